"""``get_state`` and ``set_state``: leave an environment and play on from there, here or elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from ivt_env.game import Game
from ivt_env.grounding import Grounding, LiveEpisode, Observation

_GAME = ("step_count", "terminated", "truncated", "last_reward", "best_iou")


class Stateful(Grounding):
    """Environments whose state can be taken and put back."""

    def get_state(self) -> dict[str, Any]:
        """All that decides how the environment goes on, later episodes included. JSON-able."""
        episodes = [
            {"index": live.index, "sample_id": live.game.sample.sample_id, "box": _plain(live.game.box)}
            | {"earlier": [_plain(box) for box in live.game.earlier]}
            | {name: getattr(live.game, name) for name in _GAME}
            for live in self.playing()
        ]
        rngs = [dict(rng.bit_generator.state) for rng in self._generators()]
        return {"made_with": self._made_with(), "rngs": rngs, "episodes": episodes}

    def set_state(self, state: Mapping[str, Any]) -> tuple[Observation, dict[str, Any]]:
        """Go on from where ``get_state`` was called; returns what ``reset`` returns.

        Behind ``gym.make`` this is a method of ``env.unwrapped``; the wrapper ``OrderEnforcing`` still wants
        one ``reset`` before the first ``step``.

        Raises:
            ValueError: for anything else than the state of an environment made with the same options over the
                same data. Nothing is changed then.
        """
        try:
            for name, value in self._made_with().items():
                if (theirs := state["made_with"].get(name)) != value:
                    raise ValueError(f"made with {name} {theirs!r}, this environment has {value!r}")
            rngs = [np.random.Generator(np.random.PCG64()) for _ in self._generators()]
            for rng, theirs in zip(rngs, state["rngs"], strict=True):
                rng.bit_generator.state = theirs
            live = [self._restored(episode) for _, episode in zip(rngs, state["episodes"], strict=True)]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            why = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"no state of an environment like this one: {why}") from error
        return self._go_on(rngs, live)

    def _restored(self, state: Mapping[str, Any]) -> LiveEpisode:
        index = state["index"]
        sample = self.dataset[index]
        if sample.sample_id != state["sample_id"]:
            raise ValueError(f"sample {index} is {sample.sample_id!r} here, it was {state['sample_id']!r}")
        game = Game(sample, self.reward_config, self.max_steps, state["box"])
        for name in _GAME:
            setattr(game, name, state[name])
        game.earlier = [np.array(box, dtype=np.float32).reshape(4) for box in state["earlier"]]
        if len(game.earlier) > self.max_steps:
            raise ValueError(f"{len(game.earlier)} earlier boxes, at most {self.max_steps} can be")
        return self.resumed(index, game)

    def _made_with(self) -> dict[str, Any]:
        """The options that decide what is seen and earned, JSON-able."""
        screen, dataset = self.screen, self.dataset
        return {
            "dataset": [dataset.name, dataset.split, len(dataset)],
            "max_steps": self.max_steps,
            "initial_box": _plain(self.initial_box),
            "reward": asdict(self.reward_config),
            "view": [screen.view, screen.side],
            "closeup": asdict(screen.around),
            "overlay": asdict(screen.overlay) | {"colour": list(screen.overlay.colour)},
        }

    def _generators(self) -> list[np.random.Generator]:
        raise NotImplementedError

    def _go_on(self, rngs: list[np.random.Generator], live: list[LiveEpisode]) -> tuple[Observation, dict[str, Any]]:
        raise NotImplementedError


def _plain(box: Any) -> list[float] | None:
    return None if box is None else [float(v) for v in box]
