"""Does the policy know when it is right? Its stops, and what it says about itself.

A *decision* is an action taken while there is a current box: to stop there, or to go on. The box in
force is *right* when its IoU reaches the threshold (``>=``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ivt_env.metrics.columns import Array, Outcomes
from ivt_env.metrics.scores import Share


@dataclass(frozen=True, slots=True)
class Bin:
    """Statements between two probabilities, for a reliability diagram."""

    low: float
    high: float
    """Not in the bin itself, but 1 is in the last."""
    num: int
    stated: float
    """Mean statement, NaN in an empty bin."""
    right: float
    """Share that was right, NaN in an empty bin."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """How a stated probability goes with being right."""

    ece: float
    """Expected calibration error in [0, 1], NaN over no pairs."""
    pearson: float
    """Correlation in [-1, 1] with right (1) or wrong (0), the point-biserial r; NaN where either side is constant."""
    auroc: float
    """How often a right one is stated higher than a wrong one, a tie counting half; NaN where all are
    right or all are wrong."""
    num: int
    """Statements compared."""
    right: float
    """Share of them that was right, NaN over none."""
    bins: tuple[Bin, ...]


def stop_precision(played: Outcomes, threshold: float = 0.5) -> Share:
    """Of the stops, those with a right box. A stop without any box is a wrong one."""
    right = played.stop & (played.iou_before >= threshold)
    return Share(int(right.sum()), int(played.stop.sum()))


def stop_recall(played: Outcomes, threshold: float = 0.5) -> Share:
    """Of the decisions taken with a correct current box, those that stopped.

    A box that became right with the last action allowed left no decision, so it does not count.
    """
    right = played.acted & played.has_box_before & (played.iou_before >= threshold)
    return Share(int((right & played.stop).sum()), int(right.sum()))


def stop_calibration(played: Outcomes, threshold: float = 0.5, bins: int = 10) -> Calibration:
    """The stated stop probability against whether the current box is right, over all decisions.

    Read as "the probability that the box is good enough". The reference point is the correlation
    of about 0.22 that arXiv 2606.13156 reports for stated confidence.
    """
    stated = played.acted & played.has_box_before & ~np.isnan(played.stop_probability)
    return calibration(played.stop_probability[stated], played.iou_before[stated] >= threshold, bins)


def confidence_calibration(played: Outcomes, threshold: float = 0.5, bins: int = 10) -> Calibration:
    """The stated confidence in an action against whether the box after it is right."""
    stated = played.acted & ~np.isnan(played.confidence)
    return calibration(played.confidence[stated], played.iou[stated] >= threshold, bins)


def calibration(probability: ArrayLike, correct: ArrayLike, bins: int = 10) -> Calibration:
    """Every score of m probabilities and m outcomes; see ``ece``, ``pearson``, ``auroc``, ``reliability``."""
    p, c = _pairs(probability, correct)
    right = float(c.mean()) if len(c) else math.nan
    return Calibration(ece(p, c, bins), pearson(p, c), auroc(p, c), len(p), right, reliability(p, c, bins))


def ece(probability: ArrayLike, correct: ArrayLike, bins: int = 10) -> float:
    """Expected calibration error over equal-width bins (Guo et al., arXiv 1706.04599, eq. 3).

    The sum over bins of (share of statements in it) * |mean outcome - mean probability|, of statements in [0, 1] and
    outcomes 0 or 1, both (m,). 1 itself belongs to the last bin.
    """
    # The gap of a bin's means times its count is |sum of (outcome - probability)|: an empty one adds 0.
    p, c = _pairs(probability, correct)
    index = _bin_of(p, bins)
    if not len(p):
        return math.nan
    return float(np.abs(np.bincount(index, weights=c - p, minlength=bins)).sum() / len(p))


def reliability(probability: ArrayLike, correct: ArrayLike, bins: int = 10) -> tuple[Bin, ...]:
    """The bins of ``ece`` from 0 to 1, the empty ones among them: what a reliability diagram draws."""
    p, c = _pairs(probability, correct)
    index = _bin_of(p, bins)
    found = []
    for k in range(bins):
        inside = index == k
        stated, right = (float(v[inside].mean()) if inside.any() else math.nan for v in (p, c))
        found.append(Bin(k / bins, (k + 1) / bins, int(inside.sum()), stated, right))
    return tuple(found)


def auroc(score: ArrayLike, correct: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Area under the receiver operating characteristic: P(a correct one scores above a wrong one).

    The Mann-Whitney form (Hanley and McNeil, Radiology 1982), a tie counting half. 0.5 tells
    nothing; below it the score is the wrong way round; NaN where all are correct or all are wrong.

    Only the order of the scores (m,) matters; a value of weight w counts as w equal ones.
    """
    s, c = _pairs(score, correct)
    w = np.ones(len(s)) if weights is None else np.asarray(weights, dtype=np.float64)
    levels, place = np.unique(s, return_inverse=True)
    high = np.bincount(place, weights=w * (c > 0), minlength=len(levels))
    low = np.bincount(place, weights=w * (c <= 0), minlength=len(levels))
    if not high.sum() or not low.sum():
        return math.nan
    below = np.cumsum(low) - low
    return float((high * (below + low / 2)).sum() / (high.sum() * low.sum()))


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Pearson correlation of two vectors (m,); NaN where either is constant or m < 2."""
    a, b = _pairs(x, y)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    a, b = a - a.mean(), b - b.mean()
    return float(np.clip((a @ b) / math.sqrt((a @ a) * (b @ b)), -1, 1))


def _bin_of(p: Array, bins: int) -> NDArray[np.int64]:
    """Index 0..bins-1 of the bin of each statement, (m,)."""
    if bins < 1:
        raise ValueError(f"at least 1 bin is needed, not {bins}")
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"probabilities lie in [0, 1]; these reach from {p.min()} to {p.max()}")
    return np.minimum((p * bins).astype(np.int64), bins - 1)


def _pairs(x: ArrayLike, y: ArrayLike) -> tuple[Array, Array]:
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"two vectors of one length are needed, not shapes {a.shape} and {b.shape}")
    return a, b
