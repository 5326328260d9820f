"""Boxes and stops as a model's text, and back.

The coordinate frame of a model family is declared, never guessed from the numbers. Sources: Qwen's cookbooks and
processors.

- ``relative_N``: 0 to N, relative to the image: ``relative_1000`` (Qwen3-VL, Qwen2-VL), ``relative_999`` (Qwen-VL),
  ``relative_1``.
- ``resized_pixels`` (Qwen2.5-VL): integer pixels of the image as it reaches the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ivt_env import boxes
from ivt_env.text_actions import STOP_TEXT, ParsedAction, parse_action

__all__ = ["ANSWER", "FRAMES", "STOP_TEXT", "WHOLE", "Box", "BoxCodec", "ParsedAction", "as_actions", "parse_action"]

FRAMES = {"qwen3_vl": "relative_1000", "qwen2_vl": "relative_1000", "qwen2_5_vl": "resized_pixels"}
"""Coordinate frame by ``model_type``."""

ANSWER = '{"bbox_2d": [x1, y1, x2, y2]}'
"""How a box is written; another order of the four, another key and another form can be declared."""

_PLACES = ("x1", "y1", "x2", "y2")
_PLACE = re.compile(r"\b[xy][12]\b")

Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
"""The window of an image that shows everything."""


@dataclass(frozen=True, slots=True)
class BoxCodec:
    """Between relative boxes and a model's numbers."""

    frame: str = "relative_1000"
    answer: str = ANSWER
    """A JSON object with one key, or any other text, with x1, y1, x2 and y2 in it."""
    unit: int | None = field(init=False)
    """N of ``relative_N``; None for pixels."""
    key: str | None = field(init=False)
    """Of the JSON object; None for another text."""

    def __post_init__(self) -> None:
        number = re.fullmatch(r"relative_([1-9][0-9]{0,6})", self.frame)
        if number is None and self.frame != "resized_pixels":
            raise ValueError(f"coordinate frame {self.frame!r}: choose relative_1000, relative_N or resized_pixels")
        if sorted(_PLACE.findall(self.answer)) != sorted(_PLACES):
            raise ValueError(f"answer {self.answer!r}: write x1, y1, x2 and y2 once each where the numbers stand")
        json = re.fullmatch(r'\s*\{\s*"(\w+)"\s*:\s*(\[[^\[\]]*\])\s*\}\s*', self.answer)
        if json is None and self.answer.lstrip().startswith("{"):
            raise ValueError(f"answer {self.answer!r}: write a JSON object with one key, such as {ANSWER}")
        object.__setattr__(self, "unit", None if number is None else int(number[1]))
        object.__setattr__(self, "key", None if json is None else json[1])

    def encode(self, box: Sequence[float], resized: Sequence[int]) -> list[float]:
        """A relative xyxy box as four numbers, integers but for ``relative_1``.

        ``resized`` is (height, width) of the image as it reaches the model.
        """
        values = np.asarray(box, dtype=np.float64)
        if self.unit == 1:
            return [round(float(v), 3) for v in np.clip(values, 0, 1)]
        if self.unit is not None:
            return [int(v) for v in np.clip(np.round(values * self.unit), 0, self.unit)]
        height, width = resized
        limits = np.array([width, height, width, height])
        return [int(v) for v in np.clip(np.round(values * limits), 0, limits - 1)]

    def decode(self, numbers: Sequence[float], resized: Sequence[int]) -> list[float]:
        """Four numbers of the model, xyxy, as a relative box; not checked, not repaired."""
        height, width = (self.unit, self.unit) if self.unit is not None else resized
        return [v / size for v, size in zip(numbers, (width, height, width, height), strict=True)]

    def parse(self, text: str) -> ParsedAction:
        """The last action in a model's text, its numbers as xyxy in the model's frame."""
        if self.key is not None:
            action = parse_action(text, self.key)
            found = action.numbers
        else:
            number = r"\s*(-?[0-9]{1,9}(?:\.[0-9]{1,9})?)\s*"
            pattern = number.join(re.escape(part) for part in _PLACE.split(self.answer))
            last = None
            for last in re.finditer(pattern, text):  # noqa: B007
                pass
            stop = parse_action(text)
            if last is None or (stop.stop and text.rfind("stop") > last.end()):
                return stop if stop.stop else ParsedAction()
            action, found = ParsedAction(), tuple(float(v) for v in last.groups())
        if found is None:
            return action
        by_place = dict(zip(_PLACE.findall(self.answer), found, strict=True))
        return ParsedAction(numbers=tuple(by_place[place] for place in _PLACES), image=action.image)

    def box_of(
        self, action: ParsedAction, sizes: Sequence[Sequence[int]], windows: Sequence[Box]
    ) -> list[float] | None:
        """The box of an answer, relative to the whole image; None for none, or one of an image that is not there.

        ``sizes`` (height, width) and ``windows`` are those of the images of this step.
        """
        if action.numbers is None or not 1 <= action.image <= len(windows):
            return None
        window = windows[action.image - 1]
        box = self.decode(action.numbers, sizes[action.image - 1])
        return box if tuple(window) == WHOLE else [float(v) for v in boxes.out_of_window(box, window)]

    def box_text(self, box: Sequence[float], resized: Sequence[int]) -> str:
        """A box in the model's frame, as a question names it: ``[x1, y1, x2, y2]``, or as answers write it."""
        form = self.answer if self.key is None else self.answer[self.answer.index("[") : self.answer.index("]") + 1]
        numbers = dict(zip(_PLACES, self.encode(box, resized), strict=True))
        return _PLACE.sub(lambda place: str(numbers[place[0]]), form)

    def action_text(self, box: Sequence[float], resized: Sequence[int], image: int = 1) -> str:
        """``{"bbox_2d": [x1, y1, x2, y2]}`` in the model's frame; from the second image on with its number."""
        where = "" if image == 1 else f'"image": {image}, '
        return f'{{{where}"bbox_2d": {self.box_text(box, resized)}}}'


def as_actions(
    count: int, answers: Mapping[int, tuple[Sequence[float] | None, bool, dict[str, Any]]], *further: str
) -> dict[str, Any]:
    """The actions of ``count`` environments (see ``ivt_env.rollouts.Agent``) from the answers of some of them.

    An answer is its box, whether it is a stop, and what else is stated: ``text``, ``tokens`` and ``further`` numbers.
    """
    actions: dict[str, Any] = {
        "box": np.full((count, 4), np.nan, dtype=np.float32),
        "stop": np.zeros(count, dtype=np.int64),
        "text": [""] * count,
        "parse_failure": np.zeros(count, dtype=bool),
        "tokens": np.zeros(count, dtype=np.int64),
        **{name: np.zeros(count) for name in further},
    }
    for row, (box, stop, stated) in answers.items():
        actions["stop"][row], actions["parse_failure"][row] = int(stop), box is None and not stop
        if box is not None:
            actions["box"][row] = box
        for name, value in stated.items():
            actions[name][row] = value
    return actions
