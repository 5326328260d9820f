"""The shipped model must stay as strong as the paper's base: a gain over a weaker base is no gain."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ivt_agents.play.on_split import play
from ivt_agents.vlm.load import load_policy
from ivt_agents.vlm.tiny import weights_folder


@pytest.fixture(scope="module")
def first_ious():
    episodes = play(load_policy("tiny"), "IVT-Scenes-v0", "test", range(500), ignore_stop=True, max_steps=1)
    return np.array([e.steps[0].iou for e in episodes])


def test_single_shot_accuracy_is_between_75_and_88_percent_on_test(first_ious):
    # 500 samples: the standard error is 1.8 points, and the full figure stands in the README.
    assert 0.75 - 0.03 <= (first_ious >= 0.5).mean() <= 0.88 + 0.03


def test_first_boxes_are_as_precise_as_published(first_ious):
    """A loop that corrects boxes would gain more on a base that draws them badly: 58.6 % at 0.9, n = 1,000."""
    assert (first_ious >= 0.9).mean() >= 0.586 - 0.05


def test_weights_fit_into_eight_megabytes_and_say_how_they_were_made():
    folder = weights_folder()
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 8_000_000
    record = json.loads((folder / "training.json").read_text())
    for run in (record, record["first_run"]):
        assert (
            run["command"].startswith("python -m agents.vlm.pretrain")
            and f"--seed {run['args']['seed']}" in run["command"]
        )
