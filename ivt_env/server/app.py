"""The server: OpenEnv's routes for one environment, behind the gate."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from openenv.core.env_server.http_server import HTTPEnvServer
from openenv.core.env_server.types import ConcurrencyConfig
from pydantic import ValidationError
from starlette.responses import JSONResponse

from ivt_env.server.environment import (
    GroundingAction,
    GroundingEnvironment,
    GroundingObservation,
    GroundingState,
    Refused,
    Served,
)
from ivt_env.server.gate import Gate, Limits, Plain, Socket

_NO_TOOLS = {"jsonrpc": "2.0", "id": None, "error": {"code": -32601, "message": "this environment has no tools"}}


def make_server(
    served: Served, limits: Limits, names: Collection[str] = (), origins: Collection[str] = ()
) -> uvicorn.Server:
    """A server; ``run(sockets=[...])`` serves until ``should_exit`` or a signal, then ends within 3 seconds.

    Args:
        served: what is played.
        limits: what is allowed.
        names: as for ``Gate``.
        origins: as for ``Gate``.
    """
    app = FastAPI(title=served.env_id, version="1.0.0", docs_url=None, redoc_url=None)  # of OpenEnv's routes
    for kind in (Refused, ValidationError, RequestValidationError):
        app.add_exception_handler(kind, _refusal)

    # Before those of the framework: its sessions of tools need no connection, so that nothing would end them, and
    # its step without a session has no episode.
    @app.post("/mcp", include_in_schema=False)
    async def tools() -> Any:
        return _NO_TOOLS

    @app.post("/step", include_in_schema=False)
    async def step() -> Any:
        raise Refused("a step belongs to a session: open the WebSocket")

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
