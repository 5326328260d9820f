"""What a grounding environment is: its options, spaces, episodes, observations and frames.

``GroundingEnv`` steps one episode and ``GroundingVectorEnv`` many. Everything else they have is here, once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from ivt_env import boxes, rendering
from ivt_env.batches import Layer, RecycledMemory, repaint
from ivt_env.data import load_dataset
from ivt_env.data.sample import Dataset, ImageArray, Sample
from ivt_env.expression_space import Expression
from ivt_env.game import Game
from ivt_env.rendering import Overlay, Sheet, Surroundings
from ivt_env.rewards import RewardConfig, from_options

Observation = dict[str, Any]
Action = Mapping[str, Any]

Loaded = tuple[ImageArray, Sheet]
"""A sample's image at full resolution, and on the canvas."""
Closeup = tuple[ImageArray, tuple[int, int], NDArray[np.float32]]

VIEWS = ("overlay", "closeup", "both")
_GAME = ("step_count", "terminated", "truncated", "last_reward", "best_iou")
"""What a state holds of a game, beside its sample and its boxes."""
WHOLE = np.array([0, 0, 1, 1], dtype=np.float32)
"""The window of a close-up that shows the whole image."""
DTYPES = {"box": np.float32, "step": np.int64, "extent": np.int32, "closeup_extent": np.int32}
DTYPES |= {"window": np.float32, "history": np.float32}
"""Types of the numbers in an observation."""


def observation_space(view: str, canvas: int, max_steps: int, trail: bool = False) -> spaces.Dict:
    """The observation space of one environment; see ``GroundingEnv``."""
    image = spaces.Box(0, 255, (canvas, canvas, 3), np.uint8)
    extent = spaces.Box(0, canvas, (2,), np.int32)
    relative_box = spaces.Box(0.0, 1.0, (4,), np.float32)
    parts: dict[str, spaces.Space[Any]] = {
        "image": image,
        "extent": extent,
        "expression": Expression(),
        "box": relative_box,
        "step": spaces.Discrete(max_steps + 1),
    }
    if trail:
        parts["history"] = spaces.Box(0.0, 1.0, (max_steps, 4), np.float32)
    if view != "overlay":
        parts["window"] = relative_box
    if view == "both":
        parts |= {"closeup": image, "closeup_extent": extent}
    return spaces.Dict(parts)


def action_space() -> spaces.Dict:
    """``box``: xyxy relative to the image; ``stop``: 1 ends the episode and the box is ignored."""
    return spaces.Dict({"box": spaces.Box(0.0, 1.0, (4,), np.float32), "stop": spaces.Discrete(2)})


class Screen:
    """How samples are shown."""

    def __init__(self, dataset: Dataset, view: str, canvas: int, overlay: Overlay, around: Surroundings) -> None:
        if view not in VIEWS:
            raise ValueError(f"view {view!r}: choose one of {', '.join(VIEWS)}")
        if not isinstance(canvas, int) or canvas < 16:
            raise ValueError(f"canvas {canvas!r}: give the side in pixels, an integer of at least 16")
        self.dataset, self.view, self.side, self.overlay, self.around = dataset, view, canvas, overlay, around
        self.memory = {"image": RecycledMemory(), "closeup": RecycledMemory()}
        """Memory of earlier observations. It is reused once nobody holds them or a view of them."""

    def load(self, sample: Sample) -> Loaded:
        """Decode a sample's image and place it on the canvas."""
        image = self.dataset.image(sample)
        return image, Sheet(*rendering.place_on_canvas(image, self.side), self.overlay)


class LiveEpisode:
    """An episode that is being played: its sample's number, its game, and what it looks like."""

    def __init__(self, screen: Screen, index: int, game: Game, loaded: Loaded) -> None:
        """Show ``game``, which plays sample ``index``, on ``screen``."""
        self.screen, self.index, self.game, self._loaded = screen, index, game, loaded
        self._trail: tuple[int, Loaded] = 0, loaded
        # With the box that it was made for: an episode that has ended or was refused keeps its close-up.
        self._closeup: tuple[NDArray[np.float32] | None, Closeup] | None = None

    @property
    def loaded(self) -> Loaded:
        """The sample's image at full resolution, and on the canvas with the trail, if there is one."""
        length = len(self.game.earlier)
        if self.screen.overlay.trail and self._trail[0] != length:
            image, sheet = self._loaded
            self._trail = length, (image, sheet.with_trail(self.game.earlier))
        return self._trail[1]

    def look(self) -> tuple[Observation, dict[str, Layer]]:
        """What an observation holds: the expression and the numbers, and for each image what to paint."""
        game, screen, (image, sheet) = self.game, self.screen, self.loaded
        box = game.box
        seen: Observation = {
            "expression": game.sample.expression,
            "box": boxes.NO_BOX if box is None else box,
            "step": game.step_count,
        }
        if screen.overlay.trail:
            seen["history"] = history = np.zeros((game.max_steps, 4), dtype=np.float32)
            history[: len(game.earlier)] = game.earlier or history[:0]
        layers: dict[str, Layer] = {}
        if screen.view != "closeup":
            layers["image"], seen["extent"] = (sheet.canvas, sheet, box), sheet.extent
        if screen.view != "overlay":
            if self._closeup is None or self._closeup[0] is not box:
                shown = sheet.canvas, sheet.extent, WHOLE
                if box is not None:
                    shown = rendering.closeup(image, box, screen.side, screen.overlay, screen.around)
                self._closeup = box, shown
            close, extent, seen["window"] = self._closeup[1]
            key = "image" if screen.view == "closeup" else "closeup"
            layers[key], seen["extent" if key == "image" else "closeup_extent"] = (close, None, None), extent
        return seen, layers

    def observe(self) -> Observation:
        """A fresh observation; it shares no memory with what is kept."""
        seen, layers = self.look()
        observation = {k: np.array(v, dtype=DTYPES[k])[()] if k in DTYPES else v for k, v in seen.items()}
        for key, layer in layers.items():
            observation[key] = self.screen.memory[key].array(layer[0].shape)
            repaint(observation[key], None, layer)
        return observation

    def caption(self) -> list[str]:
        """The episode in three lines."""
        game = self.game
        state = "stopped" if game.terminated else "out of steps" if game.truncated else "running"
        step = f"step {game.step_count}/{game.max_steps} ({state})"
        box = "none" if game.box is None else " ".join(f"{v:.3f}" for v in game.box)
        return [
            game.sample.expression,
            f"{step}   IoU {game.iou:.3f}   reward {round(game.last_reward, 3) + 0.0:+.3f}",
            f"box {box}   {game.sample.dataset}/{game.sample.split} {game.sample.sample_id}",
        ]

    def frame(self) -> ImageArray:
        """A captioned frame, RGB."""
        sheet, game = self.loaded[1], self.game
        return rendering.frame(sheet.canvas, sheet.extent, game.box, game.sample.box, self.caption())


