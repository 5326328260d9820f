"""Scores and differences as text and JSON: the one place that formats them.

Accuracies are printed in percent and their differences in points; IoUs as they are. Rows of the
oracle are marked, and beside a difference whose interval holds 0 stands ``n.s.`` (not significant), or ``n too small``
where there are fewer than ``MIN_CLUSTERS`` images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from ivt_env.metrics.columns import Column
from ivt_env.metrics.scores import METRICS, Share, per_episode
from ivt_env.metrics.statistics import MIN_CLUSTERS, Difference, Interval, bootstrap_mean, mcnemar, paired_bootstrap

MOST_POLICIES = 8
"""Lines of ``headline``: its screen stays short."""
ORACLE_NOTE = "* chosen with the target box: a ceiling that nothing deployed can reach, never a result"


def number(value: float | None, metric: str = "share", *, sign: bool = False, digits: int | None = None) -> str:
    """A score; ``-`` for None and NaN.

    ``mIoU`` and ``IoU`` are printed as they are, all other metrics in percent; ``sign`` writes a plus, for differences.
    ``digits`` stand behind the point (None: 3 for IoU, else 1).
    """
    if value is None or math.isnan(value):
        return "-"
    plain = metric in ("mIoU", "IoU")
    digits = (3 if plain else 1) if digits is None else digits
    return format(value if plain else 100 * value, f"{'+' if sign else ''}.{digits}f")


def interval(
    low: float | None, high: float | None, metric: str = "share", *, sign: bool = False, digits: int | None = None
) -> str:
    """The ends of an interval; ``-`` where there is none."""
    ends = [number(v, metric, sign=sign, digits=digits) for v in (low, high)]
    return "-" if "-" in ends else f"[{', '.join(ends)}]"


def title(metric: str) -> str:
    """A metric with its unit."""
    return metric if metric == "mIoU" else f"{metric} (%)"


def verdict(shown: bool, images: int) -> str:
    """What is added to a number: nothing where it is significant, ``n.s.``, or that there are too few images."""
    if shown:
        return ""
    return "n.s." if images >= MIN_CLUSTERS else "n too small"


def difference(diff: float, shown: bool, images: int, metric: str) -> str:
    """A difference with its verdict, such as ``+1.2`` or ``+0.3 n.s.``."""
    return f"{number(diff, metric, sign=True)} {verdict(shown, images)}".rstrip()


@dataclass(frozen=True, slots=True)
class Row:
    """The scores of one policy under one rule."""

    policy: str
    column: str
    oracle: bool
    rollout: str
    """``forced`` or ``stopping``."""
    scores: dict[str, Interval]
    """By metric name; the mean over seeds where there are several."""
    by_seed: dict[str, tuple[float, ...]]
    """By metric name, the score of each seed."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The paired difference of two answers to the same episodes, a minus b."""

    a: str
    b: str
    metric: str
    oracle: bool
    """One of the two looks at the target."""
    difference: Difference
    """Of the means over seeds where there are several; the interval then holds for these seeds."""
    by_seed: tuple[float, ...]
    """The difference of each seed; see ``compare`` for what is taken from what."""
    mcnemar: float | None
    """p-value of the exact test; None where an answer is not simply right or wrong."""


def score_rows(
    policy: str,
    columns: Mapping[str, Column],
    image_ids: Sequence[object],
    metrics: Sequence[str] = METRICS,
    *,
    n_boot: int = 2000,
    seed: int = 0,
) -> list[Row]:
    """One row per column, each score with its interval clustered by image.

    ``columns`` and ``image_ids`` are those of n episodes, ``metrics`` names as in ``per_episode``, ``n_boot`` and
    ``seed`` those of the intervals.
    """
    return [
        Row(
            policy,
            name,
            column.oracle,
            column.rollout,
            {m: bootstrap_mean(per_episode(column, m), image_ids, n_boot=n_boot, seed=seed) for m in metrics},
            {m: tuple(_by_seed(column, m)) for m in metrics},
        )
        for name, column in columns.items()
    ]


