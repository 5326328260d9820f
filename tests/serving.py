"""A server in a thread of the tests' own process, and what its clients need."""

from __future__ import annotations

import json
import socket as sockets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from websockets.sync.client import ClientConnection, connect

from ivt_env.server.__main__ import make_server
from ivt_env.server.environment import Served
from ivt_env.server.gate import Limits

CANVAS = {"canvas": 64}


@contextmanager
def serving(env: str = "IVT-Scenes-v0", kwargs: dict[str, Any] | None = None, **limits: Any) -> Iterator[Any]:
    """A running server: ``address`` of its sessions, ``url`` of its routes, ``place`` for plain sockets."""
    listening = sockets.create_server(("127.0.0.1", 0), backlog=128)
    server = make_server(Served(env, kwargs=kwargs), Limits(**limits), origins=["https://allowed.example"])
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    place = listening.getsockname()
    held = SimpleNamespace(
        place=place,
        url=f"http://127.0.0.1:{place[1]}",
        address=f"ws://127.0.0.1:{place[1]}/ws",
        uvicorn=server,
        sessions=lambda: sum(server.config.app._clients.values()),
    )
    try:
        assert until(lambda: server.started)
        yield held
    finally:
        server.should_exit = True
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
        begun = say(socket, {"type": "reset", "data": {"seed": 1}})
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
