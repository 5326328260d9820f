"""Serve an environment with OpenEnv.

    python -m ivt_env.server
    python -m ivt_env.server --host 0.0.0.0 --port 8000 --env IVT-RefCOCOg-v0 --kwargs '{"max_steps": 6}'

It prints its address and serves until it is interrupted (Ctrl-C or SIGTERM); then it closes every session and
ends with exit status 0. There is no password: who can reach the address can use it, within the limits.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import functools
import ipaddress
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Collection, Sequence
from dataclasses import fields
from typing import Any, NoReturn

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from openenv.core.env_server.http_server import HTTPEnvServer
from openenv.core.env_server.types import ConcurrencyConfig
from pydantic import ValidationError
from starlette.responses import JSONResponse

import ivt_env
from ivt_env import failures
from ivt_env.server.environment import (
    GroundingAction,
    GroundingEnvironment,
    GroundingObservation,
    GroundingState,
    Refused,
    Served,
)
from ivt_env.server.gate import Gate, Limits, Plain, Socket

_M_MMAP_THRESHOLD = -3
"""Of malloc.h."""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(
        prog="python -m ivt_env.server", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine)")
    made.add_argument("--port", type=int, default=8765, help="0 for any free one (default: %(default)s)")
    made.add_argument("--env", default="IVT-Scenes-v0", choices=tuple(ivt_env.IDS), metavar="ID", help="what is played")
    made.add_argument("--data-root", help="folder of real data sets; they have to be there")
    made.add_argument("--kwargs", type=json.loads, default={}, metavar="JSON", help="keywords of the environment")
    made.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="a name of this machine")
    made.add_argument("--origin", action="append", default=[], metavar="URL", help="web page that may connect")
    group = made.add_argument_group("limits")
    for one in fields(Limits):
        kind, said = type(one.default), f"{one.metadata['help']} (default: %(default)s)"
        group.add_argument("--" + one.name.replace("_", "-"), type=kind, default=one.default, metavar="N", help=said)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; the process ends with its exit status."""
    sys.exit(failures.run(lambda: _run(parser().parse_args(argv)), extra="server"))


def _run(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    limits = Limits(**{one.name: getattr(args, one.name) for one in fields(Limits)})
    if not isinstance(args.kwargs, dict):
        raise ValueError(f"--kwargs {json.dumps(args.kwargs)}: give a JSON object")
    if not 0 <= args.port < 65536:
        raise ValueError(f"--port {args.port}: give a number from 0 to 65535")
    server = make_server(Served(args.env, args.data_root, args.kwargs), limits, args.allow_host, args.origin)
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    try:
        listening = socket.create_server((args.host, args.port), family=family, backlog=128)
    except OSError as error:
        raise ValueError(f"cannot listen on {args.host} port {args.port}: {error.strerror or error}") from error
    address, port = listening.getsockname()[:2]
    if not ipaddress.ip_address(address).is_loopback:
        logging.warning("anyone who can reach %s can use this server: it asks for no password", args.host)
    # Images are large and short-lived. glibc would keep what they leave; elsewhere there is no such function.
    getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)(_M_MMAP_THRESHOLD, 1 << 18)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # uvicorn ends at them, then raises them again
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"serving {args.env}\nat http://{host}:{port}", flush=True)
    asyncio.run(_serve(server, listening))


async def _serve(server: uvicorn.Server, listening: socket.socket) -> NoReturn:
    await server.serve(sockets=[listening])
    print("stopped", flush=True)
    os._exit(0)  # a thread may be loading a data set, for which nobody waits any more


def make_server(
    served: Served, limits: Limits, names: Collection[str] = (), origins: Collection[str] = ()
) -> uvicorn.Server:
    """OpenEnv's routes for one environment, behind the gate, which takes ``names`` and ``origins``.

    ``run(sockets=[...])`` serves until ``should_exit`` or a signal, then ends within 3 seconds.
    """
    app = FastAPI(title=served.env_id, version="1.0.0", docs_url=None, redoc_url=None)  # of OpenEnv's routes
    for kind in (Refused, ValidationError, RequestValidationError):
        app.add_exception_handler(kind, _refusal)

    # Before that of the framework, whose sessions of tools need no connection, so that nothing would end them.
    @app.post("/mcp", include_in_schema=False)
    async def tools() -> Any:
        error = {"code": -32601, "message": "this environment has no tools"}
        return {"jsonrpc": "2.0", "id": None, "error": error}

    HTTPEnvServer(
        functools.partial(GroundingEnvironment, served),
        GroundingAction,
        GroundingObservation,
        concurrency_config=ConcurrencyConfig(max_concurrent_envs=limits.max_sessions),
        env_name=served.env_id,
        state_cls=GroundingState,
    ).register_routes(app)
    config = uvicorn.Config(
        Gate(app, limits, names, origins),
        loop="asyncio",
        http=Plain,
        ws=Socket,
        ws_max_size=limits.max_message_bytes,
        ws_ping_interval=30,
        ws_ping_timeout=30,
        # What compresses well here, images, is compressed already; and a small message could swell.
        ws_per_message_deflate=False,
        headers=[("connection", "close")],
        backlog=64,  # so many are let in at once, before the oldest of those who wait can be closed
        timeout_graceful_shutdown=1,
        proxy_headers=False,  # anybody on this machine could claim any address
        server_header=False,
        access_log=False,
        log_config=None,
        log_level="critical",  # what fails is logged by the gate; anyone on the network can cause the rest
    )
    return uvicorn.Server(config)


def _refusal(_: Request, error: Exception) -> JSONResponse:
    """Why not. Without the values of the client: what is not finite is no JSON."""
    if isinstance(error, ValidationError | RequestValidationError):
        why = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}"[:200] for one in error.errors()[:10]]
        return JSONResponse({"detail": "; ".join(why)}, 422)
    return JSONResponse({"detail": str(error)}, 400)


if __name__ == "__main__":
    main()
