"""Overlay swaps: what a policy does when another box is drawn than the one it proposed.

A *swap* shows a policy one box at one step of an episode and records its answer. From many swaps of
the same samples follows whether the answer depends on how *good* the drawn box is, or merely on
there being one. This module holds the records and the statistics; ``ivt_agents.evaluation.swaps`` plays them.
``docs/swaps.md`` gives every definition in words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ivt_env import boxes
from ivt_env.metrics.statistics import MIN_CLUSTERS, Interval, clustered_se, mean_interval, wilson
from ivt_env.metrics.stopping import auroc
from ivt_env.metrics.table import MOST_POLICIES, interval, number, render, score_cells, verdict

Array = NDArray[np.float64]
Box = tuple[float, float, float, float]

VARIANTS = ("own", "target", "sibling", "random", "shifted", "near", "none", "blank")
"""What can be drawn: the own box or in its place the ground truth, the box of another object of the target's class, a
box anywhere, the own box or the ground truth moved and scaled, no box, or the own box on a uniformly grey image."""

LEFT_BELOW = 0.3
"""A proposal has left the shown box if its IoU with it is below this."""
KEPT_FROM = 0.7
"""A proposal keeps the shown box if its IoU with it is at least this."""
TOWARDS_MARGIN = 0.01
"""A move towards the target must gain more IoU than this; less comes from rounding to the answer's grid."""
GOOD_FROM = 0.9
"""A shown box is good from this IoU with the target on: there is nothing to do but stop."""
BAD_BELOW = 0.3
"""A shown box is bad below this IoU with the target: it is about something else."""
RIGHT_FROM = 0.5
"""A box is right from this IoU with the target on."""

SHARES = ("stopped", "kept", "left", "towards", "right")
"""What is counted of the answers: attributes of ``Swap``, and of ``VariantScores`` as a share."""
GOOD_BAD = "AUROC good / bad"
_ON_IMAGE = ("own", "target", "sibling", "random", "shifted", "near")


@dataclass(frozen=True, slots=True)
class Swap:
    """One drawn box and the answer to it. Boxes are xyxy, relative to the image."""

    sample_id: str
    image_id: str
    variant: str
    """One of ``VARIANTS``."""
    step: int
    """Actions made before this answer: 1 shows the box in place of the policy's first one."""
    shown: Box | None
    """The box drawn; None for ``none``."""
    shown_iou: float
    """IoU of the shown box with the target, 0 without a box."""
    target: Box
    action: str
    """``stop``, ``propose`` (a usable box), ``refused`` (an unusable one) or ``unparsable``."""
    new_box: Box | None
    """The current box after the answer: the proposal, or else still the shown box."""
    new_iou: float
    """IoU of that box with the target, 0 without a box."""
    stop_probability: float | None = None
    """As the policy stated it, where it does."""
    reached: bool = True
    """The policy had not stopped before this step of its own accord."""
    agent: str = ""
    dataset: str = ""
    split: str = ""

    @property
    def stopped(self) -> bool:
        """The policy took the shown box for its answer."""
        return self.action == "stop"

    @property
    def overlap(self) -> float:
        """IoU of the box after the answer with the shown one; NaN where no box was shown."""
        if self.shown is None:
            return math.nan
        return 1.0 if self.new_box is None else float(boxes.iou(self.new_box, self.shown))

    @property
    def kept(self) -> bool:
        """Stopped, or proposed nearly the shown box again. Refused and unparsable answers keep nothing."""
        return self.stopped or (self.action == "propose" and self.overlap >= KEPT_FROM)

    @property
    def left(self) -> bool:
        """Proposed a box somewhere else; see ``LEFT_BELOW``. Never without a shown box."""
        return self.action == "propose" and self.overlap < LEFT_BELOW

    @property
    def towards(self) -> bool:
        """Proposed a box nearer to the target than the shown one; see ``TOWARDS_MARGIN``. A stop is no move."""
        return self.action == "propose" and self.new_iou > self.shown_iou + TOWARDS_MARGIN

    @property
    def right(self) -> bool:
        """The current box after the answer is right."""
        return self.new_iou >= RIGHT_FROM


