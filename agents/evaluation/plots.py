"""Plots of training and evaluation, written as PNG files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

from ivt_agents.training.folder import read_metrics
from ivt_env.episodes import Episode
from ivt_env.files import whole_file
from ivt_env.metrics.breakdown import GroupRow
from ivt_env.metrics.statistics import Interval
from ivt_env.metrics.stopping import Calibration
from ivt_env.metrics.swaps import VARIANTS, Swap, VariantScores, share

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "figure.dpi": 130,
    "font.size": 10,
}


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG file whole or not at all, and close the figure."""
    with whole_file(path) as file:
        figure.savefig(file, format="png")
    plt.close(figure)


@contextmanager
def drawing(path: Path, rows: int, columns: int, **options: Any) -> Iterator[tuple[Figure, Any]]:
    """A figure in this module's style and its axes, as ``plt.subplots``; written to ``path`` when the block ends."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, constrained_layout=True, **options)
        yield figure, axes
        save_figure(figure, path)


_DASHES: Any = ("-", (0, (5, 3)), (0, (2, 2)), (0, (7, 2, 2, 2)))


def line_style(number: int, count: int) -> dict[str, Any]:
    """How the line of one of ``count`` policies is drawn: later ones thinner and dashed, so that equal ones show."""
    width = 1.8 + 2.4 * (count - 1 - number) / max(1, count - 1)
    return {"color": f"C{number}", "linewidth": width, "linestyle": _DASHES[number % len(_DASHES)]}


def smooth(values: Sequence[float]) -> np.ndarray:
    """Centred moving average over nine values that keeps the length; shorter windows at both ends."""
    x = np.asarray(values, dtype=float)
    return np.array([x[max(0, i - 4) : i + 5].mean() for i in range(len(x))])


def plot_training(runs: Sequence[Path], path: Path) -> None:
    """Final IoU without ground truth (sampled and greedy), behaviour and health of one or more GRPO runs."""
    ious = (("rollout/final_iou", "sampled, final"), ("rollout/step0_iou", "sampled, step 0"))
    panels = (
        ("IoU without ground truth", ious),
        ("greedy on val", (("eval/final_iou", "final IoU"), ("eval/step0_iou", "step-0 IoU"))),
        ("behaviour", (("rollout/stop_rate", "stop rate"), ("rollout/parse_failure_rate", "unparsable"))),
        ("entropy of a token", (("train/entropy", "entropy"),)),
    )
    with drawing(path, 1, len(panels), figsize=(4 * len(panels), 3.2)) as (_, axes):
        for axis, (title, series) in zip(axes, panels, strict=True):
            for number, run in enumerate(runs):
                rows = read_metrics(run / "metrics.jsonl")
                for line, (key, label) in enumerate(series):
                    logged = [(row["step"], float(row[key])) for row in rows if key in row]
                    if not logged:
                        continue
                    steps, values = zip(*logged, strict=True)
                    name = label if len(runs) == 1 else f"{label}, {run.name}"
                    colour, dash = f"C{number if len(runs) > 1 else line}", ("-", "--")[line % 2]
                    style: dict[str, Any] = {"color": colour, "linestyle": dash}
                    if key.startswith("eval/"):
                        axis.plot(steps, values, label=name, marker="o", markersize=3, **style)
                    else:
                        axis.plot(steps, values, alpha=0.2, linewidth=0.8, **style)
                        axis.plot(steps, smooth(values), label=name, **style)
            axis.set(title=title, xlabel="training step")
            if axis.lines:
                axis.legend(fontsize=7)


def plot_accuracy_by_step(forced: Mapping[str, Sequence[Episode]], path: Path) -> None:
    """Accuracy after each action when every refinement is made, and what an oracle would pick."""
    with drawing(path, 1, 2, figsize=(9, 3.6), sharex=True) as (_, axes):
        for axis, threshold in zip(axes, (0.5, 0.9), strict=True):
            for number, (name, episodes) in enumerate(forced.items()):
                longest = max(len(e.steps) for e in episodes)
                ious = np.array([[e.steps[min(t, len(e.steps) - 1)].iou for t in range(longest)] for e in episodes])
                accuracy = 100 * (ious >= threshold).mean(axis=0)
                oracle = 100 * (ious.max(axis=1) >= threshold).mean()
                style = line_style(number, len(forced))
                size = 3 + style["linewidth"]
                axis.plot(range(longest), accuracy, marker="o", label=name, markersize=size, **style)
                axis.plot([longest - 0.8], [oracle], "x", color=style["color"], markersize=3 + size, zorder=3)
            title, label = f"Acc@{threshold} (%), forced to refine", "step;  x: oracle's best step (uses the target)"
            axis.set(title=title, xlabel=label, xticks=range(longest))
        axes[0].legend(fontsize=8)


def plot_before_after(episodes: Mapping[str, Sequence[Episode]], path: Path) -> None:
    """IoU of the first box against IoU of the last, one panel a policy: what refinement did to each.

    Above the diagonal an episode gained. Colour counts episodes on a logarithmic scale, because most
    change nothing and lie on the diagonal. ``episodes`` are the stopping ones by policy, of all its seeds.
    """
    wide = min(len(episodes), 4)
    high = -(-len(episodes) // wide)
    with drawing(path, high, wide, figsize=(3.5 * wide + 1, 3.7 * high), squeeze=False) as (figure, axes):
        drawn = []
        for axis, (name, played) in zip(axes.flat, episodes.items(), strict=False):
            first, last = np.array([e.steps[0].iou for e in played]), np.array([e.final_iou for e in played])
            style: dict[str, Any] = {"gridsize": 24, "extent": (0, 1, 0, 1), "bins": "log", "mincnt": 1}
            drawn.append(axis.hexbin(first, last, cmap="viridis", **style))
            axis.plot([0, 1], [0, 1], color="0.5", linewidth=0.8)
            for line in (axis.axvline, axis.axhline):  # right from here on
                line(0.5, color="C3", linewidth=0.8, linestyle=":")
            better, worse = 100 * (last > first + 1e-6).mean(), 100 * (last < first - 1e-6).mean()
            title = f"{name}\nbetter {better:.0f} %, worse {worse:.0f} %, n = {len(played)}"
            axis.set(title=title, xlabel="IoU of the first box", ylabel="IoU of the answer (learned stop)")
            axis.set_aspect("equal")
        for axis in axes.flat[len(episodes) :]:
            axis.set_visible(False)
        top = max(2.0, *(float(shown.get_array().max()) for shown in drawn))
        for shown in drawn:
            shown.set_clim(1, top)
        figure.colorbar(drawn[0], ax=axes, label="episodes", shrink=0.85)
        figure.set_layout_engine("constrained", h_pad=0.12)


def plot_reliability(statements: Mapping[str, Mapping[str, Calibration]], path: Path) -> None:
    """Reliability diagrams: how often a box was correct, against how sure the policy said it was.

    On the diagonal a policy means what it says. Below each diagram stands how its statements are spread: a point
    over few statements tells little. What is stated has a panel each, a policy a line; none is without statements.
    """
    size: dict[str, Any] = {"figsize": (4.6 * len(statements), 5.4), "height_ratios": (3, 1)}
    with drawing(path, 2, len(statements), sharex=True, squeeze=False, **size) as (_, axes):
        for column, (title, by_policy) in enumerate(statements.items()):
            upper, lower = axes[0, column], axes[1, column]
            upper.plot([0, 1], [0, 100], color="0.5", linewidth=0.8)
            for number, (name, found) in enumerate(by_policy.items()):
                used = [b for b in found.bins if b.num]
                label = f"{name}: ECE {found.ece:.2f}, r {found.pearson:.2f}"
                style = line_style(number, len(by_policy))
                dots: dict[str, Any] = {"marker": "o", "markersize": 3 + style["linewidth"], "label": label}
                upper.plot([b.stated for b in used], [100 * b.right for b in used], **dots, **style)
                shares = [100 * b.num / found.num for b in found.bins]
                lower.stairs(shares, [*(b.low for b in found.bins), 1.0], **style)
            upper.set(title=title, ylabel="correct (IoU >= 0.5), %", ylim=(-3, 103))
            lower.set(ylabel="statements, %", ylim=(0, 105), xlabel="stated", xlim=(0, 1))
            # Under the axes' title nothing is free in every case, so the lines are named outside.
            upper.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.1), frameon=False)


def plot_groups(rows: Mapping[str, Sequence[GroupRow]], path: Path) -> None:
    """Bars of the first box and of the answer by data set, size and siblings, of what ``breakdown`` gave by policy.

    The answer is ``learned_stop``, or ``last_step`` if no rollout was free to stop.
    """
    kinds = {"dataset": "data set", "size": "box, pixels (COCO)", "side": "box, share of the side"}
    kinds["siblings"] = "siblings"
    found: dict[str, dict[str, list[GroupRow]]] = {name: {} for name in rows}
    for name, of_policy in rows.items():
        answer = "learned_stop" if any(r.column == "learned_stop" for r in of_policy) else "last_step"
        for row in (r for wanted in ("step_0", answer) for r in of_policy if r.column == wanted):
            found[name].setdefault(row.group, []).append(row)
    groups = list(dict.fromkeys(group for by_group in found.values() for group in by_group))
    of_kind = {kind: [g for g in groups if g.startswith(f"{kind}:")] for kind in kinds}
    # Two panels side by side, so that the text keeps its size on a page.
    size = (9, 0.8 + 4.6 * len(found))
    with drawing(path, 2 * len(found), 2, figsize=size, sharey=True, squeeze=False) as (figure, axes):
        for place_of_policy, (name, by_group) in enumerate(found.items()):
            panels = axes[2 * place_of_policy : 2 * place_of_policy + 2].flat
            for axis, (kind, members) in zip(panels, of_kind.items(), strict=True):
                for place, group in enumerate(members):
                    for side, row in enumerate(by_group.get(group, ())):
                        score = row.scores["Acc@0.5"]
                        # No interval on a single image; rounding may put one a hair inside the mean.
                        below, above = np.nan_to_num([score.value - score.low, score.high - score.value])
                        reach = [[100 * max(below, 0)], [100 * max(above, 0)]]
                        style: dict[str, Any] = {"color": f"C{side}", "ecolor": "0.35", "error_kw": {"linewidth": 0.9}}
                        label = row.column if place == 0 else None
                        axis.bar(place + 0.4 * side - 0.2, 100 * score.value, 0.38, yerr=reach, label=label, **style)
                counts = [by_group[g][0].episodes if by_group.get(g) else 0 for g in members]
                names = [f"{g.partition(':')[2]}\nn={c}" for g, c in zip(members, counts, strict=True)]
                axis.set_xticks(range(len(members)), names)
                axis.set(title=f"{name}: {kinds[kind]}", xlim=(-0.6, max(len(members), 1) - 0.4), ylabel="Acc@0.5 (%)")
                axis.grid(axis="x", visible=False)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)


_SHARES = (("stopped", "stopped"), ("left", "left the shown box"), ("towards", "moved towards the target"))
_EDGES = np.array([0.0, 0.05, 0.3, 0.5, 0.7, 0.9, 1.0 + 1e-9])
"""Of the bins of IoU; boxes about something else fill the first two."""


def plot_swaps(scores: Sequence[VariantScores], swaps: Mapping[str, Sequence[Swap]], path: Path) -> None:
    """Shares by variant, and the share stopped against the shown box's IoU with the target, at the first step.

    ``scores`` are those of ``summarise`` for all policies, ``swaps`` the records of each.
    """
    step = min(row.step for row in scores)
    at = [row for row in scores if row.step == step]
    shown = [v for v in VARIANTS if any(row.variant == v for row in at)]
    with drawing(path, 2, 2, figsize=(10, 8), sharey=True) as (figure, panels):
        axes = panels.flat
        for axis, (name, title) in zip(axes, _SHARES, strict=False):
            places = [v for v in shown if name != "left" or v != "none"]
            for number, policy in enumerate(swaps):
                rows = [row for row in at if row.policy == policy and row.variant in places]
                width = 0.8 / len(swaps)
                x = [places.index(row.variant) + (number - (len(swaps) - 1) / 2) * width for row in rows]
                held = [getattr(row, name) for row in rows]
                heights = [100 * i.value for i in held]
                axis.bar(x, heights, width, color=f"C{number}", label=policy)
                axis.errorbar(x, heights, yerr=_reach(held), fmt="none", ecolor="0.25", linewidth=0.9, capsize=2)
            axis.set_xticks(range(len(places)), places, rotation=35, ha="right")
            axis.set_title(f"{title} (%), step {step}")
        axes[0].set_ylim(-2, 102)
        for number, (policy, records) in enumerate(swaps.items()):
            at_step = [s for s in records if s.step == step and s.variant not in ("none", "blank")]
            _plot_stops(axes[3], at_step, line_style(number, len(swaps)), policy)
        label = "IoU of the shown box with the target; dotted: stated probability"
        axes[3].set(title=f"stopped (%) by IoU of the shown box, step {step}", xlabel=label, xlim=(-0.02, 1.02))
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(swaps), frameon=False)


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
