"""``ocr``: finds what an expression quotes by reading the screen, and looks closer at what it cannot read.

A pretrained reader of text (RapidOCR) and a few rules; no training, and no look at the target. It keeps every line
that it has read: what was read from the whole image, shrunk to the canvas, is a guess, and what was read in a close-up
takes its place. It proposes the line that fits best, and stops when that was read in a close-up.
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

from ivt_agents.play.scripted import no_actions
from ivt_agents.vlm.prompts import WHOLE, Box, images_of
from ivt_env.game import iou_of_two

SURE, PLAUSIBLE = 0.85, 0.45
"""Likeness from which a text counts as the one that was asked for, and from which a line is worth a look."""
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
    """A line of text, or some words of one, where it is on the image, and whether it was read in a close-up."""

    text: str
    box: Box
    sharp: bool


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
        self._memories: dict[int, _Memory] = {}
        self._read: dict[bytes, list[tuple[str, Box]]] = {}

    def reset(self, mask: NDArray[np.bool_]) -> None:
        """New episodes where ``mask`` (N,) is true."""
        self._memories |= {i: _Memory() for i in np.flatnonzero(mask).tolist()}

    def act(self, observations: Mapping[str, Any]) -> dict[str, Any]:
        """A box (N, 4) and a stop (N,) for each environment, and what was decided in words."""
        active = observations["active"]
        actions = no_actions(len(active)) | {"text": [""] * len(active)}
        for i in np.flatnonzero(active).tolist():
            box, actions["text"][i] = self._answer(observations, i)
            actions["box"][i], actions["stop"][i] = box or 0.0, box is None
        return actions

    def _answer(self, observations: Mapping[str, Any], i: int) -> tuple[Box | None, str]:
        """The next box of environment ``i``, None to stop; and why."""
        memory, current = self._memories[i], tuple(map(float, observations["box"][i]))
        began = any(current)
        if began and "window" not in observations:
            return None, "No close-up is shown, so I keep my first answer."
        self._look(*images_of(observations, i)[-1], memory)
        found = sorted(candidates(str(observations["expression"][i]), memory.lines), key=lambda each: -each.fit)
        best = found[0] if found else None
        if int(observations["step"][i]) < self.looks and not (best and best.fit >= SURE and best.unread is None):
            for each in found:
                if each.fit >= PLAUSIBLE and each.unread and each.unread.box not in memory.looked:
                    memory.looked.add(each.unread.box)
                    return each.unread.box, f"This may read {each.unread.text!r}; I look closer."
            if (there := _unseen(memory, best)) is not None:
                return there, "Nothing that I read fits; I look elsewhere."
        if best is None:
            return None if began else WHOLE, "I can read nothing."
        if began and iou_of_two(current, best.box) > 0.9:
            return None, f"This reads {best.lines[0].text!r}; I keep it."
        return best.box, f"{best.lines[0].text!r} fits best."

    def _look(self, image: NDArray[np.uint8], window: Box, memory: _Memory) -> None:
        """Read what is shown, in place of what was read there before."""
        x1, y1, x2, y2 = window
        closer = (x2 - x1) < 1
        if closer:
            memory.windows.append(window)
        kept = [line for line in memory.lines if line.sharp or not _inside(line.box, window)]
        for text, (a, b, c, d) in self._text(np.ascontiguousarray(image)):
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
            size, lines = np.array(image.shape[1::-1]), []
            for corners, text in zip(result.boxes if result.txts else (), result.txts or (), strict=True):
                low, high = np.clip(corners.min(axis=0), 0, None), np.minimum(corners.max(axis=0), size)
                if (high > low).all():
                    a, b, c, d = (np.concatenate([low, high]) / np.tile(size, 2)).tolist()
                    lines.append((text, (a, b, c, d)))
            self._read[key] = lines
        return self._read[key]


def _unseen(memory: _Memory, best: Candidate | None) -> Box | None:
    """A small box in the middle of the window with the most unread lines, those of the best one's row first."""
    row = best.lines[1].box[1] if best and len(best.lines) > 1 and best.lines[1].sharp else -1.0
    unread = [line.box for line in memory.lines if not line.sharp]
    grid = ((x / GRID, y / GRID, (x + 1) / GRID, (y + 1) / GRID) for y, x in product(range(GRID), repeat=2))
    left = [window for window in grid if not any(_inside(window, seen) for seen in memory.windows)]
    if not left:
        return None
    x1, y1, x2, y2 = max(left, key=lambda w: (w[1] <= row < w[3], sum(_inside(box, w) for box in unread)))
    x, y, side = (x1 + x2) / 2, (y1 + y2) / 2, 0.25 / GRID
    return x - side, y - side, x + side, y + side


def candidates(expression: str, lines: list[Line]) -> list[Candidate]:
    """The boxes that an expression may mean, given the lines that were read."""
    plain = "", re.sub(r"^the ", "", expression).replace("field", "").strip(), None, None
    parsed = _EXPRESSION.search(expression)
    noun, name, row, heading = parsed.groups() if parsed else plain
    names = _like(name, lines)
    if row is None and heading is None:
        return [Candidate(fit, _target(line.box, noun), (line,)) for fit, line in names]
    found = []
    for (fit, line), (other, anchor) in product(names[:40], _like(row or heading or "", lines)[:6]):
        x1, y1, x2, y2 = line.box
        middle, weight, box = (anchor.box[1] + anchor.box[3]) / 2, 1.0, _target(line.box, noun)
        if row is not None and noun == "cell" and y2 <= middle:  # the name is that of the column
            # As far as the name of the next column.
            level = (each.box[0] for each in lines if each.box[1] <= (y1 + y2) / 2 <= each.box[3])
            box = x1, anchor.box[1], min((x for x in level if x > x2), default=max(x2, x1 + 0.03)), anchor.box[3]
        elif row is not None and noun != "cell":
            off = abs((y1 + y2) / 2 - middle) / max(anchor.box[3] - anchor.box[1], 1e-6)
            weight = 1.0 if off < 0.8 else 0.3
        elif row is None and (y1 + y2) / 2 > middle:
            weight = 1 - min((y1 - anchor.box[3]) + 0.3 * abs(x1 - anchor.box[0]), 0.9)
        else:
            continue
        found.append(Candidate(fit * other * weight, box, (line, anchor)))
    return found


def _like(name: str, lines: list[Line]) -> list[tuple[float, Line]]:
    """Lines, or words of them, that may read ``name``, the likeliest first."""
    found = []
    for line in lines:
        fit, start, end = _likeness(name, line.text)
        if fit > 0.3:
            x1, y1, x2, y2 = line.box
            step = (x2 - x1) / max(len(line.text), 1)
            found.append((fit, Line(line.text[start:end], (x1 + start * step, y1, x1 + end * step, y2), line.sharp)))
    return sorted(found, key=lambda each: -each[0])


@lru_cache(maxsize=1 << 16)
def _likeness(name: str, text: str) -> tuple[float, int, int]:
    """How like ``name`` the text or some words of it are, from 0 to 1, and which letters these are."""
    wanted, count = _plain(name), len(name.split())
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    best = (0.0, 0, len(text))
    for first, (start, _) in enumerate(spans):
        for _, end in spans[first + max(count - 2, 0) : first + count + 1]:
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
    params = {"Global.log_level": "error", "Global.use_cls": False, "Global.max_side_len": 8000}
    params |= {f"EngineConfig.onnxruntime.{kind}_op_num_threads": threads for kind in ("intra", "inter")}
    return RapidOCR(params=params)
