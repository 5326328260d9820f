"""Acceptance by a verifier: a later box replaces the kept one only where it is found better.

A score that is read one action too early speaks of another box, and the rule then looks like noise
(or, worse, like a gain) while every accuracy in the table is computed correctly.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from test_metrics_records import REFUSED, STOP, UNPARSED, episode, random_pair

from ivt_env import boxes
from ivt_env.metrics.columns import columns, outcomes, stop_verification, verifier_gated


def test_a_box_is_judged_by_what_is_said_when_it_is_shown() -> None:
    forced = [episode([0.3, 0.8, 0.6], stop_probability=[0.9, 0.2, 0.7]), episode([0.5], "s1", stop_probability=[0.4])]
    said = stop_verification(outcomes(forced))
    np.testing.assert_array_equal(said, [[0.2, 0.7, np.nan], [np.nan, np.nan, np.nan]])
    assert verifier_gated(outcomes(forced)).tolist() == [0.8, 0.5]
    stopping = [episode([0.4, 0.6, STOP], stop_probability=[0.0, 0.1, 0.8])]
    assert verifier_gated(outcomes(stopping)).tolist() == [0.6], "a stop is no new box"
    for nothing in (UNPARSED, REFUSED):  # then the next box is taken
        played = outcomes([episode([nothing, 0.7, 0.4], stop_probability=[0.1, 0.1, 0.2])])
        assert verifier_gated(played).tolist() == verifier_gated(played, margin=math.inf).tolist() == [0.7]


def test_scores_that_rank_like_the_iou_give_the_oracle_of_the_boxes_made() -> None:
    """Scores from the target are a cheat: here they show what a perfect verifier would reach."""
    forced, _ = random_pair(300, 2)
    played = outcomes(forced)
    np.testing.assert_array_equal(verifier_gated(played, played.iou**3 - 7), played.iou.max(axis=1))
    some = ~boxes.is_no_box(played.box[:, 0])
    np.testing.assert_array_equal(verifier_gated(played, -played.iou)[some], played.iou[some].min(axis=1))


def test_the_default_scores_are_the_stated_stop_probabilities() -> None:
    forced, _ = random_pair(100, 3)
    played = outcomes(forced)
    np.testing.assert_array_equal(verifier_gated(played), verifier_gated(played, stop_verification(played)))
    with_scores = columns(episodes_forced=forced, verifier_scores=played.iou)["verifier_gated"]
    np.testing.assert_array_equal(with_scores.iou, columns(episodes_forced=forced)["oracle_best"].iou)


def test_the_rule_equals_a_plain_loop() -> None:
    rng = np.random.default_rng(4)
    forced, _ = random_pair(300, 4)
    played = outcomes(forced)
    scores = np.where(rng.random(played.iou.shape) < 0.15, np.nan, rng.normal(size=played.iou.shape))
    for margin, guard in ((0.0, None), (0.3, None), (-0.2, 0.5), (0.1, 0.8)):
        found = verifier_gated(played, scores, margin=margin, guard_iou=guard)
        for i in range(len(forced)):
            kept = 0
            for t in range(1, played.iou.shape[1]):
                if not played.accepted[i, t]:
                    continue
                if boxes.is_no_box(played.box[i, kept]):
                    kept = t
                elif scores[i, t] > scores[i, kept] + margin and (
                    guard is None or boxes.iou(played.box[i, t], played.box[i, kept]) >= guard
                ):
                    kept = t
            assert found[i] == played.iou[i, kept], (margin, guard, i)


def test_the_rule_needs_scores_of_every_box_and_a_margin_that_is_a_number() -> None:
    played = outcomes([episode([0.5, 0.6])])
    with pytest.raises(ValueError, match=r"shape \(1, 1\) for boxes of shape \(1, 2\)"):
        verifier_gated(played, np.zeros((1, 1)))
    with pytest.raises(ValueError, match="margin of the verifier is NaN"):
        verifier_gated(played, margin=math.nan)
    with pytest.raises(ValueError, match=r"an IoU in \[0, 1\], not 1.5"):
        verifier_gated(played, guard_iou=1.5)
    assert "verifier_gated" not in columns(episodes_forced=[episode([0.5, 0.6])])
