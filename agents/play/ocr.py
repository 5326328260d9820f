"""``ocr``: finds what an expression quotes by reading the screen, and looks closer at what it cannot read.

A pretrained reader of text (RapidOCR) and a few rules; no training, and no look at the target. It keeps every line
that it has read. What was read from the whole image, shrunk to the canvas, is a guess; what was read in a close-up
takes its place. It proposes the line that fits best, and stops when that was read in a close-up. So it proves what a
second look is worth: the close-up holds the pixels that the first look did not show.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import lru_cache
from hashlib import blake2b
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ivt_env.game import iou_of_two

Box = tuple[float, float, float, float]

SURE = 0.85
"""Likeness from which a text counts as the one that was asked for."""
PLAUSIBLE = 0.45
"""Likeness below which a line is not worth a look."""
GRID = 4
"""Windows a side when nothing plausible was read: the whole image in close-ups of a quarter of the side."""
_EXPRESSION = re.compile(
    r'(?:the )?(?P<noun>[a-z ]*?) ?"(?P<name>[^"]+)"'
    r'(?: in the row of "(?P<row>[^"]+)"| under the heading "(?P<heading>[^"]+)")?'
)
_BESIDE = {"checkbox": "left", "radio button": "left", "switch": "left", "field": "below", "list": "below"}
"""Where the part that one clicks lies, seen from its label."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of text, or some words of one, and where it was read."""

    text: str
    box: Box
    """Relative to the image."""
    sharp: bool
    """Read in a close-up."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A box that may be meant, how well it fits, and the lines that say so."""

    fit: float
    box: Box
    lines: tuple[Line, ...]

    @property
    def unread(self) -> Line | None:
        """The first line that was not read well enough to be sure."""
        return next((line for line in self.lines if not line.sharp), None)


@dataclass(slots=True)
class _Memory:
    """What is known in one episode."""

    lines: list[Line] = field(default_factory=list)
    windows: list[Box] = field(default_factory=list)
    looked: set[Box] = field(default_factory=set)


