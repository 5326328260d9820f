"""The study's results: one screen, the tables of ``docs/results.md``, and the map. Everything is read from files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ivt_env.metrics.table import difference, interval, number, render

METRICS = ("Acc@0.5", "Acc@0.7", "Acc@0.9", "mIoU")
LOOP, BASE = "grpo", "base"
ANSWERS = {"sft": "learned_stop", "grpo": "learned_stop", "half": "learned_stop", "half-grpo": "learned_stop"}
"""The column that counts as a policy's answer; of all others it is the first box."""


def last_screen(out: Path, splits: Sequence[str]) -> str:
    """A line for each policy, the verdict in words, and where the rest is."""
    results = {split: _read(out / split) for split in splits}
    lines = []
    for name in results[splits[0]]["policies"]:
        line = [name]
        for found in results.values():
            row = _scores(found, name, ANSWERS.get(name, "step_0"))
            line += [number(row[m]["value"], m) for m in ("Acc@0.5", "Acc@0.9")]
        behaviour = _behaviour(results[splits[-1]], name)
        lines.append([*line, *((f"{behaviour['mean_proposals']:.2f}",) if name in ANSWERS else ("1.00",))])
        if name == BASE:
            again = [_scores(found, name, "last_step") for found in results.values()]
            values = [number(row[m]["value"], m) for row in again for m in ("Acc@0.5", "Acc@0.9")]
            lines.append(["base, asked to iterate", *values, "-"])
    head = ["policy", *(f"{split} {m}" for split in splits for m in ("Acc@0.5", "Acc@0.9")), "boxes"]
    said = [_verdict(found, split) for split, found in results.items()]
    files = f"report: {out / splits[-1] / 'report.html'}   tables: {out / 'summary.md'}   map: {out / 'map.png'}"
    return "\n".join([render(head, lines), "", *said, files])


def _verdict(results: Mapping[str, Any], split: str) -> str:
    """What the loop's answer gains on a split, over the base's single shot and over the best control."""
    parts = []
    for other in (BASE, "control-pixels"):
        found = {m: _compared(results, f"{other} step_0", m)["difference"] for m in METRICS}
        better = any(d["low"] > 0 for d in found.values())
        worse = any(d["high"] < 0 for d in found.values())
        word = ("mixed against" if worse else "above") if better else "below" if worse else "level with"
        told = [f"{m} {difference(d['diff'], d['shown'], d['num_clusters'], m)}" for m, d in found.items()]
        parts.append(f"{word} {other} ({', '.join(told)})")
    return f"{split}, without ground truth: the loop is {parts[0]}\n    and {parts[1]}"


def summary(out: Path, splits: Sequence[str], swapped: bool) -> str:
    """All tables of a finished study, as Markdown."""
    parts = []
    for split in splits:
        results = _read(out / split)
        parts += [f"## {split}", _score_table(results), _difference_table(results)]
        if swapped:
            parts += [f"### Swaps on {split}", _swap_table(_read(out / "swaps" / split))]
    return "\n\n".join(parts) + "\n"


def _score_table(results: Mapping[str, Any]) -> str:
    lines = []
    for name, seeds in results["policies"].items():
        first, last = (_scores(results, name, column) for column in ("step_0", "learned_stop"))
        values = [number(score[m]["value"], m) for score in (first, last) for m in METRICS]
        runs = results["audits"][name]["runs"]
        broke = [v for run in runs if (v := run["broke"]["learned_stop"]["value"]) is not None]
        behaviour = _behaviour(results, name)
        lines.append(
            [name, str(len(seeds)), *values, number(sum(broke) / len(broke)) if broke else "-"]
            + [f"{behaviour[key]:.2f}" for key in ("mean_proposals", "mean_actions")]
        )
    head = ["policy", "seeds", *(f"first {m}" for m in METRICS), *(f"answer {m}" for m in METRICS)]
    return render([*head, "regressed (%)", "boxes", "actions"], lines, markdown=True)


