"""What every model teacher is shown and asked, and which of its answers can be used.

The teacher sees the image with the student's box (translucent red, as the student sees it) and the
target (green outline), and is told in words what geometry says is wrong, so that it cannot get left
and right wrong. Its words become the student's reasoning, so they must not name what only the
teacher sees, and they must not hold numbers: the answer's own coordinates follow them.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

import numpy as np

from ivt_agents.sft.teacher.template import critique
from ivt_env.data.sample import Dataset
from ivt_env.rendering import Overlay, draw_overlay, place_on_canvas

SYSTEM = (
    "You review boxes that a student drew around objects in images. You write short corrective "
    "remarks that the student could have written while looking at its own box."
)

QUESTION = (
    'The expression is: "{expression}".\n'
    "The student's box is the translucent red rectangle. The object that the expression means is "
    "inside the green outline, which the student cannot see.\n"
    "Measured: {measured}\n"
    "In one or two short sentences say what is wrong with the red rectangle and how it must move or "
    "change its size. Refer to what is visible. Write plain English: no numbers, no coordinates, no "
    "JSON, no lists, and never mention the green outline."
)

IMAGE_SIDE = 768
"""Images are scaled down to this many pixels on the longer side: a box's error stays visible, and cost bounded."""

MAX_REPLY_TOKENS = 120
"""Two sentences; a longer text is cut off and too long to be used anyway."""

MAX_CHARACTERS = 300
"""Two sentences at most; longer text is an essay, or no remark at all."""

_TARGET = Overlay(style="outline", colour=(0, 220, 90), width=3)
_MARKUP = re.compile(r"[{}\[\]`|]|</?\w+>|bbox", re.IGNORECASE)
_NUMBER = re.compile(r"\d+\.\d+|\d{2,}|\d+\s*(?:%|px\b|pixels?\b|percent\b)|\(\s*\d+\s*,")
_WORD = re.compile(r"[^\W\d_]{2,}")
_REFUSAL = re.compile(
    r"\b(?:i(?:'m| am) (?:sorry|unable|not able)|i (?:can(?:'t|not| not)|won't)\b|as an ai\b|sorry\b)", re.IGNORECASE
)
_HIDDEN = re.compile(r"\bgreen (?:outline|box|rectangle|frame|border|line|area|region)\b", re.IGNORECASE)


class TeacherError(ValueError):
    """A teacher that cannot be used, or that is not fit for its work. Says why, and what to do."""


@dataclass(frozen=True, slots=True, eq=False)
class TraceRequest:
    """One remark to be written."""

    image: np.ndarray
    """RGB uint8 (height, width, 3), both boxes drawn."""
    question: str

    def key(self, teacher: str) -> str:
        """Hash of teacher, prompt and image: equal keys get equal answers from the cache."""
        digest = hashlib.sha256()
        for part in (teacher, SYSTEM, self.question, str(self.image.shape)):
            digest.update(part.encode("utf-8") + b"\x00")
        digest.update(np.ascontiguousarray(self.image).tobytes())
        return digest.hexdigest()


def trace_request(dataset: Dataset, index: int, shown: tuple[float, float, float, float]) -> TraceRequest:
    """The request for a remark on the box ``shown`` on sample ``index``."""
    sample = dataset[index]
    image = dataset.image(sample)
    side = min(IMAGE_SIDE, max(image.shape[:2]))
    canvas, extent = place_on_canvas(image, side)
    draw_overlay(canvas, extent, shown, Overlay())
    draw_overlay(canvas, extent, sample.box, _TARGET)
    measured = critique(shown, sample.box, sample.siblings)
    # str.replace, not str.format: an expression may hold braces. The expression goes in last.
    question = QUESTION.replace("{measured}", measured).replace("{expression}", sample.expression)
    return TraceRequest(canvas[: extent[0], : extent[1]], question)


def tidy(text: str) -> str:
    """One line without the quotation marks that models like to put around an answer."""
    line = " ".join(text.split())
    return line[1:-1].strip() if len(line) > 1 and line[0] == line[-1] and line[0] in "\"'" else line


def unusable_reason(text: str) -> str | None:
    """Why a tidied text cannot become a trace; None: it can."""
    if not text:
        return "empty"
    if len(text) > MAX_CHARACTERS:
        return f"longer than {MAX_CHARACTERS} characters"
    for pattern, why in (
        (_MARKUP, "holds JSON or markup"),
        (_NUMBER, "holds coordinates or other numbers"),
        (_REFUSAL, "is a refusal"),
        (_HIDDEN, "names the green outline, which the student cannot see"),
    ):
        if found := pattern.search(text):
            return f"{why} ({found[0]!r})"
    return None if len(_WORD.findall(text)) >= 3 else f"holds no sentence ({text!r})"
