"""The environment of a server as a Gymnasium environment of this process."""

from __future__ import annotations

import base64
import inspect
import json
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.sync.client import connect

from ivt_env.data.images import read_image
from ivt_env.env import GroundingEnv
from ivt_env.grounding import DTYPES, Action, Observation, action_space, observation_space
from ivt_env.rendering import Overlay
from ivt_env.rewards import from_options

_TYPES = DTYPES | {"target": np.float32}


class RemoteError(RuntimeError):
    """The server refused something, or cannot be reached."""


class RemoteEnv(gym.Env[Observation, Action]):
    """An environment that a server plays: observation for observation that of ``gym.make`` with the same keywords.

    What is played is the server's to say. The connection is made at once. ``render_mode`` is not offered.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}  # type: ignore[misc]

    def __init__(self, address: str, split: str | None = None, *, encoding: str = "png", timeout: float = 60.0) -> None:
        """Connect.

        Args:
            address: of the server, as it prints it: ``http://127.0.0.1:8765``.
            split: of its data set; None: the one that it plays by default.
            encoding: of images on the way, ``png`` or ``raw``; the observations are the same. ``raw`` costs
                less time and more bytes: for the same machine or a fast network.
            timeout: seconds to wait for the connection and for each reply.

        Raises:
            RemoteError: where the server cannot be reached, or has no place.
        """
        self._chosen = {"encoding": encoding} | ({} if split is None else {"split": split})
        self._address, self._timeout, self._stack = address, timeout, ExitStack()
        at = f"{address.replace('http', 'ws', 1).rstrip('/')}/ws"
        options: dict[str, Any] = {"max_size": 2**28, "compression": None, "ping_interval": None}
        try:
            # Not OpenEnv's client: it opens another session where one is lost, and the draws of samples begin anew.
            self._socket = self._stack.enter_context(connect(at, open_timeout=timeout, close_timeout=2, **options))
        except (OSError, TimeoutError, WebSocketException, EOFError) as error:
            said = error.response.body.decode(errors="replace") if isinstance(error, InvalidStatus) else ""
            raise RemoteError(f"no connection to {address}: {said or error}") from error
        made = self.state()
        keywords = {name: p.default for name, p in inspect.signature(GroundingEnv).parameters.items()} | made["kwargs"]
        self.env_id = made["env"]
        trail = from_options(Overlay, "overlay", keywords["overlay"]).trail
        self.observation_space = observation_space(keywords["view"], keywords["canvas"], keywords["max_steps"], trail)
        self.action_space = action_space()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode on the server; see ``GroundingEnv.reset``.

        Raises:
            RemoteError: where the server refuses, or the connection is lost.
        """
        super().reset(seed=seed)  # of np_random here, which Gymnasium's wrappers may draw from
        reply = self._ask("reset", self._chosen | (options or {}) | {"seed": seed})
        return _typed(reply["observation"]), _typed(reply["metadata"])

    def step(self, action: Action) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """One proposal or a stop, on the server.

        Raises:
            RemoteError: before the first reset, after the end of the episode, or where the connection is lost.
        """
        reply = self._ask("step", {"box": action["box"], "stop": int(action["stop"])})
        info = reply["metadata"]
        return _typed(reply["observation"]), float(reply["reward"]), info["terminated"], info["truncated"], _typed(info)

    def state(self) -> dict[str, Any]:
        """What the server says of the session: ``step_count``, ``sample_id``, ``terminated`` and so on."""
        return self._ask("state")

    def close(self) -> None:
        """Say goodbye; the environment cannot be used afterwards."""
        self._stack.close()

    def _ask(self, kind: str, data: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Send a message and take its reply."""
        message = {"type": kind} | ({} if data is None else {"data": data})
        try:
            with suppress(ConnectionClosed):  # the server may have said why before it closed
                self._socket.send(json.dumps(message, default=lambda value: value.tolist()))
            reply = json.loads(self._socket.recv(self._timeout))
        except TimeoutError as error:
            self.close()  # a late reply would be taken for the answer to the next message
            raise RemoteError(f"no reply from {self._address} within {self._timeout:g} s") from error
        except ConnectionClosed as error:
            raise RemoteError(f"{self._address} closed the connection: {error}") from error
        if reply["type"] == "error":
            why = reply["data"].get("errors") or ""
            raise RemoteError(f"{self._address}: {reply['data']['message']} {why}".rstrip())
        return dict(reply["data"])


def _typed(values: Mapping[str, Any]) -> dict[str, Any]:
    """An observation or an info as the environment makes it, with its types."""

    def typed(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return image_in(value)
        return np.array(value, dtype=_TYPES[name])[()] if name in _TYPES else value

    return {k: typed(k, v) for k, v in values.items() if k not in ("metadata", "terminated", "truncated")}


def image_in(value: Mapping[str, Any]) -> NDArray[np.uint8]:
    """An image (height, width, 3) of an observation; ValueError for one of another size than it states."""
    coded, shape = base64.b64decode(value["data"]), tuple(value["shape"])
    if value["encoding"] == "raw":
        return np.frombuffer(coded, dtype=np.uint8).reshape(shape).copy()
    return read_image(coded, "the server's image", shape[:2])
