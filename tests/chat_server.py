"""A chat-completions server on the loopback address that answers as badly as a test asks for."""

from __future__ import annotations

import http.server
import json
import threading
import time
from typing import Any

GOOD = "The red box sits too low and is too wide; move it up and make it narrower."
USAGE = {"prompt_tokens": 90, "completion_tokens": 10, "total_tokens": 100}


def answer(text: str | None = GOOD, usage: dict | None = USAGE) -> dict:
    return {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage}


class ChatServer:
    """``faults`` are taken one per request; ``seen`` holds (path, headers, body) of each."""

    def __init__(self) -> None:
        self.faults: list[Any] = []
        """A status, (status, headers), (status, headers, bytes), "broken", "cut", ("stall", s) or a dict."""
        self.reply: Any = answer()
        self.models = ["one"]
        self.key: str | None = None
        """Without it in the header: 401."""
        self.pause_s = 0.0
        self.seen: list[tuple[str, dict, dict]] = []
        self.ending = threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                outer.handle(self, {})

            def do_POST(self):
                length = int(self.headers["Content-Length"])
                outer.handle(self, json.loads(self.rfile.read(length)))

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    @property
    def chats(self) -> list[dict]:
        return [body for path, _, body in self.seen if path == "/v1/chat/completions"]

    def handle(self, handler, body):
        self.seen.append((handler.path, {k.title(): v for k, v in handler.headers.items()}, body))
        time.sleep(self.pause_s)
        given = handler.headers.get("Authorization", "")
        if self.key is not None and given != f"Bearer {self.key}":
            # As real servers do: the wrong key is told back.
            said = {"error": {"message": f"Incorrect API key provided: {given.removeprefix('Bearer ')}"}}
            return self.send(handler, 401, json.dumps(said).encode())
        if handler.path == "/v1/models":
            return self.send(handler, 200, json.dumps({"data": [{"id": m} for m in self.models]}).encode())
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, int):
            return self.send(handler, fault, b'{"error": {"message": "busy"}}')
        if isinstance(fault, tuple) and fault[0] == "stall":
            self.ending.wait(fault[1])
            return None
        if isinstance(fault, tuple):
            return self.send(handler, fault[0], fault[2] if len(fault) > 2 else b"", fault[1])
        if fault == "broken":
            return self.send(handler, 200, b'{"choices": [{"mess')
        content = json.dumps(fault or (self.reply(body) if callable(self.reply) else self.reply)).encode()
        if fault == "cut":
            content = json.dumps(answer()).encode()
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            handler.wfile.write(content[: len(content) // 2])
            handler.wfile.flush()
            handler.connection.close()
            return None
        return self.send(handler, 200, content)

    def send(self, handler, status, content, headers=None):
        handler.send_response(status)
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        try:
            handler.wfile.write(content)
        except ConnectionError:
            pass  # the client gave up waiting

    def close(self):
        self.ending.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
