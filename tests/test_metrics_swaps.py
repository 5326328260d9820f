"""What the overlay swaps are summed up to.

If one of these is false, a policy that stops because there *is* a box passes for one that verifies, and
a policy that repeats its own answer passes, too.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ivt_env import boxes
from ivt_env.metrics.statistics import wilson
from ivt_env.metrics.swaps import (
    Dependence,
    Swap,
    dependence,
    dependence_table,
    share,
    summarise,
    swap_headline,
    swap_table,
)
from ivt_env.metrics.table import as_json

TARGET = (0.2, 0.2, 0.6, 0.6)
FAR = (0.7, 0.7, 0.9, 0.9)
NEAR = (0.25, 0.2, 0.65, 0.6)  # IoU 0.78 with the target
SHOWN: dict[str, Any] = {
    "own": (0.2, 0.2, 0.6, 0.61),
    "target": TARGET,
    "sibling": FAR,
    "random": (0.0, 0.65, 0.1, 0.9),
    "shifted": (0.3, 0.2, 0.7, 0.6),
    "near": NEAR,
    "none": None,
    "blank": (0.2, 0.2, 0.6, 0.61),
}


def iou(box: Any) -> float:
    return 0.0 if box is None else float(boxes.iou(box, TARGET))


def swap(variant: str = "target", sample: int = 0, answer: Any = "stop", p: float | None = None, **more: Any) -> Swap:
    """A swap; ``answer`` is an action, or the box proposed."""
    shown = more.pop("shown", SHOWN[variant])
    action, new = (answer, shown) if isinstance(answer, str) else ("propose", answer)
    return Swap(
        sample_id=f"s{sample}",
        image_id=more.pop("image", f"p{sample}"),
        variant=variant,
        step=1,
        shown=shown,
        shown_iou=iou(shown),
        target=TARGET,
        action=action,
        new_box=new,
        new_iou=iou(new),
        stop_probability=p,
        **more,
    )


def played(policy: Any, samples: int = 30) -> list[Swap]:
    """Every variant of each sample; ``policy(variant, shown IoU)`` gives the answer."""
    return [swap(v, k, policy(v, iou(SHOWN[v]))) for k in range(samples) for v in SHOWN]


def named(rows: list[Dependence]) -> dict[str, Dependence]:
    return {row.name.partition(":")[0].partition(" (")[0]: row for row in rows}


AUROCS = [f"AUROC {pair}" for pair in ("good / bad", "target / near", "target / sibling", "target / random")]


@pytest.mark.parametrize(
    ("policy", "auroc", "index", "presence", "image"),
    [
        (lambda v, q: "stop" if q >= 0.9 and v != "blank" else TARGET, 1, 1, 1, 1),  # a perfect verifier
        *((lambda v, q, answer=answer: answer, 0.5, 0, 0, 0) for answer in ("stop", TARGET, FAR, "unparsable")),
        (lambda v, q: TARGET if v == "none" else "stop", 0.5, 0, 1, 0),  # stops because there is a box
    ],
)
def test_only_a_policy_that_tells_boxes_apart_is_found_to(policy, auroc, index, presence, image) -> None:
    found = named(dependence("it", played(policy)))
    expected = dict.fromkeys(AUROCS, auroc) | {"index": index, "presence": presence, "image": image}
    for name, value in expected.items():
        row = found[name]
        assert row.value.value == value and row.shown == (value != row.null), name
    if policy("target", 1.0) == TARGET:  # its own right answer again: no verifying, though it looks like keeping
        assert found["index of keeping"].value.value == 1


def test_good_and_bad_are_compared_within_a_sample_only() -> None:
    # Between samples the bad boxes have far higher probabilities; within each the good one is ahead.
    swaps = []
    for k in range(20):
        level = k / 20
        swaps += [swap("target", k, p=min(1.0, level + 0.02)), swap("sibling", k, p=level)]
    row = named(dependence("it", swaps))["AUROC target / sibling"]
    assert row.value.value == 1 and row.measure == "stop_probability"


def test_a_single_missing_probability_makes_the_statistic_one_of_stops() -> None:
    swaps = [swap(v, k, "stop", p=0.9 if v == "target" else 0.1) for k in range(12) for v in ("target", "sibling")]
    assert named(dependence("it", swaps))["AUROC target / sibling"].value.value == 1
    swaps[5] = replace(swaps[5], stop_probability=None)
    row = named(dependence("it", swaps))["AUROC target / sibling"]
    assert (row.measure, row.value.value) == ("stop", 0.5)
    between = [swap("near", 0, p=0.1), swap("near", 1, p=0.9)]  # neither good nor bad
    assert math.isnan(named(dependence("it", between))["AUROC good / bad"].value.value)


def test_the_headline_says_whether_good_boxes_are_told_from_bad() -> None:
    judging, always, upside = (
        [swap(v, k, "stop" if stops(v) else TARGET, agent=str(stops)) for v in SHOWN for k in range(20)]
        for stops in (lambda v: v == "target", lambda v: True, lambda v: v != "target")
    )
    rows = [r for name, s in {"a": judging, "b": always, "c": upside}.items() for r in dependence(name, s)]
    lines = swap_headline(rows).splitlines()
    for line, said in zip(lines[2:], ("tells good from bad", "n.s.", "prefers bad boxes"), strict=False):
        assert said in line
    assert len(swap_headline(rows * 20).splitlines()) <= 12 and max(map(len, lines)) <= 100


def test_own_right_against_wrong_goes_across_samples() -> None:
    right = [swap("own", k, p=0.6 + k / 100) for k in range(12)]
    wrong = [swap("own", 20 + k, p=0.1 + k / 100, shown=FAR) for k in range(12)]
    row = named(dependence("it", right + wrong))["AUROC own right / wrong"]
    assert row.value.value == 1 and row.value.num_clusters == 24
    assert math.isnan(named(dependence("it", right))["AUROC own right / wrong"].value.value)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    # Stops are drawn with chance 0.7 on good boxes and 0.4 on bad ones: index 0.3, AUROC 0.65. Two samples
    # share each image and its luck, so that intervals over samples would be too narrow.
    truth = {"index": 0.3, "AUROC target / sibling": 0.65, "AUROC own right / wrong": 0.65}
    covered = dict.fromkeys(truth, 0)
    trials = 40
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        swaps = []
        for image in range(50):
            luck = rng.random(3)
            for k in (2 * image, 2 * image + 1):
                for v, u in zip(("target", "sibling", "own"), luck, strict=True):
                    shown = FAR if v == "own" and image % 2 == 1 else SHOWN[v]
                    stop = u < (0.7 if iou(shown) >= 0.5 else 0.4)
                    swaps.append(swap(v, k, "stop" if stop else TARGET, image=f"p{image}", shown=shown))
        found = named(dependence("it", swaps, n_boot=100, seed=trial))
        for name, value in truth.items():
            covered[name] += found[name].value.low <= value <= found[name].value.high
    assert all(0.87 <= count / trials <= 1 for count in covered.values()), covered


def test_shares_are_wilsons_and_widen_with_shared_images() -> None:
    values = [1, 0, 1, 1, 0, 1, 1, 1, 0, 1] * 4
    alone = share(values, range(40))
    assert (alone.low, alone.high) == pytest.approx(wilson(28, 40), abs=0.01)
    together = share(np.repeat(values, 4), np.repeat(range(40), 4).tolist())
    assert together.high - together.low == pytest.approx(alone.high - alone.low, rel=0.05)
    certain = share([1] * 80, np.repeat(range(20), 4).tolist())
    assert (certain.low, certain.high) == wilson(20, 20)


def test_each_answer_is_what_its_definition_says() -> None:
    stop, refused, silent = (swap("near", 0, a) for a in ("stop", "refused", "unparsable"))
    to_target, away, again = swap("near", 0, TARGET), swap("near", 0, FAR), swap("near", 0, NEAR)
    assert [s.stopped for s in (stop, refused, silent, to_target, away, again)] == [True] + [False] * 5
    assert [s.kept for s in (stop, refused, silent, to_target, away, again)] == [True, False, False, True, False, True]
    assert [s.left for s in (stop, refused, silent, to_target, away, again)] == [False] * 4 + [True, False]
    assert [s.towards for s in (stop, refused, silent, to_target, away, again)] == [False] * 3 + [True, False, False]
    assert [s.right for s in (stop, to_target, away)] == [True, True, False]
    nothing = swap("none", 0, TARGET)
    assert nothing.towards and not nothing.left and not nothing.kept


def test_a_row_counts_its_answers() -> None:
    answers = ["stop", TARGET, FAR, "refused", "unparsable"]
    (row,) = summarise("it", [swap("near", k, a, reached=k > 0) for k, a in enumerate(answers)])
    shares = [row.stopped.value, row.left.value, row.towards.value, row.kept.value, row.right.value]
    assert shares == pytest.approx([0.2, 0.2, 0.2, 0.4, 0.8])
    assert (row.num, row.failed, row.reached) == (5, 2, 0.8)
    assert row.change.value == pytest.approx((1 - 2 * iou(NEAR)) / 5)


def test_one_sample_or_one_image_is_printed_without_an_interval() -> None:
    swaps = [swap(v, 0) for v in SHOWN]
    text = dependence_table(dependence("it", swaps)) + swap_table(summarise("it", swaps))
    assert "nan" not in text.lower()
    assert json.loads(json.dumps(as_json(dependence("it", swaps)), allow_nan=False))


@pytest.mark.parametrize(
    "swaps, why",
    [
        ([], "no swaps"),
        ([swap(agent="a"), swap("near", agent="b")], "several policies"),
        ([swap(), swap()], "there twice"),
    ],
)
def test_what_cannot_be_scored_is_refused(swaps: list[Swap], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        summarise("it", swaps)
