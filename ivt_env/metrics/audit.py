"""Everything that saved episodes say about a policy, without the policy.

    from ivt_env.episodes import load_episodes
    from ivt_env.metrics.audit import audit

    found = audit(stopping=load_episodes("episodes/mine"), forced=load_episodes("episodes/mine-forced"))
    found.runs[0].broke["learned_stop"].value, found.as_json()

What each figure is, and what it may be used for, is in ``docs/methods.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ivt_env.episodes import Episode
from ivt_env.metrics import table
from ivt_env.metrics.breakdown import GroupRow, breakdown
from ivt_env.metrics.columns import Column, check_same_samples, columns, outcomes, pool_seeds, prefix_agreement
from ivt_env.metrics.scores import (
    HEADLINE_METRICS,
    METRICS,
    Nsri,
    RolloutSummary,
    Share,
    StepChanges,
    break_rate,
    correction_rate,
    nsri,
    rollout_summary,
    step_changes,
)
from ivt_env.metrics.stopping import Calibration, confidence_calibration, stop_calibration, stop_precision, stop_recall


@dataclass(frozen=True, slots=True)
class Run:
    """One policy, one seed, played on n samples. At least one of the two rollouts is needed."""

    stopping: Sequence[Episode] | None = None
    """With its stop honoured."""
    forced: Sequence[Episode] | None = None
    """The same samples in the same order, made to take every refinement."""

    @property
    def episodes(self) -> Sequence[Episode]:
        """The rollout with the stop, or else the forced one; ValueError for neither."""
        found = self.forced if self.stopping is None else self.stopping
        if found is None:
            raise ValueError("no rollout given: pass stopping, forced or both")
        return found


@dataclass(frozen=True, slots=True)
class RunAudit:
    """What one run came to, beyond the scores of its columns."""

    stopping: RolloutSummary | None
    """Actions, proposals, parse failures and the like of the stopping rollout."""
    forced: RolloutSummary | None
    changes: StepChanges
    """What the refinements did to the IoU: of the forced rollout where there is one (all of them
    made), else of the stopping one (those the policy chose)."""
    corrected: dict[str, Share]
    """By column: of the first boxes that were wrong, the answers that are right (IoU >= threshold)."""
    broke: dict[str, Share]
    """By column: of the first boxes that were right, the answers that are wrong."""
    nsri: dict[str, Nsri]
    """By column, against the first box."""
    stop_precision: Share | None
    stop_recall: Share | None
    """Of the stopping rollout; None without it."""
    stop_calibration: Calibration
    """The stop probability against the box that was shown being right. As ``confidence_calibration``,
    of the stopping rollout where there is one: the decisions that the policy really faces."""
    confidence_calibration: Calibration
    """The confidence stated with an action against the current box after it being right."""
    prefix_agreement: float | None
    """Share of the episodes that are alike in both rollouts up to the stop; None without both. Below
    1, columns of the two rollouts differ by more than their rule."""


@dataclass(frozen=True, slots=True)
class Audit:
    """A policy on n samples, from one run or from several (seeds)."""

    name: str
    served: tuple[str, ...]
    """``data set/split`` that was really played, sorted."""
    episodes: int
    """n: samples, each played once a run and rollout."""
    image_ids: tuple[str, ...]
    """The image of each sample: what the intervals draw, length n."""
    columns: dict[str, Column]
    """The answers of every rule; the mean over runs where there are several."""
    rows: list[table.Row]
    """Every metric of every column with its interval."""
    gains: list[table.Comparison]
    """Every other column against the policy's own first box, paired."""
    groups: list[GroupRow]
    """By data set, box size and siblings."""
    runs: tuple[RunAudit, ...]
    """One a seed, in the order given."""
    threshold: float
    """IoU from which a box counts as right in ``runs``."""

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values, NaN as None; without the per-episode columns, which the episodes hold."""
        shown = [k for k in self.__dataclass_fields__ if k not in ("columns", "image_ids")]
        fields = {k: getattr(self, k) for k in shown} | {"images": len(set(self.image_ids))}
        return dict(table.as_json(fields))


def audit(
    *, stopping: Sequence[Episode] | None = None, forced: Sequence[Episode] | None = None, **options: Any
) -> Audit:
    """``audit_runs``, with its options, of one run: n episodes with the stop honoured, without it, or both."""
    return audit_runs([Run(stopping, forced)], **options)


def audit_runs(
    runs: Sequence[Run],
    *,
    name: str = "policy",
    threshold: float = 0.5,
    metrics: Sequence[str] = (*METRICS, "hit"),
    n_boot: int = 1000,
    seed: int = 0,
) -> Audit:
    """Audit a policy that was played once, or once for each of its seeds, on the same n samples.

    Scores of several runs are averaged sample by sample and then resampled by image, so the
    intervals are those of *these* seeds on other images; how far seeds differ is in ``by_seed``.

    Args:
        runs: The seeds, all with the same rollouts.
        name: Of the policy, for the tables.
        threshold: IoU from which a box counts as right, in the rates, the stops and the calibration.
        metrics: Of ``rows``.
        n_boot: Resamples of every interval.
        seed: Of every interval.
    """
    if not runs:
        raise ValueError(f"{name}: no run given")
    first = runs[0]
    for number, run in enumerate(runs[1:], 1):
        if (run.stopping is None, run.forced is None) != (first.stopping is None, first.forced is None):
            raise ValueError(f"{name}: seed {number} was not played in the same ways as seed 0 (stopping and forced)")
        check_same_samples(first.episodes, run.episodes, "seed 0", f"seed {number}")
    found = [columns(episodes_forced=run.forced, episodes_stopping=run.stopping) for run in runs]
    if any(set(each) != set(found[0]) for each in found):
        raise ValueError(f"{name}: only some of the seeds state a stop probability, so their rules differ")
    pooled = {key: pool_seeds([each[key] for each in found]) for key in found[0]}
    images = tuple(e.image_id for e in first.episodes)
    boot: Any = {"n_boot": n_boot, "seed": seed}
    gains = [
        table.compare(key, column, "step_0", pooled["step_0"], images, metric, **boot)
        for metric in HEADLINE_METRICS
        for key, column in pooled.items()
        if key != "step_0"
    ]
    groups: list[GroupRow] = []
    for kind, played in (("stopping", [r.stopping for r in runs]), ("forced", [r.forced for r in runs])):
        of_kind = {key: column for key, column in pooled.items() if column.rollout == kind}
        if of_kind:
            groups += breakdown(of_kind, [episodes for episodes in played if episodes is not None], **boot)
    order = {group: k for k, group in enumerate(dict.fromkeys(row.group for row in groups))}
    return Audit(
        name=name,
        served=tuple(sorted({f"{e.dataset}/{e.split}" for e in first.episodes})),
        episodes=len(first.episodes),
        image_ids=images,
        columns=pooled,
        rows=table.score_rows(name, pooled, images, metrics, **boot),
        gains=gains,
        groups=sorted(groups, key=lambda row: order[row.group]),
        runs=tuple(_one(run, each, threshold) for run, each in zip(runs, found, strict=True)),
        threshold=threshold,
    )


def behaviour_lines(audits: Mapping[str, Audit]) -> list[list[str]]:
    """How each policy uses its steps: what a line is about, then a text for each policy.

    Shares and rates are in percent. Several seeds give their mean and their range.
    """
    lines = []
    for label, digits, of_run in _FIGURES:
        cells = [_mean_and_range([of_run(run) for run in one.runs], digits) for one in audits.values()]
        if any(cell != "-" for cell in cells):
            lines.append([label, *cells])
    return lines


def _one(run: Run, found: Mapping[str, Column], threshold: float) -> RunAudit:
    # ``columns`` has verified them.
    stopping, forced = (None if e is None else outcomes(e, verify=False) for e in (run.stopping, run.forced))
    refining, deciding = forced or stopping, stopping or forced
    assert refining is not None and deciding is not None  # a run without any rollout has no columns
    others = {key: column for key, column in found.items() if key != "step_0"}
    before = found["step_0"]
    return RunAudit(
        stopping=None if stopping is None else rollout_summary(stopping),
        forced=None if forced is None else rollout_summary(forced),
        changes=step_changes(refining),
        corrected={key: correction_rate(before, after, threshold) for key, after in others.items()},
        broke={key: break_rate(before, after, threshold) for key, after in others.items()},
        nsri={key: nsri(before, after, threshold) for key, after in others.items()},
        stop_precision=None if stopping is None else stop_precision(stopping, threshold),
        stop_recall=None if stopping is None else stop_recall(stopping, threshold),
        stop_calibration=stop_calibration(deciding, threshold),
        confidence_calibration=confidence_calibration(deciding, threshold),
        prefix_agreement=None if stopping is None or forced is None else prefix_agreement(forced, stopping),
    )


def _percent(share: Share | None) -> float:
    return math.nan if share is None else 100 * share.value


def _summary(run: RunAudit) -> RolloutSummary:
    summary = run.stopping or run.forced
    assert summary is not None
    return summary


_FIGURES: tuple[tuple[str, int, Callable[[RunAudit], float]], ...] = (
    ("actions an episode", 2, lambda r: _summary(r).mean_actions),
    ("proposals an episode", 2, lambda r: _summary(r).mean_proposals),
    ("episodes stopped (%)", 1, lambda r: _percent(_summary(r).stopped)),
    ("unparsable actions (%)", 2, lambda r: _percent(_summary(r).parse_failures)),
    ("refused boxes (% of actions)", 2, lambda r: _percent(_summary(r).refused)),
    ("episodes without a box (%)", 2, lambda r: _percent(_summary(r).episodes_without_box)),
    ("learned stop: corrected (% of wrong first boxes)", 1, lambda r: _percent(r.corrected.get("learned_stop"))),
    ("learned stop: regressed (% of correct first boxes)", 1, lambda r: _percent(r.broke.get("learned_stop"))),
    ("learned stop: NSRI", 3, lambda r: r.nsri["learned_stop"].mean if "learned_stop" in r.nsri else math.nan),
    ("last step: corrected (% of wrong first boxes)", 1, lambda r: _percent(r.corrected.get("last_step"))),
    ("last step: regressed (% of correct first boxes)", 1, lambda r: _percent(r.broke.get("last_step"))),
    ("last step: NSRI", 3, lambda r: r.nsri["last_step"].mean if "last_step" in r.nsri else math.nan),
    ("IoU change a refinement", 4, lambda r: r.changes.mean_change),
    ("refinements that degrade (%)", 1, lambda r: _percent(r.changes.degrade)),
    ("refinements that improve (%)", 1, lambda r: _percent(r.changes.improve)),
    ("refinements that change nothing (%)", 1, lambda r: _percent(r.changes.stay)),
    ("episodes that end worse (%)", 1, lambda r: _percent(r.changes.samples_degrading)),
    ("episodes that end better (%)", 1, lambda r: _percent(r.changes.samples_improving)),
    ("stop precision (%)", 1, lambda r: _percent(r.stop_precision)),
    ("stop recall (%)", 1, lambda r: _percent(r.stop_recall)),
    ("stop probability: ECE", 3, lambda r: r.stop_calibration.ece),
    ("stop probability: r with correct", 3, lambda r: r.stop_calibration.pearson),
    ("stop probability: AUROC", 3, lambda r: r.stop_calibration.auroc),
    ("confidence: ECE", 3, lambda r: r.confidence_calibration.ece),
    ("confidence: r with correct", 3, lambda r: r.confidence_calibration.pearson),
    ("confidence: AUROC", 3, lambda r: r.confidence_calibration.auroc),
)


def _mean_and_range(values: Sequence[float], digits: int) -> str:
    """The mean over seeds and their range, ``-`` where a seed has no value."""
    if any(math.isnan(v) for v in values):
        return "-"
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} [{min(values):.{digits}f}, {max(values):.{digits}f}]"
