"""The environment over a WebSocket: a server, and a client that is an environment again.

    python -m ivt_env.server --port 8765
    env = RemoteEnv("ws://127.0.0.1:8765/ws", "IVT-Scenes-v0", max_steps=3)

The messages have the shapes of OpenEnv's: its generic client can drive this server. ``docs/server.md`` lists them.
Both sides need the ``server`` extra.
"""

from __future__ import annotations

try:
    from ivt_env.server.client import RemoteEnv, RemoteError
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "websockets":
        raise
    raise ModuleNotFoundError(
        'the server and its client need websockets: pip install "ivt-env[server]"', name="websockets"
    ) from error

__all__ = ["RemoteEnv", "RemoteError"]
