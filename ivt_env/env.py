"""The Gymnasium environment: propose a box, see it drawn, refine it or stop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from ivt_env import boxes, rendering, states
from ivt_env.data import load_dataset
from ivt_env.data.sample import Dataset, Picture, Sample
from ivt_env.expression_space import Expression
from ivt_env.game import Game
from ivt_env.rendering import Overlay, Sheet
from ivt_env.rewards import RewardConfig

Observation = dict[str, Any]
Action = Mapping[str, Any]

Loaded = tuple[Picture, Sheet]
"""A sample's picture at full resolution, and on the canvas."""
Closeup = tuple[Picture, tuple[int, int], NDArray[np.float32]]

VIEWS = ("overlay", "closeup", "both")
WHOLE = np.array([0, 0, 1, 1], dtype=np.float32)
"""The window of a close-up that shows the whole picture."""


def observation_space(view: str, canvas: int, max_steps: int) -> spaces.Dict:
    """The observation space of one environment; see ``GroundingEnv``."""
    picture = spaces.Box(0, 255, (canvas, canvas, 3), np.uint8)
    extent = spaces.Box(0, canvas, (2,), np.int32)
    relative_box = spaces.Box(0.0, 1.0, (4,), np.float32)
    parts: dict[str, spaces.Space[Any]] = {
        "image": picture,
        "extent": extent,
        "expression": Expression(),
        "box": relative_box,
        "step": spaces.Discrete(max_steps + 1),
    }
    if view != "overlay":
        parts["window"] = relative_box
    if view == "both":
        parts |= {"closeup": picture, "closeup_extent": extent}
    return spaces.Dict(parts)


def action_space() -> spaces.Dict:
    """``box``: xyxy relative to the picture; ``stop``: 1 ends the episode and the box is ignored."""
    return spaces.Dict({"box": spaces.Box(0.0, 1.0, (4,), np.float32), "stop": spaces.Discrete(2)})


class Screen:
    """Turns a sample and the current box into an observation. Pictures are decoded once per sample."""

    def __init__(self, dataset: Dataset, view: str, canvas: int, overlay: Overlay) -> None:
        if view not in VIEWS:
            raise ValueError(f"view {view!r}: choose one of {', '.join(VIEWS)}")
        if not isinstance(canvas, int) or canvas < 16:
            raise ValueError(f"canvas {canvas!r}: give the side in pixels, an integer of at least 16")
        self.dataset, self.view, self.side, self.overlay = dataset, view, canvas, overlay

    def load(self, sample: Sample) -> Loaded:
        """Decode a sample's picture and place it on the canvas."""
        picture = self.dataset.picture(sample)
        return picture, Sheet(*rendering.place_on_canvas(picture, self.side), self.overlay)

    def closeup(self, loaded: Loaded, box: NDArray[np.float32] | None) -> Closeup:
        """The close-up of a box, or the whole canvas where there is none.

        Returns:
            picture (S, S, 3), which is the cached canvas itself where there is no box; extent (height,
            width) on it; window (4,), xyxy relative to the whole picture.
        """
        picture, sheet = loaded
        if box is None:
            return sheet.canvas, sheet.extent, WHOLE.copy()
        return rendering.closeup(picture, box, self.side, self.overlay)

    def observe(self, loaded: Loaded, game: Game) -> Observation:
        """A fresh observation; nothing in it shares memory with the cached picture."""
        sheet, box = loaded[1], game.box
        observation: Observation = {
            "expression": game.sample.expression,
            "box": boxes.NO_BOX.copy() if box is None else box.copy(),
            "step": np.int64(game.step_count),
        }
        if self.view != "closeup":
            observation["image"] = sheet.canvas.copy()
            observation["extent"] = np.array(sheet.extent, dtype=np.int32)
            if box is not None:
                sheet.draw(observation["image"], box)
        if self.view != "overlay":
            close, close_extent, window = self.closeup(loaded, box)
            image_key, extent_key = closeup_keys(self.view)
            observation[image_key] = close.copy() if close is sheet.canvas else close
            observation[extent_key] = np.array(close_extent, dtype=np.int32)
            observation["window"] = window
        return observation


def closeup_keys(view: str) -> tuple[str, str]:
    """Under which keys a view that has a close-up shows its picture and its extent."""
    return ("image", "extent") if view == "closeup" else ("closeup", "closeup_extent")


