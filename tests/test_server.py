"""An environment behind the server is the environment itself, and the shapes of its messages are OpenEnv's.

Silent when false: a picture that went through a lossy format, a box that lost its last bits, a seed that counts
on one side only; a trainer learns on something else than it reports.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import plays, raw, say, serving

from ivt_env.server import RemoteEnv, RemoteError
from ivt_env.server.protocol import KWARGS, Limits, ProtocolError, box_out, parse, read_box

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running


def assert_same(mine: Any, theirs: Any, where: str) -> None:
    """Bit for bit, types and all."""
    assert type(mine) is type(theirs), f"{where}: {type(mine)} and {type(theirs)}"
    if isinstance(mine, dict):
        assert mine.keys() == theirs.keys(), where
        for key in mine:
            assert_same(mine[key], theirs[key], f"{where} {key}")
    elif isinstance(mine, np.ndarray):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape, where
        assert mine.tobytes() == theirs.tobytes(), where
    else:
        assert mine == theirs, where


def actions(rng: np.random.Generator) -> dict[str, Any]:
    """Boxes, few of them usable: also NaN, infinities, and stops."""
    box = np.sort(rng.uniform(-0.02, 1, (2, 2)), axis=0).astype(np.float32).ravel()
    spoilt = rng.random()
    if spoilt < 0.2:
        box[rng.integers(4)] = rng.choice([np.nan, np.inf, -np.inf, 7.0])
    return {"box": box, "stop": int(rng.random() < 0.15)}


@pytest.mark.parametrize(
    ("env_id", "encoding", "kwargs"),
    [
        ("IVT-Scenes-v0", "png", {}),
        ("IVT-Scenes-v0", "raw", {"view": "both", "canvas": 200, "max_steps": 6, "split": "test"}),
        ("IVT-Scenes-v0", "png", {"view": "closeup", "canvas": 96, "overlay": {"style": "outline", "width": 2}}),
        ("IVT-Photos-v0", "png", {"max_steps": 5, "reward": {"kind": "final"}, "initial_box": [0.1, 0.2, 0.5, 0.9]}),
    ],
)
def test_the_remote_environment_is_the_local_one_bit_for_bit(server, env_id, encoding, kwargs):
    local = gym.make(env_id, disable_env_checker=True, **kwargs).unwrapped
    remote = RemoteEnv(server.address, env_id, encoding=encoding, **kwargs)
    assert remote.observation_space == local.observation_space and remote.action_space == local.action_space
    rng = np.random.default_rng(0)
    steps = refused = 0
    for seed in (0, None, 1, 2**40, None):
        options = {"index": 1, "initial_box": np.array([0.1, 0.1, 0.7, 0.3])} if seed == 1 else None
        assert_same(remote.reset(seed=seed, options=options)[0], local.reset(seed=seed, options=options)[0], "reset")
        over = False
        while not over:
            action = actions(rng)
            theirs, mine = remote.step(action), local.step(action)
            for name, a, b in zip(
                ("observation", "reward", "terminated", "truncated", "info"), theirs, mine, strict=True
            ):
                assert_same(a, b, f"{name} of {action}")
            over, steps, refused = mine[2] or mine[3], steps + 1, refused + ("invalid" in mine[4])
    assert steps >= 8 and refused >= 1
    remote.close()


def test_the_client_passes_gymnasiums_checks_without_a_warning(server):
    env = RemoteEnv(server.address, "IVT-Scenes-v0", canvas=64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(env, skip_render_check=True)  # there is no render mode
    assert [str(w.message) for w in caught] == []
    env.close()


def test_several_connections_make_a_vector_environment(server):
    remote = gym.vector.SyncVectorEnv([lambda: RemoteEnv(server.address, canvas=64) for _ in range(3)])
    local = gym.make_vec("IVT-Scenes-v0", 3, canvas=64)
    seeds = [5, 6, 7]
    mine, theirs = remote.reset(seed=seeds)[0], local.reset(seed=seeds)[0]
    action = {"box": np.tile(np.array([0.1, 0.1, 0.6, 0.6], np.float32), (3, 1)), "stop": np.array([0, 0, 0])}
    for a, b in ((mine, theirs), (remote.step(action)[0], local.step(action)[0])):
        assert a["expression"] == b["expression"]
        assert all(np.array_equal(a[name], b[name]) for name in ("image", "extent", "box", "step"))
    remote.close()


def test_a_generic_client_of_openenv_finds_the_shapes_that_it_expects(server):
    """type and data; observation, reward and done; episode_id and step_count."""
    with raw(server.address) as socket:
        begun = say(socket, {"type": "reset", "data": {"seed": 0, "episode_id": "a"}})
        assert begun["type"] == "observation" and begun["data"]["reward"] is None and begun["data"]["done"] is False
        stepped = say(socket, {"type": "step", "data": {"box": [0, 0, 0.5, 0.5]}})
        assert isinstance(stepped["data"]["observation"], dict) and isinstance(stepped["data"]["reward"], float)
        state = say(socket, {"type": "state"})
        assert state["type"] == "state" and state["data"]["episode_id"] == "a" and state["data"]["step_count"] == 1
        wrong = say(socket, {"type": "jump"})
        assert wrong["type"] == "error" and set(wrong["data"]) == {"code", "message"}


def test_a_reset_keeps_the_environment_unless_it_names_another(server):
    with raw(server.address) as socket:
        say(socket, {"type": "reset", "data": {"env": "IVT-Photos-v0", "kwargs": {"canvas": 64}, "encoding": "raw"}})
        say(socket, {"type": "reset", "data": {"seed": 3}})
        state = say(socket, {"type": "state"})["data"]
        assert (state["env"], state["kwargs"]) == ("IVT-Photos-v0", {"canvas": 64})
        again = say(socket, {"type": "reset", "data": {"kwargs": {"canvas": 32}}})
        picture = again["data"]["observation"]["image"]
        assert picture["shape"] == [32, 32, 3] and picture["encoding"] == "raw"


def test_data_sets_are_loaded_once_for_all_sessions(server, monkeypatch):
    loaded = []
    monkeypatch.setattr("ivt_env.server.session.load_dataset", lambda *a: loaded.append(a))
    slots = server._settings.offer.datasets
    slots.slot("scenes", "train", None, False)
    assert plays(server.address) and loaded == []


@settings(deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=4, max_size=4))
def test_a_box_crosses_bit_for_bit(numbers):
    box = np.array(numbers, dtype=np.float32)
    found = read_box(box_out(box))
    assert np.array_equal(found, box, equal_nan=True) and found.dtype == np.float32
    assert all(v is None or math.isfinite(v) for v in box_out(box))


@settings(deadline=None)
@given(st.one_of(st.text(), st.binary(), st.recursive(st.none() | st.text(), st.lists).map(str)))
def test_no_text_makes_the_parser_fail_otherwise_than_by_saying_why(text):
    try:
        parse(text)
    except ProtocolError as error:
        assert error.code and str(error)


def test_remote_errors_have_a_code_and_bad_arguments_are_refused_before_connecting(server):
    env = RemoteEnv(server.address, canvas=64)
    with pytest.raises(RemoteError, match="before any reset") as caught:
        env.step({"box": np.zeros(4), "stop": 0})
    assert caught.value.code == "NO_EPISODE"
    with pytest.raises(RemoteError, match="from 0 to"):
        env.reset(options={"index": -1})
    env.close()
    with pytest.raises(RemoteError, match="closed the connection") as caught:
        env.reset()
    assert caught.value.code == "CLOSED"
    for bad, message in (({"env_id": "Pong"}, "no environment 'Pong'"), ({"render_mode": "ansi"}, "does not travel")):
        with pytest.raises(ValueError, match=message):
            RemoteEnv(server.address, **bad)
    with pytest.raises(RemoteError, match="no connection to ws://127.0.0.1:9/ws"):
        RemoteEnv("ws://127.0.0.1:9/ws")


def test_the_pages_example_runs(server):
    page = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    assert "ws://127.0.0.1:8765/ws" in code
    held: dict[str, Any] = {}
    exec(code.replace("ws://127.0.0.1:8765/ws", server.address), held)
    assert held["observation"]["image"].shape == (384, 384, 3) and isinstance(held["reward"], float)


def test_the_page_names_every_limit_code_keyword_and_id():
    page = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
    source = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "ivt_env" / "server").glob("*.py"))
    codes = set(re.findall(r"\"([A-Z]{2,}(?:_[A-Z]+)*)\",?\s*(?:f?\"|refusal)", source)) | {"IDLE", "SESSION_TIME"}
    assert {"INVALID_JSON", "CAPACITY_REACHED", "NO_EPISODE", "LIMIT", "TIMEOUT"} <= codes
    for word in (*codes, *KWARGS, *(f"--{n.replace('_', '-')}" for n in Limits.__slots__)):
        assert f"`{word}`" in page, word


def test_importing_the_environment_needs_neither_the_server_nor_its_library():
    code = "import sys, ivt_env; assert 'websockets' not in sys.modules; sys.modules['websockets'] = None\n"
    code += "try:\n    import ivt_env.server\nexcept ModuleNotFoundError as e:\n    print(e)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "ivt-env[server]" in done.stdout
