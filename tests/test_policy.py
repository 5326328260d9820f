"""A checkpoint that does not fit must be refused when it is loaded, not show up as a bad score."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ivt_agents.vlm.load import PolicyError, load_policy
from ivt_agents.vlm.prompts import QWEN, TINY, Prompts
from ivt_agents.vlm.tiny import weights_folder
from ivt_env.rollouts import make_vector_env


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(weights_folder(), tmp_path / "model")


def rewrite_weights(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_checkpoint_of_another_shape_is_refused(folder):
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    rewrite_weights(folder, lambda w: w.update({name: torch.zeros(64, 128)}))
    with pytest.raises(PolicyError, match="belong together"):
        load_policy(folder)


def test_a_checkpoint_with_a_missing_weight_is_refused(folder):
    rewrite_weights(folder, lambda w: w.pop("model.language_model.layers.0.self_attn.q_proj.weight"))
    with pytest.raises(PolicyError, match="missing keys"):
        load_policy(folder)


def test_saved_and_loaded_policies_act_alike(folder, tmp_path):
    env = make_vector_env("IVT-Scenes-v0", 4, split="val")
    observations, _ = env.reset(seed=3)
    policy = load_policy(folder)
    policy.save(tmp_path / "again")
    wanted, found = policy.act(observations), load_policy(tmp_path / "again").act(observations)
    assert np.array_equal(wanted["box"], found["box"], equal_nan=True) and wanted["text"] == found["text"]


def test_the_prompt_of_a_policy_travels_with_it(folder):
    assert load_policy(folder).dialogue.prompts == TINY
    (folder / "policy.json").write_text(json.dumps({"prompt": "Where is {expression}?", "frame": "relative_1000"}))
    assert load_policy(folder).dialogue.prompts.text == "Where is {expression}?"
    (folder / "policy.json").unlink()
    assert load_policy(folder).dialogue.prompts == QWEN


def test_prompts_keep_braces_and_boxes_apart():
    assert TINY.fill("the {box} {looks}", "[1, 2, 3, 4]", looks=3) == "Locate the {box} {looks}. Look 3."
    filled = Prompts("Locate {expression}. Current box: {box}.").fill("the {box} {expression}", "[1, 2, 3, 4]")
    assert filled == "Locate the {box} {expression}. Current box: [1, 2, 3, 4]."
    assert TINY.fill("x", None).endswith("Current box: none.")


def test_an_unparsable_output_is_a_counted_miss_and_the_episode_goes_on():
    policy = load_policy("tiny", max_new_tokens=2)
    env = make_vector_env("IVT-Scenes-v0", 2, split="val")
    observations, _ = env.reset(seed=0)
    actions = policy.act(observations)
    assert actions["parse_failure"].all() and np.isnan(actions["box"]).all()
    _, reward, terminated, _, infos = env.step({"box": actions["box"], "stop": actions["stop"]})
    assert (reward == 0).all() and not terminated.any() and "not finite" in infos["invalid"][0]


def test_only_active_environments_are_asked():
    policy = load_policy("tiny")
    env = make_vector_env("IVT-Scenes-v0", 3, split="val")
    observations, _ = env.reset(seed=0)
    policy.act({**observations, "active": np.array([True, False, True])})
    assert [t is None for t in policy.turns] == [False, True, False]
