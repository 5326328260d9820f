"""Plays a policy on a split, and sums up what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ivt_env.episodes import Episode
from ivt_env.rollouts import Agent, make_vector_env, rollout

METRICS = ("Acc@0.5", "Acc@0.7", "Acc@0.9", "mIoU")


def play(
    agent: Agent,
    env_id: str,
    split: str,
    indices: Sequence[int],
    *,
    ignore_stop: bool = False,
    seed: int = 0,
    num_envs: int = 100,
    agent_name: str = "",
    on_progress: Callable[[int], None] | None = None,
    **env_kwargs: Any,
) -> list[Episode]:
    """Episodes of ``agent`` on the given samples, in their order."""
    env = make_vector_env(env_id, min(num_envs, len(indices)), split=split, **env_kwargs)
    try:
        return rollout(
            env,
            agent,
            len(indices),
            seed,
            indices=indices,
            ignore_stop=ignore_stop,
            agent_name=agent_name,
            on_progress=on_progress,
        )
    finally:
        agent.reset(np.ones(env.num_envs, dtype=bool))
        env.close()


def summary(episodes: Sequence[Episode]) -> Mapping[str, float]:
    """A few numbers about stopping episodes, for logs and for before-and-after tables."""
    final = np.array([e.final_iou for e in episodes])
    first = np.array([e.steps[0].iou for e in episodes])
    steps = [s for e in episodes for s in e.steps]
    return {
        "step0_iou": float(first.mean()),
        "final_iou": float(final.mean()),
        "step0_acc50": float((first >= 0.5).mean()),
        "final_acc50": float((final >= 0.5).mean()),
        "final_acc90": float((final >= 0.9).mean()),
        "stopped": float(np.mean([e.terminated for e in episodes])),
        "proposals": float(np.mean([sum(not s.stop for s in e.steps) for e in episodes])),
        "parse_failures": float(np.mean([s.parse_failure for s in steps])),
    }
