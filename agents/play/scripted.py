"""Agents without a model (baselines, an upper bound), a rule for stopping, and one that goes on with recorded episodes.

All are batched, ignore environments whose episode is over, and decide from the observation alone, except
``OracleAgent``, which reads the target box.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ivt_agents.vlm.codec import as_actions
from ivt_env import boxes
from ivt_env.episodes import Episode, Step
from ivt_env.rollouts import Agent
from ivt_env.vector_env import GroundingVectorEnv

Actions = dict[str, Any]

_GRID = 1000
"""Random boxes have their edges on this many steps a side, so that no box is empty in float32."""
_THINNEST = 1e-3
"""The oracle's noise never makes a box thinner than this, relative to the image."""
_FURTHER = ("confidence", "stop_probability")
"""What recorded answers may state beside text, tokens and whether they could be read."""


class _Drawing:
    """An agent with a random stream for each episode, in the order in which episodes begin.

    So its choices in episode k depend on its seed and k, and not on how many environments are played at once.
    """

    def __init__(self, seed: int) -> None:
        if seed < 0:
            raise ValueError(f"seed {seed}: give an integer of at least 0")
        self._seed, self._begun = seed, 0
        self._streams: list[np.random.Generator] = []

    def reset(self, mask: NDArray[np.bool_]) -> None:
        """New episodes, and streams, where ``mask`` (N,) is true."""
        if len(mask) != len(self._streams):
            mask = np.ones(len(mask), dtype=bool)
            self._streams = [np.random.default_rng()] * len(mask)
        for i in np.flatnonzero(mask):
            self._streams[i] = np.random.default_rng([self._seed, self._begun])
            self._begun += 1

    def _streams_of(self, rows: NDArray[np.intp]) -> list[np.random.Generator]:
        if not self._streams:
            raise RuntimeError("no episodes yet; call the agent's reset() with a mask of ones")
        return [self._streams[i] for i in rows]


def no_actions(count: int) -> Actions:
    """Zeros: ``box`` (N, 4) float32 and ``stop`` (N,) int64."""
    return {"box": np.zeros((count, 4), dtype=np.float32), "stop": np.zeros(count, dtype=np.int64)}


class RandomAgent(_Drawing):
    """Draws from all boxes with equal chance, and from the second step on sometimes stops."""

    def __init__(self, seed: int = 0, stop_probability: float = 0.25) -> None:
        """``seed`` decides every draw; ``stop_probability`` is that of each step but the first."""
        if not 0 <= stop_probability <= 1:
            raise ValueError(f"stop_probability {stop_probability}: give a number from 0 to 1")
        super().__init__(seed)
        self.stop_probability = stop_probability

    def act(self, observations: Mapping[str, Any]) -> Actions:
        """A box (N, 4) and a stop (N,) for each environment."""
        rows = np.flatnonzero(observations["active"])
        actions = no_actions(len(observations["active"]))
        draws = np.array([stream.random(5) for stream in self._streams_of(rows)]).reshape(-1, 5)  # (M, 5)
        # Two different grid lines on each axis: the second is 1.._GRID lines further, round the end.
        first = np.floor(draws[:, :2] * (_GRID + 1))  # (M, 2)
        second = (first + 1 + np.floor(draws[:, 2:4] * _GRID)) % (_GRID + 1)
        edges = np.concatenate([np.minimum(first, second), np.maximum(first, second)], axis=1)  # (M, 4)
        actions["box"][rows] = edges / _GRID
        later = np.asarray(observations["step"])[rows] > 0
        actions["stop"][rows] = later & (draws[:, 4] < self.stop_probability)
        return actions


class CentreAgent:
    """Proposes a box around the centre, then stops: what is worth nothing."""

    def __init__(self, side: float = 0.5) -> None:
        """``side`` of the box is relative to the image's width and height."""
        if not 0 < side <= 1:
            raise ValueError(f"side {side}: give a number above 0 and at most 1")
        self._box = np.array([0.5 - side / 2] * 2 + [0.5 + side / 2] * 2, dtype=np.float32)

    def act(self, observations: Mapping[str, Any]) -> Actions:
        """A box (N, 4) and a stop (N,) for each environment."""
        active = np.asarray(observations["active"])
        actions = no_actions(len(active))
        actions["box"][active] = self._box
        actions["stop"][active] = np.asarray(observations["step"])[active] > 0
        return actions

    def reset(self, mask: NDArray[np.bool_]) -> None:
        """Nothing to forget."""


