"""Scores and differences as text, Markdown and JSON.

Accuracies are printed in percent and their differences in points; IoUs as they are. Rows of the
oracle are marked, and beside a difference whose interval holds 0 stands ``n.s.`` (not significant), or ``n too small``
where there are fewer than ``MIN_CLUSTERS`` images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from ivt_env.metrics import text
from ivt_env.metrics.columns import Column
from ivt_env.metrics.scores import METRICS, Share, per_episode
from ivt_env.metrics.statistics import Difference, Interval, bootstrap_mean, mcnemar, paired_bootstrap

ORACLE_NOTE = "* chosen with the target box: a ceiling that nothing deployed can reach, never a result"


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
    strict: bool = False,
    n_boot: int = 2000,
    seed: int = 0,
) -> list[Row]:
    """One row per column, each score with its interval clustered by image.

    Args:
        policy: Name printed for the policy.
        columns: What ``columns()`` returned, n episodes each.
        image_ids: ``Outcomes.image_ids``, length n.
        metrics: Names as in ``per_episode``.
        strict: As in ``per_episode``.
        n_boot: Resamples of the interval.
        seed: Seed of the interval.

    Raises:
        ValueError: As in ``per_episode`` and ``bootstrap_mean``.
    """
    return [
        Row(
            policy,
            name,
            column.oracle,
            column.rollout,
            {
                m: bootstrap_mean(per_episode(column, m, strict=strict), image_ids, n_boot=n_boot, seed=seed)
                for m in metrics
            },
            {m: tuple(_by_seed(column, m, strict)) for m in metrics},
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
    strict: bool = False,
    n_boot: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Paired difference a minus b of one metric over the same n episodes.

    The columns may be of two rules or of two policies; call ``check_same_samples`` first when
    they come from different rollouts. Columns of several seeds (``pool_seeds``) are averaged over
    them, episode by episode, before images are drawn. ``by_seed`` pairs equal numbers of seeds in
    the order given; otherwise each seed of the side that has more is set against the other's mean.

    McNemar's test is given for accuracies of answers that are right or wrong; it takes the episodes
    as independent, so with several to an image the interval is the one to go by.

    Raises:
        ValueError: As in ``per_episode`` and ``paired_bootstrap``.
    """
    x, y = per_episode(a, metric, strict=strict), per_episode(b, metric, strict=strict)
    difference = paired_bootstrap(x, y, image_ids, n_boot=n_boot, seed=seed)
    decided = a.ious.shape[1] == b.ious.shape[1] == 1  # one answer each: no seeds to average, nothing drawn
    return Comparison(
        a_name,
        b_name,
        metric,
        a.oracle or b.oracle,
        difference,
        tuple(v - w for v, w in _paired_seeds(_by_seed(a, metric, strict), _by_seed(b, metric, strict))),
        mcnemar(x, y)[0] if decided and metric.startswith("Acc@") else None,
    )


def score_table(rows: Sequence[Row], *, markdown: bool = False) -> str:
    """One line per policy and rule; each metric has a column and an interval column.

    Raises:
        ValueError: For no rows, or rows with different metrics.
    """
    metrics = _shared_metrics(rows)
    header = ["policy", "column", "episodes", "images"]
    for metric in metrics:
        header += [text.title(metric), f"{rows[0].scores[metric].level:.0%} interval"]
    lines = []
    for row in rows:
        first = row.scores[metrics[0]]
        line = [row.policy, _marked(row.column, row.oracle), str(first.num), str(first.num_clusters)]
        for metric in metrics:
            score = row.scores[metric]
            line += [text.number(score.value, metric), text.interval(score.low, score.high, metric)]
        lines.append(line)
    return with_note(render(header, lines, markdown=markdown, left=2), any(r.oracle for r in rows), markdown)


def policy_table(rows: Sequence[Row], metric: str, *, markdown: bool = False) -> str:
    """One line per policy, one column per rule, for a single metric, without intervals.

    A rule that a policy's rollouts do not allow is printed as ``-``.

    Raises:
        ValueError: For no rows, or a metric that a row lacks.
    """
    if metric not in _shared_metrics(rows):
        raise ValueError(f"no scores of {metric!r}: the rows hold {', '.join(rows[0].scores)}")
    rules = list(dict.fromkeys(_marked(r.column, r.oracle) for r in rows))
    cells: dict[str, dict[str, str]] = {}
    for r in rows:
        cells.setdefault(r.policy, {})[_marked(r.column, r.oracle)] = text.number(r.scores[metric].value, metric)
    lines = [[policy, *(found.get(rule, "-") for rule in rules)] for policy, found in cells.items()]
    found = render([f"policy, {text.title(metric)}", *rules], lines, markdown=markdown, left=1)
    return with_note(found, any(r.oracle for r in rows), markdown)


