"""The environment on OpenEnv's server, and a client that is a Gymnasium environment again.

    python -m ivt_env.server --port 8765
    env = RemoteEnv("http://127.0.0.1:8765")

``docs/server.md`` describes routes, messages and limits. Both sides need the ``server`` extra.
"""

from __future__ import annotations

try:
    from ivt_env.server.client import RemoteEnv, RemoteError
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "websockets":
        raise
    raise ModuleNotFoundError(
        'the server and its client need openenv and websockets: pip install "ivt-env[server]"', name="websockets"
    ) from error

__all__ = ["RemoteEnv", "RemoteError"]
