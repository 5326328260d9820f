"""A PPO trained here is saved, loaded and played as what it was trained as.

Silent when false: the loaded agent sees other images or words than in training and scores as if it had learned
nothing, or a downloaded run folder runs code.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from geometry import encode_box

from ivt_agents.play.by_name import load_agent
from ivt_agents.play.scripted import CentreAgent
from ivt_agents.sb3 import train
from ivt_agents.sb3.easy import SmallImages, compare, easy_indices, table
from ivt_agents.sb3.load import SB3Agent, SB3Error, load_sb3
from ivt_agents.sb3.network import begin_with_what_is_seen, make_policy
from ivt_env.data import load_dataset
from ivt_env.rollouts import make_vector_env, rollout
from ivt_env.testing import check_dataset
from ivt_env.wrappers import HashedText, SB3Wrapper
from ivt_env.wrappers.sb3 import decode_action, sb3_action_space, sb3_observation_space

ROOT = Path(__file__).parent.parent
SHAPE = {"side": 36, "text_size": 128, "text_seed": 0, "stop_above": 0.5, "max_steps": 3}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that learned next to nothing: 256 actions."""
    folder = tmp_path_factory.mktemp("sb3")
    args = train.Args(
        out=folder, steps=256, samples=8, num_envs=4, rollout=32, batch=64, epochs=1, held_out=12, splits=("val",)
    )
    return folder, train.main(args)


def weights(policy):
    return {name: value.clone() for name, value in policy.state_dict().items()}


def test_a_run_leaves_the_policy_its_configuration_and_the_comparison(run):
    folder, results = run
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "policy.pt", "results.json"]
    config = json.loads((folder / "config.json").read_text())
    assert config["trained"]["actions"] == 256 and config["trained"]["seed"] == 0
    assert [(t["split"], t["easy"], t["samples"]) for t in results["tables"]] == [("val", True, 12), ("val", False, 12)]
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))


def test_training_reaches_every_layer(run):
    """Biases and the spread of actions begin as constants, whatever the seed."""
    fresh = weights(make_policy(sb3_observation_space("overlay", 36, 128, 3), sb3_action_space()))
    trained = weights(load_sb3(run[0]).policy)
    assert fresh.keys() == trained.keys()
    constants = [k for k, value in fresh.items() if (value == value.flatten()[0]).all()]
    assert len(constants) > 10 and [k for k in constants if torch.equal(fresh[k], trained[k])] == []


def test_the_loaded_agent_plays_what_the_policy_plays_behind_the_wrapper(run):
    """Batch, single wrapper, and gym's own loop: the same boxes in the same games."""
    agent = load_agent(f"sb3:{run[0]}")
    assert isinstance(agent, SB3Agent)
    episodes = rollout(make_vector_env("IVT-Scenes-v0", 3, split="val"), agent, 5, indices=range(5))
    env = SB3Wrapper(gym.make("IVT-Scenes-v0", split="val"), side=36)
    for index, episode in enumerate(episodes):
        observation, _ = env.reset(options={"index": index})
        for step in episode.steps:
            action, _ = agent.policy.predict(observation, deterministic=True)
            observation, reward, terminated, truncated, info = env.step(action)
            assert abs(info["iou"] - step.iou) < 1e-4 and terminated == step.stop
        assert terminated or truncated


def test_only_running_episodes_are_looked_at(run):
    agent = load_sb3(run[0])
    env = make_vector_env("IVT-Scenes-v0", 3, split="val")
    observations, _ = env.reset(seed=0)
    active = np.array([True, False, True])
    all_of_them = agent.act({**observations, "active": np.ones(3, dtype=bool)})
    some = agent.act({**observations, "active": active})
    assert np.allclose(some["box"][active], all_of_them["box"][active], atol=1e-6) and not some["box"][1].any()
    assert not agent.act({**observations, "active": np.zeros(3, dtype=bool)})["box"].any()


def test_sampled_actions_differ_and_are_decided_by_the_seed(run):
    env = make_vector_env("IVT-Scenes-v0", 2, split="val")
    observations = {**env.reset(seed=0)[0], "active": np.ones(2, dtype=bool)}
    greedy, one, again, other = (
        load_sb3(run[0], deterministic=d, seed=s).act(observations)["box"]
        for d, s in ((True, 0), (False, 1), (False, 1), (False, 2))
    )
    assert np.array_equal(one, again) and not np.array_equal(one, other) and not np.array_equal(one, greedy)


