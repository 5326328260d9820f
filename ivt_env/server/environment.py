"""Grounding episodes as an environment of OpenEnv: what it takes, what it shows, and what a client may choose.

The operator decides what is played: an id, its data and its keywords. A client chooses the split, the sample, the
seed and how images travel, and nothing else.
"""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, EnvironmentMetadata, Observation, State
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, Strict, StrictBool

import ivt_env
from ivt_env import boxes
from ivt_env.data import load_dataset, splits
from ivt_env.data.sample import Dataset
from ivt_env.env import GroundingEnv

log = logging.getLogger("ivt_env.server")

_PLAYERS = 2
"""Threads that play for all sessions: what each of them holds at its peak is a multiple of an image."""
_MOST_TASKS = 1000
"""Of a list of tasks; ``num_tasks`` counts all."""

WireBox = Annotated[list[Annotated[float, Strict()] | None], Field(min_length=4, max_length=4)]
"""x1, y1, x2, y2 relative to the image; null or NaN for a coordinate that is not a number."""


class GroundingAction(Action):
    """A proposal, or a stop."""

    box: WireBox | None = Field(None, description="x1, y1, x2, y2 relative to the image, 0 to 1; null: not a number")
    stop: StrictBool | Literal[0, 1] = Field(0, description="1 ends the episode with the current box")


class GroundingReset(BaseModel):
    """What a reset takes. Split and encoding stay as they are until a reset names others."""

    model_config = ConfigDict(extra="forbid", strict=True)

    seed: int | None = Field(None, ge=0, lt=2**64)
    episode_id: str | None = Field(None, max_length=255)
    split: str | None = None
    index: int | None = None
    initial_box: WireBox | None = None
    encoding: Literal["png", "raw"] | None = None


class EncodedImage(BaseModel):
    """An image as it travels."""

    encoding: Literal["png", "raw"]
    shape: tuple[int, int, int] = Field(description="height, width, 3")
    data: str = Field(description="base64 of a PNG file, or of the RGB bytes in C order; both are exact")


class GroundingObservation(Observation):
    """What an agent sees. ``metadata`` is the info of the step, with ``terminated`` and ``truncated``."""

    model_config = ConfigDict(extra="allow")  # a close-up and its window, where the view has them

    image: EncodedImage = Field(description="canvas with the image at its top left and the current box drawn")
    extent: list[int] = Field(description="height and width of the image on the canvas, pixels")
    expression: str = Field(description="what to find")
    box: list[float] = Field(description="the current box; all zeros: none yet")
    step: int = Field(description="actions made so far")


class GroundingState(State):
    """Where a session stands."""

    env: str
    kwargs: dict[str, Any] = Field(description="keywords of the environment, set by the operator")
    split: str
    sample_id: str | None = None
    terminated: bool = False
    truncated: bool = False


class Refused(ValueError):
    """What a client asked cannot be done; the text is for the client."""


class Served:
    """What one server plays, and the data of all its sessions, each split loaded once."""

    def __init__(self, env_id: str, data_root: str | None = None, kwargs: Mapping[str, Any] | None = None) -> None:
        """Open the split that is played by default. ``kwargs`` are those of the environment.

        Raises:
            ValueError: for an unknown keyword, and as ``GroundingEnv``; ``DataMissingError`` for absent data.
        """
        if own := {"dataset", "data_root", "strict", "render_mode"} & set(kwargs or {}):
            raise ValueError(f"keyword {sorted(own)[0]!r} is not for --kwargs: --env and --data-root say what is read")
        self.kwargs: dict[str, Any] = {"split": "train"} | ivt_env.IDS[env_id] | dict(kwargs or {})
        self.env_id, self.dataset, self.split = env_id, self.kwargs.pop("dataset"), self.kwargs.pop("split")
        self.splits, self._root = splits(self.dataset), data_root
        self._datasets: dict[str, Dataset] = {}
        self.turn = threading.Lock()
        self._loader, self._players = ThreadPoolExecutor(1, "loader"), ThreadPoolExecutor(_PLAYERS, "player")
        try:
            GroundingEnv(dataset=self._open(self.split), **self.kwargs)
        except TypeError as error:
            raise ValueError(f"--kwargs: {error}") from error

    async def opened(self, split: str) -> Dataset:
        """The samples of a split, for which nobody else waits; ``Refused`` where the data set has none of this name."""
        if split not in self.splits:
            raise Refused(f"split {split[:60]!r}: choose one of {', '.join(self.splits)}")
        return self._datasets.get(split) or await self._told(self._loader, self._open, split)

    async def play(self, what: Callable[..., Any], *args: Any) -> Any:
        """Do what takes time, when it is its turn: first come, first served, and few at once."""
        return await self._told(self._players, what, *args)

    def _open(self, split: str) -> Dataset:
        if split not in self._datasets:
            self._datasets[split] = load_dataset(self.dataset, split, self._root, strict=True)
        return self._datasets[split]

    async def _told(self, pool: ThreadPoolExecutor, what: Callable[..., Any], *args: Any) -> Any:
        """What fails otherwise than by a refusal is the server's affair: its log gets it, the client a sentence."""
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, what, *args)
        except Refused:
            raise
        except Exception:
            log.exception("a request failed")
            raise Refused("the server failed at this request; its log has the details") from None


