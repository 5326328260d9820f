"""One client's environment: messages in, replies out, no sockets.

Data sets are loaded once and shared by all sessions; everything else belongs to one session alone.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import ivt_env
from ivt_env.data import load_dataset
from ivt_env.data.sample import DataError, DataMissingError, Dataset
from ivt_env.env import GroundingEnv
from ivt_env.server.protocol import (
    ENCODINGS,
    KWARGS,
    Limits,
    Message,
    ProtocolError,
    _shown,
    check_keys,
    observation_out,
    plain,
    read_action,
    read_options,
    read_seed,
)

log = logging.getLogger("ivt_env.server")

_KINDS = {str: "a string", bool: "true or false", int: "an integer"}


@dataclass(eq=False)
class _Slot:
    """A data set, and who may use it: what reads files need not be ready for several threads."""

    lock: Any = field(default_factory=Lock)
    dataset: Dataset | None = None


class SharedDatasets:
    """Data sets by what names them; the one that was not asked for longest goes when there are too many."""

    def __init__(self, most: int = 8) -> None:
        """With none loaded; ``most`` are kept."""
        self._most = most
        self._lock = Lock()
        self._slots: OrderedDict[tuple[Any, ...], _Slot] = OrderedDict()

    def slot(self, name: str, split: str, data_root: str | None, strict: bool) -> _Slot:
        """The loaded data set.

        Raises:
            DataError: as ``load_dataset``; nothing is kept then.
        """
        key = (name, split, data_root, strict)
        with self._lock:
            slot = self._slots.setdefault(key, _Slot())
            self._slots.move_to_end(key)
        try:
            with slot.lock:
                if slot.dataset is None:
                    slot.dataset = load_dataset(name, split, data_root, strict)
        except BaseException:
            with self._lock:
                self._slots.pop(key, None)
            raise
        with self._lock:
            while len(self._slots) > self._most:
                self._slots.popitem(last=False)
        return slot


@dataclass(frozen=True)
class Offer:
    """What the operator of a server offers."""

    envs: Sequence[str] = tuple(ivt_env.IDS)
    """Ids that may be asked for; the first of them, or ``IVT-Scenes-v0`` if it is there, is the default."""
    allow_data_root: bool = False
    """A client may name folders of this machine to read data sets from."""
    limits: Limits = field(default_factory=Limits)
    datasets: SharedDatasets = field(default_factory=SharedDatasets)

    def __post_init__(self) -> None:
        """Refuse ids that are not registered.

        Raises:
            ValueError: names the id.
        """
        for env in self.envs:
            if env not in ivt_env.IDS:
                raise ValueError(f"no environment {env!r}; there are {', '.join(ivt_env.IDS)}")
        if not self.envs:
            raise ValueError("no environment is offered: name at least one")

    @property
    def default(self) -> str:
        """The id for clients that name none."""
        return "IVT-Scenes-v0" if "IVT-Scenes-v0" in self.envs else self.envs[0]


class Session:
    """The environment of one connection."""

    def __init__(self, offer: Offer) -> None:
        """Without an environment; the first reset makes it."""
        self._offer = offer
        self._env: GroundingEnv | None = None
        self._slot = _Slot()
        self._asked: dict[str, Any] = {}
        self._encoding = "png"
        self._episode_id: str | None = None

    def handle(self, message: Message) -> dict[str, Any]:
        """The reply to a reset, a step or a question for the state.

        Raises:
            ProtocolError: for what cannot be done; the session can go on.
        """
        if message.type == "reset":
            return self._reset(message.data)
        if message.type == "step":
            return self._step(message.data)
        return self._state()

    def close(self) -> None:
        """Let go of the environment."""
        if self._env is not None:
            self._env.close()
        self._env = None

    def _reset(self, data: Mapping[str, Any]) -> dict[str, Any]:
        seed, options = read_seed(data.get("seed")), read_options(data.get("options"))
        encoding = data.get("encoding", self._encoding)
        if encoding not in ENCODINGS:
            raise ProtocolError("VALIDATION_ERROR", f"encoding {_shown(encoding)}: choose {' or '.join(ENCODINGS)}")
        episode_id = data.get("episode_id")
        if episode_id is not None and (not isinstance(episode_id, str) or len(episode_id) > 255):
            raise ProtocolError("VALIDATION_ERROR", "episode_id: give a string of at most 255 characters")
        env = self._environment(data)
        try:
            with self._slot.lock:
                observation, info = env.reset(seed=seed, options=options)
        except DataError as error:
            raise _data_error(error) from error
        except ValueError as error:
            raise ProtocolError("VALIDATION_ERROR", str(error)) from error
        self._encoding, self._episode_id = encoding, episode_id
        return self._reply(observation, None, False, False, info)

    def _environment(self, data: Mapping[str, Any]) -> GroundingEnv:
        """The environment that a reset asks for: the one in use, unless it asks for another."""
        kept = self._env is not None and not {"env", "kwargs"} & data.keys()
        name = data.get("env", self._asked.get("env", self._offer.default))
        kwargs = data.get("kwargs", {})
        if not isinstance(name, str) or name not in self._offer.envs:
            raise ProtocolError(
                "UNKNOWN_ENV", f"no environment {_shown(name)}; there are {', '.join(self._offer.envs)}"
            )
        if not isinstance(kwargs, dict):
            raise ProtocolError("VALIDATION_ERROR", f"kwargs {_shown(kwargs)}: give an object")
        asked = {"env": name, "kwargs": kwargs}
        if self._env is not None and (kept or asked == self._asked):
            return self._env
        slot, env = self._make(name, kwargs)
        self.close()
        self._env, self._slot, self._asked = env, slot, asked
        return env

    def _make(self, name: str, kwargs: Mapping[str, Any]) -> tuple[_Slot, GroundingEnv]:
        if "data_root" in kwargs and not self._offer.allow_data_root:
            raise ProtocolError("VALIDATION_ERROR", "data_root is the operator's to set (--allow-data-root)")
        check_keys(kwargs, (*KWARGS, "data_root"), "kwargs")
        given: dict[str, Any] = (
            {"split": "train", "data_root": None, "strict": False} | ivt_env.IDS[name] | dict(kwargs)
        )
        for key, kind in (("split", str), ("strict", bool), ("max_steps", int), ("canvas", int), ("view", str)):
            if key in given and type(given[key]) is not kind:
                raise ProtocolError("VALIDATION_ERROR", f"{key} {_shown(given[key])}: give {_KINDS[kind]}")
        if given["data_root"] is not None and not isinstance(given["data_root"], str):
            raise ProtocolError("VALIDATION_ERROR", f"data_root {_shown(given['data_root'])}: give a folder")
        for key, most in (("max_steps", self._offer.limits.max_steps), ("canvas", self._offer.limits.max_canvas)):
            if given.get(key, 0) > most:
                raise ProtocolError("LIMIT", f"{key} {given[key]}: this server allows at most {most}")
        dataset = given.pop("dataset")
        where = [given.pop(key) for key in ("split", "data_root", "strict")]
        try:
            slot = self._offer.datasets.slot(dataset, *where)
            assert slot.dataset is not None
            return slot, GroundingEnv(dataset=slot.dataset, **given)
        except DataError as error:
            raise _data_error(error) from error
        except (ValueError, TypeError) as error:
            raise ProtocolError("VALIDATION_ERROR", str(error)) from error

    def _step(self, data: Mapping[str, Any]) -> dict[str, Any]:
        action = read_action(data)
        env = self._env
        if env is None or env.game is None:
            raise ProtocolError("NO_EPISODE", "a step before any reset: send reset first")
        if env.game.over:
            raise ProtocolError("EPISODE_OVER", "the episode is over: send reset to begin another")
        observation, reward, terminated, truncated, info = env.step(action)
        return self._reply(observation, float(reward), terminated, truncated, info)

    def _reply(
        self, observation: Mapping[str, Any], reward: float | None, terminated: bool, truncated: bool, info: Any
    ) -> dict[str, Any]:
        return {
            "type": "observation",
            "data": {
                "observation": observation_out(observation, self._encoding),
                "reward": reward,
                "done": terminated or truncated,
                "terminated": terminated,
                "truncated": truncated,
                "info": {name: plain(value) for name, value in info.items()},
            },
        }

    def _state(self) -> dict[str, Any]:
        game = None if self._env is None else self._env.game
        return {
            "type": "state",
            "data": {
                "episode_id": self._episode_id,
                "step_count": 0 if game is None else game.step_count,
                "env": self._asked.get("env"),
                "kwargs": self._asked.get("kwargs", {}),
                "sample_id": None if game is None else game.sample.sample_id,
                "terminated": game is not None and game.terminated,
                "truncated": game is not None and game.truncated,
            },
        }


def _data_error(error: DataError) -> ProtocolError:
    """For a client: whole where it names no folder of this machine, else the log has it."""
    log.warning("data: %s", error)
    if isinstance(error, DataMissingError):
        return ProtocolError("DATA_MISSING", "the data set is not on the server; its log says where it was looked for")
    text = str(error)
    hidden = "/" in text or "\\" in text
    return ProtocolError("DATA_ERROR", "the data cannot be used; the server's log has the details" if hidden else text)
