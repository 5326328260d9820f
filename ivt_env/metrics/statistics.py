"""Intervals and tests over episodes that share images.

Several expressions often ask about one image, and several runs about one sample, so episodes are
not independent. Images are: everything here is clustered by image.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

MIN_CLUSTERS = 10
"""With fewer images no difference is called shown: resampling so few gives intervals that are too
narrow (with 5, chance alone gives all five the same sign one time in sixteen)."""

LEVEL = 0.95
"""Coverage of every interval."""

_WEIGHTS_AT_ONCE = 4_000_000
"""Resampling weights held at a time: 32 MB, whatever the number of images."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its percentile bootstrap interval."""

    value: float
    low: float
    high: float
    num: int
    """Episodes."""
    num_clusters: int
    """Images."""
    level: float = LEVEL


@dataclass(frozen=True, slots=True)
class Difference:
    """A paired difference of two means, a minus b, with its percentile bootstrap interval."""

    diff: float
    low: float
    high: float
    shown: bool
    """The interval excludes 0, over at least ``MIN_CLUSTERS`` images."""
    se: float
    """Analytic standard error of ``diff``, clustered by image."""
    detectable: float
    """Smallest true difference that data like these would show with 80 % power."""
    num: int
    num_clusters: int
    level: float = LEVEL


def bootstrap_mean(values: ArrayLike, clusters: Sequence[object], *, n_boot: int = 2000, seed: int = 0) -> Interval:
    """Percentile interval of a mean of one finite number per episode (n,), from ``n_boot`` resamples.

    Whole images are drawn with replacement; ``clusters`` names the image of each episode, at least 2 images. The
    same seed and images give the same resamples for every value.
    """
    v, index = _checked(values, clusters)
    low, high = _percentiles(v, index, n_boot, seed)
    return Interval(float(v.mean()), low, high, len(v), int(index.max()) + 1)


def mean_interval(values: ArrayLike, clusters: Sequence[object], *, n_boot: int, seed: int) -> Interval:
    """``bootstrap_mean``, where NaN ends stand for too few images to resample, and a NaN mean for no values."""
    v, num_clusters = np.asarray(values, dtype=np.float64), len(set(clusters))
    if num_clusters >= 2:
        return bootstrap_mean(v, clusters, n_boot=n_boot, seed=seed)
    return Interval(float(v.mean()) if len(v) else math.nan, math.nan, math.nan, len(v), num_clusters)


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, clusters: Sequence[object], *, n_boot: int = 2000, seed: int = 0
) -> Difference:
    """Percentile interval of mean(a) - mean(b) over the same episodes, both (n,), drawing whole images.

    Each resample gives the C images multinomial weights that sum to C (Efron and Tibshirani, An
    Introduction to the Bootstrap, 1993, chapters 8 and 13) and takes the weighted mean of the
    per-episode differences, so that pairing and clustering are both kept.
    """
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if left.shape != right.shape:
        raise ValueError(f"cannot pair {left.shape} with {right.shape}: score the same episodes")
    d, index = _checked(left - right, clusters)
    d[np.abs(d) < 1e-12] = 0.0  # rounding of equal expectations must not look like a consistent sign
    low, high = _percentiles(d, index, n_boot, seed)
    num_clusters = int(index.max()) + 1
    se = _clustered_se(d, index)
    return Difference(
        diff=float(d.mean()),
        low=low,
        high=high,
        shown=num_clusters >= MIN_CLUSTERS and (low > 0 or high < 0),
        se=se,
        detectable=(_z(1 - 0.05 / 2) + _z(0.8)) * se,  # two-sided at 5 %, power 80 %
        num=len(d),
        num_clusters=num_clusters,
    )


def clustered_se(values: ArrayLike, clusters: Sequence[object]) -> float:
    """Standard error of a mean of n values in C clusters; s / sqrt(n) when every cluster is single.

    sqrt(C / (C - 1) * sum over clusters of (sum of residuals)^2) / n (Liang and Zeger, Biometrika
    1986, for a mean, with the usual small-sample factor).
    """
    return _clustered_se(*_checked(values, clusters))


