"""The rules of one episode, shared by the single and the vector environment."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ivt_env import boxes
from ivt_env.data.sample import Sample
from ivt_env.rewards import RewardConfig


class Game:
    """One episode: a sample, the current box, and what each action is worth."""

    def __init__(
        self, sample: Sample, reward: RewardConfig, max_steps: int, initial_box: ArrayLike | None = None
    ) -> None:
        """Begin.

        Raises:
            ValueError: for an ``initial_box`` that is no usable box.
        """
        self.box = None if initial_box is None else _float32(initial_box)
        if self.box is not None and (why := boxes.invalid_reason(self.box)):
            raise ValueError(f"initial_box {np.asarray(initial_box).tolist()}: {why}")
        self.sample = sample
        self.reward_config = reward
        self.max_steps = max_steps
        self.step_count = 0
        self.terminated = self.truncated = False
        self.last_reward = 0.0
        self.iou = self._iou()
        self.best_iou = self.iou

    @property
    def over(self) -> bool:
        """Whether the episode has ended."""
        return self.terminated or self.truncated

    def act(self, box: ArrayLike, stop: bool) -> tuple[float, str | None]:
        """Apply one action.

        Args:
            box: (4,) xyxy relative; ignored when ``stop``.
            stop: end the episode with the box in force.

        Returns:
            The reward, and why the proposal was refused (None if it was not).
        """
        if self.over:
            raise RuntimeError("the episode is over; call reset()")
        config, before, why = self.reward_config, self.box, None
        reward = 0.0
        if stop:
            self.terminated = True
        else:
            self.step_count += 1
            reward -= config.step_cost
            proposal = _float32(box)
            why = boxes.invalid_reason(proposal)
            if why is None:
                self.box = proposal
                self.iou = self._iou()
                self.best_iou = max(self.best_iou, self.iou)
            else:
                reward -= config.invalid_penalty
            self.truncated = self.step_count >= self.max_steps
        if config.kind == "gain":
            reward += config.phi(self.box, self.sample.box) - config.phi(before, self.sample.box)
        elif self.over:
            reward += config.phi(self.box, self.sample.box)
        self.last_reward = reward
        return reward, why

    def _iou(self) -> float:
        return 0.0 if self.box is None else float(boxes.iou(self.box, self.sample.box))

    def info(self, invalid: str | None = None) -> dict[str, Any]:
        """For scoring and logging, never for acting: the target box stands in it."""
        info: dict[str, Any] = {
            "iou": self.iou,
            "best_iou": self.best_iou,
            "sample_id": self.sample.sample_id,
            "dataset": self.sample.dataset,
            "target": np.array(self.sample.box, dtype=np.float32),
        }
        if invalid is not None:
            info["invalid"] = invalid
        return info


def _float32(box: ArrayLike) -> NDArray[np.float32]:
    """A copy in the action space's precision: the box that is checked is the one kept and scored."""
    with np.errstate(over="ignore"):  # inf is refused with a reason
        return np.array(box, dtype=np.float32)