@dataclass(frozen=True, slots=True)
class VariantScores:
    """What one policy did with one variant at one step. Shares are of all ``num`` answers."""

    policy: str
    step: int
    variant: str
    num: int
    num_clusters: int
    """Images."""
    reached: float
    """Share of the samples in which the policy itself would have come to this step."""
    shown_iou: float
    """Mean IoU of the shown box with the target."""
    stopped: Interval
    kept: Interval
    left: Interval
    towards: Interval
    right: Interval
    change: Interval
    """IoU with the target after the answer minus before, mean."""
    failed: int
    """Answers that were refused or unparsable."""


@dataclass(frozen=True, slots=True)
class Dependence:
    """One statistic of what the answer depends on."""

    policy: str
    step: int
    name: str
    measure: str
    """What is compared: ``stop_probability``, ``stop`` or ``keep``."""
    null: float
    """Its value for a policy to which the difference means nothing: 0.5 for an AUROC, else 0."""
    value: Interval
    shown: bool
    """The interval excludes ``null``, over at least ``MIN_CLUSTERS`` images."""


def summarise(policy: str, swaps: Sequence[Swap], *, n_boot: int = 2000, seed: int = 0) -> list[VariantScores]:
    """A row for each step and variant that was played, in the order of ``VARIANTS``.

    Shares have Wilson intervals over the effective number of answers (see ``share``), the IoU
    change a bootstrap interval over images. The swaps are of one policy; ``policy`` is its name in the rows.
    """
    rows = []
    for step, of_step in _by_step(swaps).items():
        for variant, chosen in of_step.items():
            if not chosen:
                continue
            images = [s.image_id for s in chosen]
            change = [s.new_iou - s.shown_iou for s in chosen]
            rows.append(
                VariantScores(
                    policy=policy,
                    step=step,
                    variant=variant,
                    num=len(chosen),
                    num_clusters=len(set(images)),
                    reached=float(np.mean([s.reached for s in chosen])),
                    shown_iou=float(np.mean([s.shown_iou for s in chosen])),
                    **{name: share([getattr(s, name) for s in chosen], images) for name in SHARES},
                    change=_bounded(change, images, (-1, 1), n_boot, seed),
                    failed=sum(s.action in ("refused", "unparsable") for s in chosen),
                )
            )
    return rows


def dependence(policy: str, swaps: Sequence[Swap], *, n_boot: int = 2000, seed: int = 0) -> list[Dependence]:
    """What the decision to stop depends on, for each step; NaN where nothing was played that a statistic compares.

    ``docs/swaps.md`` says what each statistic is. Pairs are of one sample, and only ``AUROC own right / wrong`` goes
    *across* samples, since each has one own box. ``index of keeping`` is *no evidence of verifying*: a policy that
    ignores the drawn box and gives its own right answer again scores 1, too. The AUROCs use stated stop probabilities
    where every answer compared has one, else whether it stopped; ``measure`` says which. All intervals are
    bootstrapped over images.
    """
    rows = []
    for step, of_step in _by_step(swaps).items():
        on_image = [s for variant in _ON_IMAGE for s in of_step[variant]]
        by = {variant: _grouped(chosen) for variant, chosen in of_step.items()}
        by["good"] = _grouped(s for s in on_image if s.shown_iou >= GOOD_FROM)
        by["bad"] = _grouped(s for s in on_image if s.shown_iou < BAD_BELOW)
        by["wrong"] = _grouped((*of_step["sibling"], *of_step["random"]))
        found: list[tuple[str, str, float, Interval]] = []
        for high, low in (("good", "bad"), ("target", "near"), ("target", "sibling"), ("target", "random")):
            measure = _measure([s for i in by[high].keys() & by[low].keys() for s in (*by[high][i], *by[low][i])])
            values, images = _paired(
                by[high], by[low], measure, lambda a, b: auroc([*a, *b], [1] * len(a) + [0] * len(b))
            )
            found.append((f"AUROC {high} / {low}", measure, 0.5, _bounded(values, images, (0, 1), n_boot, seed)))
        measure = _measure(of_step["own"])
        across = _auroc_across(of_step["own"], measure, n_boot, seed)
        found.append(("AUROC own right / wrong", measure, 0.5, across))
        for name, measure, high, low in (
            ("index: target - sibling, random", "stop", "target", "wrong"),
            ("index of keeping (no evidence)", "keep", "target", "wrong"),
            ("presence: own - none", "stop", "own", "none"),
            ("image: own - blank", "stop", "own", "blank"),
        ):
            values, images = _paired(by[high], by[low], measure, lambda a, b: float(a.mean() - b.mean()))
            found.append((name, measure, 0.0, _bounded(values, images, (-1, 1), n_boot, seed)))
        for name, measure, null, value in found:
            clear = value.num_clusters >= MIN_CLUSTERS and (value.low > null or value.high < null)
            rows.append(Dependence(policy, step, name, measure, null, value, clear))
    return rows


