"""What stands between a network and OpenEnv's server: limits on size, time and number, for every kind of client.

uvicorn bounds the size of a message and of headers. It bounds neither the time that a request may take to arrive or a
reply to be received, nor frames that are no messages, nor who may connect. That is done here: in its two protocols
for what has to do with a connection, in a middleware (``Gate``) for requests and messages.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any, cast
from urllib.parse import urlsplit

from starlette.responses import PlainTextResponse
from starlette.websockets import WebSocketDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

log = logging.getLogger("ivt_env.server")

PATH = "/ws"
"""Where sessions are opened."""
_MOST_WAITING = 128
"""Connections without a session; of more the oldest is closed, so that those who say nothing keep nobody out."""
_FRAMES, _FRAMES_PER_SECOND = 64.0, 4.0
"""Pings, pongs and parts of messages that a client may send at once, and on end."""
_MOST_QUEUED = 64
"""Messages that a client may send without waiting for their replies."""
_PIECE = 4096
"""Bytes that are read of one client before it is judged: some hundred of the smallest frames."""


def _limit(default: float, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Limits:
    """What the server allows."""

    max_sessions: int = _limit(64, "sessions at once, that is WebSockets")
    max_sessions_per_client: int = _limit(16, "sessions at once from one address")
    session_seconds: float = _limit(6 * 3600.0, "longest life of a session")
    idle_seconds: float = _limit(600.0, "longest wait for a client's next message; pings are none")
    reply_seconds: float = _limit(20.0, "longest time a client may take to receive a reply, or to make a request")
    max_message_bytes: int = _limit(64 * 1024, "largest message of a client, or body of a request")

    def __post_init__(self) -> None:
        """Refuse bounds that admit nothing."""
        for one in fields(self):
            if not getattr(self, one.name) > 0:
                raise ValueError(f"{one.name} is {getattr(self, one.name)}: give a number above 0")


class Plain(H11Protocol):
    """A connection that is no session: one request, answered within some seconds, or a session is opened."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        gate = cast(Gate, self.config.app)
        self._waiting, self._late = gate.waiting, self.loop.call_later(gate.limits.reply_seconds, transport.abort)
        if len(self._waiting) >= _MOST_WAITING:
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
            oldest.abort()
        self._waiting[transport] = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._settled()
        super().connection_lost(exc)

    def handle_websocket_upgrade(self, event: Any) -> None:
        self._settled()
        super().handle_websocket_upgrade(event)

    def _settled(self) -> None:
        self._waiting.pop(self.transport, None)
        self._late.cancel()


