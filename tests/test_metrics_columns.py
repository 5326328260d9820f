"""The columns of an evaluation: which box each rule answers with.

If one of these claims is false nothing crashes: a table merely credits a label-free rule with a box
that it could not have picked, or drops the episodes that went wrong. A verifier's score that is read one action too
early speaks of another box, and its rule then looks like noise or, worse, like a gain.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_metrics_records import REFUSED, STOP, UNPARSED, episode, random_pair

from ivt_env import boxes
from ivt_env.metrics import columns as module
from ivt_env.metrics.columns import (
    check_same_samples,
    columns,
    outcomes,
    prefix_agreement,
    stop_verification,
    verifier_gated,
)
from ivt_env.metrics.scores import hits


def test_a_stopped_episode_keeps_the_iou_of_its_last_box() -> None:
    played = outcomes([episode([0.4, STOP]), episode([0.2, 0.3, 0.6, 0.7], "s1")])
    np.testing.assert_allclose(played.iou, [[0.4, 0.4, 0.4, 0.4], [0.2, 0.3, 0.6, 0.7]])
    assert played.num_actions.tolist() == [2, 4]
    assert played.num_proposals.tolist() == [1, 4]
    assert played.stopped.tolist() == [True, False]
    assert played.stop.sum() == 1, "the padding must not repeat the stop"
    forced = [episode([0.3, 0.6]), episode([0.3, 0.6], "s1")]
    stopping = [episode([0.3, STOP]), episode([0.4, STOP], "s1")]
    assert prefix_agreement(outcomes(forced), outcomes(stopping)) == 0.5
    assert prefix_agreement(*map(outcomes, random_pair(50, 8))) == 1.0


def test_each_column_answers_with_its_own_box() -> None:
    forced = [episode([0.3, 0.8, 0.78, 0.2], stop_probability=[0.9, 0.1, 0.6, 0.9])]
    found = columns(episodes_forced=forced, episodes_stopping=[episode([0.3, 0.8, STOP])])
    assert {name: c.iou[0] for name, c in found.items()} == pytest.approx(
        {
            "step_0": 0.3,
            "last_step": 0.2,
            "learned_stop": 0.8,
            "box_stability": 0.78,  # 0.78 / 0.8 is the first overlap of 0.9 or more
            "confidence_gated": 0.8,  # no box yet at the first 0.9; 0.6 is said before the third box
            "verifier_gated": 0.78,  # said of the boxes when shown: 0.1, 0.6, 0.9; the last is never shown
            "random_step": (0.3 + 0.8 + 0.78 + 0.2) / 4,
            "oracle_best": 0.8,
        }
    )


def test_label_free_columns_do_not_change_with_the_target() -> None:
    forced, _ = random_pair(200, 1)
    for i, one in enumerate(forced[::4]):  # a repeated box in every fourth episode, for box_stability
        forced[4 * i] = episode([*one.proposal_ious[:3], one.proposal_ious[2]], one.sample_id)
    played = outcomes(forced)
    rng = np.random.default_rng(2)

    numbered = replace(played, iou=np.tile(np.arange(1.0, 5.0), (200, 1)))  # the "IoU" tells which box was picked
    noise = rng.random((200, 4))
    for rule in (module.step_0, module.last_step, module.box_stability, module.confidence_gated, module.verifier_gated):
        picked = rule(numbered).astype(int) - 1
        assert (picked >= 0).all()
        np.testing.assert_array_equal(rule(replace(played, iou=noise)), noise[np.arange(200), picked])
        one_step = rule in (module.step_0, module.last_step)
        assert one_step or len(set(picked.tolist())) > 1, "vacuous: the rule always picks one step"


def test_random_step_equals_monte_carlo_over_proposals() -> None:
    forced, _ = random_pair(40, 4)
    column = columns(episodes_forced=forced)["random_step"]
    rng = np.random.default_rng(5)
    draws = np.array([[e.proposal_ious[k] for k in rng.integers(0, 4, 20_000)] for e in forced])  # (n, 20000)
    np.testing.assert_allclose(column.iou, draws.mean(axis=1), atol=5 * 0.5 / np.sqrt(20_000))
    np.testing.assert_allclose(hits(column, 0.5), (draws >= 0.5).mean(axis=1), atol=5 * 0.5 / np.sqrt(20_000))
    # The accuracy is not that of the mean IoU.
    column = columns(episodes_forced=[episode([0.4, 0.9])])["random_step"]
    assert column.iou[0] >= 0.5 and hits(column, 0.5).tolist() == [0.5]


@pytest.mark.parametrize(
    ("kind", "column", "actions", "start", "expected"),
    [
        ("stopping", "step_0", [STOP], None, 0.0),
        ("stopping", "step_0", [UNPARSED, 0.9], None, 0.0),
        ("stopping", "step_0", [REFUSED, 0.9], None, 0.0),
        ("stopping", "step_0", [STOP], 0.6, 0.6),
        ("forced", "box_stability", [0.4, REFUSED, 0.9], None, 0.9),  # a refused box is no agreement
        ("forced", "box_stability", [0.4, UNPARSED, 0.9], None, 0.9),
        ("forced", "box_stability", [0.79, 0.1], 0.8, 0.79),  # the starting box counts
        ("forced", "random_step", [0.2], None, 0.2),
        ("forced", "random_step", [0.6, 0.8, 1.0], None, 0.8),
    ],
)
def test_a_rule_answers_with_the_box_that_it_is_said_to(kind, column, actions, start, expected) -> None:
    found = columns(**{f"episodes_{kind}": [episode([0.5], "s1"), episode(actions, start=start)]})
    assert found[column].iou[1] == pytest.approx(expected) and "confidence_gated" not in found


def test_the_oracle_bounds_every_column_and_is_the_only_one_marked() -> None:
    forced, stopping = random_pair(300, 3)
    found = columns(episodes_forced=forced, episodes_stopping=stopping)
    assert len(found) == 8 and {name for name, c in found.items() if c.oracle} == {"oracle_best"}
    assert {name for name, c in found.items() if c.rollout == "stopping"} == {"step_0", "learned_stop"}
    for column in found.values():
        assert np.allclose(column.weights.sum(axis=1), 1), column.name
        assert (found["oracle_best"].iou >= column.iou - 1e-12).all(), column.name
    assert (found["oracle_best"].iou > found["last_step"].iou).any()
    never = columns(episodes_forced=forced, episodes_stopping=forced)
    np.testing.assert_array_equal(never["learned_stop"].iou, never["last_step"].iou)


def test_a_box_is_judged_by_what_is_said_when_it_is_shown() -> None:
    forced = [episode([0.3, 0.8, 0.6], stop_probability=[0.9, 0.2, 0.7]), episode([0.5], "s1", stop_probability=[0.4])]
    said = stop_verification(outcomes(forced))
    np.testing.assert_array_equal(said, [[0.2, 0.7, np.nan], [np.nan, np.nan, np.nan]])
    assert verifier_gated(outcomes(forced)).tolist() == [0.8, 0.5]
    stopping = [episode([0.4, 0.6, STOP], stop_probability=[0.0, 0.1, 0.8])]
    assert verifier_gated(outcomes(stopping)).tolist() == [0.6], "a stop adds no box"
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


A, B = episode([0.5], "s0"), episode([0.5], "s1")
WRONG = replace(A, steps=[replace(A.steps[0], iou=0.9)])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: columns(episodes_forced=[A, B], episodes_stopping=[B, A]), "'s0' in episodes_forced, 's1' in"),
        (lambda: columns(episodes_forced=[A, B], episodes_stopping=[A]), "2 episodes, episodes_stopping has 1"),
        (lambda: check_same_samples([A], [episode([0.5], "s0", dataset="photos")]), "differs in dataset"),
        (lambda: check_same_samples([A], [episode([0.5], "s0", start=0.1)]), "differs in initial_box"),
        (
            lambda: columns(episodes_forced=[A, episode([0.5, STOP], "s1")]),
            r"\[1\] \('s1'\) holds a stop, as do 1 of 2",
        ),
        (lambda: columns(episodes_forced=[]), "the list is empty"),
        (lambda: columns(), "no rollout given"),
        (lambda: outcomes([episode([])]), "'s0'.* has no step"),
        (lambda: outcomes([episode([0.2, STOP, 0.4])]), "goes on after its stop"),
        (lambda: module.random_step(outcomes([episode([STOP])])), "no proposal to draw from"),
        (lambda: outcomes([WRONG]), "step 0: recorded IoU 0.9, but its box and target give 0.5"),
    ],
)
def test_what_cannot_be_scored_or_paired_is_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
    assert outcomes([WRONG], verify=False).iou[0, 0] == 0.9
