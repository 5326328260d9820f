"""Pointing rewards pay for the centre of the box in the target, and ``hit`` is measured as a click is.

Silent when false: a policy is paid for a click beside the target, or its report shows another metric than hit.
"""

from __future__ import annotations

import numpy as np
import pytest

from ivt_env import boxes
from ivt_env.data import load_dataset
from ivt_env.episodes import Episode, Step
from ivt_env.game import Game
from ivt_env.metrics.audit import audit
from ivt_env.metrics.columns import columns, pool_seeds, select
from ivt_env.metrics.scores import per_episode
from ivt_env.rewards import POTENTIALS, RewardConfig

TARGET = (0.4, 0.4, 0.6, 0.6)
INSIDE, BESIDE, FAR = (0.3, 0.3, 0.72, 0.7), (0.6, 0.45, 0.7, 0.55), (0.9, 0.9, 1.0, 1.0)


def test_a_hit_is_the_centre_in_the_target_edges_included():
    assert boxes.hit([INSIDE, BESIDE, (0.5, 0.5, 0.7, 0.5), (0, 0, 0, 0)], TARGET).tolist() == [
        True,
        False,
        True,
        False,
    ]
    assert not boxes.hit((0, 0, 0, 0), (0, 0, 1, 1)), "no box is no hit"


def test_hit_pays_once_and_distance_leads_there():
    phi = {
        name: [RewardConfig(potential=name).phi(box, TARGET) for box in (FAR, BESIDE, INSIDE)] for name in POTENTIALS
    }
    assert phi["hit"] == [0, 0, 1]
    assert 0 < phi["distance"][0] < phi["distance"][1] < phi["distance"][2] == 1
    assert phi["hit_distance"] == pytest.approx([(a + b) / 2 for a, b in zip(phi["hit"], phi["distance"], strict=True)])


@pytest.mark.parametrize("potential", ["hit", "distance", "hit_distance"])
def test_gains_add_up_to_the_final_potential(potential):
    sample = load_dataset("photos")[0]
    config = RewardConfig(potential=potential)
    game = Game(sample, config, 4)
    total = sum(game.act(box, False)[0] for box in (FAR, BESIDE, sample.box))
    assert total == pytest.approx(config.phi(game.box, sample.box)) and game.hit and game.info()["hit"] is True


def test_a_stop_on_a_miss_is_wrong_for_pointing_and_one_on_a_hit_is_not():
    sample = load_dataset("photos")[0]
    x, y = (sample.box[0] + sample.box[2]) / 2, (sample.box[1] + sample.box[3]) / 2
    config = RewardConfig(potential="hit", wrong_stop_penalty=0.5)
    for box, expected in (((x - 0.01, y - 0.01, x + 0.01, y + 0.01), 0.0), ((0.98, 0.98, 1, 1), -0.5)):
        game = Game(sample, config, 3)
        game.act(box, False)
        assert game.act(box, True)[0] == expected


def played(*steps):
    made = [Step(box, False, box, float(boxes.iou(box, TARGET)), 0.0) for box in steps]
    made += [Step(None, True, steps[-1], made[-1].iou, 0.0)]
    return [Episode(f"s{n}", f"i{n}", "d", "test", "e", TARGET, (9, 9), list(made), terminated=True) for n in range(30)]


def test_columns_seeds_and_the_audit_know_hit():
    episodes = played(BESIDE, INSIDE)
    found = columns(episodes_stopping=episodes)
    assert per_episode(found["step_0"], "hit").tolist() == [0.0] * 30
    assert per_episode(found["learned_stop"], "hit").tolist() == [1.0] * 30
    assert per_episode(found["learned_stop"], "Acc@0.5").tolist() == [0.0] * 30, "hit is not IoU"
    pooled = pool_seeds([found["step_0"], columns(episodes_stopping=played(INSIDE))["step_0"]])
    assert per_episode(pooled, "hit").tolist() == [0.5] * 30
    assert [per_episode(each, "hit")[0] for each in pooled.by_seed()] == [0.0, 1.0]
    assert per_episode(select(pooled, np.arange(30) < 5), "hit").tolist() == [0.5] * 5
    rows = {row.column: row.scores["hit"].value for row in audit(stopping=episodes, n_boot=10).rows}
    assert rows == {"step_0": 0.0, "learned_stop": 1.0}
