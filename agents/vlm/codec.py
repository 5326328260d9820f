"""Boxes and stops as a model's text, and back.

The coordinate frame of a model family is declared, never guessed from the numbers. Sources: Qwen's cookbooks and
processors.

- ``relative_1000`` (Qwen3-VL, Qwen2-VL): integers 0..1000 relative to the image.
- ``resized_pixels`` (Qwen2.5-VL): integer pixels of the image as the processor resized it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ivt_env.text_actions import STOP_TEXT, ParsedAction, from_thousandths, parse_action, to_thousandths

__all__ = ["FRAMES", "STOP_TEXT", "BoxCodec", "ParsedAction", "parse_action"]

FRAMES = {"qwen3_vl": "relative_1000", "qwen2_vl": "relative_1000", "qwen2_5_vl": "resized_pixels"}
"""Coordinate frame by ``model_type``."""


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
            return to_thousandths(box)
        height, width = resized
        limits = np.array([width, height, width, height])
        return [int(v) for v in np.clip(np.round(np.asarray(box) * limits), 0, limits - 1)]

    def decode(self, numbers: Sequence[float], resized: Sequence[int]) -> list[float]:
        """Four numbers of the model as a relative xyxy box; not checked, not repaired."""
        if self.frame == "relative_1000":
            return from_thousandths(numbers)
        height, width = resized
        return [v / size for v, size in zip(numbers, (width, height, width, height), strict=True)]

    def box_text(self, box: Sequence[float], resized: Sequence[int]) -> str:
        """``[x1, y1, x2, y2]`` in the model's frame."""
        return "[" + ", ".join(map(str, self.encode(box, resized))) + "]"

    def action_text(self, box: Sequence[float], resized: Sequence[int], image: int = 1) -> str:
        """``{"bbox_2d": [x1, y1, x2, y2]}`` in the model's frame; from the second image on with its number."""
        where = "" if image == 1 else f'"picture": {image}, '
        return f'{{{where}"bbox_2d": {self.box_text(box, resized)}}}'
