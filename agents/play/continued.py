"""Goes on with recorded episodes instead of asking for the same answers again.

An agent whose answers depend on nothing but what it is shown gives the same ones in the stopping and in the forced
rollout, up to its stop. The second rollout takes those from the records of the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ivt_agents.vlm.codec import as_actions
from ivt_env.episodes import Episode, Step
from ivt_env.rollouts import Agent


class Continued:
    """Says what ``episodes`` hold, one after the other in waves, and asks ``agent`` where they have ended."""

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


_FURTHER = ("confidence", "stop_probability")


def _answer(step: Step) -> tuple[Any, bool, dict[str, Any]]:
    stated = {name: getattr(step, name) for name in ("text", "tokens", "parse_failure", *_FURTHER)}
    return step.proposal, step.stop, {name: value for name, value in stated.items() if value is not None}