def share(values: ArrayLike, clusters: Sequence[object]) -> Interval:
    """A proportion of n answers (0 or 1) with its Wilson interval, widened where answers share images.

    Wilson's interval is taken over the number of *independent* answers that would have the clustered
    standard error, p (1 - p) / se^2, at most n; where all answers are alike, over the number of images.
    """
    v = np.asarray(values, dtype=np.float64)
    num_clusters = len(set(clusters))
    if v.ndim != 1 or not len(v) or len(clusters) != len(v):
        raise ValueError(f"one value per image id is needed, not shape {v.shape} for {len(clusters)} ids")
    p = float(v.mean())
    trials = num_clusters
    if 0 < p < 1 and num_clusters > 1 and (se := clustered_se(v, clusters)) > 0:
        trials = max(1, min(len(v), round(p * (1 - p) / se**2)))
    return Interval(p, *wilson(p * trials, trials), len(v), num_clusters)


def swap_table(rows: Sequence[VariantScores]) -> str:
    """One line per policy, step and variant: shares in percent with 95 % intervals."""
    header = ["policy", "step", "shown", "n", "IoU shown", "stopped %", "left %", "towards %", "right after %"]
    lines = []
    for r in rows:
        left = "-" if r.variant == "none" else _cell(r.left)
        cells = [_cell(r.stopped), left, _cell(r.towards), _cell(r.right), _cell(r.change, "IoU", sign=True)]
        lines.append([r.policy, str(r.step), r.variant, str(r.num), f"{r.shown_iou:.3f}", *cells, str(r.failed)])
    return render([*header, "IoU change", "failed"], lines, left=3)


def dependence_table(rows: Sequence[Dependence]) -> str:
    """One line per statistic; the last column says whether it differs from what indifference gives."""
    header = ["policy", "step", "statistic", "of", "value", "95% interval", "images", "indifferent", "differs"]
    lines = [
        [r.policy, str(r.step), r.name, r.measure.replace("_", " "), *score_cells({"IoU": r.value})]
        + [str(r.value.num_clusters), f"{r.null:.1f}", verdict(r.shown, r.value.num_clusters) or "yes"]
        for r in rows
    ]
    return render(header, lines, left=4)


def swap_headline(rows: Sequence[Dependence]) -> str:
    """Can a policy tell a good drawn box from a bad one? A line for each policy and step, at most ``MOST_POLICIES``."""
    lines = []
    for r in (r for r in rows if r.name == GOOD_BAD):
        told = "tells good from bad" if r.value.value > r.null else "prefers bad boxes"
        said = "not played" if not r.value.num else verdict(r.shown, r.value.num_clusters) or told
        lines.append([r.policy[:28], said, str(r.step), *score_cells({"IoU": r.value}), str(r.value.num_clusters)])
    more = [f"and {len(lines) - MOST_POLICIES} more in table.txt"] if len(lines) > MOST_POLICIES else []
    table = render(["policy", "verdict", "step", GOOD_BAD, "95% interval", "images"], lines[:MOST_POLICIES], left=2)
    return "\n".join(
        [table, *more, "AUROC: how often it stops rather on a good drawn box than on a bad one; 0.5: by chance"]
    )


def _cell(value: Interval, metric: str = "share", sign: bool = False) -> str:
    """A value with its interval, where it has one."""
    ends = interval(value.low, value.high, metric, sign=sign)
    return f"{number(value.value, metric, sign=sign)} {'' if ends == '-' else ends}".rstrip()


