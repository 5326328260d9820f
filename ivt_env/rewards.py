"""Potentials and costs: one ``RewardConfig`` serves training and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from ivt_env import boxes

T = TypeVar("T")

POTENTIALS: dict[str, Callable[[ArrayLike, ArrayLike], Any]] = {
    "iou": boxes.iou,
    # Squared IoU as in Perception-R1: the last few pixels count for more.
    "iou_squared": lambda a, b: boxes.iou(a, b) ** 2,
    # GIoU moved to [0, 1], so that "no box" (0) is never better than a box that misses.
    "giou": lambda a, b: (boxes.giou(a, b) + 1) / 2,
    "hit": lambda a, b: boxes.hit(a, b).astype(float),
    # 1 in the target, and less the further the centre of the box is away from it.
    "distance": lambda a, b: 1 - np.minimum(boxes.miss(a, b), 1),
    "hit_distance": lambda a, b: (boxes.hit(a, b) + 1 - np.minimum(boxes.miss(a, b), 1)) / 2,
}
POINTING = ("hit", "distance", "hit_distance")
"""Potentials that look at the centre of a box alone, as a click is scored."""


def from_options(kind: type[T], name: str, options: Mapping[str, Any] | T | None) -> T:
    """A dataclass from a JSON-able keyword of ``gym.make`` called ``name``; None gives the defaults."""
    if options is None or isinstance(options, kind):
        return options or kind()
    if not isinstance(options, Mapping):
        raise ValueError(f"{name} {options!r}: give a dict of options")
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(options) - known):
        raise ValueError(f"unknown {name} option {unknown[0]!r}: choose from {', '.join(sorted(known))}")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in options.items()})


@dataclass(frozen=True, slots=True)
class RewardConfig:
    """What a step is worth.

    With the defaults a step earns the gain in IoU, so an episode's rewards add up to its final IoU
    and nothing can be won by a bad first box (gamma = 1; the gains telescope).
    """

    kind: str = "gain"
    """``gain``: potential(new) - potential(old) at every step. ``final``: the potential of the last box,
    paid once when the episode ends (the paper's outcome reward)."""
    potential: str = "iou"
    """``iou``, ``iou_squared`` or ``giou``; or for pointing ``hit`` (1 where the centre of the box lies in the target),
    ``distance`` (of the centre, which leads there) or ``hit_distance`` (the mean of both)."""
    step_cost: float = 0.0
    """Subtracted at every action that is not a stop."""
    invalid_penalty: float = 0.0
    """Subtracted when a proposal is not a usable box."""
    wrong_stop_penalty: float = 0.0
    """Subtracted when the agent stops on a box whose IoU is below 0.5 (for pointing: whose centre misses). Without it
    a policy that is unsure learns to stop at once: stopping costs nothing, looking on can only lose."""

    def __post_init__(self) -> None:
        """Refuse unknown names and negative costs."""
        if self.kind not in ("gain", "final"):
            raise ValueError(f"reward kind {self.kind!r}: choose gain or final")
        if self.potential not in POTENTIALS:
            raise ValueError(f"potential {self.potential!r}: choose one of {', '.join(POTENTIALS)}")
        for name in ("step_cost", "invalid_penalty", "wrong_stop_penalty"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not np.isfinite(value) or value < 0:
                raise ValueError(f"{name} is {value!r}: give a number >= 0 (it is subtracted)")

    def phi(self, box: ArrayLike | None, target: ArrayLike) -> float:
        """Potential of a box; 0 when there is none."""
        return 0.0 if box is None else float(POTENTIALS[self.potential](box, target))