class OCRAgent:
    """See the module."""

    shown: Mapping[str, Any] = {"view": "closeup", "closeup": {"square": True}}
    """What an environment shows it where nothing else is said."""

    def __init__(self, looks: int = 5, threads: int = 1) -> None:
        """``looks``: how often it may look closer before it answers (0: one shot); ``threads`` of the reader."""
        if looks < 0 or threads < 1:
            raise ValueError(f"looks {looks}, threads {threads}: give looks from 0 and threads from 1")
        self.looks = looks
        self._reader = _reader(threads)
        self._memories: list[_Memory] = []
        self._read: dict[bytes, list[tuple[str, Box]]] = {}

    def reset(self, mask: NDArray[np.bool_]) -> None:
        """New episodes where ``mask`` (N,) is true."""
        if len(mask) != len(self._memories):
            self._memories = [_Memory() for _ in mask]
        for i in np.flatnonzero(mask):
            self._memories[i] = _Memory()

    def act(self, observations: Mapping[str, Any]) -> dict[str, Any]:
        """A box (N, 4) and a stop (N,) for each environment, and what was decided in words."""
        n = len(observations["active"])
        actions: dict[str, Any] = {
            "box": np.zeros((n, 4), dtype=np.float32), "stop": np.zeros(n, dtype=np.int64), "text": [""] * n,
        }  # fmt: skip
        for i in np.flatnonzero(observations["active"]):
            box, actions["text"][i] = self._answer({k: v[i] for k, v in observations.items()}, self._memories[i])
            actions["stop"][i] = box is None
            if box is not None:
                actions["box"][i] = box
        return actions

    def _answer(self, seen: Mapping[str, Any], memory: _Memory) -> tuple[Box | None, str]:
        """The next box, None to stop; and why."""
        current = tuple(map(float, seen["box"]))
        began = any(current)
        if began and "window" not in seen:
            return None, "No close-up is shown, so I keep my first answer."
        self._look(seen, memory)
        found = candidates(str(seen["expression"]), memory.lines)
        best = max(found, key=lambda each: each.fit, default=None)
        if int(seen["step"]) < self.looks and not (best and best.fit >= SURE and best.unread is None):
            for each in sorted(found, key=lambda each: -each.fit):
                if each.fit >= PLAUSIBLE and each.unread and each.unread.box not in memory.looked:
                    memory.looked.add(each.unread.box)
                    return each.unread.box, f"This may read {each.unread.text!r}; I look closer."
            if (there := _unseen(memory, best)) is not None:
                return there, "Nothing that I read fits; I look elsewhere."
        if best is None:
            return (None, "I can read nothing.") if began else ((0.0, 0.0, 1.0, 1.0), "I can read nothing.")
        if began and iou_of_two(current, best.box) > 0.9:
            return None, f"This reads {best.lines[0].text!r}; I keep it."
        return best.box, f"{best.lines[0].text!r} fits best."

    def _look(self, seen: Mapping[str, Any], memory: _Memory) -> None:
        """Read what is shown, in place of what was read there before."""
        key = "closeup" if "closeup" in seen and any(seen["box"]) else "image"
        height, width = seen["closeup_extent" if key == "closeup" else "extent"]
        shown = np.ascontiguousarray(seen[key][:height, :width])
        window = seen["window"] if "window" in seen and any(seen["box"]) else (0.0, 0.0, 1.0, 1.0)
        x1, y1, x2, y2 = map(float, window)
        closer = (x2 - x1) < 1
        if closer:
            memory.windows.append((x1, y1, x2, y2))
        kept = [line for line in memory.lines if line.sharp or not _inside(line.box, (x1, y1, x2, y2))]
        for text, (a, b, c, d) in self._text(shown):
            box = x1 + a * (x2 - x1), y1 + b * (y2 - y1), x1 + c * (x2 - x1), y1 + d * (y2 - y1)
            cut = closer and (a < 0.005 and x1 > 0 or c > 0.995 and x2 < 1)
            if not (closer and any(iou_of_two(box, line.box) > 0.5 for line in kept if line.sharp)):
                kept.append(Line(text, box, closer and not cut))
        memory.lines = kept

    def _text(self, image: NDArray[np.uint8]) -> list[tuple[str, Box]]:
        """Lines of text with boxes relative to the image; the same pixels are read once."""
        key = blake2b(image.tobytes() + repr(image.shape).encode()).digest()
        if key not in self._read:
            if len(self._read) >= 1024:
                self._read.pop(next(iter(self._read)))
            result = self._reader(image[:, :, ::-1])
            lines = []
            for corners, text in zip(
                *(() if part is None else part for part in (result.boxes, result.txts)), strict=True
            ):
                low, high = corners.min(axis=0), corners.max(axis=0)
                low, high = np.clip(low, 0, None), np.minimum(high, image.shape[1::-1])
                if (high > low).all():
                    a, b, c, d = (np.concatenate([low, high]) / np.tile(image.shape[1::-1], 2)).tolist()
                    lines.append((text, (a, b, c, d)))
            self._read[key] = lines
        return self._read[key]


def _unseen(memory: _Memory, best: Candidate | None) -> Box | None:
    """A small box in the middle of the window with the most unread lines; None where all have been seen.

    Where the row of the best candidate was read, windows along that row come first.
    """
    row = best.lines[1].box[1] if best and len(best.lines) > 1 and best.lines[1].sharp else None
    found, most = None, -1
    for line, column in product(range(GRID), repeat=2):
        window = column / GRID, line / GRID, (column + 1) / GRID, (line + 1) / GRID
        if any(_inside(window, seen) for seen in memory.windows):
            continue
        held = sum(not each.sharp and _inside(each.box, window) for each in memory.lines)
        held += 1000 if row is not None and window[1] <= row < window[3] else 0
        if held > most:
            x, y, side = (column + 0.5) / GRID, (line + 0.5) / GRID, 0.25 / GRID
            found, most = (x - side, y - side, x + side, y + side), held
    return found


