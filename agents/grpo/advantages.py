"""Advantages of the steps of a group of episodes. Pure functions over NumPy arrays, no model.

Shapes: G episodes of one sample, at most T actions each. ``rewards`` (G, T) holds 0 behind the end
of an episode, ``taken`` (G, T) is true where an action was made, ``states`` (G, T) numbers what was
observed before the action.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

ADVANTAGES = ("return_to_go", "trajectory", "episode_and_step")
SCALES = ("none", "group", "batch")


def return_to_go(rewards: Array, discount: float = 1.0) -> Array:
    """Sum of the rewards from each step to the end, a later one weighed by ``discount`` to the number of steps between.

    At 1 IoU gains telescope, and what is maximised is the final IoU. At 0 each action is worth its own gain: where what
    follows spoils the box whatever it was, a return says nothing about the action, its own gain does.
    """
    out = np.array(rewards, dtype=np.float64)
    for t in range(out.shape[-1] - 2, -1, -1):
        out[..., t] += discount * out[..., t + 1]
    return out


def leave_one_out(values: Array) -> Array:
    """For each member of the group (axis 0) the mean of the others; 0 for a group of one."""
    group = values.shape[0]
    if group < 2:
        return np.zeros_like(values)
    return (values.sum(axis=0, keepdims=True) - values) / (group - 1)


def per_step_advantages(rewards: Array, taken: Mask, discount: float = 1.0) -> Array:
    """Return-to-go minus the leave-one-out group mean of it, ended episodes counted as 0; shape (G, T).

    The baseline of an episode's step never depends on that episode, so the estimator is unbiased
    although the policy itself chooses when to stop. Normalising per step *before* summing is not:
    it compares only those who went on (measured in the tests).
    """
    to_go = np.where(taken, return_to_go(rewards, discount), 0.0)
    return np.where(taken, to_go - leave_one_out(to_go), 0.0)


def trajectory_advantages(rewards: Array, taken: Mask) -> Array:
    """Total return minus the leave-one-out group mean, the same for every step taken; shape (G, T).

    Plain GRPO (arXiv 2402.03300) without division by the standard deviation.
    """
    total = rewards.sum(axis=-1)
    return np.where(taken, (total - leave_one_out(total))[:, None], 0.0)


def same_state_advantages(rewards: Array, taken: Mask, states: NDArray[np.int64]) -> Array:
    """Return-to-go minus its mean over the *other* members in the same state at the same step; (G, T).

    The step index belongs to the state, because the horizon is fixed: the same box with one action
    left is worth another amount than with two. A member that is alone in its state gets 0, as it
    does in GiGPO.
    """
    to_go = return_to_go(rewards)
    out = np.zeros_like(to_go)
    for t in range(rewards.shape[1]):
        for state in np.unique(states[taken[:, t], t]):
            here = np.flatnonzero(taken[:, t] & (states[:, t] == state))
            if len(here) > 1:
                out[here, t] = to_go[here, t] - leave_one_out(to_go[here, t])
    return out


def episode_and_step_advantages(rewards: Array, taken: Mask, states: NDArray[np.int64], omega: float = 1.0) -> Array:
    """Trajectory advantage plus ``omega`` times the same-state advantage; shape (G, T).

    After GiGPO (arXiv 2505.10978), with leave-one-out means and no division by standard deviations.
    The anchor of a step group is *sample, step index and observation* (image and current box). All
    members share it at step 0; later they share it only where they hold exactly the same box.

    It is biased in the weight of the steps, not in their signs: in expectation step t's gradient is
    multiplied by 1 + omega * P(another member is in the same state), which is 1 + omega at step 0 and
    close to 1 behind it, the less the more members have stopped. So first proposals are learned
    faster than refinements, and stops by a factor that depends on how often others stop (measured in
    the tests). ``per_step_advantages`` has no such factor.
    """
    return trajectory_advantages(rewards, taken) + omega * same_state_advantages(rewards, taken, states)


def advantages(
    kind: str, rewards: Array, taken: Mask, states: NDArray[np.int64], omega: float = 1.0, discount: float = 1.0
) -> Array:
    """The advantages of one group, (G, T), by name.

    ``states`` and ``omega`` serve ``episode_and_step`` only, ``discount`` serves ``return_to_go`` only.
    """
    if kind == "return_to_go":
        return per_step_advantages(rewards, taken, discount)
    if kind == "trajectory":
        return trajectory_advantages(rewards, taken)
    if kind == "episode_and_step":
        return episode_and_step_advantages(rewards, taken, states, omega)
    raise ValueError(f"advantage {kind!r}: choose one of {', '.join(ADVANTAGES)}")


def spread(returns: Array, floor: float) -> float:
    """Sample standard deviation of returns, two passes in float64, and never less than ``floor``.

    A floor, not an added epsilon: IoU is continuous, so a group may differ by 1e-6 and still not be
    a zero-variance group; a divisor of 1e-6 would make that difference as large as a real one.

    Args:
        returns: total returns of the episodes of a group (scale ``group``) or of all groups of all
            processes (scale ``batch``). One divisor for all steps: one per step would weigh the
            steps of an episode unequally.
        floor: lower bound, in units of reward.
    """
    values = np.asarray(returns, dtype=np.float64).ravel()
    if len(values) < 2:
        return floor
    deviation = values - values.mean()
    return max(float(np.sqrt((deviation**2).sum() / (len(values) - 1))), floor)


def zero_variance(rewards: Array, tolerance: float = 1e-6) -> bool:
    """Whether all members earned the same return at every step: such a group teaches nothing."""
    to_go = return_to_go(rewards)
    return bool((to_go.max(axis=0) - to_go.min(axis=0) <= tolerance).all())
