"""A local server for pages of large runs: episodes and images are sent when they are looked at.

It listens on 127.0.0.1 alone and answers only requests that name this address as their host, so that
no other page in the browser can reach it under a name of its own. It opens no file by name: episodes
and images are asked for by number.
"""

from __future__ import annotations

import json
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from ivt_env.data.sample import DataError, DataMissingError, ImageArray
from ivt_env.episodes import Episode
from ivt_env.viewer.page import image_jpeg, page_parts
from ivt_env.viewer.rows import Content, details

_ADDRESS = "127.0.0.1"
_KEPT_IMAGES = 64
_MOST_CONNECTIONS = 64
_LONGEST_QUERY = 1000
_LONGEST_BODY = 10_000
"""Bytes of a request's body: a box is a hundred."""
_LONGEST_HEAD = 65_536
"""Bytes of a request's first line and headers together."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What goes back to the browser."""

    body: bytes
    kind: str = "application/json"
    status: int = 200
    keep: bool = False
    """Whether the browser may keep it."""


class Refused(Exception):
    """A request that cannot be answered: its HTTP status and why."""

    def __init__(self, status: int, why: str) -> None:
        """Say why."""
        super().__init__(why)
        self.status = status


class ViewApp:
    """The page of ``ivt view``, and what it asks for while someone looks; called from several threads."""

    def __init__(
        self,
        runs: Mapping[str, Sequence[Episode]],
        image_of: Callable[[Episode], ImageArray],
        title: str,
        max_image_side: int = 2560,
    ) -> None:
        """Set up, from the episodes by the name of their run; the other arguments are those of ``write_page``."""
        self.content = Content(runs)
        self.names = list(self.content.runs)
        self.title, self.image_of, self.side = title, image_of, max_image_side
        self.version = secrets.token_hex(8)
        self._image = lru_cache(maxsize=_KEPT_IMAGES)(self._encoded)

    def get(self, path: str, query: Mapping[str, str]) -> Reply:
        """``/``, ``/episode?run=&index=``, ``/image/N`` and ``/search?run=&query=``; ``Refused`` for all else."""
        if path == "/":
            return Reply(self._page, "text/html; charset=utf-8")
        if path.startswith("/image/"):
            number = _number(path.removeprefix("/image/"), len(self.content.images), "image")
            return Reply(self._image(number), "image/jpeg", keep=True)
        if path not in ("/episode", "/search"):
            raise Refused(404, "There is no such page here.")
        name = self.names[_number(query.get("run", ""), len(self.names), "run")]
        if path == "/episode":
            run = self.content.runs[name]
            return as_reply(details(run[_number(query.get("index", ""), len(run), "index")]))
        wanted = query.get("query", "")
        if len(wanted) > _LONGEST_QUERY:
            raise Refused(400, f"A search of more than {_LONGEST_QUERY} characters.")
        return as_reply(self.content.search(name, wanted))

    def post(self, path: str, token: str, message: Any) -> Reply:
        """Nothing: this page only shows. ``message`` is whatever JSON the browser sent."""
        raise Refused(405, "This page only shows.")

    @cached_property
    def _page(self) -> bytes:
        return self.page().encode("utf-8", "xmlcharrefreplace")

    def page(self) -> str:
        """The page itself, without the details and images of its episodes."""
        content = {"runs": self.content.overview(), "version": self.version}
        return "".join(page_parts(self.title, self.content.served(), content, from_server=True))

    def _encoded(self, number: int) -> bytes:
        episode = self.content.images[number]
        try:
            return image_jpeg(self.image_of(episode), episode, self.side)
        except DataError as error:
            raise Refused(404 if isinstance(error, DataMissingError) else 500, str(error)) from error