def _by_step(swaps: Sequence[Swap]) -> dict[int, dict[str, list[Swap]]]:
    """The swaps of one policy by step and variant."""
    if not swaps:
        raise ValueError("no swaps: play some first")
    agents = {s.agent for s in swaps}
    if len(agents) > 1:
        raise ValueError(f"swaps of several policies ({', '.join(sorted(agents))}): score one at a time")
    found: dict[int, dict[str, list[Swap]]] = {
        step: {variant: [] for variant in VARIANTS} for step in sorted({s.step for s in swaps})
    }
    seen = set()
    for s in swaps:
        if (key := (s.step, s.variant, s.sample_id)) in seen:
            raise ValueError(
                f"{s.variant} at step {s.step} of sample {s.sample_id!r} is there twice; give one data set"
            )
        seen.add(key)
        found[s.step][s.variant].append(s)
    return found


def _grouped(swaps: Iterable[Swap]) -> dict[str, list[Swap]]:
    """Swaps by sample."""
    found: dict[str, list[Swap]] = {}
    for s in swaps:
        found.setdefault(s.sample_id, []).append(s)
    return found


def _paired(
    high: Mapping[str, list[Swap]],
    low: Mapping[str, list[Swap]],
    measure: str,
    statistic: Callable[[Array, Array], float],
) -> tuple[list[float], list[str]]:
    """The statistic of each sample that has both sides, and its image."""
    both = [id_ for id_ in high if id_ in low]
    values = [statistic(_scores(high[id_], measure), _scores(low[id_], measure)) for id_ in both]
    return values, [high[id_][0].image_id for id_ in both]


def _measure(swaps: Sequence[Swap]) -> str:
    return "stop_probability" if swaps and all(s.stop_probability is not None for s in swaps) else "stop"


def _scores(swaps: Sequence[Swap], measure: str) -> Array:
    if measure == "stop_probability":
        return np.array([s.stop_probability for s in swaps], dtype=np.float64)
    return np.array([s.kept if measure == "keep" else s.stopped for s in swaps], dtype=np.float64)


def _bounded(
    values: Sequence[float], clusters: Sequence[str], bounds: tuple[float, float], n_boot: int, seed: int
) -> Interval:
    """Mean with a bootstrap interval over images; NaN for no values, no interval for a single image.

    Where every value lies at a bound, resampling can show no spread; Wilson's interval over the images
    then says how far from the bound the truth may be.
    """
    num_clusters, (low, high) = len(set(clusters)), bounds
    if num_clusters >= 2 and len(set(values)) == 1 and values[0] in bounds:
        p = (values[0] - low) / (high - low)
        start, end = (low + (high - low) * q for q in wilson(p * num_clusters, num_clusters))
        return Interval(float(values[0]), start, end, len(values), num_clusters)
    return mean_interval(values, clusters, n_boot=n_boot, seed=seed)


def _auroc_across(swaps: Sequence[Swap], measure: str, n_boot: int, seed: int) -> Interval:
    """AUROC of right against wrong shown boxes across samples, drawing whole images with replacement.

    A resample without a right or without a wrong box has no AUROC and is drawn again.
    """
    right = np.array([s.shown_iou >= RIGHT_FROM for s in swaps], dtype=bool)
    images = list(dict.fromkeys(s.image_id for s in swaps))
    if not right.any() or right.all():
        return Interval(math.nan, math.nan, math.nan, len(swaps), len(images))
    scores = _scores(swaps, measure)
    value = auroc(scores, right)
    sides = [len({s.image_id for s, r in zip(swaps, right, strict=True) if r == side}) for side in (True, False)]
    if min(sides) < 2:  # the interval would not know the side that a single image stands for
        return Interval(value, math.nan, math.nan, len(swaps), len(images))
    number = {p: k for k, p in enumerate(images)}
    index = np.array([number[s.image_id] for s in swaps])
    rng = np.random.default_rng(seed)
    drawn: list[float] = []
    while len(drawn) < n_boot:
        weights = np.bincount(rng.integers(len(images), size=len(images)), minlength=len(images))[index]
        if weights[right].any() and weights[~right].any():
            drawn.append(auroc(scores, right, weights))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(value, float(low), float(high), len(swaps), len(images))
