"""Plays a policy on a split, and sums up what came of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ivt_env.data.sample import DataError, Dataset
from ivt_env.episodes import Episode
from ivt_env.rollouts import Agent, first_samples, make_vector_env, rollout
from ivt_env.text_actions import STOP_TEXT
from ivt_env.vector_env import GroundingVectorEnv

log = logging.getLogger(__name__)

MAX_UNUSABLE = 0.9
"""Where more than this share of the first answers cannot be used, there is nothing to learn from."""
_LOUD = 0.5
"""A larger share than this is reported even if it is not an error."""


class Stages:
    """Vector environments of one command, one for each way in which a box is shown."""

    def __init__(self, make: Callable[..., GroundingVectorEnv], view: str | None) -> None:
        """``make(view=..., ...)`` makes one; ``view`` is that of every agent, None: what each asks for."""
        self._make, self._view = make, view
        self._made: dict[str, GroundingVectorEnv] = {}

    def of(self, agent: Any) -> GroundingVectorEnv:
        """The environment that ``agent`` is played in; None: that of agents that do not say."""
        shown: dict[str, Any] = dict(getattr(agent, "shown", {}))
        if self._view is not None:
            shown["view"] = self._view
        key = repr(sorted(shown.items()))
        if key not in self._made:
            self._made[key] = self._make(**shown)
        return self._made[key]


def samples_to_compare(dataset: Dataset, wanted: int) -> range:
    """``first_samples``; DataError where they show one image, so that no interval over images could be drawn."""
    indices = first_samples(dataset, wanted)
    if not any(dataset[index].image_id != dataset[0].image_id for index in indices):
        raise DataError(
            f"{dataset.name}/{dataset.split}: the first {len(indices)} samples show one image, and intervals are drawn"
            " over images; give a larger --samples, or another --split"
        )
    return indices


def check_answers(unusable: int, answers: int, examples: Sequence[str], most: float, stop: bool = True) -> None:
    """Say loudly what a policy writes of whose answers most are ``unusable`` (neither a stop nor a box that is taken).

    More than the share ``most`` is an error, which shows three ``examples`` and what was expected; ``stop``: whether
    a stop is an answer.
    """
    if unusable <= min(most, _LOUD) * answers:
        return
    shown = " | ".join(repr(text if len(text) <= 120 else f"{text[:117]}...") for text in examples[:3])
    found = (
        f"{unusable} of the first {answers} answers ({unusable / answers:.0%}) cannot be used. Expected:"
        f' {{"bbox_2d": [x1, y1, x2, y2]}}{f" or {STOP_TEXT}" if stop else ""}, and the end of the turn within the'
        f" token limit. Written: {shown}"
    )
    if unusable <= most * answers:
        log.warning("%s", found)
        return
    raise ValueError(
        f"{found}. Give a model that was taught to answer so (its policy.json holds the prompt, which may be missing),"
        f" or go on all the same with --max-unusable 1 (now {most:g})"
    )


def check_episodes(episodes: Sequence[Episode], most: float = 1.0, stop: bool = True) -> None:
    """``check_answers`` of played episodes."""
    steps = [step for episode in episodes for step in episode.steps]
    unusable = [step.text for step in steps if step.parse_failure or step.invalid is not None]
    check_answers(len(unusable), len(steps), unusable, most, stop)


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
    max_unusable: float | None = 1.0,
    **env_kwargs: Any,
) -> list[Episode]:
    """Episodes of ``agent`` on the given samples, in their order.

    ``max_unusable`` is for ``check_answers``; None: whatever the agent writes is taken without a word.
    """
    env = make_vector_env(env_id, min(num_envs, len(indices)), split=split, **env_kwargs)
    try:
        said: dict[str, Any] = {"agent_name": agent_name, "on_progress": on_progress}
        episodes = rollout(env, agent, len(indices), seed, indices=indices, ignore_stop=ignore_stop, **said)
        if max_unusable is not None:
            check_episodes(episodes, max_unusable, stop=not ignore_stop and getattr(agent, "may_stop", True))
        return episodes
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
