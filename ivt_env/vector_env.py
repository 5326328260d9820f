"""Many episodes at once, with pictures shared among the members of a group."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from ivt_env import boxes
from ivt_env.data import load_dataset
from ivt_env.data.sample import Dataset, Picture, Sample
from ivt_env.env import Observation, Screen, action_space, observation_space, read_options
from ivt_env.game import Game
from ivt_env.rendering import Overlay
from ivt_env.rewards import RewardConfig

Loaded = tuple[Picture, Picture, tuple[int, int]]


class GroundingVectorEnv(gym.vector.VectorEnv[Observation, Mapping[str, Any], NDArray[Any]]):
    """Steps ``num_envs`` episodes of ``GroundingEnv`` in one process.

    Equal to ``SyncVectorEnv`` of the single environment for equal seeds and actions, but a picture
    that several episodes share is decoded once.

    ``reset`` options: ``index`` and ``initial_box`` as lists with one entry per environment (None
    entries allowed), and ``reset_mask`` (bool, (num_envs,)) to reset only some.

    With ``autoreset_mode="Disabled"`` an episode that has ended stays as it is: its actions are
    ignored, its reward is 0 and its flags stay up, so that groups finish in mid-flight undisturbed.
    """

    def __init__(
        self,
        num_envs: int = 1,
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
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
    ) -> None:
        """Arguments as in ``GroundingEnv``, and how finished episodes restart."""
        if not isinstance(num_envs, int) or num_envs < 1:
            raise ValueError(f"num_envs {num_envs!r}: give an integer of at least 1")
        if not isinstance(max_steps, int) or max_steps < 1:
            raise ValueError(f"max_steps {max_steps!r}: give an integer of at least 1")
        if initial_box is not None and (why := boxes.invalid_reason(initial_box)):
            raise ValueError(f"initial_box {initial_box}: {why}")
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode {render_mode!r}: the vector environment renders rgb_array only")
        self.num_envs = num_envs
        self.dataset = load_dataset(dataset, split, data_root, strict) if isinstance(dataset, str) else dataset
        self.screen = Screen(self.dataset, view, canvas, Overlay.from_json(overlay))
        self.reward_config = RewardConfig.from_json(reward)
        self.max_steps, self.initial_box, self.render_mode = max_steps, initial_box, render_mode
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {
            "render_modes": ["rgb_array"],
            "render_fps": 1,
            "autoreset_mode": self.autoreset_mode,
        }
        self.single_observation_space = observation_space(view, canvas, max_steps)
        self.single_action_space = action_space()
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.games: list[Game] = []
        self._loaded: list[Loaded] = []
        self._observations: list[Observation] = []
        self._rngs: list[np.random.Generator] = [np.random.default_rng() for _ in range(num_envs)]
        self._pictures: OrderedDict[str, Loaded] = OrderedDict()

    @cached_property
    def observation_space(self) -> spaces.Dict:  # type: ignore[override]
        """Made when it is first asked for: its bounds are several times as large as the observations."""
        batched = batch_space(self.single_observation_space, self.num_envs)
        assert isinstance(batched, spaces.Dict)
        return batched

    @property
    def samples(self) -> list[Sample]:
        """The samples being played, one per environment."""
        return [game.sample for game in self.games]

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin episodes; see the class docstring for ``options``."""
        options = dict(options or {})
        mask = options.pop("reset_mask", None)
        mask = np.ones(self.num_envs, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
        if mask.shape != (self.num_envs,) or not mask.any():
            raise ValueError(f"reset_mask: give {self.num_envs} booleans, at least one of them true")
        if len(self.games) < self.num_envs and not mask.all():
            raise ValueError("reset_mask: the first reset must reset every environment")
        indices, initial = (self._per_env(options.pop(k, None), k) for k in ("index", "initial_box"))
        if options:
            raise ValueError(f"unknown reset option {sorted(options)[0]!r}: choose from index, initial_box, reset_mask")
        seeds = self._seeds(seed)
        infos: dict[str, Any] = {}
        for i in np.flatnonzero(mask):
            if seeds[i] is not None:
                # np_random of a single environment is made the same way, so equal seeds agree.
                self._rngs[i] = gym.utils.seeding.np_random(seeds[i])[0]
            info = self._begin(int(i), {"index": indices[i], "initial_box": initial[i]})
            infos = self._add_info(infos, info, int(i))
        return self._stack(), infos

    def step(
        self, actions: Mapping[str, Any]
    ) -> tuple[Observation, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """One action in each environment; ``actions["box"]`` (N, 4), ``actions["stop"]`` (N,)."""
        n = self.num_envs
        if len(self.games) < n:
            raise RuntimeError("no episodes yet; call reset()")
        proposals, stops = np.asarray(actions["box"]), np.asarray(actions["stop"])
        if proposals.shape != (n, 4) or stops.shape != (n,):
            raise ValueError(f"actions: box must be ({n}, 4) and stop ({n},), not {proposals.shape} and {stops.shape}")
        rewards = np.zeros(n)
        terminated, truncated = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
        infos: dict[str, Any] = {}
        for i, game in enumerate(self.games):
            if game.over and self.autoreset_mode == AutoresetMode.NEXT_STEP:
                infos = self._add_info(infos, self._begin(i, {}), i)
                continue
            if game.over and self.autoreset_mode == AutoresetMode.DISABLED:
                terminated[i], truncated[i] = game.terminated, game.truncated
                infos = self._add_info(infos, game.info(), i)
                continue
            rewards[i], why = game.act(proposals[i], bool(stops[i]))
            terminated[i], truncated[i] = game.terminated, game.truncated
            self._observations[i] = self.screen.observe(self._loaded[i], game)
            info = game.info(why)
            if game.over and self.autoreset_mode == AutoresetMode.SAME_STEP:
                final = {"final_obs": self._observations[i], "final_info": info}
                info = final | self._begin(i, {})
            infos = self._add_info(infos, info, i)
        return self._stack(), rewards, terminated, truncated, infos

    def render(self) -> tuple[Picture, ...] | None:  # type: ignore[override]
        """A captioned frame for each environment."""
        if self.render_mode is None:
            return None
        from ivt_env.rendering import frame

        frames = []
        for game, (_, canvas, extent) in zip(self.games, self._loaded, strict=True):
            step = f"step {game.step_count}/{self.max_steps}"
            caption = [game.sample.expression, f"{step}   IoU {game.iou:.3f}"]
            frames.append(frame(canvas, extent, game.box, game.sample.box, caption))
        return tuple(frames)

    def _per_env(self, values: Any, name: str) -> list[Any]:
        if values is None:
            return [None] * self.num_envs
        if not isinstance(values, Sequence | np.ndarray) or len(values) != self.num_envs:
            raise ValueError(f"{name} {values!r}: give {self.num_envs} entries, one per environment")
        return list(values)

    def _seeds(self, seed: int | Sequence[int | None] | None) -> list[int | None]:
        if seed is None:
            return [None] * self.num_envs
        if isinstance(seed, int | np.integer):
            return [int(seed) + i for i in range(self.num_envs)]
        return [None if s is None else int(s) for s in self._per_env(seed, "seed")]

    def _begin(self, i: int, options: dict[str, Any]) -> dict[str, Any]:
        index, initial_box = read_options(options, len(self.dataset))
        if index is None:
            index = int(self._rngs[i].integers(len(self.dataset)))
        sample = self.dataset[index]
        game = Game(
            sample,
            self.reward_config,
            self.max_steps,
            self.initial_box if initial_box is None else initial_box,
        )
        loaded = self._load(sample)
        observation = self.screen.observe(loaded, game)
        if i < len(self.games):
            self.games[i], self._loaded[i], self._observations[i] = game, loaded, observation
        else:
            self.games.append(game)
            self._loaded.append(loaded)
            self._observations.append(observation)
        return game.info()

    def _load(self, sample: Sample) -> Loaded:
        """Decoded picture of a sample; as many are kept as there are environments."""
        if sample.picture_id not in self._pictures:
            self._pictures[sample.picture_id] = self.screen.load(sample)
            while len(self._pictures) > self.num_envs:
                self._pictures.popitem(last=False)
        self._pictures.move_to_end(sample.picture_id)
        return self._pictures[sample.picture_id]

    def _stack(self) -> Observation:
        """Fresh arrays with a leading axis of environments; expressions as a tuple of str."""
        stacked: Observation = {}
        for key, space in self.single_observation_space.spaces.items():  # type: ignore[attr-defined]
            values = [o[key] for o in self._observations]
            stacked[key] = tuple(values) if key == "expression" else np.stack(values).astype(space.dtype, copy=False)
        return stacked
