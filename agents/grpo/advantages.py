"""Advantages of the steps of a group of episodes. Pure functions over NumPy arrays, no model.

Shapes: G episodes of one sample, at most T actions each. ``rewards`` (G, T) holds 0 behind the end
of an episode, ``taken`` (G, T) is true where an action was made.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


def return_to_go(rewards: Array) -> Array:
    """Sum of the rewards from each step to the end, undiscounted: IoU gains telescope at gamma = 1."""
    return np.flip(np.cumsum(np.flip(rewards, axis=-1), axis=-1), axis=-1)


def leave_one_out(values: Array) -> Array:
    """For each member of the group (axis 0) the mean of the others; 0 for a group of one."""
    group = values.shape[0]
    if group < 2:
        return np.zeros_like(values)
    return (values.sum(axis=0, keepdims=True) - values) / (group - 1)


def per_step_advantages(rewards: Array, taken: Mask) -> Array:
    """Return-to-go minus the leave-one-out group mean of it, ended episodes counted as 0; shape (G, T).

    The baseline of an episode's step never depends on that episode, so the estimator is unbiased
    although the policy itself chooses when to stop. Normalising per step *before* summing is not:
    it compares only those who went on (measured in the tests).
    """
    to_go = np.where(taken, return_to_go(rewards), 0.0)
    return np.where(taken, to_go - leave_one_out(to_go), 0.0)


def trajectory_advantages(rewards: Array, taken: Mask) -> Array:
    """Total return minus the leave-one-out group mean, the same for every step taken; shape (G, T).

    Plain GRPO (arXiv 2402.03300) without division by the standard deviation.
    """
    total = rewards.sum(axis=-1)
    return np.where(taken, (total - leave_one_out(total))[:, None], 0.0)


ADVANTAGES = {"return_to_go": per_step_advantages, "trajectory": trajectory_advantages}


def zero_variance(rewards: Array, tolerance: float = 1e-6) -> bool:
    """Whether all members earned the same return at every step: such a group teaches nothing."""
    to_go = return_to_go(rewards)
    return bool((to_go.max(axis=0) - to_go.min(axis=0) <= tolerance).all())
