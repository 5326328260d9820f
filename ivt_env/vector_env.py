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

from ivt_env import boxes, states
from ivt_env.batches import Batch
from ivt_env.data import load_dataset
from ivt_env.data.sample import Dataset, Picture, Sample
from ivt_env.env import (
    Closeup,
    Loaded,
    Observation,
    Screen,
    action_space,
    closeup_keys,
    observation_space,
    read_options,
)
from ivt_env.game import Game
from ivt_env.rendering import Overlay
from ivt_env.rewards import RewardConfig


class GroundingVectorEnv(gym.vector.VectorEnv[Observation, Mapping[str, Any], NDArray[Any]]):
    """Steps ``num_envs`` episodes of ``GroundingEnv`` in one process.

    Equal to ``SyncVectorEnv`` of the single environment for equal seeds and actions, but a picture
    that several episodes share is decoded once.

    ``reset`` options: ``index`` and ``initial_box`` as lists with one entry per environment (None
    entries allowed), and ``reset_mask`` (bool, (num_envs,)) to reset only some.

    With ``autoreset_mode="Disabled"`` an episode that has ended stays as it is: its actions are
    ignored, its reward is 0 and its flags stay up, so that groups finish in mid-flight undisturbed.

    With ``copy=False`` the pictures of all steps stand in the same arrays, of which only what has changed
    is painted: fastest, and an observation holds only until the next ``reset`` or ``step``. These arrays
    are read-only.
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
        copy: bool = True,
    ) -> None:
        """Arguments as in ``GroundingEnv``, how finished episodes restart, and whether pictures are copies."""
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
        self._indices: list[int] = []
        self._loaded: list[Loaded] = []
        # With the box that it was made for: an episode that has ended or was refused keeps its close-up.
        self._closeups: list[tuple[Any, Closeup] | None] = [None] * num_envs
        self._batches: dict[str, Batch] = {
            key: Batch(num_envs, canvas, copy)
            for key in ("image", "closeup")
            if key in self.single_observation_space.spaces
        }
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
        return self._observe(), infos

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
        mode = self.autoreset_mode
        for i, game in enumerate(self.games):
            if game.over and mode == AutoresetMode.NEXT_STEP:
                self._begin(i, {})
                continue
            if game.over and mode == AutoresetMode.DISABLED:
                terminated[i], truncated[i] = game.terminated, game.truncated
                continue
            rewards[i], why = game.act(proposals[i], bool(stops[i]))
            terminated[i], truncated[i] = game.terminated, game.truncated
            invalid = {} if why is None else {"invalid": why}
            if game.over and mode == AutoresetMode.SAME_STEP:
                final = {"final_obs": self.screen.observe(self._loaded[i], game), "final_info": game.info(why)}
                self._begin(i, {})
                infos = self._add_info(infos, final, i)
            elif invalid:
                infos = self._add_info(infos, invalid, i)
        return self._observe(), rewards, terminated, truncated, infos | self._scores()

    def render(self) -> tuple[Picture, ...] | None:  # type: ignore[override]
        """A captioned frame for each environment."""
        if self.render_mode is None:
            return None
        from ivt_env.rendering import frame

        frames = []
        for game, (_, sheet) in zip(self.games, self._loaded, strict=True):
            step = f"step {game.step_count}/{self.max_steps}"
            caption = [game.sample.expression, f"{step}   IoU {game.iou:.3f}"]
            frames.append(frame(sheet.canvas, sheet.extent, game.box, game.sample.box, caption))
        return tuple(frames)

    def get_state(self) -> dict[str, Any]:
        """Everything that decides how these environments go on: plain data, JSON-able.

        ``set_state`` of any vector environment made with the same options then plays on exactly as this
        one, later episodes included.

        Raises:
            RuntimeError: before the first ``reset``.
        """
        if len(self.games) < self.num_envs:
            raise RuntimeError("no episodes yet; call reset()")
        return {
            "made_with": self._made_with(),
            "rngs": [states.rng_state(rng) for rng in self._rngs],
            "indices": list(self._indices),
            "sample_ids": [game.sample.sample_id for game in self.games],
            "episodes": [game.get_state() for game in self.games],
        }

    def set_state(self, state: Mapping[str, Any]) -> tuple[Observation, dict[str, Any]]:
        """Go on from where ``get_state`` was called, in this or another process.

        Returns:
            The observations and the infos at that point, as ``reset`` returns them.

        Raises:
            ValueError: for what is no state, or the state of an environment made with other options or
                over other data. Nothing is changed then.
        """
        keys = ("rngs", "indices", "sample_ids", "episodes")
        states.check_state(state, keys, self._made_with())
        if short := [key for key in keys if len(state[key]) != self.num_envs]:
            raise ValueError(f"{short[0]} of the state has {len(state[short[0]])} entries, not {self.num_envs}")
        rngs = [states.rng_at(rng) for rng in state["rngs"]]
        games = []
        for index, sample_id, episode in zip(state["indices"], state["sample_ids"], state["episodes"], strict=True):
            sample = states.stated_sample(self.dataset, index, sample_id)
            games.append(Game(sample, self.reward_config, self.max_steps))
            games[-1].set_state(episode)
        loaded = [self._load(game.sample) for game in games]
        self._rngs, self.games, self._indices, self._loaded = rngs, games, list(state["indices"]), loaded
        self._closeups = [None] * self.num_envs
        return self._observe(), self._scores()

    def _made_with(self) -> dict[str, Any]:
        screen = self.screen
        options = states.made_with(
            self.dataset,
            self.max_steps,
            self.initial_box,
            self.reward_config,
            screen.view,
            screen.side,
            screen.overlay,
        )
        return options | {"num_envs": self.num_envs, "autoreset_mode": self.autoreset_mode.value}

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
        self._closeups[i] = None
        if i < len(self.games):
            self.games[i], self._indices[i], self._loaded[i] = game, index, loaded
        else:
            self.games.append(game)
            self._indices.append(index)
            self._loaded.append(loaded)
        return game.info()

    def _load(self, sample: Sample) -> Loaded:
        """Decoded picture of a sample; as many are kept as there are environments."""
        if sample.picture_id not in self._pictures:
            self._pictures[sample.picture_id] = self.screen.load(sample)
            while len(self._pictures) > self.num_envs:
                self._pictures.popitem(last=False)
        self._pictures.move_to_end(sample.picture_id)
        return self._pictures[sample.picture_id]

    def _observe(self) -> Observation:
        """All environments as they stand, with a leading axis; expressions as a tuple of str."""
        view = self.screen.view
        given = [boxes.NO_BOX if game.box is None else game.box for game in self.games]
        observation: Observation = {
            "expression": tuple(game.sample.expression for game in self.games),
            "box": np.array(given, dtype=np.float32),  # (N, 4)
            "step": np.array([game.step_count for game in self.games], dtype=np.int64),  # (N,)
        }
        if view != "closeup":
            sheets = [sheet for _, sheet in self._loaded]
            layers = [(sheet.canvas, sheet, game.box) for sheet, game in zip(sheets, self.games, strict=True)]
            observation["image"] = self._batches["image"].paint(layers)
            observation["extent"] = np.array([sheet.extent for sheet in sheets], dtype=np.int32)  # (N, 2)
        if view != "overlay":
            closeups = [self._closeup(i) for i in range(self.num_envs)]
            image_key, extent_key = closeup_keys(view)
            observation[image_key] = self._batches[image_key].paint([(close, None, None) for close, _, _ in closeups])
            observation[extent_key] = np.array([extent for _, extent, _ in closeups], dtype=np.int32)
            observation["window"] = np.array([window for _, _, window in closeups], dtype=np.float32)
        return observation

    def _closeup(self, i: int) -> Closeup:
        """Environment i's close-up, made once for each box."""
        box = self.games[i].box
        made = self._closeups[i]
        if made is None or made[0] is not box:
            made = self._closeups[i] = (box, self.screen.closeup(self._loaded[i], box))
        return made[1]

    def _scores(self) -> dict[str, Any]:
        """``Game.info`` of all environments, each key with its mask, as ``_add_info`` would put it together."""
        games = self.games
        infos: dict[str, Any] = {
            "iou": np.array([game.iou for game in games]),
            "best_iou": np.array([game.best_iou for game in games]),
            "sample_id": np.array([game.sample.sample_id for game in games], dtype=object),
            "dataset": np.array([game.sample.dataset for game in games], dtype=object),
            "target": np.array([game.sample.box for game in games], dtype=np.float32),  # (N, 4)
        }
        return infos | {f"_{key}": np.ones(self.num_envs, dtype=bool) for key in infos}
