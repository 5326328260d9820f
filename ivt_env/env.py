"""The Gymnasium environment: propose a box, see it drawn, refine it or stop."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from ivt_env.data.sample import Sample
from ivt_env.game import Game
from ivt_env.grounding import Action, Grounding, LiveEpisode, Observation, action_space, take_options


class GroundingEnv(Grounding, gym.Env[Observation, Action]):
    """Iterative visual grounding: the agent proposes a box for an expression, sees it drawn, refines it or stops.

    ## Action space
    `Dict(box: Box(0, 1, (4,), float32), stop: Discrete(2))`. `box` is `x1, y1, x2, y2` relative to
    the whole image (also where a close-up is shown). With `stop=1` the episode ends with the
    current box and `box` is ignored.

    ## Observation space
    | key | space | meaning |
    | --- | --- | --- |
    | `image` | `Box(0, 255, (S, S, 3), uint8)` | canvas, the image at its top left, the current box drawn |
    | `extent` | `Box((2,), int32)` | height and width of the image on the canvas, pixels |
    | `expression` | `Text` | what to find |
    | `box` | `Box(0, 1, (4,), float32)` | the current box; all zeros: none yet |
    | `step` | `Discrete(max_steps + 1)` | actions made so far |
    | `window` | `Box(0, 1, (4,), float32)` | only with a close-up: the region it shows |
    | `history` | `Box(0, 1, (max_steps, 4), float32)` | only with a trail: the earlier boxes, then zeros |
    | `closeup`, `closeup_extent` | as `image`, `extent` | only with `view="both"` |

    ## Rewards
    IoU gain, `phi(new) - phi(old)` with `phi(no box) = 0`; a stop earns 0. See `RewardConfig`.

    ## Episodes
    A sample is drawn uniformly from the split; `options={"index": i}` chooses it. The episode begins without a box;
    `options={"initial_box": [x1, y1, x2, y2]}` gives one. A stop terminates an episode, and `max_steps` actions
    truncate it.
    A proposal that is not a box (NaN, outside [0, 1], `x2 <= x1`, `y2 <= y1`) uses up its step, changes
    nothing, and is explained in `info["invalid"]`.

    ## Arguments
    `data_root` is the folder of real data sets (None: `IVT_DATA`, then the user cache). With `strict`, a missing one is
    an error, not a warning and the embedded data. `canvas` is S in pixels; `view` is `overlay`, `closeup` or `both`.
    `overlay`, `closeup` and `reward` are options of `Overlay`, `Surroundings` and `RewardConfig`. Every episode starts
    from `initial_box`, if one is given. `render_mode` is `rgb_array`, `human` or `ansi`.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": ["rgb_array", "human", "ansi"],
        "render_fps": 1,
    }
    _window: Any = None

    @cached_property
    def observation_space(self) -> spaces.Dict:  # type: ignore[override]
        """See the class docstring."""
        return self.one_observation_space()

    @cached_property
    def action_space(self) -> spaces.Dict:  # type: ignore[override]
        """See the class docstring."""
        return action_space()

    @property
    def game(self) -> Game | None:
        """The episode being played; None before the first ``reset``."""
        return self.live[0].game if self.live else None

    @property
    def sample(self) -> Sample:
        """The sample being played."""
        return self.playing()[0].game.sample

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode; ``options`` may hold ``index`` and ``initial_box``."""
        super().reset(seed=seed)
        self.live = [self.begin(self.np_random, *take_options(options, ("index", "initial_box")))]
        return self._now()

    def step(self, action: Action) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """One proposal or a stop. Gains add up to the final IoU."""
        game = self.playing()[0].game
        reward, why = game.act(action["box"], bool(action["stop"]))
        observation, info = self._now(why)
        return observation, reward, game.terminated, game.truncated, info

    def render(self) -> Any:
        """``rgb_array``: a captioned frame; ``ansi``: the same in words; ``human``: a window."""
        if self.render_mode is None:
            gym.logger.warn('render() needs a render mode, for example gym.make(..., render_mode="rgb_array")')
            return None
        live = self.playing()[0]
        if self.render_mode == "ansi":
            return "\n".join(live.caption()) + "\n"
        if self.render_mode == "rgb_array":
            return live.frame()
        self._show()
        return None

    def close(self) -> None:
        """Close the window, if there is one."""
        if self._window is not None:
            import pygame

            pygame.display.quit()
            pygame.quit()
            self._window = None

    def _now(self, invalid: str | None = None) -> tuple[Observation, dict[str, Any]]:
        """Observation and info as the episode stands; the window, if any, is brought up to date."""
        live = self.live[0]
        if self.render_mode == "human":
            self._show()
        return live.observe(), live.game.info(invalid)

    def _generators(self) -> list[np.random.Generator]:
        return [self.np_random]

    def _go_on(self, rngs: list[np.random.Generator], live: list[LiveEpisode]) -> tuple[Observation, dict[str, Any]]:
        self.np_random, self.live = rngs[0], live
        return self._now()

    def _show(self) -> None:
        try:
            import pygame
        except ImportError as error:
            raise gym.error.DependencyNotInstalled(
                'render_mode="human" opens a window with pygame: pip install "ivt-env[human]"'
            ) from error
        pixels = self.live[0].frame()
        if self._window is None:
            pygame.init()
            self._window = pygame.display.set_mode((pixels.shape[1], pixels.shape[0]))
            pygame.display.set_caption("ivt_env")
        pygame.event.pump()
        self._window.blit(pygame.surfarray.make_surface(pixels.swapaxes(0, 1)), (0, 0))
        pygame.display.flip()
