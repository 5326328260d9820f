"""A server in a thread of the tests' own process, and what its clients need."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from websockets.sync.client import ClientConnection, connect

from ivt_env.server.app import GroundingServer, Settings
from ivt_env.server.protocol import Limits
from ivt_env.server.session import Offer


@contextmanager
def serving(*, envs: tuple[str, ...] | None = None, allow_data_root: bool = False, **limits: Any) -> Iterator[Any]:
    """A running ``GroundingServer``."""
    given = {} if envs is None else {"envs": envs}
    settings = Settings(port=0, offer=Offer(allow_data_root=allow_data_root, limits=Limits(**limits), **given))
    started, ended = threading.Event(), asyncio.Event()
    held: dict[str, Any] = {}

    async def serve() -> None:
        async with GroundingServer(settings) as server:
            held.update(server=server, loop=asyncio.get_running_loop())
            started.set()
            await ended.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert started.wait(20)
    try:
        yield held["server"]
    finally:
        held["loop"].call_soon_threadsafe(ended.set)
        thread.join(20)
        assert not thread.is_alive(), "the server did not stop"


def raw(address: str, **options: Any) -> ClientConnection:
    """A connection that says whatever a test likes; to be used in a with statement."""
    return connect(address, compression=None, max_size=2**28, proxy=None, close_timeout=2, **options)


def say(socket: ClientConnection, message: Any) -> dict[str, Any]:
    """Send a text, or an object as JSON, and read the reply."""
    socket.send(message if isinstance(message, str | bytes) else json.dumps(message))
    return json.loads(socket.recv(timeout=30))


def plays(address: str) -> bool:
    """Whether a new client can play a whole episode of one action."""
    with raw(address) as socket:
        begun = say(socket, {"type": "reset", "data": {"seed": 1, "kwargs": {"canvas": 64}}})
        ended = say(socket, {"type": "step", "data": {"stop": 1}})
        socket.send('{"type": "close"}')
    return begun["type"] == ended["type"] == "observation" and ended["data"]["done"]


def until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return condition()
