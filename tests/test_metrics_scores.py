"""Scores of columns and stops against values worked out by hand.

A wrong comparison or denominator moves a headline by points without any error: parse failures
alone can be 1 in 10 answers.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from test_metrics_records import REFUSED, STOP, UNPARSED, episode

from ivt_env.metrics.columns import Column, columns, outcomes
from ivt_env.metrics.scores import (
    METRICS,
    break_rate,
    correction_rate,
    hits,
    nsri,
    per_episode,
    rollout_summary,
    scores,
    step_changes,
)
from ivt_env.metrics.stopping import (
    calibration,
    confidence_calibration,
    ece,
    pearson,
    stop_calibration,
    stop_precision,
    stop_recall,
)


def decided(ious: list[float]) -> Column:
    values = np.array(ious)[:, None]
    return Column("made", values, np.ones_like(values), oracle=False, rollout="forced")


def drawn(ious: list[list[float]]) -> Column:
    values = np.array(ious)
    return Column("drawn", values, np.full_like(values, 1 / values.shape[1]), oracle=False, rollout="forced")


def test_mean_accuracy_averages_ten_thresholds() -> None:
    assert hits(decided([0.5, 0.49, 0.51]), 0.5).tolist() == [1, 0, 1]
    found = scores(decided([0.95, 0.72, 0.3]))
    assert tuple(found) == METRICS == ("Acc@0.5", "Acc@0.7", "Acc@0.75", "Acc@0.9", "mAcc", "mIoU")
    assert found["mAcc"] == pytest.approx((1.0 + 0.5 + 0.0) / 3)  # 0.72 passes 0.50 ... 0.70
    assert found["mIoU"] == pytest.approx((0.95 + 0.72 + 0.3) / 3)
    assert found["Acc@0.75"] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="unknown metric 'IoU'"):
        per_episode(decided([0.5]), "IoU")
    with pytest.raises(ValueError, match=r"lies in \[0, 1\], this one is 50"):
        per_episode(decided([0.5]), "Acc@50")


def test_correction_and_break_rate_have_the_prior_as_denominator() -> None:
    before, after = decided([0.2, 0.3, 0.6, 0.7, 0.8]), decided([0.6, 0.4, 0.7, 0.1, 0.5])
    corrected, broken = correction_rate(before, after), break_rate(before, after)
    assert (corrected.count, corrected.total, corrected.value) == (1, 2, 0.5)
    assert (broken.count, broken.total) == (1, 3)
    # The two rates account for the whole change of accuracy.
    change = hits(after, 0.5).sum() - hits(before, 0.5).sum()
    assert change == corrected.count - broken.count
    assert math.isnan(correction_rate(decided([0.9]), decided([0.9])).value)


def test_rates_of_a_random_rule_are_expectations() -> None:
    before, after = decided([0.2, 0.8]), drawn([[0.2, 0.6], [0.8, 0.1]])
    assert correction_rate(before, after).value == 0.5
    assert break_rate(before, after).value == 0.5
    with pytest.raises(ValueError, match="draws at random"):
        correction_rate(after, before)
    with pytest.raises(ValueError, match="2 episodes with 'made' of 1"):
        break_rate(before, decided([0.1]))


@pytest.mark.parametrize(
    ("iou_0", "iou_1", "g"),
    [(0.5, 0.75, 0.5), (0.5, 0.25, -0.5), (0.0, 0.3, 0.3), (1.0, 0.4, -0.6), (0.4, 0.4, 0.0), (0.8, 1.0, 1.0)]
    + [(0.0, 0.0, 0.0), (1.0, 1.0, 0.0), (0.2, 0.0, -1.0)],
)
def test_nsri_measures_a_gain_by_the_room_and_a_loss_by_the_stake(iou_0: float, iou_1: float, g: float) -> None:
    assert nsri(decided([iou_0]), decided([iou_1])).mean == pytest.approx(g)


def test_nsri_splits_by_whether_the_first_answer_was_right() -> None:
    found = nsri(decided([0.5, 0.0, 0.2]), decided([0.75, 0.3, 0.1]))
    assert found.prior_right == pytest.approx(0.5)
    assert found.prior_wrong == pytest.approx((0.3 - 0.5) / 2)
    assert found.mean == pytest.approx((0.5 + 0.3 - 0.5) / 3)
    assert (found.num_right, found.num_wrong) == (1, 2)
    assert nsri(decided([0.5]), drawn([[0.75, 0.25]])).mean == pytest.approx(0.0)


def test_step_changes_count_refinements_only() -> None:
    found = step_changes(
        outcomes([episode([0.4, 0.6, 0.5, STOP]), episode([UNPARSED, 0.7, REFUSED], "s1"), episode([STOP], "s2")])
    )
    # Refinements: +0.2, -0.1 and a refused one; the first boxes and the stops are none.
    assert found.mean_change == pytest.approx(0.1 / 3)
    assert (found.improve.count, found.degrade.count, found.stay.count) == (1, 1, 1)
    assert found.improve.total == 3
    assert (found.samples_improving.count, found.samples_degrading.count) == (1, 0)
    assert found.samples_degrading.total == 3


def test_step_changes_ignore_differences_within_the_tolerance() -> None:
    played = outcomes([episode([0.5, 0.5 + 1e-8, 0.5 - 1e-3])])
    found = step_changes(played)
    assert (found.stay.count, found.degrade.count, found.samples_degrading.count) == (1, 1, 1)
    assert step_changes(played, tolerance=0.01).stay.count == 2


def test_failures_stay_in_every_denominator_and_are_counted() -> None:
    played = outcomes([episode([UNPARSED, 0.6, STOP]), episode([REFUSED, UNPARSED], "s1"), episode([0.9, STOP], "s2")])
    found = rollout_summary(played)
    assert (found.episodes, found.mean_actions, found.mean_proposals) == (3, 7 / 3, 5 / 3)
    assert (found.parse_failures.count, found.parse_failures.total) == (2, 7)
    assert found.refused.count == 1
    assert found.episodes_with_failure.value == pytest.approx(2 / 3)
    assert found.episodes_without_box.value == pytest.approx(1 / 3)
    assert found.stopped.value == pytest.approx(2 / 3)
    failing = [episode([UNPARSED, UNPARSED], f"s{i}") for i in range(3)]
    for column in columns(episodes_forced=[*failing, episode([1.0, 1.0], "s3")]).values():
        assert per_episode(column, "Acc@0.5").mean() == 0.25, column.name


def test_stop_precision_and_recall_by_hand() -> None:
    played = outcomes(
        [
            episode([0.6, STOP]),  # right stop
            episode([0.6, 0.7, STOP], "s1"),  # went on once with a right box, then a right stop
            episode([0.2, STOP], "s2"),  # wrong stop
            episode([STOP], "s3"),  # stop without a box
            episode([0.2, 0.9], "s4"),  # right with the last action: no decision left
        ]
    )
    precision, recall = stop_precision(played), stop_recall(played)
    assert (precision.count, precision.total) == (2, 4)
    assert (recall.count, recall.total) == (2, 3)


def test_stop_calibration_judges_the_box_in_force_before_the_action() -> None:
    episodes = [
        episode([0.9, 0.1, 0.9], stop_probability=[0.5, 1.0, 0.0]),
        episode([0.1, 0.9, STOP], "s1", stop_probability=[None, 0.0, 1.0]),
    ]
    found = stop_calibration(outcomes(episodes))
    assert (found.num, found.ece, found.pearson) == (4, 0.0, pytest.approx(1.0))
    assert stop_calibration(outcomes([episode([0.5])])).num == 0
    # The confidence is judged by the box after the action.
    found = confidence_calibration(outcomes([episode([0.9, 0.1], confidence=[1.0, 0.0])]))
    assert (found.num, found.ece, found.pearson) == (2, 0.0, pytest.approx(1.0))


def test_ece_by_hand() -> None:
    # Bin 0.8 to 0.9: mean 0.85, half right, weight 2/3. Bin 0.2 to 0.3: said 0.25, wrong, weight 1/3.
    assert ece([0.82, 0.88, 0.25], [1, 0, 0]) == pytest.approx(2 / 3 * 0.35 + 1 / 3 * 0.25)
    assert ece([1.0, 1.0], [1, 0]) == 0.5
    assert ece([0.85, 0.95], [1, 0]) == pytest.approx((0.15 + 0.95) / 2)
    assert math.isnan(ece([], []))
    with pytest.raises(ValueError, match=r"probabilities lie in \[0, 1\]"):
        ece([1.2], [1])


def test_pearson_equals_numpy_and_is_nan_for_a_constant() -> None:
    x, y = np.random.default_rng(4).random((2, 100))
    assert pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert math.isnan(pearson([0.3, 0.3], [0, 1]))
    assert calibration([0.0, 1.0], [1, 0]).pearson == pytest.approx(-1.0)
    with pytest.raises(ValueError, match="one length"):
        pearson([1.0], [1.0, 2.0])
