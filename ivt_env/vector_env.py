"""Many episodes at once, with images shared among the members of a group."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from ivt_env.batches import Batch
from ivt_env.data.sample import Dataset, ImageArray, Sample
from ivt_env.game import Game
from ivt_env.grounding import DTYPES, Grounding, LiveEpisode, Loaded, Observation, action_space, take_options


class GroundingVectorEnv(Grounding, gym.vector.VectorEnv[Observation, Mapping[str, Any], NDArray[Any]]):
    """Steps ``num_envs`` episodes of ``GroundingEnv`` in one process.

    Equal to ``SyncVectorEnv`` of the single environment for equal seeds and actions, but an image
    that several episodes share is decoded once.

    ``reset`` options: ``index`` and ``initial_box`` as lists with one entry per environment (None
    entries allowed), and ``reset_mask`` (bool, (num_envs,)) to reset only some.

    With ``autoreset_mode="Disabled"`` an episode that has ended stays as it is: its actions are
    ignored, its reward is 0 and its flags stay up, so that groups finish in mid-flight undisturbed.

    With ``copy=False`` the images of all steps are in the same read-only arrays, in which only what has changed is
    painted: fastest, and an observation holds only until the next ``reset`` or ``step``.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 1}  # type: ignore[misc]

    def __init__(
        self,
        num_envs: int = 1,
        dataset: str | Dataset = "scenes",
        split: str = "train",
        *,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        copy: bool = True,
        **options: Any,
    ) -> None:
        """How many episodes, how they restart, whether images are copies; the other options are ``GroundingEnv``'s."""
        if not isinstance(num_envs, int) or num_envs < 1:
            raise ValueError(f"num_envs {num_envs!r}: give an integer of at least 1")
        self.num_envs = num_envs
        super().__init__(dataset, split, **options)
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = self.metadata | {"autoreset_mode": self.autoreset_mode}  # type: ignore[misc]
        self.single_observation_space, self.single_action_space = self.one_observation_space(), action_space()
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._painters = {key: Batch(num_envs, self.screen.side, copy) for key in ("image", "closeup")}
        self._rngs: list[np.random.Generator] = [np.random.default_rng() for _ in range(num_envs)]
        self._images: OrderedDict[str, Loaded] = OrderedDict()

    @cached_property
    def observation_space(self) -> spaces.Dict:  # type: ignore[override]
        """Made when it is first asked for: its bounds are several times as large as the observations."""
        batched = batch_space(self.single_observation_space, self.num_envs)
        assert isinstance(batched, spaces.Dict)
        return batched

    @property
    def games(self) -> list[Game]:
        """The episodes being played, one per environment."""
        return [live.game for live in self.live]

    @property
    def samples(self) -> list[Sample]:
        """The samples being played, one per environment."""
        return [live.game.sample for live in self.live]

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin episodes; see the class docstring for ``options``."""
        *given, mask = take_options(options, ("index", "initial_box", "reset_mask"))
        mask = np.ones(self.num_envs, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
        if mask.shape != (self.num_envs,) or not mask.any():
            raise ValueError(f"reset_mask: give {self.num_envs} booleans, at least one of them true")
        if not self.live and not mask.all():
            raise ValueError("reset_mask: the first reset must reset every environment")
        indices, boxes = (self._per_env(v, name) for v, name in zip(given, ("index", "initial_box"), strict=True))
        seeds = self._seeds(seed)
        infos: dict[str, Any] = {}
        live: list[Any] = list(self.live) or [None] * self.num_envs
        for i in np.flatnonzero(mask).tolist():
            if seeds[i] is not None:
                # np_random of a single environment is made the same way, so equal seeds agree.
                self._rngs[i] = gym.utils.seeding.np_random(seeds[i])[0]
            live[i] = self.begin(self._rngs[i], indices[i], boxes[i])
            infos = self._add_info(infos, live[i].game.info(), i)
        self.live = live
        return self._observe(), infos

    def step(
        self, actions: Mapping[str, Any]
    ) -> tuple[Observation, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """One action in each environment; ``actions["box"]`` (N, 4), ``actions["stop"]`` (N,)."""
        n, mode = self.num_envs, self.autoreset_mode
        live = self.playing()
        proposals, stops = np.asarray(actions["box"]), np.asarray(actions["stop"])
        if proposals.shape != (n, 4) or stops.shape != (n,):
            raise ValueError(f"actions: box must be ({n}, 4) and stop ({n},), not {proposals.shape} and {stops.shape}")
        rewards = np.zeros(n)
        terminated, truncated = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
        infos: dict[str, Any] = {}
        for i, game in enumerate(self.games):
            if game.over and mode == AutoresetMode.NEXT_STEP:
                live[i] = self.begin(self._rngs[i])
                continue
            if game.over and mode == AutoresetMode.DISABLED:
                terminated[i], truncated[i] = game.terminated, game.truncated
                continue
            rewards[i], why = game.act(proposals[i], bool(stops[i]))
            terminated[i], truncated[i] = game.terminated, game.truncated
            if game.over and mode == AutoresetMode.SAME_STEP:
                final = {"final_obs": live[i].observe(), "final_info": game.info(why)}
                live[i] = self.begin(self._rngs[i])
                infos = self._add_info(infos, final, i)
            elif why is not None:
                infos = self._add_info(infos, {"invalid": why}, i)
        return self._observe(), rewards, terminated, truncated, infos | self._scores()

    def render(self) -> tuple[ImageArray, ...] | None:  # type: ignore[override]
        """A captioned frame for each environment, as the single environment draws it."""
        return None if self.render_mode is None else tuple(live.frame() for live in self.playing())

    def _per_env(self, values: Any, name: str) -> list[Any]:
        if values is None:
            return [None] * self.num_envs
        if not isinstance(values, Sequence | np.ndarray) or len(values) != self.num_envs:
            raise ValueError(f"{name} {values!r}: give {self.num_envs} entries, one per environment")
        return list(values)

    def _seeds(self, seed: int | Sequence[int | None] | None) -> list[int | None]:
        if isinstance(seed, int | np.integer):
            return [int(seed) + i for i in range(self.num_envs)]
        return [None if s is None else int(s) for s in self._per_env(seed, "seed")]

    def _load(self, sample: Sample) -> Loaded:
        """Decoded image of a sample; as many are kept as there are environments."""
        if sample.image_id not in self._images:
            self._images[sample.image_id] = super()._load(sample)
            while len(self._images) > self.num_envs:
                self._images.popitem(last=False)
        self._images.move_to_end(sample.image_id)
        return self._images[sample.image_id]

    def _observe(self) -> Observation:
        """All environments as they stand, with a leading axis; expressions as a tuple of str."""
        seen, layers = zip(*(live.look() for live in self.live), strict=True)
        observation: Observation = {"expression": tuple(one["expression"] for one in seen)}
        for key in (key for key in seen[0] if key in DTYPES):
            observation[key] = np.array([one[key] for one in seen], dtype=DTYPES[key])
        for key in layers[0]:
            observation[key] = self._painters[key].paint([one[key] for one in layers])
        return observation

    def _scores(self) -> dict[str, Any]:
        """``Game.info`` of all environments, each key with its mask, as ``_add_info`` would put it together."""
        each = [live.game.info() for live in self.live]
        infos = {
            key: np.array([one[key] for one in each], dtype=object if isinstance(value, str) else None)
            for key, value in each[0].items()
        }
        return infos | {f"_{key}": np.ones(self.num_envs, dtype=bool) for key in infos}

    def _generators(self) -> list[np.random.Generator]:
        return self._rngs

    def _go_on(self, rngs: list[np.random.Generator], live: list[LiveEpisode]) -> tuple[Observation, dict[str, Any]]:
        self._rngs, self.live = rngs, live
        return self._observe(), self._scores()

    def _made_with(self) -> dict[str, Any]:
        return super()._made_with() | {"num_envs": self.num_envs, "autoreset_mode": self.autoreset_mode.value}