def mcnemar(a: ArrayLike, b: ArrayLike) -> tuple[float, int, int]:
    """Exact two-sided McNemar test of paired rights (1) and wrongs (0), (n,) (Psychometrika 1947, binomial form).

    It takes every pair as independent: with several expressions per image, prefer
    ``paired_bootstrap``, or pass one episode per image.

    Returns:
        The p-value, the number right in ``a`` only, and the number right in ``b`` only.
    """
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if left.shape != right.shape or left.ndim != 1 or not len(left):
        raise ValueError(f"two equally long, non-empty vectors are needed, not {left.shape} and {right.shape}")
    if not np.isin([left, right], (0.0, 1.0)).all():
        raise ValueError("McNemar's test takes 0 and 1 only; an expectation over a random step has no such test")
    only_a, only_b = int((left > right).sum()), int((right > left).sum())
    discordant, term, tail = only_a + only_b, 1, 0
    for i in range(min(only_a, only_b) + 1):  # exact integers: the sum of C(discordant, i)
        tail += term
        term = term * (discordant - i) // (i + 1)
    return min(1.0, 2 * tail / 2**discordant), only_a, only_b


def wilson(count: float, total: int) -> tuple[float, float]:
    """Wilson score interval of a proportion (JASA 1927), for independent trials; ``count`` may be an expectation."""
    if total < 1 or not 0 <= count <= total:
        raise ValueError(f"{count} of {total} is no proportion")
    z = _z(0.5 + LEVEL / 2)
    p, spread = count / total, z * z / total
    centre = (p + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(p * (1 - p) / total + spread / (4 * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def _checked(values: ArrayLike, clusters: Sequence[object]) -> tuple[Array, NDArray[np.int64]]:
    """Values (n,) and the cluster index 0..C-1 of each (n,)."""
    v = np.asarray(values, dtype=np.float64)
    if v.ndim != 1 or not len(v):
        raise ValueError(f"a non-empty vector of one value per episode is needed, not shape {v.shape}")
    if len(clusters) != len(v):
        raise ValueError(f"{len(v)} values but {len(clusters)} image ids")
    if not np.isfinite(v).all():
        raise ValueError(f"value {int(np.argmin(np.isfinite(v)))} is {v[~np.isfinite(v)][0]}, not a finite number")
    order: dict[object, int] = {}
    index = np.array([order.setdefault(c, len(order)) for c in clusters], dtype=np.int64)
    if len(order) < 2:
        raise ValueError("all episodes show one image: nothing can be resampled, score at least 2 images")
    return v, index


def _percentiles(v: Array, index: NDArray[np.int64], n_boot: int, seed: int) -> tuple[float, float]:
    tail = (1 - LEVEL) / 2
    if n_boot < 1:
        raise ValueError(f"at least 1 resample is needed, not {n_boot}")
    sums, counts = np.bincount(index, weights=v), np.bincount(index)  # (C,)
    num_clusters = len(sums)
    rows = max(1, _WEIGHTS_AT_ONCE // num_clusters)
    blocks: Iterable[Array] = _weights(num_clusters, n_boot, seed, rows)
    if n_boot <= rows:
        blocks = [_held_weights(num_clusters, n_boot, seed)]
    means = [(weights @ sums) / (weights @ counts) for weights in blocks]
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def _weights(num_clusters: int, n_boot: int, seed: int, rows: int) -> Iterator[Array]:
    """The resamples as multinomial weights, (at most ``rows``, C) at a time."""
    rng = np.random.default_rng(seed)
    uniform = np.full(num_clusters, 1 / num_clusters)
    for start in range(0, n_boot, rows):
        yield rng.multinomial(num_clusters, uniform, size=min(rows, n_boot - start)).astype(np.float64)


@lru_cache(maxsize=2)  # drawing takes far longer than using, and a table uses the same ones in every cell
def _held_weights(num_clusters: int, n_boot: int, seed: int) -> Array:
    return next(_weights(num_clusters, n_boot, seed, n_boot))


def _clustered_se(v: Array, index: NDArray[np.int64]) -> float:
    residuals = np.bincount(index, weights=v - v.mean())  # (C,)
    c = len(residuals)
    return float(np.sqrt(c / (c - 1) * (residuals**2).sum()) / len(v))


def _z(probability: float) -> float:
    return NormalDist().inv_cdf(probability)
