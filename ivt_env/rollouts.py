"""Plays episodes with any agent and records them.

``play`` is the one loop, in training, in evaluation and in the checks for authors, so that a stop, an answer without a
box and an episode that is over mean one thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from ivt_env.data.sample import Dataset
from ivt_env.episodes import Box, Episode, Step
from ivt_env.game import Game
from ivt_env.grounding import Observation
from ivt_env.vector_env import GroundingVectorEnv

T = TypeVar("T")

_STATED = {"stop_probability": float, "confidence": float, "tokens": int, "seconds": float}
"""What an agent may state of each answer."""


class Agent(Protocol):
    """What plays an episode: any object with these two methods."""

    def act(self, observations: Mapping[str, Any]) -> Mapping[str, Any]:
        """Actions for a batch of N environments.

        Args:
            observations: as the environment gives them, with a leading axis of N, and ``active``
                (bool, (N,)): where it is false the episode is over and the action is ignored.

        Returns:
            ``box`` (N, 4) float and ``stop`` (N,) int. An agent with more to say may add ``text``
            (N str), ``parse_failure`` (N bool), ``stop_probability`` and ``confidence`` (N floats), ``tokens``
            (N ints) and ``seconds`` (N floats).
        """
        ...

    def reset(self, mask: NDArray[np.bool_]) -> None:
        """New episodes begin where ``mask`` (N,) is true; agents with memory forget there."""
        ...


@dataclass(frozen=True, slots=True)
class Moment:
    """One action in each of N environments, and what came of it."""

    active: NDArray[np.bool_]
    """Whose episode was running. Only these rows mean anything. (N,)"""
    actions: Mapping[str, Any]
    """What the agent said."""
    boxes: NDArray[np.float32]
    """What was put forward. (N, 4)"""
    stops: NDArray[np.bool_]
    """Who stopped. (N,)"""
    unparsable: NDArray[np.bool_]
    """Whose text held no usable action. (N,)"""
    invalid: list[str | None]
    """Why the environment refused a box, length N."""
    rewards: NDArray[np.float64]
    """(N,)"""
    ended: NDArray[np.bool_]
    """Whose episode is over now. (N,)"""

    def said(self, i: int) -> dict[str, Any]:
        """What the agent of environment ``i`` said beside its action, as fields of a ``Step``."""
        stated = {key: (self.actions.get(key), kind) for key, kind in _STATED.items()}
        return {key: None if values is None else kind(values[i]) for key, (values, kind) in stated.items()} | {
            "text": str(self.actions["text"][i]) if "text" in self.actions else "",
            "parse_failure": bool(self.unparsable[i]),
        }


def play(
    env: GroundingVectorEnv,
    agent: Agent,
    *,
    seed: int | Sequence[int] | None = None,
    options: dict[str, Any] | None = None,
    active: NDArray[np.bool_] | None = None,
    ignore_stop: bool = False,
) -> Iterator[Moment]:
    """Begin an episode in each environment at once, and play them to their end as moments are asked for.

    Args:
        env: a vector environment with ``autoreset_mode="Disabled"``.
        agent: is reset, and asked for every action.
        seed: of ``env.reset``.
        options: of ``env.reset``.
        active: where to play, (N,); None: everywhere.
        ignore_stop: a stop is replaced by proposing the current box again (while there is none, by no box); only
            what the agent said keeps it.
    """
    if env.autoreset_mode != AutoresetMode.DISABLED:
        raise ValueError('episodes are played in a vector environment made with autoreset_mode="Disabled"')
    observations, _ = env.reset(seed=seed, options=options)
    everyone = np.ones(env.num_envs, dtype=bool)
    agent.reset(everyone.copy())
    return _moments(env, agent, observations, everyone if active is None else active, ignore_stop)


def _moments(
    env: GroundingVectorEnv, agent: Agent, observations: Observation, active: NDArray[np.bool_], ignore_stop: bool
) -> Iterator[Moment]:
    none = np.zeros(env.num_envs, dtype=bool)
    while active.any():
        actions = agent.act({**observations, "active": active.copy()})
        stops = np.asarray(actions["stop"]).astype(bool)
        boxes = np.asarray(actions["box"], dtype=np.float32)
        if ignore_stop:
            boxes, stops = np.where(stops[:, None], observations["box"], boxes), none
        observations, rewards, terminated, truncated, infos = env.step({"box": boxes, "stop": stops})
        refused = infos.get("_invalid", none)
        yield Moment(
            active,
            actions,
            boxes,
            stops,
            np.asarray(actions.get("parse_failure", none), dtype=bool),
            [str(infos["invalid"][i]) if refused[i] else None for i in range(env.num_envs)],
            rewards,
            active & (terminated | truncated),
        )
        active = active & ~(terminated | truncated)


def waves(items: Sequence[T], size: int) -> Iterator[tuple[list[T], NDArray[np.bool_]]]:
    """``size`` items at a time, and which of them count: the last wave is filled up with its first item."""
    for start in range(0, len(items), size):
        wave = list(items[start : start + size])
        yield wave + [wave[0]] * (size - len(wave)), np.arange(size) < len(wave)


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
    on_episode: Callable[[Episode], None] | None = None,
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
        ignore_stop: forced refinement, as in ``play``. Gives the columns that need every step.
        agent_name: written into the records.
        on_progress: called with the number of episodes finished in each wave.
        on_episode: called with each episode as soon as it is over.

    Returns:
        ``episodes`` records, in order.
    """
    for name, given in (("indices", indices), ("initial boxes", initial_boxes)):
        if given is not None and len(given) != episodes:
            raise ValueError(f"{len(given)} {name} for {episodes} episodes")
    records: list[Episode] = []
    for rows, active in waves(range(episodes), env.num_envs):
        options: dict[str, Any] = {}
        if indices is not None:
            options["index"] = [int(indices[r]) for r in rows]
        if initial_boxes is not None:
            options["initial_box"] = [initial_boxes[r] for r in rows]
        seeds = None if seed is None else [seed + r for r in rows]
        moments = play(env, agent, seed=seeds, options=options, active=active, ignore_stop=ignore_stop)
        games, count = env.games, int(active.sum())
        live = [begin_record(games[i], agent_name, None if seeds is None else seeds[i]) for i in range(count)]
        for moment in moments:
            for i in np.flatnonzero(moment.active).tolist():
                stop, box = bool(moment.stops[i]), moment.boxes[i]
                record_action(live[i], games[i], box, stop, moment.invalid[i], **moment.said(i))
                if moment.ended[i] and on_episode is not None:
                    on_episode(live[i])
        records += live
        if on_progress is not None:
            on_progress(count)
    return records