def candidates(expression: str, lines: list[Line]) -> list[Candidate]:
    """The boxes that an expression may mean, given the lines that were read."""
    parsed = _EXPRESSION.search(expression)
    noun, name, row, heading = parsed.groups() if parsed else ("", expression, None, None)
    if parsed is None:
        name = re.sub(r"^the ", "", expression).replace("field", "").strip()
    names = _like(name, lines)
    if row is None and heading is None:
        return [Candidate(fit, _target(line.box, noun), (line,)) for fit, line in names]
    anchors = _like(row or heading or "", lines)[:6]
    found = []
    for (fit, line), (other, anchor) in product(names[:40], anchors):
        x1, y1, x2, y2 = line.box
        middle, size = (anchor.box[1] + anchor.box[3]) / 2, anchor.box[3] - anchor.box[1]
        if row is not None and noun == "cell":  # the name is that of the column
            if y2 <= middle:
                # As far as the name of the next column.
                level = (each.box[0] for each in lines if each.box[1] <= (y1 + y2) / 2 <= each.box[3])
                box = x1, anchor.box[1], min((x for x in level if x > x2), default=max(x2, x1 + 0.03)), anchor.box[3]
                found.append(Candidate(fit * other, box, (line, anchor)))
        elif row is not None:
            off = abs((y1 + y2) / 2 - middle) / max(size, 1e-6)
            found.append(Candidate(fit * other * (1 if off < 0.8 else 0.3), _target(line.box, noun), (line, anchor)))
        elif (y1 + y2) / 2 > middle:
            distance = (y1 - anchor.box[3]) + 0.3 * abs(x1 - anchor.box[0])
            found.append(Candidate(fit * other * (1 - min(distance, 0.9)), _target(line.box, noun), (line, anchor)))
    return found


def _like(name: str, lines: list[Line]) -> list[tuple[float, Line]]:
    """Lines, or words of them, that may read ``name``, the likeliest first."""
    found = []
    for line in lines:
        fit, start, end = _likeness(name, line.text)
        if fit > 0.3:
            x1, y1, x2, y2 = line.box
            step = (x2 - x1) / max(len(line.text), 1)
            words = line.text[start:end]
            found.append((fit, Line(words, (x1 + start * step, y1, x1 + end * step, y2), line.sharp)))
    return sorted(found, key=lambda each: -each[0])


@lru_cache(maxsize=1 << 16)
def _likeness(name: str, text: str) -> tuple[float, int, int]:
    """How like ``name`` the text or some words of it are, from 0 to 1, and which letters these are."""
    wanted = _plain(name)
    spans = [(match.start(), match.end()) for match in re.finditer(r"\S+", text)]
    count = len(name.split())
    best = (0.0, 0, len(text))
    for first in range(len(spans)):
        for last in range(first + max(count - 2, 0), min(first + count + 1, len(spans))):
            start, end = spans[first][0], spans[last][1]
            matcher = SequenceMatcher(None, wanted, _plain(text[start:end]), autojunk=False)
            if matcher.quick_ratio() > best[0] and (ratio := matcher.ratio()) > best[0]:
                best = ratio, start, end
    # Words out of a longer line are less likely to be a link or a button of their own.
    whole = len(wanted) / max(len(_plain(text)), 1)
    return best[0] * (1 if whole > 0.8 else 0.95), best[1], best[2]


def _plain(text: str) -> str:
    return "".join(letter for letter in text.casefold() if letter.isalnum()) or text.strip()


def _target(box: Box, noun: str) -> Box:
    """What is clicked: the text itself, or what stands beside a label."""
    x1, y1, x2, y2 = box
    height, side = y2 - y1, _BESIDE.get(noun)
    if side == "left":
        width = height * 9 / 16
        return max(x1 - 1.6 * width, 0.0), y1, max(x1 - 0.4 * width, 1e-3), y2
    if side == "below" and y2 + 1.2 * height < 1:
        return x1, y2, x2, y2 + 1.2 * height
    return box


def _inside(inner: Box, outer: Box) -> bool:
    """Whether the middle of a box lies in another."""
    x, y = (inner[0] + inner[2]) / 2, (inner[1] + inner[3]) / 2
    return outer[0] <= x <= outer[2] and outer[1] <= y <= outer[3]


def _reader(threads: int) -> Any:
    """RapidOCR as it comes (it enlarges small images to find lines), but it never shrinks an image."""
    try:
        from rapidocr import RapidOCR  # type: ignore[import-not-found]
    except ImportError as error:
        raise ValueError(f"agent 'ocr' needs RapidOCR, ivt-env[ocr]: {error}") from error
    engine = "EngineConfig.onnxruntime."
    return RapidOCR(
        params={
            f"{engine}intra_op_num_threads": threads, f"{engine}inter_op_num_threads": threads,
            "Global.log_level": "error", "Global.use_cls": False, "Global.max_side_len": 8000,
        }
    )  # fmt: skip
