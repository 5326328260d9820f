"""The server: sessions over WebSockets, within limits."""

from __future__ import annotations

import asyncio
import http
import json
import logging
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.typing import Origin

from ivt_env.server.protocol import PATH, Limits, Message, ProtocolError, error_out, parse
from ivt_env.server.session import Offer, Session

log = logging.getLogger("ivt_env.server")

# Close codes of RFC 6455, section 7.4.1, and its registry.
_POLICY, _TRY_LATER = 1008, 1013
_REFUSALS = 64
"""Connections beyond the limit that are told so in the protocol; any more get a plain HTTP 503."""


@dataclass(frozen=True)
class Settings:
    """How a server runs."""

    host: str = "127.0.0.1"
    port: int = 8765
    """0: any free one."""
    offer: Offer = field(default_factory=Offer)
    workers: int = 2
    """Threads that play; a reset or a step occupies one."""
    origins: tuple[str, ...] = ()
    """Web pages that may connect, as ``https://example.org``. Programs send no origin and are not concerned."""

    @property
    def limits(self) -> Limits:
        """Of the offer."""
        return self.offer.limits


class GroundingServer:
    """Serves environments until it is closed.

    async with GroundingServer(Settings(port=0)) as server:
        print(server.address)
        await server.wait_closed()
    """

    def __init__(self, settings: Settings) -> None:
        """Not listening yet."""
        self._settings = settings
        self._limits = settings.limits
        self._workers = ThreadPoolExecutor(settings.workers, thread_name_prefix="sessions")
        self._clients: Counter[str] = Counter()
        self._server: Server | None = None
        self.counts: Counter[str] = Counter()
        """What has happened: ``sessions``, ``refused``, ``messages``, ``errors``, ``failures``, ``slow``."""

    @property
    def sessions(self) -> int:
        """Sessions now."""
        return self._clients.total()

    @property
    def address(self) -> str:
        """The address of the WebSocket."""
        assert self._server is not None, "not listening"
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"ws://{f'[{host}]' if ':' in host else host}:{port}{PATH}"

    async def __aenter__(self) -> GroundingServer:
        """Listen.

        Raises:
            OSError: where the address cannot be listened on.
        """
        settings, limits = self._settings, self._limits
        self._server = await serve(
            self._connection,
            settings.host,
            settings.port,
            process_request=self._request,
            origins=[None, *(Origin(o) for o in settings.origins)],
            max_size=limits.max_message_bytes,
            max_queue=2,
            # What compresses well here, pictures, is compressed already; and a small message could swell.
            compression=None,
            open_timeout=10,
            close_timeout=2,
            ping_interval=30,
            ping_timeout=30,
            server_header=None,
            logger=_quiet(),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close every session and stop."""
        assert self._server is not None
        self._server.close()  # every connection with code 1001, going away
        await self._server.wait_closed()
        self._workers.shutdown(wait=True, cancel_futures=True)

    async def wait_closed(self) -> None:
        """Until the server was closed."""
        assert self._server is not None
        await self._server.wait_closed()

    def _request(self, connection: ServerConnection, request: Request) -> Response | None:
        """Before a WebSocket is opened: other paths, and far too many connections."""
        path = request.path.partition("?")[0]
        if path == "/health":
            status = {"status": "healthy", "sessions": self.sessions, "max_sessions": self._limits.max_sessions}
            return connection.respond(http.HTTPStatus.OK, json.dumps(status) + "\n")
        if path != PATH:
            return connection.respond(http.HTTPStatus.NOT_FOUND, f"nothing here; the WebSocket is at {PATH}\n")
        assert self._server is not None
        if len(self._server.connections) > self._limits.max_sessions + _REFUSALS:
            self.counts["refused"] += 1
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "too many connections; try again later\n")
        return None

    async def _connection(self, connection: ServerConnection) -> None:
        """One client from its first message to its end."""
        client = str(connection.remote_address[0]) if connection.remote_address else "unknown"
        refusal = self._refusal(client)
        if refusal is not None:
            self.counts["refused"] += 1
            await self._leave(connection, "CAPACITY_REACHED", refusal, _TRY_LATER)
            return
        self._clients[client] += 1
        self.counts["sessions"] += 1
        session = Session(self._settings.offer)
        try:
            await self._serve(connection, session)
        except ConnectionClosed:
            pass  # it vanished, said goodbye, or sent what was too large: there is no one left to tell
        finally:
            # A step may still be under way in a thread; the environment is closed behind it.
            self._workers.submit(session.close)
            self._clients[client] -= 1
            if not self._clients[client]:
                del self._clients[client]

    def _refusal(self, client: str) -> str | None:
        most, each = self._limits.max_sessions, self._limits.max_sessions_per_client
        if self.sessions >= most:
            return f"all {most} sessions are taken; try again later"
        if self._clients[client] >= each:
            return f"{client} has {each} sessions, which is the limit for one client; close one"
        return None

    async def _serve(self, connection: ServerConnection, session: Session) -> None:
        limits, loop = self._limits, asyncio.get_running_loop()
        end = time.monotonic() + limits.session_seconds
        while True:
            left = end - time.monotonic()
            try:
                async with asyncio.timeout(min(left, limits.idle_seconds)):
                    text = await connection.recv()
            except TimeoutError:
                idle = left > limits.idle_seconds
                code = "IDLE" if idle else "SESSION_TIME"
                why = f"no message in {limits.idle_seconds:g} s" if idle else f"{limits.session_seconds:g} s are over"
                await self._leave(connection, code, f"the session ends: {why}", _POLICY)
                return
            self.counts["messages"] += 1
            try:
                message = parse(text)
                if message.type == "close":
                    return
                reply = await loop.run_in_executor(self._workers, _answer, session, message)
            except ProtocolError as error:
                self.counts["errors"] += 1
                reply = error_out(error.code, str(error))
            except Exception:
                # One client's bad luck must not end the others'.
                self.counts["failures"] += 1
                log.exception("a message failed")
                reply = error_out("INTERNAL_ERROR", "the server failed at this message; its log has the details")
            if not await self._send(connection, reply):
                return

    async def _send(self, connection: ServerConnection, text: str) -> bool:
        """Send a reply; false: the client took too long to receive it, and was cut off."""
        try:
            async with asyncio.timeout(self._limits.reply_seconds):
                await connection.send(text)
        except TimeoutError:
            self.counts["slow"] += 1
            log.warning("a client did not receive a reply within %g s; cut off", self._limits.reply_seconds)
            connection.transport.abort()
            return False
        return True

    async def _leave(self, connection: ServerConnection, code: str, message: str, close_code: int) -> None:
        """Say why, and close."""
        try:
            if await self._send(connection, error_out(code, message)):
                await connection.close(close_code, message)
        except ConnectionClosed:
            pass


def _answer(session: Session, message: Message) -> str:
    """The reply as text; that of a picture takes a while, so it is made in the session's thread."""
    return json.dumps(session.handle(message))


def _quiet() -> Any:
    """The library logs every broken handshake with its traceback; anyone on the network can cause those."""
    logger = logging.getLogger("ivt_env.server.websockets")
    logger.setLevel(logging.CRITICAL)
    return logger
