"""What an agent's completions cost: counted from what it was asked and what it said, never estimated.

A prompt that several completions share counts once, and of a conversation that goes on only what is new. Padding and
the time between model calls are not counted. Of a served model the tokens are those that its server counts, and the
patches are not known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ivt_agents.play.chat import Answer
from ivt_env.rollouts import Agent

if TYPE_CHECKING:
    from ivt_agents.vlm.turns import Turn


@dataclass(frozen=True, slots=True)
class Cost:
    """Sums over any number of answers."""

    answers: int = 0
    """Completions sampled."""
    images: int = 0
    """Images that went through the vision tower."""
    patches: int = 0
    """Their patches: what a larger image has more of."""
    prefilled: int = 0
    """Prompt tokens run through the language model, those that stand for images included."""
    sampled: int = 0
    """Tokens sampled, those that end an answer included."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def per_episode(self, episodes: int) -> dict[str, float]:
        """Means over ``episodes`` episodes, by field."""
        return {name: total / episodes for name, total in asdict(self).items()}


def cost_of(
    turns: Sequence[Turn | Answer | None], before: Mapping[int, Turn] | None = None, reuse: bool = True
) -> Cost:
    """What one ``act`` cost; turns of one prompt object shared its prefill, None is where nothing was said.

    ``before`` is what was said last at each place, for conversations that go on (with ``reuse``: at their cache).
    """
    served = [turn for turn in turns if isinstance(turn, Answer)]
    said = [(place, turn) for place, turn in enumerate(turns) if turn is not None and not isinstance(turn, Answer)]
    images: dict[int, Any] = {}
    prefilled = 0
    for place, prompt in {id(turn.prompt): (place, turn.prompt) for place, turn in said}.values():
        # The images of the current step come last; any before them were shown earlier.
        shown, known = prompt.images, 0
        if reuse and len(shown) > len(prompt.windows):
            if before is None or place not in before:
                raise ValueError(
                    f"turn {place} goes on with a conversation whose last turn is not known: count every act from"
                    " the beginning of the episodes"
                )
            shown, last = shown[-len(prompt.windows) :], before[place]
            # The token that was sampled last has not been run through the model: this prefill begins with it.
            known = len(last.prompt.ids) + len(last.completion) - 1
        images |= {id(image): image for image in shown}
        prefilled += len(prompt.ids) - known
    return Cost(
        answers=len(said) + len(served),
        images=len(images) + sum(answer.images for answer in served),
        patches=sum(int(np.prod(image.grid)) for image in images.values()),
        prefilled=prefilled + sum(answer.prompt_tokens for answer in served),
        sampled=sum(len(turn.completion) for _, turn in said) + sum(answer.completion_tokens for answer in served),
    )


class Metered:
    """An agent, unchanged in what it does, whose costs are added up while it plays."""

    def __init__(self, agent: Agent) -> None:
        """Wrap any agent; where it wraps another (its ``agent``), that one's answers are counted."""
        self.agent = agent
        self.shown = getattr(agent, "shown", {})
        speaker: Any = agent
        while speaker is not None and not hasattr(speaker, "turns"):
            speaker = getattr(speaker, "agent", None)
        self._speaker, self._counted = speaker, getattr(speaker, "turns", None)
        self._before: dict[int, Turn] = {}
        self.cost: Cost | None = None if speaker is None else Cost()
        """So far; None for an agent that does not show what it asks: a scripted one, or a class of your own
        without ``turns`` (see ``VLMPolicy.turns``)."""

    def act(self, observations: Mapping[str, Any]) -> Mapping[str, Any]:
        """The agent's own actions (N)."""
        actions = self.agent.act(observations)
        # An agent makes a new list each time; a wrapped one that was not asked still shows its last.
        if self._speaker is not None and self.cost is not None and self._speaker.turns is not self._counted:
            self._counted = turns = self._speaker.turns
            self.cost += cost_of(turns, self._before, self._speaker.reuse)
            said = ((k, turn) for k, turn in enumerate(turns) if turn is not None)
            self._before = {k: turn for k, turn in said if not isinstance(turn, Answer)}
        return actions

    def reset(self, mask: NDArray[np.bool_]) -> None:
        """New episodes where ``mask`` (N,) is true; what was counted stays."""
        self.agent.reset(mask)
