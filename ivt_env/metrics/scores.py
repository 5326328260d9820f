"""Scores of columns and of rollouts. Accuracies, rates and shares are in [0, 1], never percent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ivt_env import boxes
from ivt_env.metrics.columns import Array, Column, Outcomes

MEAN_THRESHOLDS = tuple(k / 100 for k in range(50, 100, 5))
"""0.50, 0.55, ..., 0.95: averaged in mAcc, after COCO's average precision."""
METRICS = ("Acc@0.5", "Acc@0.7", "Acc@0.75", "Acc@0.9", "mAcc", "mIoU")
"""What tables report of every column; see ``per_episode``."""
HEADLINE_METRICS = ("Acc@0.5", "Acc@0.9", "mIoU")
"""What differences and strata are reported in."""


@dataclass(frozen=True, slots=True)
class Share:
    """A count out of a total. The count is fractional where a rule draws at random."""

    count: float
    total: int

    @property
    def value(self) -> float:
        """``count / total``, NaN when there is nothing to count."""
        return self.count / self.total if self.total else math.nan


@dataclass(frozen=True, slots=True)
class Nsri:
    """Normalised self-refinement index, each mean in [-1, 1], NaN over no episodes."""

    mean: float
    prior_right: float
    """Over the episodes whose first answer was right."""
    prior_wrong: float
    """Over the episodes whose first answer was wrong."""
    num_right: int
    num_wrong: int


@dataclass(frozen=True, slots=True)
class StepChanges:
    """What the refinements of a rollout did to the IoU.

    A *refinement* is an action other than a stop, taken while there is a current box. A refused or
    unparsed one is a refinement that changes nothing.
    """

    mean_change: float
    """Signed mean of IoU after minus IoU before over all refinements, NaN without any."""
    degrade: Share
    """Refinements that lower the IoU by more than the tolerance."""
    improve: Share
    """Refinements that raise the IoU by more than the tolerance."""
    stay: Share
    """The other refinements."""
    samples_degrading: Share
    """Episodes whose last box is worse than the one before their first refinement, of all episodes:
    one that never refines counts in the total."""
    samples_improving: Share
    """The same, better."""


@dataclass(frozen=True, slots=True)
class RolloutSummary:
    """How the episodes of a rollout went, whatever they scored."""

    episodes: int
    mean_actions: float
    """Actions per episode, the stop among them."""
    mean_proposals: float
    """Actions other than a stop per episode."""
    stopped: Share
    """Episodes that the policy ended itself."""
    parse_failures: Share
    """Actions whose text held no usable action, of all actions."""
    refused: Share
    """Parsed proposals that the environment refused, of all actions."""
    episodes_with_failure: Share
    """Episodes with at least one unparsed or refused action. They stay in every score."""
    episodes_without_box: Share
    """Episodes that end with no box: IoU 0 in every score."""


def per_episode(column: Column, metric: str) -> Array:
    """The value of each episode (n,) whose mean is the score, for the paired statistics.

    ``metric`` is ``mIoU``, ``mAcc``, ``Acc@<threshold>``, for example ``Acc@0.5``, or ``hit``: the centre of the box
    lies in the target, as a click is scored.
    """
    if not len(column):
        raise ValueError(f"the column {column.name!r} holds no episodes")
    if metric == "mIoU":
        return column.iou
    if metric == "hit":
        if column.hits is None:
            raise ValueError(f"the column {column.name!r} was made without boxes, so nothing is known of its hits")
        return (column.hits * column.weights).sum(axis=1)
    if metric == "mAcc":
        return np.mean([hits(column, t) for t in MEAN_THRESHOLDS], axis=0)
    if metric.startswith("Acc@"):
        try:
            return hits(column, float(metric[4:]))
        except ValueError as error:
            raise ValueError(f"{metric!r}: {error}") from error
    raise ValueError(f"unknown metric {metric!r}: use mIoU, mAcc, hit or Acc@<threshold>")


def hits(column: Column, threshold: float) -> Array:
    """Probability that the answer of each episode is right. Shape (n,).

    0 or 1 where the rule decides; the mean of the indicator over the draws (not the indicator of
    the mean IoU) where it draws.
    """
    return (_right(column.ious, threshold) * column.weights).sum(axis=1)


def scores(column: Column, metrics: Sequence[str] = METRICS) -> dict[str, float]:
    """The mean of each metric over all episodes, by name; see ``per_episode``."""
    return {metric: float(per_episode(column, metric).mean()) for metric in metrics}


