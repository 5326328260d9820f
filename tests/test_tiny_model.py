"""The shipped model must stay as strong as published: a gain over a weaker base is no gain, and one over a base that
could have told at a first look shows no looking.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from ivt_agents.play.on_split import play
from ivt_agents.vlm.load import load_policy
from ivt_agents.vlm.tiny import weights_folder
from ivt_env.data import load_dataset


def first_ious(split, count):
    policy = load_policy("tiny")
    options = {"ignore_stop": True, "max_steps": 1, **policy.shown}
    episodes = play(policy, "IVT-Scenes-v0", split, range(count), **options)
    return np.array([e.steps[0].iou for e in episodes])


@pytest.fixture(scope="module")
def on_test():
    return first_ious("test", 150)


def test_first_boxes_on_test_are_as_right_and_as_precise_as_published(on_test):
    assert (on_test >= 0.5).mean() >= 0.95 and (on_test >= 0.9).mean() >= 0.80


def test_a_first_look_finds_an_object_of_a_search_scene_but_not_which_one_is_meant():
    found = (first_ious("test_search", 150) >= 0.5).mean()
    scenes = load_dataset("scenes", "test_search", strict=True)
    chance = np.mean([1 / scenes[i].meta["things"] for i in range(150)])
    assert abs(found - chance) < 0.08, (found, chance)


def test_weights_fit_into_eight_megabytes_and_say_how_they_were_made():
    folder = weights_folder()
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 8_000_000
    record = json.loads((folder / "training.json").read_text())
    assert record["command"].startswith("python -m ivt_agents.vlm.pretrain ") and record["args"]["seed"] == 0