class Socket(WebSocketsSansIOProtocol):
    """A session's connection: whoever floods it, or does not read, is cut off."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._allowed, self._counted = _FRAMES, self.loop.time()
        super().connection_made(transport)
        self.transport.set_write_buffer_limits(high=0)  # any byte that is not received makes it wait

    def data_received(self, data: bytes) -> None:
        # In pieces, because a read of a quarter of a megabyte can hold forty thousand frames.
        for start in range(0, len(data), _PIECE):
            if not self.transport.is_closing():
                super().data_received(data[start : start + _PIECE])
                if self.queue.qsize() > _MOST_QUEUED:
                    self._cut()

    def handle_ping(self) -> None:
        self._count()
        super().handle_ping()

    def handle_pong(self, event: Any) -> None:
        self._count()
        super().handle_pong(event)

    def handle_cont(self, event: Any) -> None:
        self._count()
        super().handle_cont(event)

    def _count(self) -> None:
        """Count a frame that is not a message."""
        now = self.loop.time()
        self._allowed = min(_FRAMES, self._allowed + (now - self._counted) * _FRAMES_PER_SECOND) - 1
        self._counted = now
        if self._allowed < 0:
            self._cut()

    def _cut(self) -> None:
        self.disconnected = True  # nothing more is written: asyncio would log each try
        raise ConnectionAbortedError("frames on end")  # asyncio drops the connection and all that came with it

    def pause_writing(self) -> None:
        super().pause_writing()
        seconds = cast(Gate, self.config.app).limits.reply_seconds
        self._deaf = self.loop.call_later(seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._deaf.cancel()


Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class Gate:
    """Who may come in, and how long a session lasts."""

    def __init__(self, app: Any, limits: Limits, names: Collection[str] = (), origins: Collection[str] = ()) -> None:
        """Before an application.

        Args:
            app: the application.
            limits: what is allowed.
            names: of this machine, beside ``localhost`` and addresses in numbers, under which it answers.
            origins: web pages that may connect, as ``https://example.org``. Programs send no origin.
        """
        self._app, self.limits = app, limits
        self.waiting: dict[asyncio.Transport, None] = {}
        self._names, self._origins = {"localhost", *names}, set(origins)
        self._clients: Counter[str] = Counter()

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Answer a request or serve a session."""
        try:
            if scope["type"] != "lifespan" and (refusal := self._refusal(scope)) is not None:
                await PlainTextResponse(f"{refusal[1]}\n", refusal[0])(scope, receive, send)
            elif scope["type"] == "websocket":
                await self._session(scope, receive, send)
            else:
                await self._app(scope, receive, send)
        except Exception:
            log.exception("a request failed")
            raise

    def _refusal(self, scope: Any) -> tuple[int, str] | None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        # Else a page elsewhere could point a name of its own at this machine and read along.
        host = headers.get("host", "")
        if not self._is_ours(host):
            return 403, f"this server does not answer as {host[:100]!r}: start it with --allow-host to change that"
        if headers.get("origin") not in {None, *self._origins}:
            return 403, "web pages may not connect: start the server with --origin to allow one"
        if scope["type"] == "websocket":
            each, client = self.limits.max_sessions_per_client, scope["client"][0]
            if scope["path"] != PATH:
                return 404, f"nothing here; sessions are opened at {PATH}"
            if self._clients[client] >= each:
                return 503, f"{client} has {each} sessions, which is the limit for one client; close one"
        elif "transfer-encoding" in headers:
            return 411, "say how long the body is"
        elif int(headers.get("content-length", 0)) > self.limits.max_message_bytes:
            return 413, f"send at most {self.limits.max_message_bytes} bytes"
        return None

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            return name in self._names or bool(ipaddress.ip_address(name))
        except ValueError:
            return False

    async def _session(self, scope: Any, receive: Receive, send: Send) -> None:
        end, client = time.monotonic() + self.limits.session_seconds, scope["client"][0]

        async def timely() -> Any:
            """The next message that is a JSON object; what is none is answered here."""
            while True:
                left = end - time.monotonic()
                try:
                    async with asyncio.timeout(min(left, self.limits.idle_seconds)):
                        message = await receive()
                except TimeoutError:
                    idle = left > self.limits.idle_seconds
                    why = f"no message in {self.limits.idle_seconds:g} s" if idle else "its time is over"
                    await send(_error("SESSION_ERROR", f"the session ends: {why}"))
                    await send({"type": "websocket.close", "code": 1008, "reason": why})
                    return {"type": "websocket.disconnect", "code": 1008}
                unreadable = _unreadable(message.get("text")) if message["type"] == "websocket.receive" else None
                if unreadable is None:
                    return message
                await send(_error("INVALID_JSON", unreadable))

        self._clients[client] += 1
        try:
            # The framework answers what fails in a session, and itself fails where the client has left.
            with suppress(WebSocketDisconnect, RuntimeError, OSError):
                await self._app(scope, timely, send)
        finally:
            self._clients[client] -= 1
            self._clients += Counter()  # without those that are at 0


def _error(code: str, message: str) -> dict[str, str]:
    return {"type": "websocket.send", "text": json.dumps({"type": "error", "data": {"code": code, "message": message}})}


def _unreadable(text: str | None) -> str | None:
    """Why a message is not one that the framework can read."""
    if text is None:
        return "a binary frame: send JSON as text"
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:  # an integer may have more digits than Python reads
        return f"no JSON: {error}"
    return None if isinstance(found, dict) else "a message is an object with type and data"
