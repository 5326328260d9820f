"""Serve environments over a WebSocket.

    python -m ivt_env.server
    python -m ivt_env.server --host 0.0.0.0 --port 8765 --env IVT-RefCOCOg-v0 --max-sessions 32

It prints its address and serves until it is interrupted (Ctrl-C or SIGTERM); then it closes every session and
ends with exit status 0. There is no password: who can reach the address can use it, within the limits.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import logging
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields

import ivt_env
from ivt_env import failures
from ivt_env.server.app import GroundingServer, Settings
from ivt_env.server.protocol import Limits
from ivt_env.server.session import Offer

_LIMITS = {
    "max_sessions": "sessions at once",
    "max_sessions_per_client": "sessions at once from one address",
    "session_seconds": "longest life of a session",
    "idle_seconds": "longest wait for a client's next message",
    "reply_seconds": "longest time a client may take to receive a reply",
    "max_message_bytes": "largest message of a client",
    "max_canvas": "largest side of an observation's picture, pixels",
    "max_steps": "longest episode, actions",
}


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(
        prog="python -m ivt_env.server", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine)")
    made.add_argument("--port", type=int, default=8765, help="0 for any free one (default: %(default)s)")
    made.add_argument(
        "--env",
        action="append",
        choices=tuple(ivt_env.IDS),
        metavar="ID",
        help=f"offer this id only; may be repeated (default: all of {', '.join(ivt_env.IDS)})",
    )
    made.add_argument("--workers", type=int, default=2, help="threads that play (default: %(default)s)")
    made.add_argument(
        "--allow-data-root", action="store_true", help="clients may name folders of this machine to read data sets from"
    )
    made.add_argument(
        "--origin", action="append", default=[], metavar="URL", help="web page that may connect; may be repeated"
    )
    group = made.add_argument_group("limits")
    for one in fields(Limits):
        kind = type(one.default)
        group.add_argument(
            "--" + one.name.replace("_", "-"),
            type=kind,
            default=one.default,
            metavar="N",
            help=f"{_LIMITS[one.name]} (default: %(default)s)",
        )
    return made


async def run(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with GroundingServer(settings) as server:
        print(f"serving {', '.join(settings.offer.envs)}\nat {server.address}", flush=True)
        await stop.wait()
        counts = server.counts
    print(f"stopped after {counts['sessions']} sessions, {counts['refused']} refused", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; the process ends with its exit status."""
    sys.exit(failures.run(lambda: _serve(parser().parse_args(argv)), extra="server"))


def _serve(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    limits = Limits(**{one.name: getattr(args, one.name) for one in fields(Limits)})
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers}: give at least 1")
    if not 0 <= args.port < 65536:
        raise ValueError(f"--port {args.port}: give a number from 0 to 65535")
    offer = Offer(tuple(args.env or ivt_env.IDS), args.allow_data_root, limits)
    settings = Settings(args.host, args.port, offer, args.workers, tuple(args.origin))
    if not _is_loopback(args.host):
        logging.warning("anyone who can reach %s can use this server: it asks for no password", args.host)
    try:
        asyncio.run(run(settings))
    except OSError as error:
        why = error.strerror or error
        raise ValueError(f"cannot listen on {args.host} port {args.port}: {why}") from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    main()
