"""An environment behind the server is the environment itself, and OpenEnv's own client and checker agree with it.

Silent when false: an image that went through a lossy format, a box that lost its last bits, a seed that counts
on one side only; a trainer learns on something else than it reports.
"""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st
from openenv.cli.__main__ import app as openenv
from openenv.core import GenericEnvClient
from PIL import Image
from playing import assert_equal
from serving import CANVAS, plays, raw, say, serving
from typer.testing import CliRunner

from ivt_env.data import load_dataset, splits
from ivt_env.server import RemoteEnv, RemoteError
from ivt_env.server.client import image_in
from ivt_env.server.environment import GroundingAction, GroundingReset, _array
from ivt_env.server.gate import Limits

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "environments" / "openenv"


@pytest.fixture(scope="module")
def server():
    with serving(kwargs=CANVAS) as running:
        yield running


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
def test_the_remote_environment_is_the_local_one_bit_for_bit(env_id, encoding, kwargs):
    local = gym.make(env_id, disable_env_checker=True, **kwargs).unwrapped
    rng = np.random.default_rng(0)
    steps = refused = 0
    with serving(env_id, kwargs) as server:
        remote = RemoteEnv(server.url, encoding=encoding)
        assert remote.env_id == env_id
        assert remote.observation_space == local.observation_space and remote.action_space == local.action_space
        for seed in (0, None, 1, 2**40, None):
            options = {"index": 1, "initial_box": np.array([0.1, 0.1, 0.7, 0.3])} if seed == 1 else None
            theirs, mine = remote.reset(seed=seed, options=options), local.reset(seed=seed, options=options)
            assert_equal(theirs, mine)
            over = False
            while not over:
                action = actions(rng)
                theirs, mine = remote.step(action), local.step(action)
                assert_equal(theirs, mine)
                over, steps, refused = mine[2] or mine[3], steps + 1, refused + ("invalid" in mine[4])
        remote.close()
    assert steps >= 8 and refused >= 1


def test_the_client_passes_gymnasiums_checks_without_a_warning(server):
    env = RemoteEnv(server.url)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(env, skip_render_check=True)  # there is no render mode
    assert [str(w.message) for w in caught] == []
    env.close()


def test_several_connections_make_a_vector_environment(server):
    remote = gym.vector.SyncVectorEnv([lambda: RemoteEnv(server.url) for _ in range(3)])
    local = gym.make_vec("IVT-Scenes-v0", 3, **CANVAS)
    seeds = [5, 6, 7]
    mine, theirs = remote.reset(seed=seeds)[0], local.reset(seed=seeds)[0]
    action = {"box": np.tile(np.array([0.1, 0.1, 0.6, 0.6], np.float32), (3, 1)), "stop": np.array([0, 0, 0])}
    for a, b in ((mine, theirs), (remote.step(action)[0], local.step(action)[0])):
        assert a["expression"] == b["expression"]
        assert all(np.array_equal(a[name], b[name]) for name in ("image", "extent", "box", "step"))
    remote.close()


def test_openenvs_own_client_plays_an_episode_with_images(server):
    """Nothing of this package on the client's side."""
    local = gym.make("IVT-Scenes-v0", disable_env_checker=True, split="val", **CANVAS).unwrapped
    seen, _ = local.reset(options={"index": 4})
    with GenericEnvClient(server.url).sync() as client:
        begun = client.reset(split="val", index=4, episode_id="a")
        assert begun.reward is None and not begun.done and begun.observation["expression"] == seen["expression"]
        file = begun.observation["image"]
        with Image.open(io.BytesIO(base64.b64decode(file["data"]))) as image:
            assert image.format == "PNG" and np.array_equal(np.asarray(image), seen["image"])
        box = [0.1, 0.2, 0.6, 0.7]
        expected = local.step({"box": np.array(box, np.float32), "stop": 0})
        stepped = client.step({"box": box})
        assert stepped.reward == expected[1] and not stepped.done
        assert np.array_equal(image_in(stepped.observation["image"]), expected[0]["image"])
        state = client.state()
        assert (state["episode_id"], state["step_count"], state["split"]) == ("a", 1, "val")
        assert state["sample_id"] == expected[4]["sample_id"] == stepped.metadata["sample_id"]
        ended = client.step({"stop": True})
        assert ended.done and ended.reward == 0.0 and ended.metadata["terminated"]


def test_split_and_encoding_stay_until_a_reset_names_others(server):
    with raw(server.address) as socket:
        say(socket, {"type": "reset", "data": {"split": "val", "encoding": "raw"}})
        again = say(socket, {"type": "reset", "data": {"index": 2}})["data"]
        assert again["metadata"]["sample_id"] == load_dataset("scenes", "val")[2].sample_id
        image = again["observation"]["image"]
        assert image["encoding"] == "raw" and len(base64.b64decode(image["data"])) == 64 * 64 * 3
        other = say(socket, {"type": "reset", "data": {"split": "test", "encoding": "png"}})["data"]
        assert other["metadata"]["sample_id"].startswith("test")
        assert other["observation"]["image"]["encoding"] == "png"


