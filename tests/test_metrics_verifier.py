"""Acceptance by a verifier: a later box replaces the kept one only where it is found better.

A score that is read one action too early speaks of another box, and the rule then looks like noise
(or, worse, like a gain) while every accuracy in the table is computed correctly.
"""

from __future__ import annotations

import numpy as np
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
        assert verifier_gated(played).tolist() == [0.7]


def test_the_rule_equals_a_plain_loop() -> None:
    forced, _ = random_pair(300, 4)
    played = outcomes(forced)
    scores = stop_verification(played)
    assert np.isnan(scores).any() and not np.isnan(scores).all()
    found = verifier_gated(played)
    for i in range(len(forced)):
        kept = 0
        for t in range(1, played.iou.shape[1]):
            no_box_yet = boxes.is_no_box(played.box[i, kept])
            if played.accepted[i, t] and (no_box_yet or scores[i, t] > scores[i, kept]):
                kept = t
        assert found[i] == played.iou[i, kept], i
    assert "verifier_gated" not in columns(episodes_forced=[episode([0.5, 0.6])])
