"""Intervals and tests against closed forms, other formulas and simulation.

An interval that ignores shared images, or pairs the wrong episodes, is too narrow without any
sign of it, and noise is then reported as a gain. The suite's own check: 4 correlated episodes per
image make the unclustered standard error about half of the true one.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from ivt_env.metrics import statistics as module
from ivt_env.metrics.statistics import MIN_CLUSTERS, bootstrap_mean, clustered_se, mcnemar, paired_bootstrap, wilson


def correlated(rng: np.random.Generator, clusters: int, mean: float) -> tuple[np.ndarray, list[int]]:
    """Values with a shared part per cluster of 1 to 4 members; the size tells nothing of the value."""
    ids = np.repeat(np.arange(clusters), rng.integers(1, 5, clusters))
    return mean + rng.normal(size=clusters)[ids] + 0.5 * rng.normal(size=len(ids)), ids.tolist()


def test_the_interval_covers_the_truth_about_95_times_in_100() -> None:
    rng, covered, by_episode, trials = np.random.default_rng(0), 0, 0, 400
    for trial in range(trials):
        values, ids = correlated(rng, 80, 0.3)
        found = paired_bootstrap(values, np.zeros_like(values), ids, n_boot=400, seed=trial)
        covered += found.low <= 0.3 <= found.high
        by_episode += abs(values.mean() - 0.3) <= 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    # Binomial standard deviation at 0.94: 0.012; four of them, around what 80 images allow.
    assert 0.89 <= covered / trials <= 0.985
    assert by_episode / trials < 0.87, "an interval that ignores the images would cover far less"


def test_copies_of_an_episode_add_no_evidence() -> None:
    values = np.random.default_rng(4).normal(size=50)
    once = paired_bootstrap(values, 0 * values, range(50), seed=5)
    four = paired_bootstrap(np.repeat(values, 4), np.zeros(200), np.repeat(range(50), 4).tolist(), seed=5)
    assert (four.low, four.high, four.se) == pytest.approx((once.low, once.high, once.se))
    assert (once.num, four.num, once.num_clusters, four.num_clusters) == (50, 200, 50, 50)


def test_the_bootstrap_equals_a_plain_resampling_loop() -> None:
    values, ids = correlated(np.random.default_rng(6), 30, 0.2)
    groups = [values[np.array(ids) == c] for c in range(30)]
    rng = np.random.default_rng(7)
    means = [np.concatenate([groups[k] for k in rng.integers(0, 30, 30)]).mean() for _ in range(8000)]
    found = bootstrap_mean(values, ids, n_boot=8000)
    np.testing.assert_allclose([found.low, found.high], np.quantile(means, [0.025, 0.975]), atol=0.02)
    values, ids = correlated(np.random.default_rng(3), 500, 0.0)
    found = bootstrap_mean(values, ids, n_boot=8000)
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(clustered_se(values, ids), rel=0.05)


def test_one_seed_gives_one_answer_whatever_the_batching(monkeypatch: pytest.MonkeyPatch) -> None:
    values, ids = correlated(np.random.default_rng(8), 40, 0.0)
    first = bootstrap_mean(values, ids, seed=1)
    assert bootstrap_mean(values, ids, seed=1) == first
    assert bootstrap_mean(values, ids, seed=2) != first
    monkeypatch.setattr(module, "_WEIGHTS_AT_ONCE", 40 * 7)
    batched = bootstrap_mean(values, ids, seed=1)
    assert (batched.low, batched.high) == pytest.approx((first.low, first.high), rel=1e-12)
    monkeypatch.undo()
    assert bootstrap_mean(values, [f"image {i}" for i in ids], seed=1) == first


def test_rounding_is_never_shown_as_a_difference() -> None:
    a = np.full(60, 0.7)
    b = np.nextafter(a, 1)
    assert (b > a).all()
    found = paired_bootstrap(a, b, range(60))
    assert not found.shown
    assert (found.diff, found.low, found.high) == (0.0, 0.0, 0.0)
    worse = paired_bootstrap(a - 0.2 + np.random.default_rng(9).normal(0, 0.1, 60), a, range(60))
    assert worse.shown and worse.high < 0, "a clear difference keeps its sign"


def test_too_few_images_show_nothing() -> None:
    for n, shown in ((MIN_CLUSTERS - 1, False), (MIN_CLUSTERS, True)):
        assert paired_bootstrap(np.ones(n), np.zeros(n), range(n)).shown is shown


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (0, 0, 1.0),
        (3, 3, 1.0),
        (5, 0, 2 / 32),
        (1, 5, 2 * (1 + 6) / 64),
        (10, 2, 2 * (1 + 12 + 66) / 4096),
        (0, 1, 1.0),
    ],
)
def test_mcnemar_equals_hand_computed_values(only_a: int, only_b: int, p: float) -> None:
    a = [1] * only_a + [0] * only_b + [1, 1, 0]
    b = [0] * only_a + [1] * only_b + [1, 1, 0]
    assert mcnemar(a, b) == (pytest.approx(p), only_a, only_b)
    assert mcnemar(b, a)[0] == mcnemar(a, b)[0]


def test_mcnemar_holds_for_thousands_of_pairs() -> None:
    a, b = np.repeat([1, 0], [2600, 2400]), np.repeat([0, 1], [2600, 2400])
    z = (200 - 1) / math.sqrt(5000)  # normal approximation with continuity correction
    assert mcnemar(a, b)[0] == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)


def test_a_difference_of_the_detectable_size_is_found_four_times_in_five() -> None:
    rng, n, trials = np.random.default_rng(10), 100, 2000
    size = paired_bootstrap(
        rng.normal(size=100_000), np.zeros(100_000), range(100_000), n_boot=1
    ).detectable * math.sqrt(100_000 / n)
    assert size == pytest.approx(2.8016 / math.sqrt(n), rel=0.02)
    d = rng.normal(size, 1, (trials, n))
    found = np.abs(d.mean(axis=1) / (d.std(axis=1, ddof=1) / math.sqrt(n))) > 1.96
    assert found.mean() == pytest.approx(0.8, abs=4 * 0.009 + 0.01)


def test_wilson_equals_published_values_and_stays_in_the_unit_interval() -> None:
    # Newcombe (Statistics in Medicine 1998), table I: 81 of 263 and 0 of 20.
    assert wilson(81, 263) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))
    assert wilson(0, 20) == (0.0, pytest.approx(0.1611, abs=5e-5))
    assert wilson(20, 20)[1] == 1.0


@pytest.mark.parametrize(
    ("test", "arguments", "message"),
    [
        (bootstrap_mean, ([], []), "non-empty vector"),
        (paired_bootstrap, ([1, 2, 3], [1, 2], range(3)), r"cannot pair \(3,\) with \(2,\)"),
        (bootstrap_mean, ([1, 2, 3], range(2)), "3 values but 2 image ids"),
        (bootstrap_mean, ([1, math.nan], range(2)), "value 1 is nan"),
        (bootstrap_mean, ([1, 2], ["p", "p"]), "all episodes show one image"),
        (mcnemar, ([0.5], [1]), "0 and 1 only"),
        (mcnemar, ([], []), "non-empty"),
        (wilson, (3, 2), "3 of 2 is no proportion"),
    ],
)
def test_bad_input_is_refused_with_its_reason(test, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        test(*arguments)
