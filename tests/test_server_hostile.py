"""Whatever a client sends, or fails to, it gets a clear answer and the server goes on serving the others.

Silent when false: a server that leaks a session with every lost connection works for a week.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket as sockets
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
from serving import plays, raw, say, serving, until
from websockets.exceptions import ConnectionClosed, InvalidStatus

from ivt_env.server import RemoteEnv, RemoteError

ROOT = Path(__file__).parent.parent
RESET = {"type": "reset", "data": {"seed": 0, "kwargs": {"canvas": 64}}}


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running


def reset(**data: object) -> dict[str, object]:
    return {"type": "reset", "data": data}


def step(**data: object) -> dict[str, object]:
    return {"type": "step", "data": data}


BAD = [
    ("", "INVALID_JSON", "Expecting value"),
    ("{", "INVALID_JSON", "no JSON"),
    ('{"type": "reset"} {}', "INVALID_JSON", "Extra data"),
    ("[" * 60_000, "INVALID_JSON", "nested too deeply"),
    ("9" * 60_000, "INVALID_JSON", "digits"),
    ('{"type": "step", "data": {"box": [NaN, 0, 1, 1]}}', "INVALID_JSON", "NaN is no JSON; null stands for"),
    ('{"type": "step", "data": {"box": [0, 0, 1, Infinity]}}', "INVALID_JSON", "Infinity"),
    (b"\x80\x04N.", "BINARY_MESSAGE", "send JSON as text"),
    ("[1, 2]", "VALIDATION_ERROR", "an object with type and data"),
    ("null", "VALIDATION_ERROR", "an object with type and data"),
    ({"type": "explode"}, "UNKNOWN_TYPE", "choose one of reset, step, state, close"),
    ({"type": ["reset"]}, "UNKNOWN_TYPE", "choose one of"),
    ({"type": "x" * 5000}, "UNKNOWN_TYPE", "..."),
    ({"data": {}}, "UNKNOWN_TYPE", "null"),
    ({"type": "reset", "data": 3}, "VALIDATION_ERROR", "give an object"),
    ({"type": "reset", "seed": 3}, "VALIDATION_ERROR", '"seed" in a message'),
    (reset(sede=3), "VALIDATION_ERROR", '"sede"'),
    (reset(env="Pong-v5"), "UNKNOWN_ENV", '"Pong-v5"'),
    (reset(env="os:system"), "UNKNOWN_ENV", "there are IVT-"),
    (reset(env=7), "UNKNOWN_ENV", "7"),
    (reset(seed="zero"), "VALIDATION_ERROR", "seed"),
    (reset(seed=-1), "VALIDATION_ERROR", "from 0"),
    (reset(seed=True), "VALIDATION_ERROR", "seed true"),
    (reset(seed=10**30), "VALIDATION_ERROR", "seed"),
    (reset(encoding="pickle"), "VALIDATION_ERROR", "png or raw"),
    (reset(encoding=["png"]), "VALIDATION_ERROR", "png or raw"),
    (reset(episode_id="x" * 256), "VALIDATION_ERROR", "255"),
    (reset(options={"index": 10**15}), "VALIDATION_ERROR", "from 0 to"),
    (reset(options={"index": -1}), "VALIDATION_ERROR", "from 0 to"),
    (reset(options={"index": 1.5}), "VALIDATION_ERROR", "index 1.5"),
    (reset(options={"seed": 1}), "VALIDATION_ERROR", '"seed" in options'),
    (reset(options=[]), "VALIDATION_ERROR", "options []"),
    (reset(options={"initial_box": [0, 0, 0, 0]}), "VALIDATION_ERROR", "x2 <= x1"),
    (reset(options={"initial_box": "0 0 1 1"}), "VALIDATION_ERROR", "give four numbers"),
    (reset(kwargs={"data_root": "/etc"}), "VALIDATION_ERROR", "--allow-data-root"),
    (reset(kwargs={"render_mode": "human"}), "VALIDATION_ERROR", '"render_mode" in kwargs'),
    (reset(kwargs={"dataset": "photos"}), "VALIDATION_ERROR", '"dataset" in kwargs'),
    (reset(kwargs=[1]), "VALIDATION_ERROR", "kwargs [1]"),
    (reset(kwargs={"canvas": 10**6}), "LIMIT", "at most 1024"),
    (reset(kwargs={"canvas": 8}), "VALIDATION_ERROR", "at least 16"),
    (reset(kwargs={"canvas": "640"}), "VALIDATION_ERROR", "give an integer"),
    (reset(kwargs={"max_steps": 10**9}), "LIMIT", "at most 100"),
    (reset(kwargs={"max_steps": True}), "VALIDATION_ERROR", "max_steps true: give an integer"),
    (reset(kwargs={"strict": 1}), "VALIDATION_ERROR", "give true or false"),
    (reset(kwargs={"view": "x-ray"}), "VALIDATION_ERROR", "closeup"),
    (reset(kwargs={"split": "../../etc"}), "DATA_ERROR", ""),
    (reset(kwargs={"split": "nonsense"}), "DATA_ERROR", "nonsense"),
    (reset(kwargs={"overlay": {"colour": [0, 0, 999]}}), "VALIDATION_ERROR", "0..255"),
    (reset(kwargs={"overlay": {"style": {}}}), "VALIDATION_ERROR", "style"),
    (reset(kwargs={"reward": {"potential": []}}), "VALIDATION_ERROR", ""),
    (reset(kwargs={"reward": "iou"}), "VALIDATION_ERROR", "give a dict"),
    (reset(kwargs={"initial_box": ["a", "b", "c", "d"]}), "VALIDATION_ERROR", ""),
    (reset(kwargs={"initial_box": [0.5, 0.5, 0.1, 0.1]}), "VALIDATION_ERROR", "x2 <= x1"),
    (step(), "VALIDATION_ERROR", "give a box, or stop 1"),
    (step(box=["0", "0", "1", "1"]), "VALIDATION_ERROR", "give four numbers"),
    (step(box="abcd"), "VALIDATION_ERROR", "give four numbers"),
    (step(box=[0, 0, 1]), "VALIDATION_ERROR", "give four numbers"),
    (step(box=[True, False, 1, 1]), "VALIDATION_ERROR", "give four numbers"),
    (step(box=[0, 0, 1, 10**400]), "VALIDATION_ERROR", "too large"),
    (step(box=[[0], 0, 1, 1]), "VALIDATION_ERROR", "give four numbers"),
    (step(box=[0, 0, 1, 1], stop=2), "VALIDATION_ERROR", "give 0 or 1"),
    (step(box=[0, 0, 1, 1], stop="no"), "VALIDATION_ERROR", "give 0 or 1"),
    (step(action=[0, 0, 1, 1]), "VALIDATION_ERROR", '"action"'),
    ({"type": "state", "data": {"all": 1}}, "VALIDATION_ERROR", '"all"'),
]


def test_every_bad_message_gets_its_reason_and_the_session_goes_on(server):
    failures = server.counts["failures"]
    with raw(server.address) as socket:
        for message in (step(box=[0, 0, 1, 1]), step(stop=1)):
            early = say(socket, message)
            assert early["data"]["code"] == "NO_EPISODE" and "send reset first" in early["data"]["message"]
        assert say(socket, RESET)["type"] == "observation"
        for message, code, said in BAD:
            reply = say(socket, message)
            assert reply["type"] == "error", message
            assert reply["data"]["code"] == code and said in reply["data"]["message"], (str(message)[:200], reply)
            assert "Traceback" not in reply["data"]["message"] and len(reply["data"]["message"]) < 600
        # None of all that has moved the episode.
        state = say(socket, {"type": "state"})["data"]
        assert state["step_count"] == 0 and state["kwargs"] == {"canvas": 64}
        refused = say(socket, step(box=[None, 0, 1, 1]))["data"]
        assert "not finite" in refused["info"]["invalid"] and refused["done"] is False
        say(socket, step(stop=1))
        assert say(socket, step(stop=1))["data"]["code"] == "EPISODE_OVER"
        assert say(socket, RESET)["type"] == "observation"
    assert server.counts["failures"] == failures, "an answer was made from an unforeseen exception"


def test_a_message_above_the_limit_ends_its_session_and_no_other(server):
    with raw(server.address) as other, raw(server.address) as socket:
        say(other, RESET)
        socket.send("x" * 100_000)
        with pytest.raises(ConnectionClosed) as caught:
            socket.recv(timeout=20)
        assert caught.value.rcvd.code == 1009
        assert say(other, step(stop=1))["data"]["done"]


def test_a_fault_of_the_server_is_told_without_its_inside(server, monkeypatch, caplog):
    def broken(*_: object) -> None:
        raise RuntimeError("/a/secret/folder")

    with raw(server.address) as socket:
        say(socket, RESET)
        monkeypatch.setattr("ivt_env.env.GroundingEnv.step", broken)
        reply = say(socket, step(stop=1))
        assert reply["data"]["code"] == "INTERNAL_ERROR" and "secret" not in json.dumps(reply)
        assert "/a/secret/folder" in caplog.text, "the operator has to find it"
        monkeypatch.undo()
        assert say(socket, RESET)["type"] == "observation"


def test_a_missing_data_set_is_told_without_the_servers_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("IVT_DATA", str(tmp_path / "hidden place"))
    asked = reset(env="IVT-RefCOCOg-v0", kwargs={"strict": True})
    with serving() as server, raw(server.address) as socket:
        reply = say(socket, asked)
        assert reply["data"]["code"] == "DATA_MISSING" and "hidden place" not in json.dumps(reply)
    with serving(allow_data_root=True, envs=("IVT-RefCOCOg-v0",)) as server, raw(server.address) as socket:
        asked["data"]["kwargs"]["data_root"] = str(tmp_path)
        assert say(socket, asked)["data"]["code"] == "DATA_MISSING"
        assert say(socket, reset(env="IVT-Scenes-v0"))["data"]["code"] == "UNKNOWN_ENV"


def test_a_client_that_vanishes_in_mid_episode_leaves_nothing_behind(server):
    assert until(lambda: server.sessions == 0)
    held = [raw(server.address) for _ in range(5)]
    for client in held:
        with client as socket:
            say(socket, RESET)
            socket.send(json.dumps(step(box=[0, 0, 0.5, 0.5])))
            # No closing handshake: the cable is pulled while a step is under way.
            socket.socket.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            socket.socket.shutdown(sockets.SHUT_RDWR)
    assert until(lambda: server.sessions == 0) and plays(server.address)


def test_a_client_that_does_not_read_is_cut_off_and_others_are_served():
    with serving(reply_seconds=1.0) as server:
        plain = sockets.create_connection(server._server.sockets[0].getsockname()[:2])
        plain.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
        with raw(server.address, sock=plain, max_queue=1) as socket:
            big = json.dumps(reset(encoding="raw", kwargs={"canvas": 1024}))
            for _ in range(8):
                socket.send(big)
            assert plays(server.address), "one slow client holds up the others"
            assert until(lambda: server.counts["slow"] == 1)
            assert until(lambda: server.sessions == 0) and plays(server.address)


def test_silence_and_old_age_end_a_session_with_a_word():
    with serving(idle_seconds=0.3) as server, raw(server.address) as socket:
        said = json.loads(socket.recv(timeout=20))
        assert said["data"]["code"] == "IDLE" and "0.3 s" in said["data"]["message"]
        with pytest.raises(ConnectionClosed):
            socket.recv(timeout=20)
        assert until(lambda: server.sessions == 0)
    with serving(session_seconds=0.5) as server:
        env = RemoteEnv(server.address, canvas=64)
        with pytest.raises(RemoteError, match="0.5 s are over") as caught:
            while True:  # each reset is a message in good time
                env.reset()
                time.sleep(0.05)
        assert caught.value.code == "SESSION_TIME"
        env.close()


def test_of_a_thousand_connections_those_above_the_limit_are_refused_with_a_message():
    served, told, http = [], 0, 0
    with serving(max_sessions=20, max_sessions_per_client=20) as server:
        try:
            for number in range(1000):
                try:
                    if number < 20:
                        served.append(raw(server.address).__enter__())
                        assert say(served[-1], RESET)["type"] == "observation"
                        continue
                    with raw(server.address) as refused:
                        said = json.loads(refused.recv(timeout=20))
                        assert (
                            said["data"]["code"] == "CAPACITY_REACHED" and "all 20 sessions" in said["data"]["message"]
                        )
                        told += 1
                except InvalidStatus as error:
                    assert error.response.status_code == 503
                    http += 1
            assert told + http == 980 and told > 0
            for socket in served:
                assert say(socket, step(stop=1))["data"]["done"], "a session suffered from the refused ones"
        finally:
            for socket in served:
                socket.close()
        assert until(lambda: server.sessions == 0) and plays(server.address)


def test_connections_that_never_speak_do_not_keep_others_out():
    with serving(max_sessions=3, max_sessions_per_client=3) as server:
        address = server._server.sockets[0].getsockname()[:2]
        mute = [sockets.create_connection(address) for _ in range(200)]
        assert plays(server.address)
        for one in mute:
            one.close()


def test_one_client_cannot_take_all_sessions():
    with serving(max_sessions=10, max_sessions_per_client=2) as server:
        with raw(server.address) as one, raw(server.address) as two, raw(server.address) as three:
            say(one, RESET)
            say(two, RESET)
            said = json.loads(three.recv(timeout=20))["data"]
            assert said["code"] == "CAPACITY_REACHED" and "127.0.0.1 has 2 sessions" in said["message"]
        assert until(lambda: server.sessions == 0) and plays(server.address)


def test_other_paths_and_web_pages_are_turned_away(server):
    base = server.address.removesuffix("/ws")
    with urlopen(base.replace("ws://", "http://") + "/health", timeout=20) as answer:
        assert json.load(answer)["status"] == "healthy"
    with pytest.raises(InvalidStatus) as caught:
        raw(base + "/admin").__enter__()
    assert caught.value.response.status_code == 404
    with pytest.raises(InvalidStatus) as caught:
        raw(server.address, origin="https://evil.example").__enter__()
    assert caught.value.response.status_code == 403


def started(*options: str) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "ivt_env.server", "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    page = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
    assert f"$ python -m ivt_env.server --port 8765\n{process.stdout.readline()}at ws://" in page
    return process, process.stdout.readline().removeprefix("at ").strip()


def resident(process: subprocess.Popen[str]) -> int:
    """Memory of a process in bytes."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_keeps_its_memory_over_300_sessions_and_ends_cleanly(number):
    process, address = started("--max-sessions", "4")
    try:
        for _ in range(50 if number == signal.SIGTERM else 1):
            assert plays(address)
        before = resident(process)
        if number == signal.SIGTERM:
            for k in range(300):
                if k % 3:
                    assert plays(address)
                else:
                    with raw(address) as socket:
                        say(socket, RESET)
                        socket.socket.shutdown(sockets.SHUT_RDWR)
            grown = resident(process) - before
            print(f"grown by {grown / 1e6:.2f} MB over 300 sessions")
            assert grown < 4e6
        with raw(address) as socket:
            say(socket, RESET)
            process.send_signal(number)
            with pytest.raises(ConnectionClosed) as caught:
                socket.recv(timeout=20)
            assert caught.value.rcvd.code == 1001
        assert process.wait(20) == 0
        assert "stopped after" in process.stdout.read() and "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-sessions", "0"], "max_sessions is 0"),
        (["--max-canvas", "4"], "at least 16 pixels"),
        (["--idle-seconds", "nan"], "idle_seconds is nan"),
        (["--port", "70000"], "--port 70000"),
        (["--workers", "0"], "--workers 0"),
        (["--env", "Pong"], "invalid choice: 'Pong'"),
        (["--host", "203.0.113.1"], "cannot listen on 203.0.113.1"),
    ],
)
def test_a_wrong_option_ends_with_one_line(options, message, capsys):
    from ivt_env.server.__main__ import main

    with pytest.raises(SystemExit) as caught:
        main(["--port", "0", *options])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
