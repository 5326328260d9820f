"""Servers in processes of their own, for tests and benchmarks."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent


def resident(process: subprocess.Popen[str]) -> int:
    """Memory of a process in bytes."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def started(words: list[str], port: int, cwd: Path, seconds: float = 120.0) -> subprocess.Popen[bytes]:
    """A Python process that listens on ``port``."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    output = (cwd / f"server-{port}.log").open("ab")
    server = subprocess.Popen([sys.executable, *words], cwd=cwd, env=environment, stdout=output, stderr=output)
    until = time.monotonic() + seconds
    while time.monotonic() < until and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return server
        except OSError:
            time.sleep(0.05)
    server.kill()
    raise RuntimeError((cwd / f"server-{port}.log").read_text()[-2000:])


def scripted(port: int, seconds: float, log: Path, *faults: str) -> subprocess.Popen[bytes]:
    return started([str(HERE / "scripted_server.py"), str(port), str(seconds), str(log), *faults], port, log.parent)


@contextmanager
def transformers_serve(model: str, cwd: Path) -> Iterator[str]:
    """The base address of transformers' own server, with one model."""
    port = free_port()
    server = started([str(HERE / "transformers_serve.py"), model, str(port)], port, cwd)
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.kill()
        server.wait()
