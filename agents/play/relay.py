"""Two agents for one episode: one gives the first box, the other refines it.

Learning to refine changes a small policy's first boxes for the worse; a relay leaves them to the model that it was
before. It costs the memory of both and not one answer more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ivt_env.rollouts import Agent


class Relay:
    """The first agent answers while there is no box, the second as soon as there is one.

    An episode that starts from a box is the second one's from the beginning.
    """

    def __init__(self, first: Agent, then: Agent) -> None:
        """``first`` proposes where there is no current box, ``then`` refines or stops."""
        self.first, self.then = first, then
        self.view = getattr(then, "view", "overlay")
        """What the second agent was trained for. Without a box every view shows the whole image."""
        self.reuse = bool(getattr(then, "reuse", True))
        self.turns: list[Any] = []
        """What was asked and said in the last ``act``, of the two; None where neither shows it."""

    def act(self, observations: Mapping[str, Any]) -> dict[str, Any]:
        """One action per environment (N), each of the agent whose turn it is; what only one states is left out."""
        n = len(observations["box"])
        active = np.asarray(observations.get("active", np.ones(n, dtype=bool)), dtype=bool)
        shown: NDArray[np.bool_] = np.any(np.asarray(observations["box"]) != 0, axis=-1)  # (N,); all zeros: none yet
        self.turns = [None] * n
        acted: list[Mapping[str, Any]] = []
        for agent, rows in ((self.first, active & ~shown), (self.then, active & shown)):
            if not rows.any() and (acted or agent is self.first and active.any()):
                continue  # the other agent acts for all
            acted.append(agent.act({**observations, "active": rows}))
            said = getattr(agent, "turns", [None] * n)
            self.turns = [said[row] if rows[row] else turn for row, turn in enumerate(self.turns)]
        if len(acted) == 1:
            return dict(acted[0])
        opening, going_on = acted
        return {key: _pick(shown, opening[key], going_on[key]) for key in opening.keys() & going_on.keys()}

    def reset(self, mask: NDArray[np.bool_]) -> None:
        """New episodes where ``mask`` (N,) is true."""
        self.first.reset(mask)
        self.then.reset(mask)


def _pick(shown: NDArray[np.bool_], opening: Any, going_on: Any) -> Any:
    """Row by row the one or the other, (N, ...); a list of texts stays a list."""
    if isinstance(opening, list):
        return [b if late else a for late, a, b in zip(shown, opening, going_on, strict=True)]
    a, b = np.asarray(opening), np.asarray(going_on)
    return np.where(shown.reshape(-1, *[1] * (a.ndim - 1)), b, a)
