"""A server on the loopback address that gives files, as badly as a test asks for."""

from __future__ import annotations

import hashlib
import http.server
import io
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image

from ivt_env.data import fetch

CONTENT = bytes(range(256)) * 4096  # 1 MiB


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@dataclass
class Served:
    """One address: what it gives, and how badly."""

    content: bytes = b""
    etag: str | None = '"one"'
    last_modified: str | None = None
    ranges: bool = True
    """Whether Range is honoured."""
    if_range: bool = True
    """Whether If-Range is."""
    length: bool = True
    """Whether Content-Length is told."""
    faults: list = field(default_factory=list)
    """One per request: a status, ("cut", bytes), ("stall", bytes) or None."""
    headers: dict = field(default_factory=dict)


class Server:
    """A loopback HTTP server; ``files`` may be changed while it runs, ``log`` holds (method, path, headers)."""

    def __init__(self):
        self.files: dict[str, Served] = {}
        self.log: list[tuple[str, str, dict]] = []
        self.sent = Counter()
        self.ending = threading.Event()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_HEAD(self):
                server.answer(self, body=False)

            def do_GET(self):
                server.answer(self, body=True)

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def answer(self, handler, body):
        self.log.append((handler.command, handler.path, dict(handler.headers)))
        served = self.files.get(handler.path)
        if served is None:
            handler.send_error(404)
            return
        fault = served.faults.pop(0) if served.faults else None
        start, status = 0, 200
        asked = handler.headers.get("Range")
        valid = handler.headers.get("If-Range")
        if asked and served.ranges and (not served.if_range or valid in (None, served.etag, served.last_modified)):
            start, status = int(asked.removeprefix("bytes=").split("-")[0]), 206
            if start >= len(served.content):
                status = 416
        if isinstance(fault, int):
            status = fault
        handler.send_response(status)
        for name, value in served.headers.items():
            handler.send_header(name, value)
        content = served.content[start:] if status in (200, 206) else b""
        if status == 416:
            handler.send_header("Content-Range", f"bytes */{len(served.content)}")
        if status == 206:
            handler.send_header("Content-Range", f"bytes {start}-{len(served.content) - 1}/{len(served.content)}")
        if served.etag:
            handler.send_header("ETag", served.etag)
        if served.last_modified:
            handler.send_header("Last-Modified", served.last_modified)
        if served.length:
            handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        if not body:
            return
        if isinstance(fault, tuple):
            content = content[: fault[1]]
        self.sent[handler.path] += len(content)  # before the client can have it all and look
        try:
            handler.wfile.write(content)
            handler.wfile.flush()
        except ConnectionError:
            self.sent[handler.path] -= len(content)  # the client has what it wants
            return
        if isinstance(fault, tuple) and fault[0] == "stall":
            self.ending.wait(20)

    def requests(self, path):
        return [headers for method, p, headers in self.log if p == path and method == "GET"]

    def close(self):
        self.ending.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def server(monkeypatch):
    """A server, for downloads with little patience."""
    monkeypatch.setenv("no_proxy", "*")
    for name, value in {"ATTEMPTS": 3, "FIRST_WAIT_S": 0.0, "TIMEOUT_S": 5.0}.items():
        monkeypatch.setattr(fetch, name, value)
    running = Server()
    yield running
    running.close()


def leftovers(folder):
    return sorted(p.name for p in Path(folder).iterdir())


# --- One file -------------------------------------------------------------------------------------


def jpeg(shade):
    file = io.BytesIO()
    Image.new("RGB", (32, 24), (shade, 80, 90)).save(file, "JPEG")
    return file.getvalue()