def asked(server: Any, path: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(server.url + path, data, {"Content-Type": "application/json"}), timeout=20) as answer:
        return json.load(answer)


def test_every_sample_is_a_task_and_no_task_tells_its_target(server):
    at = "/IVT-Scenes-v0"
    assert asked(server, "/list_environments") == ["IVT-Scenes-v0"]
    assert [one["name"] for one in asked(server, f"{at}/splits")] == list(splits("scenes"))
    val = load_dataset("scenes", "val")
    assert asked(server, f"{at}/num_tasks", {"split": "val"}) == {"num_tasks": len(val)}
    task = asked(server, f"{at}/task", {"split": "val", "index": 7})["task"]
    assert task == {"id": val[7].sample_id, "index": 7, "split": "val", "expression": val[7].expression}
    some = asked(server, f"{at}/task_range", {"split": "val", "start": 7, "stop": 9})["tasks"]
    assert some[0] == task and len(some) == 2
    assert len(asked(server, f"{at}/tasks", {"split": "val"})["tasks"]) == 1000 < len(val)
    with raw(server.address) as socket:  # what a task names is what a reset plays
        begun = say(socket, {"type": "reset", "data": {"split": "val", "index": 7}})
        assert begun["data"]["observation"]["expression"] == task["expression"]


def test_the_schema_is_that_of_what_is_sent(server):
    schema = asked(server, "/schema")
    assert {"box", "stop"} <= schema["action"]["properties"].keys()
    with raw(server.address) as socket:
        shown = say(socket, {"type": "reset"})["data"]["observation"]
        assert shown.keys() <= schema["observation"]["properties"].keys()
        assert say(socket, {"type": "state"})["data"].keys() == schema["state"]["properties"].keys()


def validate(*target: str) -> str:
    done = CliRunner().invoke(openenv, ["validate", *target])
    assert done.exit_code == 0, done.output
    return done.output


def test_openenv_validate_has_no_complaint(server):
    running = validate(server.url)
    assert "Verdict: PASS" in running and "FAIL" not in running
    package = validate(str(PACKAGE), "--level", "static", "--skip-build")
    assert "Verdict: PASS" in package and "FAIL" not in package


def test_the_packages_dockerfile_starts_the_server_with_options_that_it_has():
    from ivt_env.server.__main__ import parser

    command = re.search(r"^CMD (\[.*\])$", (PACKAGE / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)[1]
    words = json.loads(command)
    assert words[:3] == ["python", "-m", "ivt_env.server"]
    assert parser().parse_args(words[3:]).host == "0.0.0.0"


def test_data_sets_are_loaded_once_for_all_sessions(server, monkeypatch):
    assert plays(server.address)
    monkeypatch.setattr("ivt_env.server.environment.load_dataset", lambda *a, **k: pytest.fail("loaded again"))
    assert plays(server.address)


@settings(deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=4, max_size=4))
def test_a_box_crosses_bit_for_bit(numbers):
    box = np.array(numbers, dtype=np.float32)
    wire = json.loads(json.dumps(box.tolist()))
    for found in (GroundingAction(box=wire).box, GroundingReset(initial_box=wire).initial_box):
        assert np.array_equal(_array(found), box, equal_nan=True) and _array(found).dtype == np.float32


def test_remote_errors_say_what_was_wrong(server):
    env = RemoteEnv(server.url)
    with pytest.raises(RemoteError, match="before any reset"):
        env.step({"box": np.zeros(4), "stop": 0})
    with pytest.raises(RemoteError, match="index -1: train has samples 0 to"):
        env.reset(options={"index": -1})
    env.close()
    with pytest.raises(RemoteError, match="closed the connection"):
        env.reset()
    for chosen, message in (
        ({"split": "nonsense"}, "choose one of train, val"),
        ({"encoding": "gif"}, "'png' or 'raw'"),
    ):
        env = RemoteEnv(server.url, **chosen)
        with pytest.raises(RemoteError, match=message):
            env.reset()
        env.close()
    with pytest.raises(RemoteError, match="127.0.0.1:9"):
        RemoteEnv("http://127.0.0.1:9")


def test_the_pages_example_runs():
    page = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
    with serving() as server:
        for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
            assert "http://127.0.0.1:8765" in code
            held: dict[str, Any] = {}
            exec(code.replace("http://127.0.0.1:8765", server.url), held)
    assert held["image"].shape == (384, 384, 3)


def test_the_page_names_every_limit_and_option():
    from ivt_env.server.__main__ import parser

    page = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
    for action in parser()._actions:
        if action.dest not in ("help", "host", "port"):
            assert f"`{action.option_strings[0]}`" in page, action.dest
    for one in fields(Limits):
        assert f"| `--{one.name.replace('_', '-')}` | {one.default:g} |" in page
    assert all(f"`{name}`" in page for name in GroundingReset.model_fields)


def test_importing_the_environment_needs_neither_the_server_nor_its_library():
    code = "import sys, ivt_env; assert 'websockets' not in sys.modules; sys.modules['websockets'] = None\n"
    code += "try:\n    import ivt_env.server\nexcept ModuleNotFoundError as e:\n    print(e)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "ivt-env[server]" in done.stdout
