"""An action as text: optional reasoning, then one JSON object with a box or a stop.

    {"bbox_2d": [x1, y1, x2, y2]}      {"stop": true}

What the four numbers mean is the reader's business: ``THOUSANDTHS`` of the picture here, and each model
family's own frame in ``agents.vlm.codec``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

STOP_TEXT = '{"stop": true}'

THOUSANDTHS = 1000
"""The right and the bottom edge of the picture, where numbers are relative to it."""


@dataclass(frozen=True, slots=True)
class ParsedAction:
    """What a model's text asks for: a box (the model's numbers), a stop, or nothing usable."""

    numbers: tuple[float, ...] | None = None
    stop: bool = False
    picture: int = 1
    """Which of the pictures shown the numbers are relative to, from 1."""

    @property
    def failed(self) -> bool:
        """Whether the text held no usable action."""
        return self.numbers is None and not self.stop


_OBJECT = re.compile(r"\{[^{}]*\}")


def parse_action(text: str) -> ParsedAction:
    """The action in a model's text: its last JSON object, which must hold a box or a stop.

    Reasoning before it, a Markdown fence and a surrounding list are fine. A box may say which picture it
    is relative to (``"picture": 2``). Two different actions in one object, four things that are not
    numbers, or no object at all count as a failure; no text raises an error.
    """
    found = _OBJECT.findall(text)
    if not found:
        return ParsedAction()
    try:
        action = json.loads(found[-1])
    except (ValueError, RecursionError):  # thousands of nested brackets are a failure like any other
        return ParsedAction()
    stop, numbers, picture = action.get("stop"), action.get("bbox_2d"), action.get("picture", 1)
    if not isinstance(picture, int) or isinstance(picture, bool) or picture < 1:
        return ParsedAction()
    if stop is True and numbers is None:
        return ParsedAction(stop=True)
    if stop in (None, False) and isinstance(numbers, list) and len(numbers) == 4 and all(map(_is_number, numbers)):
        return ParsedAction(numbers=tuple(float(v) for v in numbers), picture=picture)
    return ParsedAction()


def to_thousandths(box: Sequence[float]) -> list[int]:
    """A relative xyxy box as four integers 0..1000."""
    return [int(v) for v in np.clip(np.round(np.asarray(box, dtype=np.float64) * THOUSANDTHS), 0, THOUSANDTHS)]


def from_thousandths(numbers: Sequence[float]) -> list[float]:
    """Four numbers in thousandths as a relative xyxy box; not checked, not repaired."""
    return [v / THOUSANDTHS for v in numbers]


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False
