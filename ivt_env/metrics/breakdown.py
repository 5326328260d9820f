"""Any column and metric by data set, size of the target's box and number of siblings.

The strata are those of ``columns.strata``. A row tells how many episodes and images it stands on:
many rows are looked at together, so a single odd one among them is no finding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ivt_env.episodes import Episode
from ivt_env.metrics.columns import Column, select, strata
from ivt_env.metrics.scores import HEADLINE_METRICS, Share, per_episode
from ivt_env.metrics.statistics import Interval, mean_interval
from ivt_env.metrics.table import marked, render, score_cells, score_heads, with_note


@dataclass(frozen=True, slots=True)
class GroupRow:
    """The scores of one rule on one stratum."""

    group: str
    """``all`` or a key of ``strata``, for example ``side:tiny``."""
    column: str
    oracle: bool
    episodes: int
    """Samples in the stratum; with several seeds each was played once a seed."""
    images: int
    parse_failures: Share
    """Actions without a usable text, of all actions that were taken on the stratum, over all seeds.
    They stay in every score."""
    scores: dict[str, Interval]
    """By metric name; ``low`` and ``high`` are NaN where the stratum shows fewer than 2 images."""


def breakdown(
    columns: Mapping[str, Column],
    runs: Sequence[Sequence[Episode]],
    metrics: Sequence[str] = HEADLINE_METRICS,
    *,
    n_boot: int = 2000,
    seed: int = 0,
) -> list[GroupRow]:
    """One row per stratum and column, ``all`` first.

    ``runs`` are the rollouts behind the columns: one, or one a seed where the columns are means over seeds.
    ``metrics`` are names as in ``per_episode``, ``n_boot`` and ``seed`` those of the intervals.
    """
    episodes = runs[0]
    unparsed = np.array([[sum(s.parse_failure for s in e.steps) for e in run] for run in runs]).sum(axis=0)  # (n,)
    actions = np.array([[len(e.steps) for e in run] for run in runs]).sum(axis=0)
    images = np.array([e.image_id for e in episodes])
    rows = []
    for group, mask in {"all": np.ones(len(episodes), dtype=bool), **strata(episodes)}.items():
        inside = images[mask].tolist()
        failures = Share(int(unparsed[mask].sum()), int(actions[mask].sum()))
        for name, column in columns.items():
            part = select(column, mask)
            scores = {m: mean_interval(per_episode(part, m), inside, n_boot=n_boot, seed=seed) for m in metrics}
            images_shown = len(set(inside))
            rows.append(GroupRow(group, name, column.oracle, int(mask.sum()), images_shown, failures, scores))
    return rows


def group_table(rows: Mapping[str, Sequence[GroupRow]]) -> str:
    """One line per policy, stratum and column of what ``breakdown`` gave by policy."""
    header = ["policy", "group", "column", "episodes", "images", "unparsable"]
    header += score_heads(next(iter(rows.values()))[0].scores)
    all_rows = [(policy, row) for policy, of_policy in rows.items() for row in of_policy]
    lines = [
        [policy, row.group, marked(row.column, row.oracle), str(row.episodes), str(row.images)]
        + [f"{row.parse_failures.count:g}", *score_cells(row.scores)]
        for policy, row in all_rows
    ]
    return with_note(render(header, lines, left=3), any(row.oracle for _, row in all_rows))
