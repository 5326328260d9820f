"""The study's results as Markdown: what ``docs/results.md`` shows, from what the study wrote.

Everything is read from ``results.json`` files. Which control is the best one is not chosen by hand: it is the one
with the highest score on the split in question, which favours the controls.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ivt_env.metrics.table import difference, interval, number, render

METRICS = ("Acc@0.5", "Acc@0.9", "mIoU")
LOOP = "loop"
CONTROLS = (
    ("base", "step_0"),
    ("control", "step_0"),
    ("large", "step_0"),
    ("medoid-8", "learned_stop"),
    ("best-of-8", "learned_stop"),
    ("second-shot", "learned_stop"),
)
"""Each control and what it answers: single shots their first box, the others what they end with."""


def summary(out: Path, splits: Sequence[str]) -> str:
    """All tables of a finished study.

    Args:
        out: folder of the study.
        splits: that were scored.
    """
    parts = []
    for split in splits:
        results = _read(out / split)
        parts += [f"## {split}", scores(results), differences(results)]
    parts += ["## Swaps", swaps(_read(out / "swaps")), "## Cost of an episode", costs(out, splits[0])]
    return "\n\n".join(parts) + "\n"


def scores(results: Mapping[str, Any]) -> str:
    """A line for each policy: its first box, its answer, and how it got from the one to the other."""
    found = {(row["policy"], row["column"]): row["scores"] for row in results["rows"]}
    lines = []
    for name, audit in results["audits"].items():
        runs = audit["runs"]
        both = [found[name, column][m] for column in ("step_0", "learned_stop") for m in METRICS]
        best = found.get((name, "oracle_best"))
        # Over the seeds that have a value: where no first box was right, none could be broken.
        broke = [share for run in runs if (share := run["broke"]["learned_stop"]["value"]) is not None]
        lines.append(
            [name, str(len(runs)), *(number(score["value"], m) for score, m in zip(both, METRICS * 2, strict=True))]
            + ["-" if best is None else number(best["Acc@0.5"]["value"]), number(np.mean(broke)) if broke else "-"]
            + [f"{np.mean([run['stopping'][key] for run in runs]):.2f}" for key in ("mean_proposals", "mean_actions")]
        )
    head = ["policy", "seeds", *(f"first box {m}" for m in METRICS), *(f"answer {m}" for m in METRICS)]
    head += ["oracle Acc@0.5", "regressed (%)", "boxes", "actions"]
    return render(head, lines, markdown=True)


def best_control(results: Mapping[str, Any], metric: str) -> tuple[str, str]:
    """Policy and column of the control that scores highest on ``metric``."""
    rows = [r for r in results["rows"] if (r["policy"], r["column"]) in CONTROLS]
    best = max(rows, key=lambda r: r["scores"][metric]["value"])
    return best["policy"], best["column"]


def differences(results: Mapping[str, Any]) -> str:
    """The loop's answer minus its own first box, and minus each control's."""
    lines = []
    for metric in METRICS:
        strongest = " ".join(best_control(results, metric))
        played = [" ".join(control) for control in CONTROLS if control[0] in results["policies"]]
        for other in (f"{LOOP} step_0", *played):
            one = next(
                c
                for c in results["comparisons"]
                if (c["a"], c["b"], c["metric"]) == (f"{LOOP} learned_stop", other, metric)
            )
            lines.append(_difference(one, other + (" (the best control)" if other == strongest else "")))
    head = ["metric", "loop's answer minus", "difference", "95 % interval", "detectable", "each seed"]
    return render(head, lines, markdown=True, left=2)


def swaps(results: Mapping[str, Any]) -> str:
    """What the loops do with each drawn box, seed by seed."""
    lines = []
    for row in results["variants"]:
        shares = [number(row[key]["value"]) for key in ("stopped", "left", "towards", "right")]
        shown = number(row["shown_iou"], "IoU", digits=2)
        lines.append([row["variant"], row["policy"], str(row["num"]), shown, *shares])
    lines.sort(key=lambda line: [r["variant"] for r in results["variants"]].index(line[0]))
    head = ["box drawn", "policy", "n", "its IoU", "stops (%)", "leaves (%)", "towards the target (%)"]
    return render([*head, "then right (%)"], lines, markdown=True, left=2)


def costs(out: Path, split: str) -> str:
    """What each policy's episodes cost on one split, as counted while they were played."""
    lines, fields = [], []
    for path in sorted((out / "played" / split).glob("*/results.json")):
        for name, seeds in json.loads(path.read_text(encoding="utf-8"))["costs"].items():
            fields = list(seeds[0])
            lines.append([name, *(f"{seeds[0][field]:.1f}" for field in fields)])
    return render(["policy", *fields], lines, markdown=True)


def _difference(comparison: Mapping[str, Any], other: str) -> list[str]:
    d, metric = comparison["difference"], comparison["metric"]
    value = difference(d["diff"], d["shown"], d["num_clusters"], metric)
    each = " ".join(number(v, metric, sign=True) for v in comparison["by_seed"])
    return [
        metric,
        other,
        value,
        interval(d["low"], d["high"], metric, sign=True),
        number(d["detectable"], metric),
        each,
    ]


def _read(folder: Path) -> Any:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))
