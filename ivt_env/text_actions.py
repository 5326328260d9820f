"""An action as text: optional reasoning, then one JSON object with a box or a stop.

    {"bbox_2d": [x1, y1, x2, y2]}      {"stop": true}

What the four numbers mean is the reader's business: ``THOUSANDTHS`` of the image here, and each model
family's own frame in ``ivt_agents.vlm.codec``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

STOP_TEXT = '{"stop": true}'

THOUSANDTHS = 1000
"""The right and the bottom edge of the image, where numbers are relative to it."""


@dataclass(frozen=True, slots=True)
class ParsedAction:
    """What a model's text asks for: a box (the model's numbers), a stop, or nothing usable."""

    numbers: tuple[float, ...] | None = None
    stop: bool = False
    image: int = 1
    """Which of the images shown the numbers are relative to, from 1."""

    @property
    def failed(self) -> bool:
        """Whether the text held no usable action."""
        return self.numbers is None and not self.stop


LONGEST_ANSWER = 65_536
"""Characters of a text that are read for an action: its end, where the action stands."""


def parse_action(text: str, key: str = "bbox_2d") -> ParsedAction:
    """The action in a model's text: the last complete JSON object with a box or a stop.

    Reasoning around it, a Markdown fence, a surrounding list or object, other keys with any text in them and an
    object that is cut off do no harm. A box may say which image it is relative to (``"image": 2``). Two
    different actions in one object, four things that are not numbers, or no such object at all count as a failure;
    no text raises an error. ``key`` is that of the box.
    """
    action = _last_object(text[-LONGEST_ANSWER:], key)
    stop, numbers, image = action.get("stop"), action.get(key), action.get("image", 1)
    if not isinstance(image, int) or isinstance(image, bool) or image < 1:
        return ParsedAction()
    if stop is True and numbers is None:
        return ParsedAction(stop=True)
    if stop in (None, False) and isinstance(numbers, list) and len(numbers) == 4 and all(map(_is_number, numbers)):
        return ParsedAction(numbers=tuple(float(v) for v in numbers), image=image)
    return ParsedAction()


_MARKS = re.compile(r'\\++"?+|"|\{(?=\s*")')
"""Quotes, escaped or not, and braces that an object with a key can begin with."""

_SHALLOW = 200
"""Characters that can be passed over where the decoder gives up nesting: fewer than the levels it went down."""


def _last_object(text: str, key: str) -> dict[str, Any]:
    """The JSON object with a box or a stop that is complete last; empty if there is none.

    In linear time, however the brackets are nested: where the decoder fails, it has seen every object that it
    passed. Only what it took for the inside of a string (an odd number of quotes away) is read once more.
    """
    found: dict[str, Any] = {}

    def note(value: dict[str, Any]) -> dict[str, Any]:
        nonlocal found
        if key in value or "stop" in value:
            found = value
        return value

    decoder = json.JSONDecoder(object_hook=note, parse_int=_integer, strict=False)
    quoted, seen = 0, [0, 0]
    """Whether the number of quotes so far is odd, and up to where objects are known that begin after an even and an
    odd number of them."""
    for mark in _MARKS.finditer(text):
        start = mark.start()
        if mark[0] != "{":
            quoted ^= mark[0][-1] == '"' and len(mark[0]) % 2
        elif start >= seen[quoted]:
            try:
                seen = [decoder.raw_decode(text, start)[1]] * 2
            except json.JSONDecodeError as error:
                seen[quoted] = error.pos
            except RecursionError:
                seen[quoted] = start + _SHALLOW
    return found


def _integer(digits: str) -> int | float:
    """An integer, or infinity for one that Python would need quadratic time or an error for."""
    return int(digits) if len(digits) < 20 else float(digits)


def to_thousandths(box: Sequence[float]) -> list[int]:
    """A relative xyxy box as four integers 0..1000."""
    return [int(v) for v in np.clip(np.round(np.asarray(box, dtype=np.float64) * THOUSANDTHS), 0, THOUSANDTHS)]


def from_thousandths(numbers: Sequence[float]) -> list[float]:
    """Four numbers in thousandths as a relative xyxy box; not checked, not repaired."""
    return [v / THOUSANDTHS for v in numbers]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