class OracleAgent(_Drawing):
    """Proposes the target with less and less noise, then stops: an upper bound.

    It takes the target from the environment, which an agent that is to be measured may not do.
    """

    def __init__(
        self, env: GroundingVectorEnv, noise: float = 0.1, shrink: float = 0.5, proposals: int = 2, seed: int = 0
    ) -> None:
        """Take the targets from the samples of ``env``.

        ``noise`` is the standard deviation of each edge at the first step, relative to the target's width (left, right)
        or height (top, bottom); every further step multiplies it by ``shrink``. It stops after ``proposals`` boxes.
        """
        if not (np.isfinite(noise) and noise >= 0 and np.isfinite(shrink) and shrink >= 0):
            raise ValueError(f"noise {noise}, shrink {shrink}: give finite numbers of at least 0")
        if proposals < 1:
            raise ValueError(f"proposals {proposals}: give an integer of at least 1")
        super().__init__(seed)
        self._env, self.noise, self.shrink, self.proposals = env, noise, shrink, proposals

    def act(self, observations: Mapping[str, Any]) -> Actions:
        """A box (N, 4) and a stop (N,) for each environment."""
        rows = np.flatnonzero(observations["active"])
        actions = no_actions(len(observations["active"]))
        samples = self._env.samples
        targets = np.array([boxes.visible_part(samples[i].box) for i in rows]).reshape(-1, 4)  # (M, 4)
        steps = np.asarray(observations["step"])[rows]
        draws = np.array([s.standard_normal(4) for s in self._streams_of(rows)]).reshape(-1, 4)
        sizes = np.tile(targets[:, 2:] - targets[:, :2], 2)  # width, height, width, height: (M, 4)
        spread = self.noise * self.shrink ** steps.astype(float)
        actions["box"][rows] = _usable(targets + draws * sizes * spread[:, None], targets)
        actions["stop"][rows] = steps >= self.proposals
        return actions


def _usable(noisy: NDArray[np.float64], targets: NDArray[np.float64]) -> NDArray[np.float64]:
    """Boxes (M, 4) in order and inside the image; an axis that noise left empty takes the target's."""
    clipped = boxes.clip(noisy)
    low, high = np.minimum(clipped[:, :2], clipped[:, 2:]), np.maximum(clipped[:, :2], clipped[:, 2:])
    ordered = np.concatenate([low, high], axis=1)
    empty = np.tile(high - low < _THINNEST, 2)
    return np.where(empty, targets, ordered)


class StopAfter:
    """Another agent, stopped after ``count`` proposals. It may stop earlier of its own accord."""

    def __init__(self, agent: Agent, count: int) -> None:
        """``count`` proposals of ``agent``, refused ones included; 0 keeps the box that the episode began with."""
        if count < 0:
            raise ValueError(f"count {count}: give an integer of at least 0")
        self.agent, self.count = agent, count
        self.shown = getattr(agent, "shown", {})

    def act(self, observations: Mapping[str, Any]) -> Mapping[str, Any]:
        """The wrapped agent's actions (N), stopped where it has had its proposals.

        The wrapped agent is not asked about those environments: a model need not answer for nothing.
        """
        active = np.asarray(observations["active"])
        due = active & (np.asarray(observations["step"]) >= self.count)  # (N,)
        asked = active & ~due
        if not asked.any():
            return no_actions(len(active)) | {"stop": due.astype(np.int64)}
        actions = dict(self.agent.act({**observations, "active": asked}))
        actions["stop"] = np.where(due, 1, actions["stop"]).astype(np.int64)
        if "text" in actions:
            actions["text"] = ["" if d else text for d, text in zip(due, actions["text"], strict=True)]
        if "parse_failure" in actions:
            actions["parse_failure"] = np.asarray(actions["parse_failure"]) & ~due
        return actions

    def reset(self, mask: NDArray[np.bool_]) -> None:
        """New episodes where ``mask`` (N,) is true."""
        self.agent.reset(mask)


class Continued:
    """Says what ``episodes`` hold, one after the other in waves, and asks ``agent`` where they have ended.

    An agent whose answers depend on nothing but what it is shown gives the same ones in the stopping and in the forced
    rollout, up to its stop. The second rollout takes those from the records of the first.
    """

    def __init__(self, agent: Agent, episodes: Sequence[Episode], num_envs: int) -> None:
        """``episodes`` are those of ``agent`` on the samples to be played, in their order."""
        self.agent, self._left, self._num_envs = agent, list(episodes), num_envs
        self._wave: list[Episode] = []
        self.shown = getattr(agent, "shown", {})

    def act(self, observations: Mapping[str, Any]) -> dict[str, Any]:
        """The recorded or the agent's actions (N); see ``ivt_env.rollouts.Agent``."""
        active, steps = np.asarray(observations["active"]), np.asarray(observations["step"])
        said = {}
        for row in np.flatnonzero(active).tolist():
            if steps[row] < len(self._wave[row].steps):
                said[row] = _answer(self._wave[row].steps[steps[row]])
        asked = active.copy()
        asked[list(said)] = False
        if not asked.any():
            return as_actions(len(active), said, *_FURTHER)
        actions = dict(self.agent.act({**observations, "active": asked}))
        recorded = as_actions(len(active), said, *(name for name in _FURTHER if name in actions))
        for row in said:
            for name, values in recorded.items():
                actions[name][row] = values[row]
        return actions

    def reset(self, mask: NDArray[np.bool_]) -> None:
        """The next wave of episodes begins, in every environment."""
        self._wave, self._left = self._left[: self._num_envs], self._left[self._num_envs :]
        self.agent.reset(mask)


def _answer(step: Step) -> tuple[Any, bool, dict[str, Any]]:
    stated = {name: getattr(step, name) for name in ("text", "tokens", "parse_failure", *_FURTHER)}
    return step.proposal, step.stop, {name: value for name, value in stated.items() if value is not None}
