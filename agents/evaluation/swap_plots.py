"""The image of the overlay swaps: what each policy does with each box, and its stops against quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

from ivt_agents.evaluation.plots import STYLE, line_style, save_figure
from ivt_env.metrics.statistics import Interval
from ivt_env.metrics.swaps import VARIANTS, Swap, VariantScores, share

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_SHARES = (("stopped", "stopped"), ("left", "left the shown box"), ("towards", "moved towards the target"))
_EDGES = np.array([0.0, 0.05, 0.3, 0.5, 0.7, 0.9, 1.0 + 1e-9])
"""Of the bins of IoU; boxes about something else fill the first two."""


def plot_swaps(scores: Sequence[VariantScores], swaps: Mapping[str, Sequence[Swap]], path: Path) -> None:
    """Write a PNG: shares by variant, and the share stopped against the shown box's IoU with the target.

    Args:
        scores: of ``summarise``, for all policies; the first step of each is drawn.
        swaps: the records of each policy.
        path: of the file.
    """
    step = min(row.step for row in scores)
    at = [row for row in scores if row.step == step]
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(2, 2, figsize=(10, 8), constrained_layout=True, sharey=True)
        axes = panels.flat
        shown = [v for v in VARIANTS if any(row.variant == v for row in at)]
        for axis, (name, title) in zip(axes, _SHARES, strict=False):
            places = [v for v in shown if name != "left" or v != "none"]
            for number, policy in enumerate(swaps):
                rows = {row.variant: getattr(row, name) for row in at if row.policy == policy}
                width = 0.8 / len(swaps)
                x = [places.index(v) + (number - (len(swaps) - 1) / 2) * width for v in rows if v in places]
                held = [rows[v] for v in rows if v in places]
                heights = [100 * i.value for i in held]
                axis.bar(x, heights, width, color=f"C{number}", label=policy)
                axis.errorbar(x, heights, yerr=_reach(held), fmt="none", ecolor="0.25", linewidth=0.9, capsize=2)
            axis.set_xticks(range(len(places)), places, rotation=35, ha="right")
            axis.set_title(f"{title} (%), step {step}")
        axes[0].set_ylim(-2, 102)
        for number, (policy, records) in enumerate(swaps.items()):
            at_step = [s for s in records if s.step == step and s.variant not in ("none", "blank")]
            _plot_stops(axes[3], at_step, line_style(number, len(swaps)), policy)
        axes[3].set_title(f"stopped (%) by IoU of the shown box, step {step}")
        axes[3].set_xlabel("IoU of the shown box with the target; dotted: stated probability")
        axes[3].set_xlim(-0.02, 1.02)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(swaps), frameon=False)
        save_figure(figure, path)


def _plot_stops(axis: plt.Axes, swaps: Sequence[Swap], style: dict[str, Any], label: str) -> None:
    ious = np.array([s.shown_iou for s in swaps])
    place = np.digitize(ious, _EDGES) - 1
    bins = [np.flatnonzero(place == k).tolist() for k in range(len(_EDGES) - 1)]
    bins = [rows for rows in bins if len(rows)]
    held = [share([swaps[i].stopped for i in rows], [swaps[i].image_id for i in rows]) for rows in bins]
    x = [ious[rows].mean() for rows in bins]
    y = [100 * i.value for i in held]
    axis.errorbar(x, y, yerr=_reach(held), marker="o", label=label, markersize=4, capsize=2, elinewidth=1, **style)
    if all(s.stop_probability is not None for s in swaps):
        stated = np.array([s.stop_probability for s in swaps], dtype=float)
        axis.plot(x, [100 * stated[rows].mean() for rows in bins], ":", color=style["color"], linewidth=1)


def _reach(held: Sequence[Interval]) -> NDArray[np.float64]:
    """How far the intervals reach below and above their values, in percent: (2, n)."""
    return 100 * np.array([[i.value - i.low for i in held], [i.high - i.value for i in held]]).clip(0)
