"""Plays episodes with any agent and records them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from ivt_env import boxes
from ivt_env.episodes import Box, Episode, Step
from ivt_env.vector_env import GroundingVectorEnv


class Agent(Protocol):
    """What plays an episode: any object with these two methods."""

    def act(self, observations: Mapping[str, Any]) -> Mapping[str, Any]:
        """Actions for a batch of N environments.

        Args:
            observations: as the environment gives them, with a leading axis of N, and ``active``
                (bool, (N,)): where it is false the episode is over and the action is ignored.

        Returns:
            ``box`` (N, 4) float and ``stop`` (N,) int. An agent with more to say may add ``text``
            (N str), ``parse_failure`` (N bool), ``stop_probability`` and ``confidence`` (N floats).
        """
        ...

    def reset(self, mask: NDArray[np.bool_]) -> None:
        """New episodes begin where ``mask`` (N,) is true; agents with memory forget there."""
        ...


def rollout(
    env: GroundingVectorEnv,
    agent: Agent,
    episodes: int,
    seed: int | None = None,
    *,
    indices: Sequence[int] | None = None,
    initial_boxes: Sequence[Sequence[float] | None] | None = None,
    ignore_stop: bool = False,
    agent_name: str = "",
    on_progress: Callable[[int], None] | None = None,
) -> list[Episode]:
    """Play episodes to their end and return their records.

    Args:
        env: a vector environment with ``autoreset_mode="Disabled"``; it is played in waves of
            ``env.num_envs``.
        agent: plays all environments.
        episodes: how many.
        seed: decides which samples are drawn; episode i is seeded with ``seed + i``, so the number
            of environments does not change the result.
        indices: play these samples instead, one per episode.
        initial_boxes: start boxes, one per episode (None: no box).
        ignore_stop: forced refinement: a stop is replaced by proposing the current box again, and
            the agent's wish is kept in ``stop_probability`` only. Gives the columns that need every step.
        agent_name: written into the records.
        on_progress: called with the number of episodes finished in each wave.

    Returns:
        ``episodes`` records, in order.
    """
    if env.autoreset_mode != AutoresetMode.DISABLED:
        raise ValueError('rollout() needs a vector environment made with autoreset_mode="Disabled"')
    if indices is not None and len(indices) != episodes:
        raise ValueError(f"{len(indices)} indices for {episodes} episodes")
    if initial_boxes is not None and len(initial_boxes) != episodes:
        raise ValueError(f"{len(initial_boxes)} initial boxes for {episodes} episodes")
    records: list[Episode] = []
    n = env.num_envs
    for start in range(0, episodes, n):
        wave = range(start, min(start + n, episodes))
        # The last wave may be short: its spare environments repeat the wave's first episode.
        rows = [*wave, *[start] * (n - len(wave))]
        options: dict[str, Any] = {}
        if indices is not None:
            options["index"] = [int(indices[r]) for r in rows]
        if initial_boxes is not None:
            options["initial_box"] = [initial_boxes[r] for r in rows]
        seeds = None if seed is None else [seed + r for r in rows]
        observations, _ = env.reset(seed=seeds, options=options)
        agent.reset(np.ones(n, dtype=bool))
        live = [_record(env, i, agent_name, None if seeds is None else seeds[i]) for i in range(len(wave))]
        active = np.arange(n) < len(wave)
        while active.any():
            actions = agent.act({**observations, "active": active.copy()})
            stops = np.asarray(actions["stop"]).astype(np.int64)
            proposals = np.asarray(actions["box"], dtype=np.float32)
            if ignore_stop:
                proposals = np.where(stops[:, None] == 1, observations["box"], proposals)
                stops = np.zeros_like(stops)
            observations, rewards, terminated, truncated, infos = env.step({"box": proposals, "stop": stops})
            for i in np.flatnonzero(active).tolist():
                step = _step(env, i, proposals[i], bool(stops[i]), rewards[i], infos, actions)
                live[i].steps.append(step)
                live[i].terminated, live[i].truncated = bool(terminated[i]), bool(truncated[i])
            active &= ~(terminated | truncated)
        records += live
        if on_progress is not None:
            on_progress(len(wave))
    return records


def make_vector_env(env_id: str, num_envs: int, **kwargs: Any) -> GroundingVectorEnv:
    """The custom vector environment of a registered id, as ``rollout`` needs it."""
    env = gym.make_vec(
        env_id,
        num_envs=num_envs,
        vectorization_mode="vector_entry_point",
        autoreset_mode="Disabled",
        **kwargs,
    )
    unwrapped = env.unwrapped
    assert isinstance(unwrapped, GroundingVectorEnv), f"{env_id} is not a grounding environment"
    return unwrapped


def _tuple(box: Any) -> Box:
    x1, y1, x2, y2 = (float(v) for v in box)
    return (x1, y1, x2, y2)


def _record(env: GroundingVectorEnv, i: int, agent: str, seed: int | None) -> Episode:
    sample, box = env.samples[i], env.games[i].box
    return Episode(
        sample_id=sample.sample_id,
        picture_id=sample.picture_id,
        dataset=sample.dataset,
        split=sample.split,
        expression=sample.expression,
        target=_tuple(sample.box),
        size=sample.size,
        steps=[],
        initial_box=None if box is None else _tuple(box),
        agent=agent,
        seed=seed,
        siblings=[_tuple(b) for b in sample.siblings],
    )


def _step(
    env: GroundingVectorEnv,
    i: int,
    proposal: NDArray[np.float32],
    stop: bool,
    reward: float,
    infos: Mapping[str, Any],
    actions: Mapping[str, Any],
) -> Step:
    game = env.games[i]
    said = infos["invalid"][i] if "invalid" in infos and infos["_invalid"][i] else None
    usable = not stop and bool(np.isfinite(proposal).all())
    probability, confidence = actions.get("stop_probability"), actions.get("confidence")
    return Step(
        proposal=_tuple(proposal) if usable else None,
        stop=stop,
        box=None if game.box is None or boxes.is_no_box(game.box) else _tuple(game.box),
        iou=game.iou,
        reward=float(reward),
        invalid=said,
        text=str(actions["text"][i]) if "text" in actions else "",
        parse_failure=bool(actions["parse_failure"][i]) if "parse_failure" in actions else False,
        stop_probability=None if probability is None else float(probability[i]),
        confidence=None if confidence is None else float(confidence[i]),
    )