def compare(
    a_name: str,
    a: Column,
    b_name: str,
    b: Column,
    image_ids: Sequence[object],
    metric: str = "Acc@0.5",
    *,
    n_boot: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Paired difference a minus b of one metric over the same n episodes.

    Call ``check_same_samples`` first when they come from different rollouts. Several seeds (``pool_seeds``) are
    averaged, episode by episode, before images are drawn. ``by_seed`` pairs equal numbers of seeds in
    the order given; otherwise each seed of the side that has more is set against the other's mean.

    McNemar's test is given for accuracies of answers that are right or wrong; it takes the episodes
    as independent, so with several to an image the interval is the one to go by.
    """
    x, y = per_episode(a, metric), per_episode(b, metric)
    difference = paired_bootstrap(x, y, image_ids, n_boot=n_boot, seed=seed)
    decided = a.ious.shape[1] == b.ious.shape[1] == 1  # one answer each: no seeds to average, nothing drawn
    p = mcnemar(x, y)[0] if decided and metric.startswith("Acc@") else None
    left, right = _by_seed(a, metric), _by_seed(b, metric)
    if len(left) != len(right):
        most = max(len(left), len(right))
        left, right = (s if len(s) == most else [sum(s) / len(s)] * most for s in (left, right))
    by_seed = tuple(v - w for v, w in zip(left, right, strict=True))
    return Comparison(a_name, b_name, metric, a.oracle or b.oracle, difference, by_seed, p)


def score_table(rows: Sequence[Row]) -> str:
    """One line per policy and rule; each metric has a column and an interval column."""
    lines = []
    for row in rows:
        first = next(iter(row.scores.values()))
        line = [row.policy, marked(row.column, row.oracle), str(first.num), str(first.num_clusters)]
        lines.append(line + score_cells(row.scores))
    header = ["policy", "column", "episodes", "images", *score_heads(rows[0].scores)]
    return with_note(render(header, lines, left=2), any(r.oracle for r in rows))


def score_heads(metrics: Iterable[str]) -> list[str]:
    """The headings of ``score_cells``."""
    return [head for metric in metrics for head in (title(metric), "95% interval")]


def score_cells(scores: Mapping[str, Interval]) -> list[str]:
    """Each score by metric, and its interval."""
    pairs = ((number(s.value, metric), interval(s.low, s.high, metric)) for metric, s in scores.items())
    return [cell for pair in pairs for cell in pair]


def policy_table(rows: Sequence[Row], metric: str) -> str:
    """One line per policy, one column per rule, for a single metric, without intervals.

    A rule that a policy's rollouts do not allow is printed as ``-``.
    """
    cells: dict[str, dict[str, str]] = {}
    for r in rows:
        cells.setdefault(r.policy, {})[marked(r.column, r.oracle)] = number(r.scores[metric].value, metric)
    rules = list(dict.fromkeys(rule for found in cells.values() for rule in found))
    lines = [[policy, *(found.get(rule, "-") for rule in rules)] for policy, found in cells.items()]
    return with_note(render([f"policy, {title(metric)}", *rules], lines), any(r.oracle for r in rows))


def difference_table(comparisons: Sequence[Comparison]) -> str:
    """One line per comparison: the difference with its verdict (``verdict``) and interval.

    ``detectable`` is the smallest true difference that these data would have shown with 80 %
    power: what "n.s." leaves open. ``each seed`` appears where a comparison has several.
    """
    seeds = any(len(c.by_seed) > 1 for c in comparisons)
    header = ["a", "b", "metric", "a - b", "95% interval", "images", "detectable", "McNemar p"]
    lines = []
    for c in comparisons:
        d = c.difference
        line = [
            c.a,
            c.b,
            marked(title(c.metric), c.oracle),
            difference(d.diff, d.shown, d.num_clusters, c.metric),
            interval(d.low, d.high, c.metric, sign=True),
            str(d.num_clusters),
            number(d.detectable, c.metric),
            p_value(c.mcnemar),
        ]
        lines.append([*line, each_seed(c.by_seed, c.metric, sign=True)] if seeds else line)
    header += ["each seed"] if seeds else []
    found = with_note(render(header, lines, left=3), any(c.oracle for c in comparisons))
    clustered = [c for c in comparisons if c.mcnemar is not None and c.difference.num > c.difference.num_clusters]
    if clustered:
        d = clustered[0].difference
        found += (
            f"\n\nMcNemar's test takes the {d.num} episodes as independent; they show {d.num_clusters} images: "
            "go by the interval"
        )
    return found


def p_value(p: float | None) -> str:
    """A p-value, ``-`` where there is none."""
    return "<0.0001" if p is not None and p < 1e-4 else number(p, "IoU", digits=4)


def each_seed(values: Sequence[float], metric: str, *, sign: bool = False) -> str:
    """The score or difference of each seed, ``-`` where there is only one."""
    return " ".join(number(v, metric, sign=sign) for v in values) if len(values) > 1 else "-"


def seed_table(rows: Sequence[Row], metric: str) -> str:
    """One line per policy of several seeds and rule: their number, mean and each seed's score."""
    several = [r for r in rows if len(r.by_seed[metric]) > 1]
    lines = [
        [r.policy, marked(r.column, r.oracle), str(len(r.by_seed[metric])), number(r.scores[metric].value, metric)]
        + [each_seed(r.by_seed[metric], metric)]
        for r in several
    ]
    header = ["policy", "column", "seeds", f"mean, {title(metric)}", "each seed"]
    return with_note(render(header, lines, left=2), any(r.oracle for r in several))


def headline(audits: Mapping[str, Mapping[str, Any]]) -> str:
    """Does refinement help? A line for each policy, of at most ``MOST_POLICIES``; at most 100 columns wide.

    ``audits`` holds by policy what ``Audit.as_json`` gives.
    """
    lines = []
    for name, audit in audits.items():
        scores = {row["column"]: row["scores"]["Acc@0.5"]["value"] for row in audit["rows"]}
        d = own_gains(audit)["Acc@0.5"]["difference"]
        said = verdict(d["shown"], d["num_clusters"]) or f"refinement {'helps' if d['diff'] > 0 else 'hurts'}"
        seeds = f" ({len(audit['runs'])} seeds)" if len(audit["runs"]) > 1 else ""
        cells = [number(scores["step_0"]), number(scores["learned_stop"]), number(d["diff"], sign=True)]
        lines.append([f"{name[:28]}{seeds}", said, *cells, interval(d["low"], d["high"], sign=True)])
    more = [f"and {len(lines) - MOST_POLICIES} more policies"] if len(lines) > MOST_POLICIES else []
    head = ["policy", "verdict", "step 0", "final", "difference", "95% interval"]
    legend = "Acc@0.5 (%), without ground truth: the first box (step 0), the box at the learned stop (final)"
    return "\n".join([render(head, lines[:MOST_POLICIES], left=2), *more, legend])


def own_gains(audit: Mapping[str, Any]) -> dict[str, Any]:
    """By metric, the difference of a policy's answer (its learned stop) to its own first box."""
    return {g["metric"]: g for g in audit["gains"] if g["a"] == "learned_stop"}


def render(header: Sequence[str], lines: Sequence[Sequence[str]], *, markdown: bool = False, left: int = 1) -> str:
    """An aligned table: the first ``left`` columns to the left, the others to the right."""
    for line in lines:
        if len(line) != len(header):
            raise ValueError(f"a line of {len(line)} cells under {len(header)} headings: {list(line)}")
    grid = [list(header), *(list(line) for line in lines)]
    if markdown:
        grid = [[cell.replace("|", "\\|").replace("*", "\\*") for cell in line] for line in grid]
    widths = [max(len(line[k]) for line in grid) for k in range(len(header))]
    texts = [
        [cell.ljust(w) if k < left else cell.rjust(w) for k, (cell, w) in enumerate(zip(line, widths, strict=True))]
        for line in grid
    ]
    if not markdown:
        rule = "  ".join("-" * w for w in widths)
        body = ["  ".join(line).rstrip() for line in texts]
        return "\n".join([body[0], rule, *body[1:]])
    marks = ["-" * max(w, 3) if k < left else "-" * max(w - 1, 2) + ":" for k, w in enumerate(widths)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [texts[0], marks, *texts[1:]])


def as_json(value: Any) -> Any:
    """Records, arrays and mappings of this package as plain JSON values; NaN becomes None.

    A ``Share`` is given with its value. Another type, or an infinite number, is a TypeError.
    """
    if isinstance(value, Share):
        return {"value": as_json(value.value), "count": as_json(value.count), "total": value.total}
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_json(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return as_json(value.tolist())
    if isinstance(value, list | tuple):
        return [as_json(v) for v in value]
    if isinstance(value, float):
        if math.isinf(value):
            raise TypeError("an infinite number has no JSON form")
        return None if math.isnan(value) else value
    if value is None or isinstance(value, str | int | bool):
        return value
    raise TypeError(f"no JSON form for {type(value).__name__}")


def _by_seed(column: Column, metric: str) -> list[float]:
    return [float(per_episode(one, metric).mean()) for one in column.by_seed()]


def marked(name: str, oracle: bool) -> str:
    """``name``, with a star where it is the oracle's."""
    return f"{name} *" if oracle else name


def with_note(table: str, oracle: bool) -> str:
    """``table`` with ``ORACLE_NOTE`` under it where one of its rows is the oracle's."""
    return f"{table}\n\n{ORACLE_NOTE}" if oracle else table