class Grounding:
    """The options of both environments, checked, and how an episode begins."""

    metadata: ClassVar[dict[str, Any]]

    def __init__(
        self,
        dataset: str | Dataset = "scenes",
        split: str = "train",
        data_root: str | None = None,
        strict: bool = False,
        max_steps: int = 3,
        canvas: int = 640,
        view: str = "overlay",
        overlay: Mapping[str, Any] | Overlay | None = None,
        closeup: Mapping[str, Any] | Surroundings | None = None,
        reward: Mapping[str, Any] | RewardConfig | None = None,
        initial_box: list[float] | None = None,
        render_mode: str | None = None,
    ) -> None:
        """See ``GroundingEnv``; ValueError for an option that is not known or out of range."""
        if not isinstance(max_steps, int) or max_steps < 1:
            raise ValueError(f"max_steps {max_steps!r}: give an integer of at least 1")
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(f"render_mode {render_mode!r}: choose one of {self.metadata['render_modes']}")
        if initial_box is not None and (why := boxes.invalid_reason(initial_box)):
            raise ValueError(f"initial_box {initial_box}: {why}")
        self.dataset = load_dataset(dataset, split, data_root, strict) if isinstance(dataset, str) else dataset
        self.reward_config = from_options(RewardConfig, "reward", reward)
        drawn, around = from_options(Overlay, "overlay", overlay), from_options(Surroundings, "closeup", closeup)
        self.screen = Screen(self.dataset, view, canvas, drawn, around)
        self.max_steps, self.initial_box, self.render_mode = max_steps, initial_box, render_mode
        self.live: list[LiveEpisode] = []
        """The running episodes; none before the first ``reset``."""

    def one_observation_space(self) -> spaces.Dict:
        """The observation space of one environment."""
        return observation_space(self.screen.view, self.screen.side, self.max_steps, self.screen.overlay.trail)

    def begin(self, rng: np.random.Generator, index: Any = None, initial_box: Any = None) -> LiveEpisode:
        """A new episode with sample ``index``, or one that ``rng`` draws.

        Raises:
            ValueError: for an index outside the data set, and an ``initial_box`` that is not usable.
        """
        size = len(self.dataset)
        if index is None:
            index = int(rng.integers(size))
        elif not isinstance(index, int | np.integer) or not 0 <= index < size:
            raise ValueError(f"index {index!r}: give an integer from 0 to {size - 1}")
        start = self.initial_box if initial_box is None else initial_box
        return self.resumed(int(index), Game(self.dataset[int(index)], self.reward_config, self.max_steps, start))

    def resumed(self, index: int, game: Game) -> LiveEpisode:
        """The episode of a game that is under way."""
        return LiveEpisode(self.screen, index, game, self._load(game.sample))

    def playing(self) -> list[LiveEpisode]:
        """The running episodes; RuntimeError before the first ``reset``."""
        if not self.live:
            raise RuntimeError("no episode yet; call reset()")
        return self.live

    def _load(self, sample: Sample) -> Loaded:
        return self.screen.load(sample)

    # ---- a state: leave an environment and play on from there, here or elsewhere -------------------

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
            ValueError: unless the state is that of an environment made with the same options over the same data.
                Nothing is changed then.
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


def take_options(options: Mapping[str, Any] | None, names: tuple[str, ...]) -> list[Any]:
    """The values of reset options by name, None where not given; ValueError for an unknown one."""
    given = dict(options or {})
    values = [given.pop(name, None) for name in names]
    if given:
        raise ValueError(f"unknown reset option {sorted(given)[0]!r}: choose from {', '.join(names)}")
    return values


def _plain(box: Any) -> list[float] | None:
    return None if box is None else [float(v) for v in box]
