"""The audit over saved episodes: it must say what fresh ones say, drop nobody, and average seeds.

A stratum that loses an episode, or a seed that counts twice, changes a table without any error.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from test_metrics_records import episode, random_pair

from ivt_env.episodes import load_episodes, save_episodes
from ivt_env.metrics.audit import Run, audit, audit_runs, behaviour_lines
from ivt_env.metrics.breakdown import breakdown, group_table
from ivt_env.metrics.columns import columns, outcomes, pool_seeds, strata
from ivt_env.metrics.scores import METRICS, break_rate, correction_rate, scores
from ivt_env.metrics.stopping import auroc, ece, reliability
from ivt_env.metrics.table import compare, difference_table, seed_table


def seeds(count: int, n: int = 40) -> list[Run]:
    runs = []
    for seed in range(count):
        forced, stopping = random_pair(n, seed)
        runs.append(Run(stopping, forced))
    return runs


def varied(n: int, seed: int) -> list:
    """Episodes of two data sets whose targets, images and siblings differ in size and number."""
    rng = np.random.default_rng(seed)
    made = []
    for i, one in enumerate(random_pair(n, seed)[0]):
        side = float(rng.uniform(0.02, 0.9))
        one.target = (0.0, 0.0, side, side)
        one.size = (int(rng.integers(40, 900)), int(rng.integers(40, 900)))
        one.siblings = [(0.5, 0.5, 0.6, 0.6)] * int(rng.integers(0, 6))
        one.dataset = ("scenes", "photos")[i % 2]
        made.append(one)
    return made


def test_an_audit_of_saved_episodes_equals_that_of_fresh_ones(tmp_path) -> None:
    (run,) = seeds(1)
    save_episodes(tmp_path / "a", run.stopping)
    save_episodes(tmp_path / "a-forced", run.forced)
    saved = audit(stopping=load_episodes(tmp_path / "a"), forced=load_episodes(tmp_path / "a-forced"), n_boot=50)
    assert saved.as_json() == audit(stopping=run.stopping, forced=run.forced, n_boot=50).as_json()
    back = json.loads(json.dumps(saved.as_json(), allow_nan=False))
    assert back["episodes"] == 40 and back["images"] == 20 and back["served"] == ["scenes/test"]
    assert {"rows", "gains", "groups", "runs"} <= set(back) and "columns" not in back


def test_the_audit_holds_what_the_single_functions_give() -> None:
    (run,) = seeds(1)
    found = audit(stopping=run.stopping, forced=run.forced, n_boot=50)
    single = columns(episodes_forced=run.forced, episodes_stopping=run.stopping)
    assert list(found.columns) == list(single) and len(single) == 8
    for row in found.rows:
        assert {m: s.value for m, s in row.scores.items()} == pytest.approx(
            scores(single[row.column], (*METRICS, "hit"))
        )
    one = found.runs[0]
    for key in ("learned_stop", "verifier_gated", "random_step"):
        assert one.broke[key] == break_rate(single["step_0"], single[key])
        assert one.corrected[key] == correction_rate(single["step_0"], single[key])
    assert one.stopping.parse_failures.count == sum(s.parse_failure for e in run.stopping for s in e.steps) > 0
    everyone = {g.column: g for g in found.groups if g.group == "all"}
    assert everyone["learned_stop"].parse_failures == one.stopping.parse_failures
    assert everyone["last_step"].parse_failures == one.forced.parse_failures
    shown = str(behaviour_lines({"mine": found}))
    for label in (
        "proposals an episode",
        "learned stop: regressed",
        "stop precision",
        "stop recall",
        "NSRI",
        "unparsable",
    ):
        assert label in shown


def test_one_rollout_is_enough() -> None:
    (run,) = seeds(1)
    only = audit(stopping=run.stopping, n_boot=20)
    assert set(only.columns) == {"step_0", "learned_stop"} and only.runs[0].forced is None
    forced = audit(forced=run.forced, n_boot=20)
    assert forced.runs[0].stop_precision is None and "learned_stop" not in forced.columns
    assert "stop precision" not in str(behaviour_lines({"a": forced}))
    with pytest.raises(ValueError, match="no rollout given"):
        audit()
    with pytest.raises(ValueError, match="no run given"):
        audit_runs([])


@pytest.mark.parametrize(
    ("side", "pixels", "siblings", "expected"),
    [
        (0.1, 310, 0, {"size:small", "side:tiny", "siblings:0"}),
        (0.11, 320, 1, {"size:medium", "side:small", "siblings:1"}),
        (0.25, 380, 2, {"size:medium", "side:medium", "siblings:2"}),
        (0.5, 192, 7, {"size:large", "side:large", "siblings:3+"}),
    ],
)
def test_the_strata_have_the_limits_that_they_are_said_to_have(side, pixels, siblings, expected) -> None:
    others = [(0.0, 0.0, 0.1, 0.1)] * siblings
    one = replace(episode([0.5]), target=(0.0, 0.0, side, side), size=(pixels, pixels), siblings=others)
    assert set(strata([one])) == expected | {"dataset:scenes"}


def test_the_groups_of_a_kind_add_up_to_the_whole() -> None:
    episodes = varied(200, 1)
    for one in episodes:
        one.steps[0].parse_failure = True
    episodes[0].dataset = "alone"
    found = columns(episodes_forced=episodes, verify=False)
    rows = breakdown({"last_step": found["last_step"]}, [episodes], ["mIoU", "Acc@0.5"], n_boot=20)
    whole = rows[0]
    assert (whole.group, whole.episodes) == ("all", 200) and len(rows) == 1 + 3 + 3 + 4 + 4
    for kind in ("dataset", "size", "side", "siblings"):
        members = [r for r in rows if r.group.startswith(f"{kind}:")]
        assert len(members) > 1 and sum(r.episodes for r in members) == 200
        assert sum(r.parse_failures.count for r in members) == whole.parse_failures.count > 200 - 1
        for metric in ("mIoU", "Acc@0.5"):
            total = sum(r.episodes * r.scores[metric].value for r in members)
            assert total / 200 == pytest.approx(whole.scores[metric].value)
    alone = next(r for r in rows if r.group == "dataset:alone")
    assert alone.images == 1 and np.isnan(alone.scores["mIoU"].low), "one image has no interval"
    assert group_table({"a": [alone]}).splitlines()[2].split()[-1] == "-"


def test_scores_of_pooled_seeds_are_the_means_over_seeds() -> None:
    runs = seeds(3)
    single = [columns(episodes_forced=r.forced, episodes_stopping=r.stopping) for r in runs]
    pooled = audit_runs(runs, n_boot=20)
    for row in pooled.rows:
        each = [scores(one[row.column]) for one in single]
        for metric in METRICS:
            assert row.by_seed[metric] == pytest.approx([e[metric] for e in each])
            assert row.scores[metric].value == pytest.approx(np.mean([e[metric] for e in each]))
    assert len(pooled.runs) == 3 and pooled.episodes == 40
    once, thrice = audit_runs(runs[:1], n_boot=50), audit_runs(runs[:1] * 3, n_boot=50)
    for a, b in zip(once.gains, thrice.gains, strict=True):
        same = [(d.diff, d.low, d.high) for d in (a.difference, b.difference)]
        assert same[0] == pytest.approx(same[1]), "copies of a seed add no evidence"
    assert "[" in str(behaviour_lines({"loop": pooled})), "the range over seeds is printed"
    assert len(seed_table(pooled.rows, "mIoU").splitlines()[2].split()) == 4 + 3


def test_seeds_are_paired_in_order_and_uneven_numbers_against_the_mean() -> None:
    runs, images = seeds(3), outcomes(seeds(1)[0].forced).image_ids
    last = [columns(episodes_forced=r.forced)["last_step"] for r in runs]
    first = [columns(episodes_forced=r.forced)["step_0"] for r in runs]
    means = [np.array([scores(c)["mIoU"] for c in part]) for part in (last, first)]
    paired = compare("a", pool_seeds(last), "b", pool_seeds(first), images, "mIoU", n_boot=20)
    assert paired.by_seed == pytest.approx(means[0] - means[1])
    assert paired.difference.diff == pytest.approx((means[0] - means[1]).mean())
    assert "each seed" in difference_table([paired])
    alone = compare("a", first[0], "b", pool_seeds(last), images, "mIoU", n_boot=20)
    assert alone.by_seed == pytest.approx(means[1][0] - means[0])
    two = compare("a", pool_seeds(last), "b", pool_seeds(first[:2]), images, "mIoU", n_boot=20)
    assert two.by_seed == pytest.approx(means[0] - means[1][:2].mean())


def test_mcnemar_is_given_only_for_rights_and_wrongs() -> None:
    (run, other) = seeds(2)
    found = audit(stopping=run.stopping, forced=run.forced, n_boot=20)
    given = {(c.a, c.metric): c.mcnemar is not None for c in found.gains}
    assert given["last_step", "Acc@0.5"] and not given["last_step", "mIoU"] and not given["random_step", "Acc@0.5"]
    assert all(c.mcnemar is None for c in audit_runs([run, other], n_boot=20).gains)
    text = difference_table(found.gains)
    assert "McNemar p" in text and "they show 20 images" in text


def test_runs_that_do_not_belong_together_are_refused() -> None:
    run, other = seeds(2)
    with pytest.raises(ValueError, match="seed 1 was not played in the same ways"):
        audit_runs([run, Run(other.stopping)], name="loop")
    with pytest.raises(ValueError, match="episode 0 differs in sample_id: 's0' in seed 0, 's1' in seed 1"):
        audit_runs([run, Run(other.stopping[1:] + other.stopping[:1], other.forced[1:] + other.forced[:1])])
    with pytest.raises(ValueError, match="cannot pool"):
        pool_seeds(list(columns(episodes_forced=run.forced).values())[:2])


def test_the_bins_are_the_ece_taken_apart() -> None:
    rng = np.random.default_rng(6)
    p, c = rng.random(3000) ** 3, rng.random(3000) < 0.4
    bins = reliability(p, c, 15)
    assert [b.low for b in bins[1:]] == [b.high for b in bins[:-1]] and sum(b.num for b in bins) == 3000
    assert sum(b.num * abs(b.right - b.stated) for b in bins if b.num) / 3000 == pytest.approx(ece(p, c, 15))
    assert np.isnan(reliability([0.95], [1])[0].right)


def test_auroc_equals_all_pairs_with_ties_as_half() -> None:
    rng = np.random.default_rng(7)
    s, c, w = rng.integers(0, 6, 150), rng.random(150) < 0.3, rng.integers(0, 4, 150)
    gaps = s[c][:, None] - s[~c][None, :]
    assert auroc(s, c) == pytest.approx((gaps > 0).mean() + (gaps == 0).mean() / 2)
    assert auroc(s, c, w) == pytest.approx(auroc(np.repeat(s, w), np.repeat(c, w)))
    assert auroc(-s, c) == pytest.approx(1 - auroc(s, c))
    assert auroc([0.1, 0.9], [0, 1]) == 1 and auroc([0.4, 0.4], [0, 1]) == 0.5 and np.isnan(auroc([0.4], [1]))