def difference_table(comparisons: Sequence[Comparison], *, markdown: bool = False) -> str:
    """One line per comparison: the difference with its verdict (``text.verdict``) and interval.

    ``detectable`` is the smallest true difference that these data would have shown with 80 %
    power: what "n.s." leaves open. ``each seed`` appears where a comparison has several.

    Raises:
        ValueError: For no comparisons.
    """
    if not comparisons:
        raise ValueError("no comparisons to print")
    level = comparisons[0].difference.level
    seeds = any(len(c.by_seed) > 1 for c in comparisons)
    header = ["a", "b", "metric", "a - b", f"{level:.0%} interval", "images", "detectable", "McNemar p"]
    header += ["each seed"] if seeds else []
    lines = []
    for c in comparisons:
        d = c.difference
        line = [
            c.a,
            c.b,
            _marked(text.title(c.metric), c.oracle),
            text.difference(d.diff, d.shown, d.num_clusters, c.metric),
            text.interval(d.low, d.high, c.metric, sign=True),
            str(d.num_clusters),
            text.number(d.detectable, c.metric),
            "-" if c.mcnemar is None else "<0.0001" if c.mcnemar < 1e-4 else f"{c.mcnemar:.4f}",
        ]
        each = " ".join(text.number(v, c.metric, sign=True) for v in c.by_seed) if len(c.by_seed) > 1 else "-"
        lines.append([*line, each] if seeds else line)
    found = with_note(render(header, lines, markdown=markdown, left=3), any(c.oracle for c in comparisons), markdown)
    clustered = [c for c in comparisons if c.mcnemar is not None and c.difference.num > c.difference.num_clusters]
    if clustered:
        d = clustered[0].difference
        found += (
            f"\n\nMcNemar's test takes the {d.num} episodes as independent; they show {d.num_clusters} images: "
            "go by the interval"
        )
    return found


def seed_table(rows: Sequence[Row], metric: str, *, markdown: bool = False) -> str:
    """One line per policy of several seeds and rule: their number, mean and each seed's score.

    Raises:
        ValueError: For no row of several seeds, or a metric that a row lacks.
    """
    if metric not in _shared_metrics(rows):
        raise ValueError(f"no scores of {metric!r}: the rows hold {', '.join(rows[0].scores)}")
    several = [r for r in rows if len(r.by_seed[metric]) > 1]
    if not several:
        raise ValueError("no policy has several seeds")
    lines = []
    for r in several:
        values = r.by_seed[metric]
        each = " ".join(text.number(v, metric) for v in values)
        lines.append(
            [r.policy, _marked(r.column, r.oracle), str(len(values)), text.number(r.scores[metric].value, metric), each]
        )
    header = ["policy", "column", "seeds", f"mean, {text.title(metric)}", "each seed"]
    return with_note(render(header, lines, markdown=markdown, left=2), any(r.oracle for r in several), markdown)


def render(header: Sequence[str], lines: Sequence[Sequence[str]], *, markdown: bool = False, left: int = 1) -> str:
    """An aligned table: the first ``left`` columns to the left, the others to the right.

    Raises:
        ValueError: For a line with another number of cells than the header.
    """
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

    A ``Share`` is given with its value.

    Raises:
        TypeError: For a value of another type, or an infinite number.
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


def _by_seed(column: Column, metric: str, strict: bool) -> list[float]:
    return [float(per_episode(one, metric, strict=strict).mean()) for one in column.by_seed()]


def _paired_seeds(left: list[float], right: list[float]) -> list[tuple[float, float]]:
    if len(left) == len(right):
        return list(zip(left, right, strict=True))
    if len(left) > len(right):
        return [(v, sum(right) / len(right)) for v in left]
    return [(sum(left) / len(left), w) for w in right]


def _shared_metrics(rows: Sequence[Row]) -> list[str]:
    if not rows:
        raise ValueError("no rows to print")
    metrics = list(rows[0].scores)
    for row in rows:
        if list(row.scores) != metrics or not metrics:
            raise ValueError(f"{row.policy!r} {row.column!r} has the metrics {list(row.scores)}, not {metrics}")
    return metrics


def _marked(name: str, oracle: bool) -> str:
    return f"{name} *" if oracle else name


def with_note(table: str, oracle: bool, markdown: bool) -> str:
    """``table`` with ``ORACLE_NOTE`` under it where one of its rows is the oracle's."""
    if not oracle:
        return table
    return f"{table}\n\n" + (ORACLE_NOTE.replace("*", "\\*") if markdown else ORACLE_NOTE)
