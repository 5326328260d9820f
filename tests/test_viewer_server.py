"""What the local server of ``ivt view --serve`` gives away, and to whom.

If one of these is false, nothing crashes: another page in the browser reads along, a file of this
machine leaves it, or a model's output runs as a program.
"""

from __future__ import annotations

import http.client
import json
import socket as sockets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from shown_episodes import HOSTILE, SEPARATORS, made_up_episodes, photo_of, play

from ivt_env.viewer.server import LocalServer, ViewApp


@contextmanager
def served(app: ViewApp) -> Iterator[LocalServer]:
    server = LocalServer(app)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def ask(
    server: LocalServer, path: str, method: str = "GET", body: str | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body; the path goes out exactly as it is written."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.putrequest(method, path, skip_host="Host" in headers)
    if body is not None and "Content-Length" not in headers:
        headers["Content-Length"] = str(len(body.encode()))
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders(None if body is None else body.encode())
    reply = connection.getresponse()
    found = reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read()
    connection.close()
    return found


@pytest.fixture(scope="module")
def server() -> Iterator[LocalServer]:
    with served(ViewApp({"one": made_up_episodes(), "two": made_up_episodes(1)}, photo_of, "t")) as running:
        yield running


def test_page_details_and_images_are_those_of_the_episodes(server: LocalServer) -> None:
    status, headers, page = ask(server, "/")
    assert status == 200 and headers["content-type"].startswith("text/html")
    assert b"connect-src 'self'" in page and b"unsafe" not in page
    assert b"covers part of the object" not in page  # what the agent said comes later
    for place, episode in enumerate(made_up_episodes(1)):
        row = json.loads(ask(server, f"/episode?run=1&index={place}")[2])
        assert [s.get("text", "") for s in row["steps"]] == [s.text for s in episode.steps]
        assert row["imageId"] == episode.image_id
    status, headers, image = ask(server, "/image/0")
    assert status == 200 and headers["content-type"] == "image/jpeg" and image[:2] == b"\xff\xd8"


@pytest.mark.parametrize(
    "path",
    [
        "/../../../../etc/passwd", "//etc/passwd", "/image/../../pyproject.toml", "/image/%2e%2e%2fpage.py",
        "/image/-1", "/image/99999", "/image/1e1", "/image/%D9%A1", "/image/",
        "/episode?run=0&index=-1", "/episode?run=0&index=99999", "/episode?run=7&index=0", "/episode", "/viewer.js",
        "/search?run=x&query=a", "/episode?run=0&index=" + "9" * 4000,
    ],
)  # fmt: skip
def test_nothing_but_episodes_can_be_asked_for(server: LocalServer, path: str) -> None:
    status, _, body = ask(server, path)
    assert status in (400, 404) and len(body) < 200 and b"root:" not in body
    assert ask(server, "/image/1")[0] == 200  # and it lives


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "", "127.0.0.1.x:{port}"]
)
def test_a_page_that_points_its_own_name_here_learns_nothing(server: LocalServer, host: str) -> None:
    for path in ("/", "/episode?run=0&index=0", "/image/0"):
        status, headers, body = ask(server, path, Host=host.format(port=server.server_port))
        assert status == 403 and b"woman" not in body and headers["content-type"].startswith("text/plain")
    for own in ("localhost", "127.0.0.1"):
        assert ask(server, "/", Host=f"{own}:{server.server_port}")[0] == 200
    assert server.server_address[0] == "127.0.0.1", "only this machine can connect"


def test_every_reply_forbids_guessing_its_type_and_reading_from_elsewhere_and_no_order_is_taken(
    server: LocalServer,
) -> None:
    for path in ("/", "/episode?run=0&index=0", "/image/0", "/nowhere"):
        headers = ask(server, path)[1]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in headers
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
    status, _, body = ask(server, "/act", "POST", "{}", Content_Type="application/json")
    assert status == 405 and b"only shows" in body


def test_hostile_text_is_data_in_the_page_and_in_the_servers_json() -> None:
    hostile = [e for e in made_up_episodes() if HOSTILE in e.expression]
    hostile[0].dataset = hostile[0].agent = HOSTILE
    with served(ViewApp({HOSTILE: hostile}, photo_of, HOSTILE)) as running:
        page = ask(running, "/")[2].decode()
        assert page.count("<script") == page.count("</script>") == 2 and "<img" not in page
        status, headers, body = ask(running, "/episode?run=0&index=0")
        assert status == 200 and headers["content-type"] == "application/json"
        assert json.loads(body)["steps"][0]["text"] == HOSTILE + SEPARATORS and body.isascii()
        _, headers, body = ask(running, "/image/<script>alert(1)</script>".replace(" ", ""))
        assert headers["content-type"].startswith("text/plain")


def test_search_finds_what_the_agent_said() -> None:
    episodes = made_up_episodes()
    app = ViewApp({"one": episodes}, photo_of, "t")
    expected = [i for i, e in enumerate(episodes) if any("right edge" in s.text for s in e.steps)]
    assert expected and json.loads(app.get("/search", {"run": "0", "query": "RIGHT Edge"}).body) == expected


def test_two_servers_share_neither_port_nor_images(server: LocalServer) -> None:
    for port in (server.server_port, 70_000):
        with pytest.raises(ValueError, match=f"--port {port}: cannot listen"):
            LocalServer(ViewApp({"a": [play((0, 0, 1, 1), [])]}, photo_of, "t"), port)
    apps = [ViewApp({"a": made_up_episodes()}, photo_of, "t") for _ in range(2)]
    assert apps[0].version != apps[1].version, "the browser would show one server an image kept from the other"
    assert all(a.version in a.page() for a in apps)


def test_a_connection_closed_by_the_end_of_the_server_is_not_reported(capsys: Any) -> None:
    # SIGTERM may come right after a thread was started: socketserver then closes the connection under it.
    with LocalServer(ViewApp({}, photo_of, "t")) as ended:
        closed, _ = sockets.socketpair()
        closed.close()
        ended._free.acquire()
        ended.process_request_thread(closed, ("127.0.0.1", 1))
    assert capsys.readouterr().err == ""


def test_details_are_read_while_others_search(server: LocalServer, tmp_path: Path) -> None:
    failures: list[Any] = []

    def look(number: int) -> None:
        for path in ("/search?run=0&query=the", f"/episode?run=0&index={number % 20}", f"/image/{number % 6}"):
            status = ask(server, path)[0]
            if status != 200:
                failures.append((path, status))

    threads = [threading.Thread(target=look, args=(n,)) for n in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