def correction_rate(before: Column, after: Column, threshold: float = 0.5) -> Share:
    """Of the episodes that ``before`` got wrong, those that ``after`` gets right."""
    prior = _prior(before, after, threshold)
    return Share(float((hits(after, threshold) * ~prior).sum()), int((~prior).sum()))


def break_rate(before: Column, after: Column, threshold: float = 0.5) -> Share:
    """Of the episodes that ``before`` got right, those that ``after`` gets wrong."""
    prior = _prior(before, after, threshold)
    return Share(float(((1 - hits(after, threshold)) * prior).sum()), int(prior.sum()))


def nsri(before: Column, after: Column, threshold: float = 0.5) -> Nsri:
    """Normalised self-refinement index: the mean of g over episodes (VG-Refiner, arXiv 2512.06373).

    With IoU0 of ``before`` and IoU1 of ``after``: g = (IoU1 - IoU0) / (1 - IoU0) if it went up,
    g = (IoU1 - IoU0) / IoU0 if it went down, 0 if it stayed. An improvement is thus measured
    against the room there was, a loss against what there was to lose.
    """
    prior = _prior(before, after, threshold)
    change = after.ious - before.iou[:, None]  # (n, K)
    room = np.where(change > 0, 1 - before.iou[:, None], before.iou[:, None])
    gain = np.divide(change, room, out=np.zeros_like(change), where=change != 0)
    g = (gain * after.weights).sum(axis=1)
    return Nsri(_mean(g), _mean(g[prior]), _mean(g[~prior]), int(prior.sum()), int((~prior).sum()))


def step_changes(played: Outcomes, tolerance: float = 1e-6) -> StepChanges:
    """What the refinements did to the IoU, one by one and over whole episodes.

    A change of IoU no larger than ``tolerance`` counts as none. The paper does not define its "IoU drop per step";
    compare minus ``mean_change`` on a forced rollout with it, and its "samples degrading" with ``samples_degrading``.
    """
    refined = played.acted & ~played.stop & played.has_box_before  # (n, T)
    change = (played.iou - played.iou_before)[refined]
    total = len(change)
    degrade, improve = int((change < -tolerance).sum()), int((change > tolerance).sum())
    # The current box before the first refinement against the last one; 0 where nothing was refined.
    first = played.iou_before[np.arange(len(refined)), refined.argmax(axis=1)]
    overall = np.where(refined.any(axis=1), played.iou[:, -1] - first, 0.0)
    return StepChanges(
        mean_change=_mean(change),
        degrade=Share(degrade, total),
        improve=Share(improve, total),
        stay=Share(total - degrade - improve, total),
        samples_degrading=Share(int((overall < -tolerance).sum()), len(overall)),
        samples_improving=Share(int((overall > tolerance).sum()), len(overall)),
    )


def rollout_summary(played: Outcomes) -> RolloutSummary:
    """How many actions, stops and failures a rollout of n episodes had."""
    actions = int(played.acted.sum())
    proposed = played.acted & ~played.stop
    failed = proposed & ~played.accepted
    refused = failed & ~played.parse_failure
    return RolloutSummary(
        episodes=len(played.acted),
        mean_actions=float(played.num_actions.mean()),
        mean_proposals=float(played.num_proposals.mean()),
        stopped=Share(int(played.stopped.sum()), len(played.acted)),
        parse_failures=Share(int(played.parse_failure.sum()), actions),
        refused=Share(int(refused.sum()), actions),
        episodes_with_failure=Share(int((refused | played.parse_failure).any(axis=1).sum()), len(played.acted)),
        episodes_without_box=Share(int(boxes.is_no_box(played.box[:, -1]).sum()), len(played.acted)),
    )


def _right(iou: Array, threshold: float) -> Array:
    if not 0 <= threshold <= 1:
        raise ValueError(f"an IoU threshold lies in [0, 1], this one is {threshold}")
    return np.asarray(iou >= threshold, dtype=np.float64)


def _prior(before: Column, after: Column, threshold: float) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Where the first answer was right, (n,)."""
    if len(before) != len(after):
        raise ValueError(f"cannot pair {before.name!r} of {len(before)} episodes with {after.name!r} of {len(after)}")
    if before.ious.shape[1] != 1:
        raise ValueError(f"{before.name!r} draws at random, so no episode of it is simply right or wrong")
    return _right(before.ious[:, 0], threshold) > 0


def _mean(values: Array) -> float:
    return float(values.mean()) if len(values) else math.nan
