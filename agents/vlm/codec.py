"""Boxes and stops as a model's text, and back.

Each model family writes coordinates in its own frame; the frame is declared, never guessed from the
size of the numbers. Sources: Qwen's cookbooks and processors.

- ``relative_1000`` (Qwen3-VL, Qwen2-VL): integers 0..1000 relative to the picture.
- ``resized_pixels`` (Qwen2.5-VL): integer pixels of the picture as the processor resized it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FRAMES = {"qwen3_vl": "relative_1000", "qwen2_vl": "relative_1000", "qwen2_5_vl": "resized_pixels"}
"""Coordinate frame by ``model_type``."""

STOP_TEXT = '{"stop": true}'


@dataclass(frozen=True, slots=True)
class BoxCodec:
    """Between relative boxes and a model's integers."""

    frame: str = "relative_1000"

    def __post_init__(self) -> None:
        """Refuse unknown frames."""
        if self.frame not in FRAMES.values():
            raise ValueError(f"coordinate frame {self.frame!r}: choose from {sorted(set(FRAMES.values()))}")

    def encode(self, box: Sequence[float], resized: Sequence[int]) -> list[int]:
        """A relative xyxy box as four integers; ``resized`` is (height, width) after the processor."""
        if self.frame == "relative_1000":
            return [int(v) for v in np.clip(np.round(np.asarray(box, dtype=np.float64) * 1000), 0, 1000)]
        height, width = resized
        limits = np.array([width, height, width, height])
        return [int(v) for v in np.clip(np.round(np.asarray(box) * limits), 0, limits - 1)]

    def decode(self, numbers: Sequence[float], resized: Sequence[int]) -> list[float]:
        """Four numbers of the model as a relative xyxy box; not checked, not repaired."""
        if self.frame == "relative_1000":
            return [v / 1000 for v in numbers]
        height, width = resized
        return [v / size for v, size in zip(numbers, (width, height, width, height), strict=True)]

    def box_text(self, box: Sequence[float], resized: Sequence[int]) -> str:
        """``[x1, y1, x2, y2]`` in the model's frame."""
        return "[" + ", ".join(map(str, self.encode(box, resized))) + "]"

    def action_text(self, box: Sequence[float], resized: Sequence[int], picture: int = 1) -> str:
        """``{"bbox_2d": [x1, y1, x2, y2]}`` in the model's frame; from the second picture on with its number."""
        where = "" if picture == 1 else f'"picture": {picture}, '
        return f'{{{where}"bbox_2d": {self.box_text(box, resized)}}}'


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
    numbers, or no object at all count as a failure.
    """
    found = _OBJECT.findall(text)
    if not found:
        return ParsedAction()
    try:
        action = json.loads(found[-1])
    except ValueError:
        return ParsedAction()
    stop, numbers, picture = action.get("stop"), action.get("bbox_2d"), action.get("picture", 1)
    if not isinstance(picture, int) or isinstance(picture, bool) or picture < 1:
        return ParsedAction()
    if stop is True and numbers is None:
        return ParsedAction(stop=True)
    if stop in (None, False) and isinstance(numbers, list) and len(numbers) == 4 and all(map(_is_number, numbers)):
        return ParsedAction(numbers=tuple(float(v) for v in numbers), picture=picture)
    return ParsedAction()


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
