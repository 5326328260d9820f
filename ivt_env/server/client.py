"""The environment of a server as a Gymnasium environment of this process."""

from __future__ import annotations

import inspect
import ipaddress
import json
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, ClassVar
from urllib.parse import urlsplit

import gymnasium as gym
import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI
from websockets.sync.client import ClientConnection, connect

import ivt_env
from ivt_env.env import GroundingEnv
from ivt_env.grounding import Action, Observation, action_space, observation_space
from ivt_env.server.protocol import ENCODINGS, KWARGS, box_out, picture_in

_FLOAT32 = ("box", "window", "target")
_INT32 = ("extent", "closeup_extent")


class RemoteError(RuntimeError):
    """The server refused a message, or cannot be reached; ``code`` says which, for programs."""

    def __init__(self, code: str, message: str) -> None:
        """Keep both."""
        super().__init__(f"{message} ({code})")
        self.code = code


class RemoteEnv(gym.Env[Observation, Action]):
    """An environment that a server plays: observation for observation that of ``gym.make`` with the same keywords.

    The connection is made at once and the environment at the first ``reset``. ``render_mode`` is not offered.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}  # type: ignore[misc]

    def __init__(
        self,
        address: str,
        env_id: str = "IVT-Scenes-v0",
        *,
        encoding: str = "png",
        timeout: float = 60.0,
        **kwargs: Any,
    ) -> None:
        """Connect.

        Args:
            address: of the server, as it prints it: ``ws://127.0.0.1:8765/ws``.
            env_id: a registered id.
            encoding: of pictures on the way, ``png`` or ``raw``; the observations are the same. ``raw`` costs
                less time and more bytes: for the same machine or a fast network.
            timeout: seconds to wait for the connection and for each reply.
            **kwargs: of the environment: those of ``protocol.KWARGS``, and ``data_root`` where the server allows it.

        Raises:
            ValueError: for an unknown id, keyword or encoding.
            RemoteError: where the server cannot be reached. (A full one says so at the first reset.)
        """
        self._stack = ExitStack()
        if env_id not in ivt_env.IDS:
            raise ValueError(f"no environment {env_id!r}; there are {', '.join(ivt_env.IDS)}")
        if encoding not in ENCODINGS:
            raise ValueError(f"encoding {encoding!r}: choose {' or '.join(ENCODINGS)}")
        if unknown := sorted(kwargs.keys() - {*KWARGS, "data_root"}):
            raise ValueError(f"keyword {unknown[0]!r} does not travel; there are {', '.join(KWARGS)}")
        defaults = {name: p.default for name, p in inspect.signature(GroundingEnv).parameters.items()}
        whole = defaults | ivt_env.IDS[env_id] | kwargs
        self.observation_space = observation_space(whole["view"], whole["canvas"], whole["max_steps"])
        self.action_space = action_space()
        self._address, self._timeout = address, timeout
        self._asked = {"env": env_id, "kwargs": kwargs, "encoding": encoding}
        self._socket = self._connect()

    def _connect(self) -> ClientConnection:
        try:
            host = urlsplit(self._address).hostname or ""
            opened = connect(
                self._address,
                max_size=2**28,
                compression=None,
                open_timeout=self._timeout,
                close_timeout=2,
                ping_interval=None,
                # A proxy of the machine's settings would be asked for an address that only this machine knows.
                proxy=None if _is_loopback(host) else True,
            )
            return self._stack.enter_context(opened)
        except (OSError, TimeoutError, InvalidHandshake, InvalidURI, EOFError) as error:
            raise RemoteError("NOT_CONNECTED", f"no connection to {self._address}: {error}") from error

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode on the server; see ``GroundingEnv.reset``.

        Raises:
            RemoteError: where the server refuses, or the connection is lost.
        """
        super().reset(seed=seed)  # of np_random here, which Gymnasium's wrappers may draw from
        given = {name: _plain(value) for name, value in (options or {}).items()}
        if given.get("initial_box") is not None:
            given["initial_box"] = box_out(given["initial_box"])
        data = self._asked | {"seed": None if seed is None else int(seed), "options": given}
        reply = self._say({"type": "reset", "data": data}, "observation")
        return _observation(reply), _info(reply)

    def step(self, action: Action) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """One proposal or a stop, on the server.

        Raises:
            RemoteError: before the first reset, after the end of the episode, or where the connection is lost.
        """
        data = {"box": box_out(action["box"]), "stop": int(action["stop"])}
        reply = self._say({"type": "step", "data": data}, "observation")
        return _observation(reply), float(reply["reward"]), reply["terminated"], reply["truncated"], _info(reply)

    def state(self) -> dict[str, Any]:
        """What the server says of the session: ``step_count``, ``sample_id``, ``terminated`` and so on."""
        return self._say({"type": "state"}, "state")

    def close(self) -> None:
        """Say goodbye; the environment cannot be used afterwards."""
        try:
            self._socket.send(json.dumps({"type": "close"}))
        except (ConnectionClosed, OSError):
            pass
        self._stack.close()

    def _say(self, message: Mapping[str, Any], expected: str) -> dict[str, Any]:
        """Send a message and take its reply."""
        try:
            try:
                self._socket.send(json.dumps(message, allow_nan=False))
            except ConnectionClosed:
                pass  # the server may have said why before it closed
            text = self._socket.recv(self._timeout)
        except TimeoutError as error:
            self._stack.close()  # a late reply would be taken for the answer to the next message
            raise RemoteError("TIMEOUT", f"no reply from {self._address} within {self._timeout:g} s") from error
        except ConnectionClosed as error:
            raise RemoteError("CLOSED", f"{self._address} closed the connection: {error}") from error
        reply = json.loads(text)
        if reply["type"] == "error":
            raise RemoteError(reply["data"]["code"], reply["data"]["message"])
        if reply["type"] != expected:
            raise RemoteError("PROTOCOL", f"a reply of type {reply['type']!r} where {expected!r} was due")
        return dict(reply["data"])


def _observation(reply: Mapping[str, Any]) -> Observation:
    """An observation as the environment makes it, with its types."""
    return {name: _typed(name, value) for name, value in reply["observation"].items()}


def _info(reply: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _typed(name, value) for name, value in reply["info"].items()}


def _typed(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return picture_in(value)
    if name in _FLOAT32:
        return np.array(value, dtype=np.float32)
    if name in _INT32:
        return np.array(value, dtype=np.int32)
    return np.int64(value) if name == "step" else value


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