def test_a_longer_episode_or_another_view_than_in_training_is_refused(run):
    agent = load_sb3(run[0], deterministic=False, seed=0)
    env = make_vector_env("IVT-Scenes-v0", 1, split="val", max_steps=5)
    with pytest.raises(SB3Error, match="action 4 .* at most 3.*max_steps=3"):
        observations, _ = env.reset(seed=0)
        agent.act({**observations, "step": np.array([3]), "active": np.array([True])})
    with pytest.raises(SB3Error, match="view='overlay'"):
        observations, _ = make_vector_env("IVT-Scenes-v0", 1, split="val", view="both").reset(seed=0)
        agent.act({**observations, "active": np.array([True])})


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def broken(run, tmp_path, name, content):
    for file in ("config.json", "policy.pt"):
        (tmp_path / file).write_bytes((run[0] / file).read_bytes())
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", None, "ivt_agents.sb3.train --out"),
        ("policy.pt", None, "did not come to its end"),
        ("config.json", b"{", "cannot be read"),
        ("config.json", b"[]", "holds a list"),
        ("config.json", json.dumps({**SHAPE, "side": "36"}).encode(), "side is '36'"),
        ("config.json", json.dumps({**SHAPE, "text_size": 10**9}).encode(), "text_size is 1000000000"),
        ("config.json", json.dumps({**SHAPE, "text_size": 64}).encode(), "policy.pt: does not hold"),
        ("policy.pt", b"nothing", "policy.pt: does not hold"),
        ("policy.pt", pickle.dumps(Bomb()), "policy.pt: does not hold"),
    ],
)
def test_a_folder_that_cannot_be_used_is_named_with_the_reason(run, tmp_path, monkeypatch, name, content, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SB3Error, match=re.escape(said)):
        load_sb3(broken(run, tmp_path, name, content))
    assert not (tmp_path / "exploded").exists()


def test_easy_scenes_have_two_objects_and_compare_nothing():
    dataset = load_dataset("scenes", "val")
    indices = easy_indices(dataset, 20)
    assert indices == [
        i for i in range(indices[-1] + 1) if dataset[i].meta["things"] <= 2 and dataset[i].meta["kind"] == "attributes"
    ]
    assert {dataset[i].meta["things"] for i in indices} <= {1, 2}
    assert not any(re.search("most|right of|left of|above|below|closest|not", dataset[i].expression) for i in indices)
    with pytest.raises(ValueError, match="photos.*--no-easy"):
        easy_indices(load_dataset("photos", "test"), 1)


def test_held_images_are_a_data_set_like_any_other():
    scenes = load_dataset("scenes", "val")
    check_dataset(SmallImages(scenes, [3, 1, 4], 36), samples=3)
    assert SmallImages(scenes, [3, 1, 4], 36)[1].expression == scenes[1].expression


def test_the_comparison_of_an_agent_with_itself_shows_no_difference():
    found = compare(CentreAgent(), "val", easy=False, samples=12)
    assert found["ppo_minus"]["centre"]["diff"] == 0 and not found["ppo_minus"]["centre"]["shown"]
    assert "not shown" in table(found).splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "--steps 0"),
        ({"gamma": 1.5}, "--gamma 1.5"),
        ({"batch": 100}, "--batch 100.*1024 actions"),
        ({"held_out": 1}, "--held-out 1"),
        ({"side": 8}, "--side 8"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_is_made(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        train.main(train.Args(out=tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_the_limit_of_actions_earns_nothing_that_was_not_played(monkeypatch):
    """A truncated episode's last reward would be raised by the value of a step that never comes."""
    small = SmallImages(load_dataset("scenes", "val"), [0, 1], 36)
    env = train.make_env(small, train.Args(episode_steps=2))
    env.reset(seed=0)
    action = encode_box([0.2, 0.2, 0.6, 0.6])
    assert env.step(action)[2:4] == (False, False)
    assert env.step(action)[2:4] == (True, False)


@pytest.mark.parametrize(("x", "y"), [(0.25, 0.75), (0.75, 0.25), (0.6, 0.6)])
def test_before_training_the_policy_boxes_what_differs_from_the_rest(x, y):
    """Were the axes or the scales of the features not those of the action, it would box another place."""
    torch.manual_seed(0)
    policy = make_policy(sb3_observation_space("overlay", 36, 128, 3), sb3_action_space())
    begin_with_what_is_seen(policy)
    image = np.full((3, 36, 36), 128, dtype=np.uint8)
    left, top = round(36 * x) - 4, round(36 * y) - 4
    image[:, top : top + 8, left : left + 8] = np.array([250, 200, 20])[:, None, None]
    observation = {
        "image": image,
        "box": np.zeros(4, dtype=np.float32),
        "step": np.eye(4, dtype=np.float32)[0],
        "expression": HashedText().embed("the yellow square"),
    }
    action, _ = policy.predict(observation, deterministic=True)
    (x1, y1, x2, y2), stop = decode_action(action, 0.5)
    assert abs((x1 + x2) / 2 - x) < 0.08 and abs((y1 + y2) / 2 - y) < 0.08 and not stop


def test_the_code_in_the_documentation_runs(tmp_path):
    page = (ROOT / "docs" / "sb3.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    assert blocks
    for block in blocks:
        done = subprocess.run(
            [sys.executable, "-W", "error::UserWarning", "-c", block], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("chosen", "inside"), [(None, 1), ("2", 2)])
def test_a_network_as_small_as_this_gets_one_thread_unless_the_user_chose(monkeypatch, chosen, inside):
    """Two threads wait for each other: see the figures in docs/sb3.md."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    if chosen is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with train.one_thread():
            assert torch.get_num_threads() == inside
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