class GroundingEnvironment(Environment[GroundingAction, GroundingObservation, GroundingState]):
    """The environment of one session."""

    SUPPORTS_CONCURRENT_SESSIONS = True
    REQUIRES_SINGLE_THREAD_EXECUTOR = True  # else a thread for each session, which would have nothing to do

    def __init__(self, served: Served) -> None:
        """Before the first reset."""
        super().__init__()
        self._served, self._split, self._encoding = served, served.split, "png"
        self._env: GroundingEnv | None = None
        self._episode_id: str | None = None

    async def reset_async(self, **asked: Any) -> GroundingObservation:  # type: ignore[override]
        """Begin an episode with what ``GroundingReset`` takes; ValidationError for what it does not."""
        checked = GroundingReset(**asked)
        split = checked.split or self._split
        return await self._served.play(self.reset, checked, split, await self._served.opened(split))

    async def step_async(self, action: GroundingAction, **_: Any) -> GroundingObservation:  # type: ignore[override]
        """Take a proposal or a stop."""
        return await self._served.play(self.step, action)

    def reset(self, asked: GroundingReset, split: str, dataset: Dataset) -> GroundingObservation:  # type: ignore[override]
        """As ``reset_async``; ``Refused`` for what cannot be done, with the reason."""
        if asked.index is not None and not 0 <= asked.index < len(dataset):
            raise Refused(f"index {asked.index}: {split} has samples 0 to {len(dataset) - 1}")
        initial = None if asked.initial_box is None else _array(asked.initial_box)
        if initial is not None and (why := boxes.invalid_reason(initial)):
            raise Refused(f"initial_box: {why}")
        if self._env is None or split != self._split:
            self._env, self._split = GroundingEnv(dataset=dataset, **self._served.kwargs), split
        self._encoding, self._episode_id = asked.encoding or self._encoding, asked.episode_id
        with self._served.turn:
            options = {"index": asked.index, "initial_box": initial}
            observation, info = self._env.reset(seed=asked.seed, options=options)
        return self._seen(observation, info, None, False, False)

    def step(self, action: GroundingAction) -> GroundingObservation:  # type: ignore[override]
        """As ``step_async``; ``Refused`` where no episode runs, or there is neither a box nor a stop."""
        if self._env is None or self._env.game is None:
            raise Refused("a step before any reset: send reset first")
        if self._env.game.over:
            raise Refused("the episode is over: send reset to begin another")
        if action.box is None and not action.stop:
            raise Refused("a step without an action: give a box, or stop 1")
        box = _array(action.box or [0.0] * 4)
        observation, reward, terminated, truncated, info = self._env.step({"box": box, "stop": int(action.stop)})
        return self._seen(observation, info, float(reward), terminated, truncated)

    def _seen(
        self, observation: Mapping[str, Any], info: Mapping[str, Any], reward: float | None, stopped: bool, cut: bool
    ) -> GroundingObservation:
        shown = {name: self._wire(value) for name, value in observation.items()}
        said = {name: self._wire(value) for name, value in info.items()} | {"terminated": stopped, "truncated": cut}
        return GroundingObservation(**shown, reward=reward, done=stopped or cut, metadata=said)

    def _wire(self, value: Any) -> Any:
        if not isinstance(value, np.ndarray | np.generic):
            return value
        if value.ndim < 3:
            return value.tolist()
        coded: Any = np.ascontiguousarray(value)
        if self._encoding == "png":
            file = io.BytesIO()
            # The least compression: a step waits for it, and most of a scene is flat colour.
            Image.fromarray(value).save(file, "PNG", compress_level=1)
            coded = file.getbuffer()
        data = base64.b64encode(coded).decode("ascii")
        return EncodedImage.model_construct(encoding=self._encoding, shape=value.shape, data=data)

    @property
    def state(self) -> GroundingState:
        """Where the session stands; also before the first reset."""
        served, played = self._served, {}
        if self._env is not None and (game := self._env.game) is not None:
            played = {name: getattr(game, name) for name in ("step_count", "terminated", "truncated")}
            played["sample_id"] = game.sample.sample_id
        session = {"split": self._split, "episode_id": self._episode_id}
        return GroundingState(env=served.env_id, kwargs=served.kwargs, **session, **played)

    def get_metadata(self) -> EnvironmentMetadata:
        """What is served."""
        about = "Iterative visual grounding: propose a box, see it drawn on the image, refine it or stop."
        return EnvironmentMetadata(name=self._served.env_id, description=about, version=ivt_env.__version__)

    # ---- the routes of tasks: each sample is one, and none of them tells its target ---------------

    def list_splits(self) -> list[str]:
        """The splits of the data set served."""
        return list(self._served.splits)

    async def num_tasks(self, split: str) -> int:
        """Samples of a split."""
        return len(await self._served.opened(split))

    async def list_tasks(self, split: str) -> list[dict[str, Any]]:
        """The first thousand samples of a split."""
        return await self.get_task_range(split)

    async def get_task(self, split: str, index: int) -> dict[str, Any]:
        """One sample; IndexError where there is none."""
        found = await self.get_task_range(split, max(index, 0), max(index, -1) + 1)
        return found[0]

    async def get_task_range(self, split: str, start: int | None = None, stop: int | None = None) -> list[Any]:
        """At most a thousand samples of a split."""
        dataset = await self._served.opened(split)

        def task(index: int) -> dict[str, Any]:
            with self._served.turn:
                sample = dataset[index]
            return {"id": sample.sample_id, "index": index, "split": split, "expression": sample.expression}

        return [await self._served.play(task, index) for index in range(len(dataset))[start:stop][:_MOST_TASKS]]


def _array(box: Sequence[float | None]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # an infinity is refused by the environment, with a reason
        return np.array(box, dtype=np.float32)  # None becomes NaN