class GroundingEnv(gym.Env[Observation, Action]):
    """Iterative visual grounding of one referring expression an episode.

    ## Description
    The agent sees a picture and a referring expression and proposes a box. From then on it sees its
    own box drawn on the picture, and refines it or stops.

    ## Action space
    `Dict(box: Box(0, 1, (4,), float32), stop: Discrete(2))`. `box` is `x1, y1, x2, y2` relative to
    the whole picture (also where a close-up is shown). With `stop=1` the episode ends with the box
    in force and `box` is ignored.

    ## Observation space
    | key | space | meaning |
    | --- | --- | --- |
    | `image` | `Box(0, 255, (S, S, 3), uint8)` | canvas, the picture at its top left, the current box drawn |
    | `extent` | `Box((2,), int32)` | height and width of the picture on the canvas, pixels |
    | `expression` | `Text` | what to find |
    | `box` | `Box(0, 1, (4,), float32)` | the current box; all zeros: none yet |
    | `step` | `Discrete(max_steps + 1)` | actions made so far |
    | `window` | `Box(0, 1, (4,), float32)` | only with a close-up: the region it shows |
    | `closeup`, `closeup_extent` | as `image`, `extent` | only with `view="both"` |

    ## Rewards
    IoU gain, `phi(new) - phi(old)` with `phi(no box) = 0`; a stop earns 0. See `RewardConfig`.

    ## Starting state
    A sample drawn uniformly from the split, or `options={"index": i}`; no box, or
    `options={"initial_box": [x1, y1, x2, y2]}`.

    ## Episode end
    1. Termination: the agent stops.
    2. Truncation: `max_steps` actions were made.

    A proposal that is no box (NaN, outside [0, 1], `x2 <= x1`, `y2 <= y1`) uses up its step, changes
    nothing, and is explained in `info["invalid"]`.

    ## Arguments
    | name | type | default | meaning |
    | --- | --- | --- | --- |
    | `dataset` | str or `Dataset` | set by the id | what to serve |
    | `split` | str | `"train"` | |
    | `data_root` | str or None | None | folder of real data sets; None: `IVT_DATA`, then the user cache |
    | `strict` | bool | False | absence of a real data set is an error instead of a warned fallback |
    | `max_steps` | int | 3 | the paper's one proposal and two refinements |
    | `canvas` | int | 640 (scenes: 384) | S |
    | `view` | str | `"overlay"` | `overlay`, `closeup` or `both` |
    | `overlay` | dict or None | None | options of `Overlay` |
    | `reward` | dict or None | None | options of `RewardConfig` |
    | `initial_box` | list or None | None | box that every episode starts from |
    | `render_mode` | str or None | None | `rgb_array`, `human` or `ansi` |
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": ["rgb_array", "human", "ansi"],
        "render_fps": 1,
    }

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
        reward: Mapping[str, Any] | RewardConfig | None = None,
        initial_box: list[float] | None = None,
        render_mode: str | None = None,
    ) -> None:
        """See the class docstring.

        Raises:
            ValueError: for an option that is not known or out of range.
            DataError: for an unknown data set or split, or broken data.
            DataMissingError: with ``strict``, where the data set is not on this machine.
        """
        if not isinstance(max_steps, int) or max_steps < 1:
            raise ValueError(f"max_steps {max_steps!r}: give an integer of at least 1")
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(f"render_mode {render_mode!r}: choose one of {self.metadata['render_modes']}")
        if initial_box is not None and (why := boxes.invalid_reason(initial_box)):
            raise ValueError(f"initial_box {initial_box}: {why}")
        if isinstance(dataset, str):
            self.dataset = load_dataset(dataset, split, data_root, strict)
        else:
            self.dataset = dataset
        self.reward_config = RewardConfig.from_json(reward)
        self.screen = Screen(self.dataset, view, canvas, Overlay.from_json(overlay))
        self.max_steps, self.initial_box, self.render_mode = max_steps, initial_box, render_mode
        self.observation_space = observation_space(view, canvas, max_steps)
        self.action_space = action_space()
        self.game: Game | None = None
        self._index = -1
        self._loaded: Loaded | None = None
        self._window: Any = None

    @property
    def sample(self) -> Sample:
        """The sample being played."""
        if self.game is None:
            raise RuntimeError("no episode yet; call reset()")
        return self.game.sample

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode; ``options`` may hold ``index`` and ``initial_box``."""
        super().reset(seed=seed)
        index, initial_box = read_options(options, len(self.dataset))
        if index is None:
            index = int(self.np_random.integers(len(self.dataset)))
        sample = self.dataset[index]
        self.game = Game(
            sample,
            self.reward_config,
            self.max_steps,
            self.initial_box if initial_box is None else initial_box,
        )
        self._index, self._loaded = index, self.screen.load(sample)
        self._show()
        return self.screen.observe(self._loaded, self.game), self.game.info()

    def step(self, action: Action) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """One proposal or a stop. Gains add up to the final IoU."""
        if self.game is None or self._loaded is None:
            raise RuntimeError("no episode yet; call reset()")
        reward, why = self.game.act(action["box"], bool(action["stop"]))
        observation = self.screen.observe(self._loaded, self.game)
        self._show()
        return observation, reward, self.game.terminated, self.game.truncated, self.game.info(why)

    def get_state(self) -> dict[str, Any]:
        """Everything that decides how this environment goes on: plain data, JSON-able.

        ``set_state`` of any environment made with the same options then plays on exactly as this one,
        later episodes included. (The environment can also be pickled or deep-copied whole.)

        Raises:
            RuntimeError: before the first ``reset``.
        """
        if self.game is None:
            raise RuntimeError("no episode yet; call reset()")
        return {
            "made_with": self._made_with(),
            "seed": self._np_random_seed,
            "rng": None if self._np_random is None else states.rng_state(self._np_random),
            "index": self._index,
            "sample_id": self.game.sample.sample_id,
            "episode": self.game.get_state(),
        }

    def set_state(self, state: Mapping[str, Any]) -> tuple[Observation, dict[str, Any]]:
        """Go on from where ``get_state`` was called, in this or another process.

        Behind ``gym.make`` this is a method of ``env.unwrapped``; the wrapper ``OrderEnforcing`` still wants
        one ``reset`` before the first ``step``.

        Returns:
            The observation and the info at that point, as ``reset`` returns them.

        Raises:
            ValueError: for what is no state, or the state of an environment made with other options or
                over other data. Nothing is changed then.
        """
        states.check_state(state, ("seed", "rng", "index", "sample_id", "episode"), self._made_with())
        sample = states.stated_sample(self.dataset, state["index"], state["sample_id"])
        game = Game(sample, self.reward_config, self.max_steps)
        game.set_state(state["episode"])
        rng = None if state["rng"] is None else states.rng_at(state["rng"])
        loaded = self.screen.load(sample)
        self._np_random, self._np_random_seed = rng, state["seed"]
        self.game, self._index, self._loaded = game, state["index"], loaded
        self._show()
        return self.screen.observe(loaded, game), game.info()

    def _made_with(self) -> dict[str, Any]:
        screen = self.screen
        return states.made_with(
            self.dataset,
            self.max_steps,
            self.initial_box,
            self.reward_config,
            screen.view,
            screen.side,
            screen.overlay,
        )

    def render(self) -> Any:
        """``rgb_array``: a captioned frame; ``ansi``: the same in words; ``human``: a window."""
        if self.render_mode is None:
            gym.logger.warn('render() needs a render mode, for example gym.make(..., render_mode="rgb_array")')
            return None
        if self.game is None or self._loaded is None:
            raise RuntimeError("no episode yet; call reset()")
        if self.render_mode == "ansi":
            return "\n".join(self._caption()) + "\n"
        if self.render_mode == "rgb_array":
            return self._frame()
        self._show()
        return None

    def close(self) -> None:
        """Close the window, if there is one."""
        if self._window is not None:
            import pygame

            pygame.display.quit()
            pygame.quit()
            self._window = None

    def _caption(self) -> list[str]:
        assert self.game is not None
        game = self.game
        state = "stopped" if game.terminated else "out of steps" if game.truncated else "running"
        step = f"step {game.step_count}/{self.max_steps} ({state})"
        box = "none" if game.box is None else " ".join(f"{v:.3f}" for v in game.box)
        return [
            game.sample.expression,
            f"{step}   IoU {game.iou:.3f}   reward {round(game.last_reward, 3) + 0.0:+.3f}",
            f"box {box}   {game.sample.dataset}/{game.sample.split} {game.sample.sample_id}",
        ]

    def _frame(self) -> Picture:
        assert self.game is not None and self._loaded is not None
        sheet = self._loaded[1]
        return rendering.frame(sheet.canvas, sheet.extent, self.game.box, self.game.sample.box, self._caption())

    def _show(self) -> None:
        """Bring the window up to date; without ``render_mode="human"`` nothing happens."""
        if self.render_mode != "human":
            return
        try:
            import pygame
        except ImportError as error:
            raise gym.error.DependencyNotInstalled(
                'render_mode="human" opens a window with pygame: pip install "ivt-env[human]"'
            ) from error
        pixels: NDArray[np.uint8] = self._frame()
        if self._window is None:
            pygame.init()
            self._window = pygame.display.set_mode((pixels.shape[1], pixels.shape[0]))
            pygame.display.set_caption("ivt_env")
        pygame.event.pump()
        self._window.blit(pygame.surfarray.make_surface(pixels.swapaxes(0, 1)), (0, 0))
        pygame.display.flip()


def read_options(options: Mapping[str, Any] | None, length: int) -> tuple[int | None, Any]:
    """``index`` and ``initial_box`` from reset options.

    Raises:
        ValueError: for an unknown option or an index outside the data set.
    """
    options = dict(options or {})
    index, initial_box = options.pop("index", None), options.pop("initial_box", None)
    if options:
        raise ValueError(f"unknown reset option {sorted(options)[0]!r}: choose from index, initial_box")
    if index is None:
        return None, initial_box
    if not isinstance(index, int | np.integer) or not 0 <= index < length:
        raise ValueError(f"index {index!r}: give an integer from 0 to {length - 1}")
    return int(index), initial_box