def begin_record(game: Game, agent: str, seed: int | None) -> Episode:
    """The record of a game that begins."""
    sample = game.sample
    names = ("sample_id", "image_id", "dataset", "split", "expression", "size")
    return Episode(
        **{name: getattr(sample, name) for name in names},
        target=box_tuple(sample.box),
        steps=[],
        initial_box=None if game.box is None else box_tuple(game.box),
        agent=agent,
        seed=seed,
        siblings=[box_tuple(b) for b in sample.siblings],
    )


def record_action(
    episode: Episode, game: Game, proposal: NDArray[np.float32], stop: bool, invalid: str | None, **said: Any
) -> None:
    """Add the action that ``game`` has just taken to its record.

    A ``proposal`` (4,) that is not finite is none; ``invalid`` says why the box was refused; ``said`` are other
    fields of ``Step``.
    """
    usable = not stop and bool(np.isfinite(proposal).all())
    episode.steps.append(
        Step(
            proposal=box_tuple(proposal) if usable else None,
            stop=stop,
            box=None if game.box is None else box_tuple(game.box),
            iou=game.iou,
            reward=float(game.last_reward),
            invalid=invalid,
            **said,
        )
    )
    episode.terminated, episode.truncated = game.terminated, game.truncated


def first_samples(dataset: Dataset, wanted: int) -> range:
    """The first ``wanted`` samples of a split, all of it where it has fewer: what every command measures on."""
    return range(min(wanted, len(dataset)))


def make_vector_env(env_id: str, num_envs: int, **kwargs: Any) -> GroundingVectorEnv:
    """The custom vector environment of a registered id, as ``rollout`` needs it."""
    kwargs |= {"vectorization_mode": "vector_entry_point", "autoreset_mode": "Disabled"}
    unwrapped = gym.make_vec(env_id, num_envs=num_envs, **kwargs).unwrapped
    assert isinstance(unwrapped, GroundingVectorEnv), f"{env_id} is not a grounding environment"
    return unwrapped


def box_tuple(box: Any) -> Box:
    """A box as a record holds it."""
    x1, y1, x2, y2 = (float(v) for v in box)
    return (x1, y1, x2, y2)