def _difference_table(results: Mapping[str, Any]) -> str:
    """The loop's answer minus every other policy's."""
    lines = []
    for metric in METRICS:
        for other in results["policies"]:
            column = "step_0" if other == LOOP else ANSWERS.get(other, "step_0")
            one = _compared(results, f"{other} {column}", metric)
            d = one["difference"]
            each = " ".join(number(v, metric, sign=True) for v in one["by_seed"])
            value = difference(d["diff"], d["shown"], d["num_clusters"], metric)
            bounds = interval(d["low"], d["high"], metric, sign=True)
            lines.append([metric, f"{other} {column}", value, bounds, number(d["detectable"], metric), each])
    head = ["metric", "the loop's answer minus", "difference", "95 % interval", "detectable", "each seed"]
    return render(head, lines, markdown=True, left=2)


def _swap_table(results: Mapping[str, Any]) -> str:
    lines = []
    for row in results["variants"]:
        shares = [number(row[key]["value"]) for key in ("stopped", "left", "towards", "right")]
        lines.append([row["variant"], str(row["num"]), number(row["shown_iou"], "IoU", digits=2), *shares])
    head = ["box drawn", "n", "its IoU", "stops (%)", "leaves (%)", "towards the target (%)", "then right (%)"]
    return render(head, lines, markdown=True)


def plot_map(out: Path, marks: Sequence[int]) -> None:
    """Accuracy against the size of the mark, for single shots and the loop: where a second look pays."""
    from ivt_agents.evaluation.plots import drawing

    labels = {
        "base": "base, one look at 96 px",
        "control-pixels-0": "trained control, one look at 288 px",
        "grpo-0": "loop, looks of 96 px",
    }
    with drawing(out / "map.png", 1, 1, figsize=(7, 4.4)) as (figure, axes):
        for name, label in labels.items():
            column = ANSWERS.get(name.rpartition("-")[0] or name, "step_0")
            rows = [_scores(_read(out / "map" / str(m) / name), name, column)["Acc@0.5"] for m in marks]
            values, low, high = (100 * np.array([row[key] for row in rows]) for key in ("value", "low", "high"))
            bars = [values - low, high - values]
            pixels = _pixels(out, name, marks)
            axes.errorbar(marks, values, bars, label=f"{label} ({pixels})", capsize=3, marker="o", linewidth=2)
        axes.axhline(23.75, color="grey", linewidth=1, linestyle=":")
        axes.annotate("chance", (float(np.mean(marks[-2:])), 18.5), color="grey", ha="center")
        label = "side of the mark that tells the objects apart, in pixels of 768"
        axes.set(title="Where a second look pays", xlabel=label, ylabel="Acc@0.5, without ground truth (%)")
        axes.set(xticks=list(marks), ylim=(0, 100))
        figure.legend(loc="outside lower center", fontsize=9)


def _pixels(out: Path, name: str, marks: Sequence[int]) -> str:
    """Thousands of pixels that an answer looks at, over the sizes of marks."""
    side = 288 if name.startswith("control") else 96
    looks = [1.0] * len(marks)
    if name.startswith(LOOP):  # the whole image once, then the whole image and a close-up at each further action
        found = [_behaviour(_read(out / "map" / str(m) / name), name)["mean_actions"] for m in marks]
        looks = [1 + 2 * (actions - 1) for actions in found]
    low, high = (round(v * side * side / 1000) for v in (min(looks), max(looks)))
    return f"{low} k pixels" if low == high else f"{low} to {high} k pixels"


def _scores(results: Mapping[str, Any], name: str, column: str) -> Any:
    return next(row["scores"] for row in results["rows"] if (row["policy"], row["column"]) == (name, column))


def _compared(results: Mapping[str, Any], other: str, metric: str) -> Any:
    wanted = (f"{LOOP} learned_stop", other, metric)
    return next(c for c in results["comparisons"] if (c["a"], c["b"], c["metric"]) == wanted)


def _behaviour(results: Mapping[str, Any], name: str) -> dict[str, float]:
    """Means over the seeds."""
    runs = [run["stopping"] for run in results["audits"][name]["runs"]]
    return {key: sum(run[key] for run in runs) / len(runs) for key in ("mean_proposals", "mean_actions")}


def _read(folder: Path) -> Any:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))
