"""Rollouts for GRPO: groups of episodes in the vector environment, with every turn kept as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ivt_agents.training.run import Stopwatch
from ivt_agents.vlm.policy import VLMPolicy
from ivt_agents.vlm.turns import Turn
from ivt_env.rollouts import play
from ivt_env.vector_env import GroundingVectorEnv


@dataclass(slots=True)
class Groups:
    """P groups of G episodes of at most T actions, played by one policy."""

    turns: list[list[Turn]]
    """For each of the P * G episodes, group after group, its turns in order."""
    rewards: NDArray[np.float64]
    """(P, G, T); 0 behind the end."""
    taken: NDArray[np.bool_]
    """(P, G, T)"""
    ious: NDArray[np.float64]
    """IoU of the current box after each action, the last one repeated. (P, G, T)"""
    stopped: NDArray[np.bool_]
    """(P, G)"""
    parse_failures: int
    unusable: list[str] = field(default_factory=list)
    """Raw texts of answers without a box or stop that the environment takes."""


def collect(
    env: GroundingVectorEnv,
    policy: VLMPolicy,
    indices: Sequence[int],
    group_size: int,
    watch: Stopwatch | None = None,
    *,
    format_bonus: float = 0.0,
    require_format: bool = False,
) -> Groups:
    """Play ``group_size`` episodes of each sample to their end.

    All members of a group start alike: same image, expression and initial box; they differ by the
    policy's sampling alone. ``env`` has ``len(indices) * group_size`` environments, autoreset disabled.
    ``format_bonus`` is added to the last reward of an episode all of whose answers were usable; with
    ``require_format`` an episode with an unusable one earns nothing.
    """
    watch, count = watch or Stopwatch(), len(indices) * group_size
    if env.num_envs != count:
        raise ValueError(f"{env.num_envs} environments for {len(indices)} groups of {group_size}")
    rewards, ious = np.zeros((2, count, env.max_steps))
    taken = np.zeros((count, env.max_steps), dtype=bool)
    turns: list[list[Turn]] = [[] for _ in range(count)]
    unusable: list[str] = []
    failures, usable = 0, np.ones(count, dtype=bool)
    options = {"index": [int(i) for i in indices for _ in range(group_size)]}
    for step, moment in enumerate(play(env, _Timed(policy, watch), seed=0, options=options)):
        active = moment.active
        rewards[active, step], taken[:, step] = moment.rewards[active], active
        failures += int(moment.unparsable[active].sum())
        refused = active & (moment.unparsable | np.array([why is not None for why in moment.invalid]))
        unusable += [moment.said(int(i))["text"] for i in np.flatnonzero(refused)]
        usable &= ~refused
        rewards[moment.ended & usable, step] += format_bonus
        for i in np.flatnonzero(active):
            turn = policy.turns[i]
            assert turn is not None
            turns[i].append(turn)
        ious[:, step:] = np.array([game.iou for game in env.games])[:, None]
    if require_format:
        rewards[~usable] = 0.0
    policy.reset(np.ones(count, dtype=bool))  # conversations are over; their caches would stay for the update
    watch.lap("rollout_environment")
    shape = (len(indices), group_size, env.max_steps)
    stopped = np.array([game.terminated for game in env.games]).reshape(shape[:2])
    return Groups(turns, rewards.reshape(shape), taken.reshape(shape), ious.reshape(shape), stopped, failures, unusable)


class _Timed:
    """The policy, with the time that it takes told apart from the environment's."""

    def __init__(self, policy: VLMPolicy, watch: Stopwatch) -> None:
        self.policy, self.watch, self.reset = policy, watch, policy.reset

    def act(self, observations: Mapping[str, Any]) -> dict[str, Any]:
        self.watch.lap("rollout_environment")
        actions = self.policy.act(observations)
        self.watch.lap("rollout_model")
        return actions