class LocalServer(ThreadingHTTPServer):
    """``app`` on a port of this machine; ``serve_forever`` answers, ``url`` says where."""

    daemon_threads = True
    # Where more come at once, the system lets them wait a whole second before they may try again.
    request_queue_size = 512

    def __init__(self, app: ViewApp, port: int = 0) -> None:
        """Listen on ``port``, or on any that is free (0); ValueError for a port that is taken or cannot be had."""
        self.app = app
        self._free = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        self._moved: dict[Any, None] = {}
        try:
            super().__init__((_ADDRESS, port), _Handler)
        except (OSError, OverflowError) as error:
            raise ValueError(f"--port {port}: cannot listen there ({error}); give another, or 0 for any") from error

    @property
    def url(self) -> str:
        """The address to open in a browser."""
        return f"http://{_ADDRESS}:{self.server_port}/"

    def serve(self, what: str) -> None:
        """Serve ``what``, in words, until Ctrl-C, which is how it is meant to end; standard output gets the address."""
        print(self.url, flush=True)
        print(f"{what}; only this machine can open the address; Ctrl-C ends", file=sys.stderr, flush=True)
        with self:
            try:
                self.serve_forever(poll_interval=0.2)
            except KeyboardInterrupt:
                print(file=sys.stderr)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Hand a connection to a thread; where there are too many, the one that stood still for longest is closed."""
        if not self._free.acquire(blocking=False):
            with suppress(StopIteration, RuntimeError, OSError):  # its thread may end it at the same time
                stillest = next(iter(self._moved))
                self._moved.pop(stillest, None)
                stillest.shutdown(socket.SHUT_RDWR)
            if not self._free.acquire(timeout=0.5):
                self.shutdown_request(request)
                return
        self.moves(request)
        super().process_request(request, client_address)

    def moves(self, request: Any) -> None:
        """A connection was opened, its request has arrived, or its answer has been received."""
        self._moved.pop(request, None)
        self._moved[request] = None

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer on a connection until it ends."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._moved.pop(request, None)
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Show an error, unless the browser left in the middle of a reply or the server closed the connection.

        SIGTERM that arrives while a thread is being started closes the connection of that thread.
        """
        closed = request.fileno() < 0
        if not closed and not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Head:
    """What a connection sends, read as far as a request's head may be long."""

    def __init__(self, file: Any) -> None:
        self._file, self.left = file, 0
        self.read, self.close = file.read, file.close

    def readline(self, limit: int) -> bytes:
        line: bytes = self._file.readline(min(limit, self.left))
        self.left -= len(line)
        if not self.left:
            raise ConnectionError("a request's head is too long")
        return line


class _Handler(BaseHTTPRequestHandler):
    server: LocalServer  # type: ignore[assignment]
    protocol_version = "HTTP/1.1"
    timeout = 20  # seconds without a word from the other side, or to receive an answer
    server_version, sys_version = "ivt", ""

    def setup(self) -> None:
        super().setup()
        self.rfile: Any = _Head(self.rfile)

    def handle_one_request(self) -> None:
        self.rfile.left = _LONGEST_HEAD
        self.server.moves(self.connection)
        super().handle_one_request()

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _get(self) -> Reply:
        self.server.moves(self.connection)
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query, max_num_fields=10).items()}
        return self.server.app.get(parts.path, query)

    def _post(self) -> Reply:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or not length.isascii() or int(length) > _LONGEST_BODY:
            self.close_connection = True  # its body is still on the way
            raise Refused(413, f"Send at most {_LONGEST_BODY} bytes and say how many.")
        body = self.rfile.read(int(length))
        self.server.moves(self.connection)
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "Send JSON.")
        try:
            message = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"This is not JSON: {error}") from error
        return self.server.app.post(urlsplit(self.path).path, self.headers.get("X-IVT-Token", ""), message)

    def _answer(self, work: Callable[[], Reply]) -> None:
        # Else a page elsewhere could point a name of its own at this machine and read along.
        host = self.headers.get("Host", "")
        try:
            if host not in (f"{_ADDRESS}:{self.server.server_port}", f"localhost:{self.server.server_port}"):
                self.close_connection = True
                raise Refused(403, f"This server answers only as {self.server.url}")
            reply = work()
        except (Refused, ValueError) as error:  # a ValueError is of the query, or of what a data set holds
            status = error.status if isinstance(error, Refused) else 400
            reply = Reply(str(error).encode("utf-8", "replace"), "text/plain; charset=utf-8", status)
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.kind)
        self.send_header("Content-Length", str(len(reply.body)))
        self.send_header("Cache-Control", "private, max-age=3600" if reply.keep else "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Content-Security-Policy", "frame-ancestors 'none'")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(reply.body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line for each image would bury what matters."""


def as_reply(value: Any) -> Reply:
    """``value`` as JSON."""
    return Reply(json.dumps(value, allow_nan=False).encode("ascii"))


def _number(text: str, below: int, what: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 12 or int(text) >= below:
        raise Refused(404, f"There is no {what} {text[:40]!r} here: give a number below {below}.")
    return int(text)
