"""One common rule for every data set, and beside it the rule by which each benchmark is published.

The rules differ where it is easy to miss: whether an overlap equal to the threshold counts, IoU or
GIoU, clamping, bins and averages over classes. A number may be compared with a published one only
under that one's own rule, and data sets with one another only under the common rule.

What all rules share:

- Boxes are xyxy in pixels of the original image, areas continuous. Coordinates are rounded to
  1e-6 px first: samples hold boxes relative to their image, and 104 px / 427 * 427 need not be
  104.0 again.
- Thresholds are k / 100 for a whole k, the float nearest to the decimal (never sums of 0.05). The
  overlap of boxes in whole pixels is a rounded quotient of exact numbers, so one that equals the
  threshold compares as equal.
- A prediction that is missing or unusable (a row with a NaN) is a miss: overlap 0, kept in every
  denominator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ivt_env import boxes
from ivt_env.data import GUI
from ivt_env.data.sample import Sample
from ivt_env.metrics.scores import MEAN_THRESHOLDS
from ivt_env.metrics.statistics import bootstrap_mean
from ivt_env.metrics.table import interval, number, render, title

Array = NDArray[np.float64]

OWN_RULES: dict[str, tuple[str, ...]] = {
    "refcoco": ("refcoco", "mdetr", "vlmr1"),
    "refcocoplus": ("refcoco", "mdetr", "vlmr1"),
    "refcocog": ("refcoco", "mdetr", "vlmr1"),
    "refl4": ("refl4",),
    "refadv": ("refadv",),
    **dict.fromkeys(("screens", *GUI), ("hit",)),
    "uivisionlayout": (),  # by mean IoU, which "common" has
}
"""Data set -> rules under which numbers on it are published; a data set not named here has none."""

_PIXEL_DIGITS = 6
_REPORTED = (0.5, 0.75, 0.9)
_SIZES = ("small: under 128 px", "medium: 128 to 256 px", "large: over 256 px")


class BenchmarkError(ValueError):
    """Samples that lack what a rule needs."""


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """One number of a rule."""

    metric: str
    """Rows of the same name of different rules belong beside each other."""
    value: float
    """In [0, 1], never percent; NaN over no samples."""
    n: int
    """Samples in the denominator."""
    rule: str
    """What counts as a hit, for example ``IoU > 0.5``."""
    low: float | None = None
    """95 % percentile bootstrap interval, clustered by image; None where none was asked for or
    there is none (class averages, fewer than 2 images)."""
    high: float | None = None


@dataclass(frozen=True, slots=True)
class RuleResult:
    """The scores of one set of predictions under one rule."""

    name: str
    source: str
    """Whose rule it is, and where it differs from the others."""
    rows: tuple[ScoreRow, ...]
    notes: tuple[str, ...] = ()
    """What a reader must know before quoting the numbers."""


def score(
    name: str,
    predicted_px: ArrayLike,
    samples: Sequence[Sample],
    *,
    category_map: Mapping[str, str] | None = None,
    resamples: int = 0,
    seed: int = 0,
) -> RuleResult:
    """Score predictions under one rule.

    Args:
        name: one of ``RULES``.
        predicted_px: xyxy in pixels of the original image, shape (n, 4); a NaN means no box.
        samples: the n samples they answer, in the same order. ``refl4`` needs ``meta["category"]``
            (``o365_m`` or ``refcoco_k``), ``refadv`` a whole number ``meta["distractors"]``.
        category_map: ``refcoco_k`` -> ``o365_m``, for ``refl4``. Without it, or for a k that it lacks, the
            class stays one of its own and the result says so: then the class averages are not Ref-L4's.
        resamples: bootstrap resamples of each interval; 0 gives no intervals.
        seed: of the intervals.
    """
    if name not in _RULES:
        raise BenchmarkError(f"no rule {name!r}; there are {', '.join(RULES)}")
    targets = targets_px(samples)
    predicted = _checked(predicted_px, targets)
    iou = overlap(predicted, targets)
    rows = _Rows(samples, targets, predicted, iou, category_map or {}, resamples, seed)
    source, rule = _RULES[name]
    rule(rows)
    return RuleResult(name, source, tuple(rows.done), tuple(rows.notes))


def _common(rows: _Rows) -> None:
    """IoU >= t, no clamping. mAcc, after COCO, is the mean of the accuracies at 0.50, 0.55, ..., 0.95."""
    rows.accuracies(rows.iou, _REPORTED, strict=False)
    rows.add("mIoU", rows.iou, "mean of IoU")


def _refcoco(rows: _Rows) -> None:
    """IoU >= 0.5 on continuous areas, as lmms-eval scores.

    REFER publishes no rule for boxes: its evaluation code scores generated sentences. **Unknown:** by which rule
    (strict or not, areas with or without + 1 px) any other published number was made; the rules ``refcoco``,
    ``mdetr`` and ``vlmr1`` say how much could hang on it.
    """
    rows.accuracies(rows.iou, (0.5,), strict=False, mean=False)


def _mdetr(rows: _Rows) -> None:
    """**GIoU** >= 0.5, the precision at 1 of MDETR's evaluation code (github.com/ashkamath/mdetr).

    GIoU = IoU - (hull - union) / hull (Rezatofighi et al., arXiv 1902.09630) is never above IoU: the harder rule.
    """
    giou = np.where(boxes.area(rows.predicted) > 0, boxes.giou(rows.predicted, rows.targets), -1.0)
    rows.add("Acc@0.5", hits(giou, 0.5, strict=False), "GIoU >= 0.5")


def _vlm_r1(rows: _Rows) -> None:
    """**Strict** IoU > 0.5 of VLM-R1's evaluation script (github.com/om-ai-lab/VLM-R1).

    Its intersection counts pixels (-1, then +1), which is the continuous one wherever boxes overlap
    by more than 1 px in both directions, and 0 elsewhere; so it is here.
    """
    low = np.maximum(rows.predicted[:, :2], rows.targets[:, :2])  # (n, 2)
    shared = np.minimum(rows.predicted[:, 2:], rows.targets[:, 2:]) - low
    iou = np.where((shared > 1).all(axis=1), rows.iou, 0.0)
    rows.accuracies(iou, (0.5,), strict=True, mean=False)


def _ref_l4(rows: _Rows) -> None:
    """Everything **strict**, IoU > t, without clamping; by the target's size and as averages over classes, too.

    Source: ``RefL4Evaluator`` (github.com/JierunChen/Ref-L4, ``ref_l4/evaluation.py``, commit bae942c). It
    computes in float32, this in float64: an IoU within 1e-7 of a threshold may fall differently.
    """
    iou = rows.iou
    rows.accuracies(iou, _REPORTED, strict=True)
    side = np.sqrt(np.prod(rows.targets[:, 2:] - rows.targets[:, :2], axis=1))
    size_bin = (side >= 128).astype(int) + (side > 256)
    for place, label in enumerate(_SIZES):
        rows.accuracies(iou, (0.5,), strict=True, label=f", {label}", members=np.flatnonzero(size_bin == place))
    categories = [_category(sample) for sample in rows.samples]
    unmapped = sorted({c for c in categories if c.startswith("refcoco_") and c not in rows.category_map})
    _, index = np.unique([rows.category_map.get(c, c) for c in categories], return_inverse=True)
    for metric, values, rule in (
        ("Acc@0.5", hits(iou, 0.5, strict=True), "IoU > 0.5"),
        ("mAcc", mean_hits(iou, strict=True), "IoU > 0.50, 0.55, ..., 0.95"),
    ):
        means = np.bincount(index, weights=values) / np.bincount(index)  # of each class
        rule = f"{rule}, mean of {len(means)} classes"
        rows.done.append(ScoreRow(f"{metric}, class average", float(means.mean()), len(iou), rule))
    if unmapped:
        rows.notes.append(
            f"class averages are over UNMAPPED classes: {len(unmapped)} refcoco_* classes ({unmapped[0]} is one) stay "
            "apart from the o365_* classes that Ref-L4 joins them with, so these two rows are not Ref-L4's and must "
            "not be compared with published ones; give a category map (mapping_dict in Ref-L4's evaluation.py as JSON)"
        )


def _ref_adv(rows: _Rows) -> None:
    """IoU >= t after sorting the corners and **clamping the prediction to the image**; by same-class distractors, too.

    Source: ``run.py`` and ``report.py`` of github.com/dddraxxx/Ref-Adv. Its second request after an
    unreadable answer is part of producing predictions, not of scoring them.
    """
    limits = np.array([(s.size[1], s.size[0]) for s in rows.samples], dtype=np.float64)  # (n, 2): width, height
    low = np.clip(np.minimum(rows.predicted[:, :2], rows.predicted[:, 2:]), 0, limits)
    high = np.clip(np.maximum(rows.predicted[:, :2], rows.predicted[:, 2:]), 0, limits)
    iou = overlap(np.concatenate([low, high], axis=1), rows.targets)
    rows.accuracies(iou, _REPORTED, strict=False, mean=False)
    count = np.array([_distractors(sample) for sample in rows.samples])
    for label, least, most in (("2-3", 2, 3), ("4-6", 4, 6), (">=7", 7, math.inf)):
        found = np.flatnonzero((count >= least) & (count <= most))
        rows.accuracies(iou, (0.5,), strict=False, mean=False, label=f", {label} distractors", members=found)
    if few := int((count < 2).sum()):
        rows.notes.append(f"{few} samples have fewer than 2 distractors: in the totals, in none of the published bins")


def _hit(rows: _Rows) -> None:
    """The predicted point, or the centre of the predicted box, lies in the target, edges included."""
    rows.add("hit", boxes.hit(rows.predicted, rows.targets).astype(np.float64), "centre in the target")


_Rule = Callable[["_Rows"], None]
_RULES: dict[str, tuple[str, _Rule]] = {
    "common": ("one rule for every data set, by which they can be compared", _common),
    "refcoco": (
        "as lmms-eval scores; not as VLMEvalKit, which clips, swaps corners and guesses frames; REFER itself scores no "
        "boxes, and whether other published numbers are strict is unknown",
        _refcoco,
    ),
    "mdetr": ("MDETR's precision at 1: GIoU in the place of IoU", _mdetr),
    "vlmr1": ("VLM-R1's evaluation script, which drew 2,000 samples (seed 42); this scores all", _vlm_r1),
    "refl4": ("Ref-L4's evaluator: strict, no clamping, size is sqrt(w * h) of the target in px", _ref_l4),
    "refadv": ("Ref-Adv's run.py and report.py: corners sorted, clamped to the image", _ref_adv),
    "hit": ("clicks, as on screens: a point, or the centre of a box", _hit),
}
RULES = tuple(_RULES)
"""Every name that ``score`` takes."""


def targets_px(samples: Sequence[Sample]) -> Array:
    """The target boxes, xyxy in pixels of the original images to 1e-6 px, shape (n, 4)."""
    if not samples:
        raise ValueError("no samples to score")
    relative = np.array([s.box for s in samples], dtype=np.float64)
    height_width = np.array([s.size for s in samples], dtype=np.float64)
    return np.round(relative * height_width[:, [1, 0, 1, 0]], _PIXEL_DIGITS)


def overlap(predicted_px: ArrayLike, target_px: ArrayLike) -> Array:
    """IoU of each prediction with its target, both (n, 4) xyxy in pixels; 0 for an unusable one. (n,)."""
    targets = np.asarray(target_px, dtype=np.float64)
    predicted = _checked(predicted_px, targets)
    return np.where(boxes.area(predicted) > 0, boxes.iou(predicted, targets), 0.0)


def hits(overlaps: ArrayLike, threshold: float, *, strict: bool) -> Array:
    """1.0 where an overlap (n,) counts at ``threshold``, else 0.0; ``strict``: one equal to it does not count."""
    values = np.asarray(overlaps, dtype=np.float64)
    return np.asarray(values > threshold if strict else values >= threshold, dtype=np.float64)


def mean_hits(overlaps: ArrayLike, *, strict: bool) -> Array:
    """Share of the ten thresholds 0.50, 0.55, ..., 0.95 that each overlap passes, shape (n,)."""
    return np.mean([hits(overlaps, t, strict=strict) for t in MEAN_THRESHOLDS], axis=0)


def results_table(results: Sequence[RuleResult]) -> str:
    """The rules beside each other, one line per metric, each score with its interval; percent, except mIoU."""
    by_name = [{row.metric: row for row in result.rows} for result in results]
    lines = []
    for metric in dict.fromkeys(row.metric for result in results for row in result.rows):
        n = next(rows[metric].n for rows in by_name if metric in rows)
        lines.append([title(metric), str(n), *(_cell(rows.get(metric)) for rows in by_name)])
    return render(["metric", "n", *(result.name for result in results)], lines)


def legend(results: Sequence[RuleResult]) -> list[str]:
    """What each rule is, and what must be known before its numbers are quoted."""
    lines = []
    for result in results:
        lines.append(f"{result.name}: {'; '.join(_conditions(result.rows))} ({result.source})")
        lines += [f"{result.name}: NOTE: {note}" for note in result.notes]
    return lines


@dataclass
class _Rows:
    """What a rule scores, and the rows that it makes of it, with their intervals."""

    samples: Sequence[Sample]
    targets: Array
    predicted: Array
    iou: Array
    category_map: Mapping[str, str]
    resamples: int
    seed: int
    done: list[ScoreRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def accuracies(
        self,
        iou: Array,
        thresholds: Iterable[float],
        *,
        strict: bool,
        mean: bool = True,
        label: str = "",
        members: NDArray[np.int64] | None = None,
    ) -> None:
        """One row per threshold and, with ``mean``, mAcc; of the samples ``members`` only, if given."""
        sign = ">" if strict else ">="
        for t in thresholds:
            self.add(f"Acc@{t:g}{label}", hits(iou, t, strict=strict), f"IoU {sign} {t:g}", members)
        if mean:
            rule = f"IoU {sign} 0.50, 0.55, ..., 0.95"
            self.add(f"mAcc{label}", mean_hits(iou, strict=strict), rule, members)

    def add(self, metric: str, values: Array, rule: str, members: NDArray[np.int64] | None = None) -> None:
        index = np.arange(len(values)) if members is None else members
        chosen, images = values[index], [self.samples[i].image_id for i in index]
        low = high = None
        if self.resamples and len(set(images)) >= 2:
            interval = bootstrap_mean(chosen, images, n_boot=self.resamples, seed=self.seed)
            low, high = interval.low, interval.high
        value = float(chosen.mean()) if len(chosen) else math.nan
        self.done.append(ScoreRow(metric, value, len(chosen), rule, low, high))


def _checked(predicted_px: ArrayLike, targets: Array) -> Array:
    predicted = np.asarray(predicted_px, dtype=np.float64)
    if predicted.shape != targets.shape or targets.ndim != 2 or targets.shape[1] != 4:
        raise ValueError(
            f"predictions of shape {predicted.shape} for targets of shape {targets.shape}; both are (n, 4)"
        )
    # A number that is not finite makes its whole box none: clamping must not turn it into one.
    finite = np.isfinite(predicted).all(axis=1, keepdims=True)
    return np.where(finite, np.round(predicted, _PIXEL_DIGITS), np.nan)


def _category(sample: Sample) -> str:
    found = sample.meta.get("category")
    if not isinstance(found, str) or not found.startswith(("o365_", "refcoco_")):
        raise BenchmarkError(
            f"{sample.dataset} {sample.split}, sample {sample.sample_id!r}: category {found!r} is not like o365_64 or "
            "refcoco_1, and the rule refl4 averages over these; use it on Ref-L4, or --rule common"
        )
    return found


def _distractors(sample: Sample) -> int:
    found = sample.meta.get("distractors")
    if type(found) is not int or found < 0:
        raise BenchmarkError(
            f"{sample.dataset} {sample.split}, sample {sample.sample_id!r}: distractors is {found!r}, not a whole "
            "number from 0, and the rule refadv bins by it; use it on Ref-Adv, or --rule common"
        )
    return found


def _conditions(rows: Sequence[ScoreRow]) -> list[str]:
    """What counts, each condition once; the single thresholds of one comparison together."""
    together: dict[str, list[str]] = {}
    for row in rows:
        measure, _, threshold = row.rule.rpartition(" ")
        single = measure.endswith((">", ">="))
        found = together.setdefault(measure if single else row.rule, [])
        if single and threshold not in found:
            found.append(threshold)
    return [f"{rule} {', '.join(thresholds)}".rstrip() for rule, thresholds in together.items()]


def _cell(row: ScoreRow | None) -> str:
    if row is None:
        return "-"
    digits = 4 if row.metric == "mIoU" else 2
    ends = interval(row.low, row.high, row.metric)
    return f"{number(row.value, row.metric, digits=digits)} {'' if ends == '-' else ends}".rstrip()
