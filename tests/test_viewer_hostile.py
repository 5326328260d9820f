"""Whoever connects to the server of ``ivt view --serve`` and does not behave, the person at the browser is served.

In processes of their own, with sockets of this machine; bounded in number and time.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket as sockets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from server_processes import resident
from shown_episodes import made_up_episodes, photo_of
from test_viewer_command import started

from ivt_env.episodes import save_episodes

SECONDS = float(os.environ.get("IVT_SOAK_SECONDS", "2"))
LIMIT_BYTES = 300e6
SLOWEST_S, END_S = 1.0, 3.0

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")


@pytest.fixture
def viewer(tmp_path: Path) -> Iterator[Any]:
    """The command's process and where it listens."""
    save_episodes(tmp_path / "run", made_up_episodes(), photo_of)
    process, address = started(["view", "run", "--serve"], tmp_path)
    try:
        yield process, ("127.0.0.1", int(address.rstrip("/").rpartition(":")[2]))
    finally:
        process.kill()
        process.communicate()


def slowest_of(place: tuple[str, int], seconds: float) -> float:
    """The longest that an honest browser waited for a page or an image, on a new connection or a kept one."""
    end, slowest = time.monotonic() + seconds, 0.0
    while time.monotonic() < end:
        connection = http.client.HTTPConnection(*place, timeout=20)
        for path in ("/", "/image/0", "/episode?run=0&index=0"):
            begun = time.monotonic()
            connection.request("GET", path)
            reply = connection.getresponse()
            assert reply.status == 200 and reply.read()
            slowest = max(slowest, time.monotonic() - begun)
        connection.close()
    return slowest


def head(place: tuple[str, int], start: str = "GET /image/0") -> bytes:
    return f"{start} HTTP/1.1\r\nHost: {place[0]}:{place[1]}\r\n".encode()


def trickling(place: tuple[str, int], connection: sockets.socket) -> None:
    connection.sendall(head(place))
    while True:
        connection.sendall(b"X: 1\r\n")
        time.sleep(0.1)


def trickling_body(place: tuple[str, int], connection: sockets.socket) -> None:
    connection.sendall(head(place, "POST /act") + b"Content-Type: application/json\r\nContent-Length: 9000\r\n\r\n")
    while True:
        connection.sendall(b" ")
        time.sleep(0.1)


def silent(_: tuple[str, int], connection: sockets.socket) -> None:
    connection.recv(1)


def deaf(place: tuple[str, int], connection: sockets.socket) -> None:
    while True:
        connection.sendall((head(place) + b"\r\n") * 100)


def flooding(place: tuple[str, int], connection: sockets.socket) -> None:
    while True:
        connection.sendall((head(place, "GET /") + b"\r\n") * 10)
        connection.recv(1 << 20)


def verbose(place: tuple[str, int], connection: sockets.socket) -> None:
    connection.sendall(head(place) + (b"X: " + b"y" * 65_000 + b"\r\n") * 99)
    connection.recv(1)


@pytest.mark.parametrize(
    ("conduct", "many"),
    [(silent, 200), (trickling, 64), (trickling_body, 64), (deaf, 64), (verbose, 64), (flooding, 4)],
)
def test_those_who_misbehave_cost_neither_memory_nor_the_others_nor_a_timely_end(
    viewer: Any, conduct: Callable[..., None], many: int
) -> None:
    process, place = viewer
    over = threading.Event()

    def misbehave() -> None:
        for _ in range(50):  # closed, it comes back
            if over.is_set():
                return
            with contextlib.suppress(OSError), sockets.create_connection(place, timeout=2) as connection:
                conduct(place, connection)
            over.wait(0.2)

    threads = [threading.Thread(target=misbehave, daemon=True) for _ in range(many)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    slowest, memory = slowest_of(place, SECONDS), resident(process)
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    status = process.wait(20)
    ended = time.monotonic() - begun
    over.set()
    print(f"{conduct.__name__}: {slowest:.3f} s, {memory / 1e6:.0f} MB, ended in {ended:.2f} s")
    assert slowest < SLOWEST_S and memory < LIMIT_BYTES and ended < END_S and status == 143
    assert "Traceback" not in process.stderr.read()
    for thread in threads:
        thread.join(20)
