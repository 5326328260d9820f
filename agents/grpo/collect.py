"""Rollouts for GRPO: groups of episodes in the vector environment, with every turn kept as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ivt_agents.training.run import Stopwatch
from ivt_agents.vlm.policy import VLMPolicy
from ivt_agents.vlm.turns import Turn
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
    """IoU of the box in force after each action, the last one repeated. (P, G, T)"""
    stopped: NDArray[np.bool_]
    """(P, G)"""
    parse_failures: int


def collect(
    env: GroundingVectorEnv,
    policy: VLMPolicy,
    indices: Sequence[int],
    group_size: int,
    watch: Stopwatch | None = None,
    *,
    may_stop: bool = True,
    format_bonus: float = 0.0,
    require_format: bool = False,
) -> Groups:
    """Play ``group_size`` episodes of each sample to their end.

    All members of a group start alike: same picture, expression and initial box; they differ by the
    policy's sampling alone.

    Args:
        env: ``len(indices) * group_size`` environments, autoreset disabled.
        policy: samples at its own temperature.
        indices: P samples of the environment's split.
        group_size: G.
        watch: gets the seconds of ``rollout_model`` and ``rollout_environment``.
        may_stop: False counts a stop as an unusable answer: it keeps the box, and the episode goes on.
        format_bonus: added to the last reward of an episode all of whose answers were usable.
        require_format: an episode with an unusable answer earns nothing.
    """
    watch = watch or Stopwatch()
    count = len(indices) * group_size
    if env.num_envs != count:
        raise ValueError(f"{env.num_envs} environments for {len(indices)} groups of {group_size}")
    observations, _ = env.reset(seed=0, options={"index": [int(i) for i in indices for _ in range(group_size)]})
    policy.reset(np.ones(count, dtype=bool))
    horizon = env.max_steps
    rewards, taken = np.zeros((count, horizon)), np.zeros((count, horizon), dtype=bool)
    ious = np.zeros((count, horizon))
    turns: list[list[Turn]] = [[] for _ in range(count)]
    active, failures, usable = np.ones(count, dtype=bool), 0, np.ones(count, dtype=bool)
    for step in range(horizon):
        watch.lap("rollout_environment")
        actions = policy.act({**observations, "active": active})
        watch.lap("rollout_model")
        stop, failed = np.asarray(actions["stop"]), np.asarray(actions["parse_failure"])
        if not may_stop:
            # The box of a stop is not a number, so the environment refuses it and keeps the one in force.
            failed = failed | (stop == 1)
            stop = np.zeros_like(stop)
        observations, reward, terminated, truncated, infos = env.step({"box": actions["box"], "stop": stop})
        rewards[active, step], taken[:, step] = reward[active], active
        failures += int(failed[active].sum())
        usable &= ~(failed | np.asarray(infos.get("_invalid", False))) | ~active
        ended = active & (terminated | truncated)
        rewards[ended & usable, step] += format_bonus
        for i in np.flatnonzero(active):
            turn = policy.turns[i]
            assert turn is not None
            turns[i].append(turn)
        ious[:, step] = [game.iou for game in env.games]
        active = active & ~(terminated | truncated)
        if not active.any():
            ious[:, step + 1 :] = ious[:, step : step + 1]
            break
    if require_format:
        rewards[~usable] = 0.0
    policy.reset(np.ones(count, dtype=bool))  # conversations are over; their caches would stay for the update
    watch.lap("rollout_environment")
    shape = (len(indices), group_size, horizon)
    stopped = np.array([game.terminated for game in env.games]).reshape(shape[:2])
    return Groups(turns, rewards.reshape(shape), taken.reshape(shape), ious.reshape(shape), stopped, failures)
