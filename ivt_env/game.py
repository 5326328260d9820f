"""The rules of one episode, shared by the single and the vector environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ivt_env import boxes
from ivt_env.data.sample import DataError, Sample
from ivt_env.expression_space import MAX_EXPRESSION
from ivt_env.rewards import POINTING, RewardConfig

MAX_ELONGATION = 100
"""Longer side of an image divided by the shorter: of a longer one a canvas shows nothing, and the processors of
vision-language models refuse 200."""
GOOD = 0.5
"""IoU from which on a box counts as right, as in Acc@0.5."""


def unplayable(sample: Sample) -> str | None:
    """Why no environment plays a sample, with what to do; None for one that can be played."""
    height, width = sample.size
    if len(sample.expression) > MAX_EXPRESSION:
        why = f"expression of {len(sample.expression)} letters; at most {MAX_EXPRESSION} can be played: shorten it"
    elif max(height, width) > MAX_ELONGATION * min(height, width):
        why = f"image of {width} x {height} pixels; one side can be at most {MAX_ELONGATION} times the other: cut it up"
    else:
        return None
    return f"{why}, or leave the row out"


class Game:
    """One episode: a sample, the current box, and what each action is worth."""

    def __init__(
        self, sample: Sample, reward: RewardConfig, max_steps: int, initial_box: ArrayLike | None = None
    ) -> None:
        """Begin; DataError for a sample that cannot be played, ValueError for an ``initial_box`` that is no box."""
        if why := unplayable(sample):
            raise DataError(f"{sample.dataset}/{sample.split} {sample.sample_id}: {why}")
        self.box = None if initial_box is None else _float32(initial_box)
        if self.box is not None and (why := boxes.invalid_reason(self.box)):
            raise ValueError(f"initial_box {np.asarray(initial_box).tolist()}: {why}")
        self.earlier: list[NDArray[np.float32]] = []
        """The boxes that were current before this one, in their order."""
        self.sample = sample
        self.reward_config = reward
        self.max_steps = max_steps
        self.step_count = 0
        self.terminated = self.truncated = False
        self.last_reward = 0.0
        self.iou, self.phi = self._worth()
        self.best_iou = self.iou

    @classmethod
    def with_history(cls, sample: Sample, boxes_so_far: Sequence[ArrayLike]) -> Game:
        """A game in which these boxes were proposed, the last of which is current; it has one action left."""
        game = cls(sample, RewardConfig(), len(boxes_so_far) + 1, boxes_so_far[-1] if len(boxes_so_far) else None)
        game.earlier = [_float32(box) for box in boxes_so_far[:-1]]
        game.step_count = len(boxes_so_far)
        return game

    @property
    def hit(self) -> bool:
        """Whether the centre of the current box lies in the target."""
        return self.box is not None and bool(boxes.hit(self.box, self.sample.box))

    @property
    def over(self) -> bool:
        """Whether the episode has ended."""
        return self.terminated or self.truncated

    def act(self, box: ArrayLike, stop: bool) -> tuple[float, str | None]:
        """Apply one action, a ``box`` (4,) or a stop. Gives the reward, and why the box was refused."""
        if self.over:
            raise RuntimeError("the episode is over; call reset()")
        config, before, why, reward = self.reward_config, self.phi, None, 0.0
        if stop:
            self.terminated = True
            right = self.hit if config.potential in POINTING else self.iou >= GOOD
            reward -= 0.0 if right else config.wrong_stop_penalty
        else:
            self.step_count += 1
            reward -= config.step_cost
            proposal = _float32(box)
            why = boxes.invalid_reason(proposal)
            if why is None:
                if self.box is not None:
                    self.earlier.append(self.box)
                self.box = proposal
                self.iou, self.phi = self._worth()
                self.best_iou = max(self.best_iou, self.iou)
            else:
                reward -= config.invalid_penalty
            self.truncated = self.step_count >= self.max_steps
        if config.kind == "gain":
            reward += self.phi - before
        elif self.over:
            reward += self.phi
        self.last_reward = reward
        return reward, why

    def _worth(self) -> tuple[float, float]:
        """IoU and potential of the current box; both 0 without one."""
        if self.box is None:
            return 0.0, 0.0
        iou = iou_of_two(self.box.tolist(), self.sample.box)
        config = self.reward_config
        return iou, iou if config.potential == "iou" else config.phi(self.box, self.sample.box)

    def info(self, invalid: str | None = None) -> dict[str, Any]:
        """For scoring and logging, never for acting: it contains the target box."""
        info: dict[str, Any] = {
            "iou": self.iou,
            "best_iou": self.best_iou,
            "hit": self.hit,
            "sample_id": self.sample.sample_id,
            "dataset": self.sample.dataset,
            "target": np.array(self.sample.box, dtype=np.float32),
        }
        if invalid is not None:
            info["invalid"] = invalid
        return info


def iou_of_two(a: Sequence[float], b: Sequence[float]) -> float:
    """``boxes.iou`` of two single boxes, bit for bit, on plain floats in a twentieth of the time."""
    ax1, ay1, ax2, ay2 = a
    bx1, by1, bx2, by2 = b
    width, height = min(ax2, bx2) - max(ax1, bx1), min(ay2, by2) - max(ay1, by1)
    intersection = max(width, 0.0) * max(height, 0.0)
    area_a = max(ax2 - ax1, 0.0) * max(ay2 - ay1, 0.0)
    area_b = max(bx2 - bx1, 0.0) * max(by2 - by1, 0.0)
    union = area_a + area_b - intersection
    return float(intersection / union) if union > 0 else 0.0


def _float32(box: ArrayLike) -> NDArray[np.float32]:
    """A copy in the action space's precision: the box that is checked is the one kept and scored."""
    if isinstance(box, np.ndarray) and box.dtype == np.float32:
        return box.copy()
    with np.errstate(over="ignore"):  # inf is refused with a reason
        return np.array(box, dtype=np.float32)
