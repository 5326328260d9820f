"""Plots of training and evaluation, written as PNG files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from ivt_env.episodes import Episode

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "figure.dpi": 130,
    "font.size": 9,
}


def read_metrics(run: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of every metric of a run folder."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        step = int(row.pop("step"))
        for key, value in row.items():
            steps, values = found.setdefault(key, ([], []))
            steps.append(step)
            values.append(float(value))
    return found


def smooth(values: Sequence[float], span: int = 9) -> np.ndarray:
    """Centred moving average that keeps the length; shorter windows at both ends."""
    x = np.asarray(values, dtype=float)
    half = span // 2
    return np.array([x[max(0, i - half) : i + half + 1].mean() for i in range(len(x))])


def plot_training(runs: Sequence[Path], path: Path) -> None:
    """Label-free final IoU (sampled and greedy), behaviour and health of one or more GRPO runs."""
    panels = (
        ("label-free IoU", (("rollout/final_iou", "sampled, final"), ("rollout/step0_iou", "sampled, step 0"))),
        ("greedy on val", (("eval/final_iou", "final IoU"), ("eval/step0_iou", "step-0 IoU"))),
        ("behaviour", (("rollout/stop_rate", "stop rate"), ("rollout/parse_failure_rate", "unparsable"))),
        ("entropy of a token", (("train/entropy", "entropy"),)),
    )
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.2), constrained_layout=True)
        for axis, (title, series) in zip(axes, panels, strict=True):
            for number, run in enumerate(runs):
                metrics = read_metrics(run)
                for line, (key, label) in enumerate(series):
                    if key not in metrics:
                        continue
                    steps, values = metrics[key]
                    name = label if len(runs) == 1 else f"{label}, {run.name}"
                    colour, dash = f"C{number if len(runs) > 1 else line}", ("-", "--")[line % 2]
                    sampled = not key.startswith("eval/")
                    if sampled:
                        axis.plot(steps, values, dash, color=colour, alpha=0.2, linewidth=0.8)
                    shown = smooth(values) if sampled else values
                    axis.plot(
                        steps, shown, dash, color=colour, label=name, marker=None if sampled else "o", markersize=3
                    )
            axis.set_title(title)
            axis.set_xlabel("training step")
            if axis.lines:
                axis.legend(fontsize=7)
        figure.savefig(path)
        plt.close(figure)


def plot_accuracy_by_step(forced: Mapping[str, Sequence[Episode]], path: Path) -> None:
    """Accuracy after each action when every refinement is made, and what an oracle would pick."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True, sharex=True)
        for axis, threshold in zip(axes, (0.5, 0.9), strict=True):
            for number, (name, episodes) in enumerate(forced.items()):
                longest = max(len(e.steps) for e in episodes)
                ious = np.array([[e.steps[min(t, len(e.steps) - 1)].iou for t in range(longest)] for e in episodes])
                accuracy = 100 * (ious >= threshold).mean(axis=0)
                oracle = 100 * (ious.max(axis=1) >= threshold).mean()
                axis.plot(range(longest), accuracy, "o-", color=f"C{number}", label=name, markersize=4)
                axis.plot([longest - 0.8], [oracle], "x", color=f"C{number}")
            axis.set_title(f"Acc@{threshold} (%), forced to refine")
            axis.set_xlabel("step;  x: oracle's best step (uses the target)")
            axis.set_xticks(range(longest))
        axes[0].legend(fontsize=8)
        figure.savefig(path)
        plt.close(figure)
