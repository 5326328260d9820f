"""A chat-completions server in a process of its own, which can be killed.

    python tests/scripted_server.py PORT SECONDS LOG [FAULTS]

It answers each request after SECONDS, always alike, and then writes its hash into LOG, one line per answer that was
sent. With FAULTS every third request fails first: 429, 500, a page, a cut reply, in turn.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import sys
import threading
import time

PING = "Answer with the word ready."


def box_of(text: str, image: str) -> str:
    """A box, or a stop where one is drawn; the same for the same question."""
    digest = hashlib.sha256((text + image).encode()).digest()
    if "box: none" not in text and digest[0] % 3 == 0:
        return '{"stop": true}'
    x, y = digest[1] * 2, digest[2] * 2
    return f'{{"bbox_2d": [{x}, {y}, {x + 100 + digest[3]}, {y + 100 + digest[4]}]}}'


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    lock = threading.Lock()
    seen: dict[str, int] = {}
    flying = most = 0

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        key = hashlib.sha256(body).hexdigest()
        image, text = json.loads(body)["messages"][-1]["content"][-2:]
        with Handler.lock:
            Handler.seen[key] = Handler.seen.get(key, 0) + 1
            number, times = len(Handler.seen), Handler.seen[key]
        time.sleep(SECONDS)
        if FAULTS and number % 3 == 0 and times == 1 and text["text"] != PING:
            return self.fail(number // 3 % 4)
        said = box_of(text["text"], image["image_url"]["url"])
        usage = {"prompt_tokens": 90, "completion_tokens": 10, "total_tokens": 100}
        choice = {"message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
        self.reply(200, json.dumps({"choices": [choice], "usage": usage}).encode())
        if text["text"] != PING:
            with Handler.lock, open(LOG, "a") as log:
                log.write(key + "\n")

    def reply(self, status: int, content: bytes, length: int | None = None) -> None:
        head = f"HTTP/1.1 {status} X\r\nContent-Length: {length or len(content)}\r\n\r\n".encode()
        self.wfile.write(head + content)
        self.wfile.flush()

    def fail(self, kind: int) -> None:
        if kind == 0:
            self.reply(429, b'{"error": {"message": "busy"}}')
        elif kind == 1:
            self.reply(500, b"oops")
        elif kind == 2:
            self.reply(200, b"<html>hello</html>")
        else:
            self.reply(200, b'{"choices": [', length=500)
            self.close_connection = True


if __name__ == "__main__":
    SECONDS, LOG, FAULTS = float(sys.argv[2]), sys.argv[3], len(sys.argv) > 4
    http.server.ThreadingHTTPServer.request_queue_size = 128
    http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
