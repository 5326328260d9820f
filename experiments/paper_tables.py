"""Both versions of the table of arXiv 2606.13156, from forced rollouts.

Version 1 gives the best step of an episode, which only the target can choose. Version 2 asks what is left
when a rule that could be deployed has to choose. The paper's numbers are quoted as third parties report
them; its samples, its model and, where it does not say, its definitions are not ours, so they stand beside
ours to compare the shape, never the height.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ivt_env.episodes import Episode
from ivt_env.metrics.columns import Column, outcomes
from ivt_env.metrics.scores import rollout_summary, scores, step_changes
from ivt_env.metrics.statistics import Difference
from ivt_env.metrics.table import ORACLE_NOTE, as_json, compare, difference, marked, number, render, title

METRICS = ("Acc@0.5", "Acc@0.7", "Acc@0.9", "mIoU")
N_BOOT = 1000


@dataclass(frozen=True)
class Played:
    """One policy's forced episodes and their columns."""

    episodes: list[Episode]
    columns: dict[str, Column]


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the first version."""

    title: str
    policy: str
    column: str
    reported: tuple[float | None, ...]
    """The paper's Acc@0.5, @0.7, @0.9, mIoU, IoU drop per step and samples degrading."""


VERSION_1 = (
    Line("base, single shot", "base", "step_0", (0.796, 0.709, 0.455, 0.719, None, None)),
    # A best step can be no worse than the first; the paper's 48.7 is, so it is compared with the last step.
    Line("base + IVT, untrained (last step)", "base", "last_step", (0.487, 0.442, 0.283, 0.442, None, None)),
    Line("SFT + IVT (best step *)", "sft", "oracle_best", (0.820, 0.741, 0.483, 0.743, 0.140, 0.634)),
    Line("SFT + GRPO, single step", "single", "step_0", (0.800, None, None, None, None, None)),
    Line("SFT + GRPO + IVT (best step *)", "grpo", "oracle_best", (0.806, 0.725, None, 0.729, 0.029, 0.248)),
    Line("SFT + GRPO on own gains (best step *)", "own_gain", "oracle_best", (None,) * 6),
)
"""The last is not the paper's, and there only where it was trained."""

REPORTED_2 = "the paper, reported: single shot 79.6, oracle best 82.0, best other rule 75.6 (one source) Acc@0.5"


@dataclass(frozen=True, slots=True)
class Claim:
    """One thing that the paper's recipe does, and whether it did it here."""

    text: str
    holds: bool
    figures: str


def most_confident(episodes: Sequence[Episode]) -> Column:
    """The box of the action whose words the policy was surest of; a rule without ground truth, n episodes.

    The confidence is what the episodes state: for the project's models the geometric mean of the sampled
    tokens' probabilities. Where none is stated, the first box.
    """
    played = outcomes(episodes)
    stated = np.where(np.isnan(played.confidence), -np.inf, played.confidence)
    chosen = played.iou[np.arange(len(stated)), stated.argmax(axis=1)]
    return Column("most_confident", chosen[:, None], np.ones((len(chosen), 1)), False, "forced")


def rules(played: Played) -> dict[str, Column]:
    """Every way of choosing the answer, those without ground truth first, the oracle last."""
    found = {**played.columns, "most_confident": most_confident(played.episodes)}
    return dict(sorted(found.items(), key=lambda item: (item[1].oracle, item[0] != "step_0")))


def drop(played: Played) -> float:
    """IoU lost per refinement, a mean over all refinements of the forced rollout; negative for a gain."""
    return -step_changes(outcomes(played.episodes)).mean_change


def version_1(played: Mapping[str, Played]) -> str:
    """The paper's first table: the target chooses the step. Ours, and what is reported below it."""
    lines = []
    for line in VERSION_1:
        if line.policy not in played:
            continue
        one = played[line.policy]
        found = step_changes(outcomes(one.episodes))
        after = (None, None) if line.column == "step_0" else (-found.mean_change, found.samples_degrading.value)
        lines.append([line.title, *_cells([*scores(one.columns[line.column], METRICS).values(), *after])])
        if line.policy != "own_gain":
            lines.append(["   the paper, reported", *_cells(line.reported)])
    head = ["version 1: ground truth chooses", *map(title, METRICS), "IoU drop per step", "samples degrading (%)"]
    return render(head, lines)


def _cells(values: Sequence[float | None]) -> list[str]:
    """Of ``METRICS``; where they stand behind, also a drop per step and a share."""
    kinds = [*((m, False) for m in METRICS), ("IoU", True), ("share", False)]
    return [number(value, kind, sign=sign) for value, (kind, sign) in zip(values, kinds, strict=False)]


def version_2(played: Mapping[str, Played]) -> str:
    """The paper's second table: what each rule makes of the same rollouts, and what it gains on step 0."""
    clusters = outcomes(played["base"].episodes).image_ids
    base = played["base"].columns["step_0"]
    lines = []
    for name in (n for n in ("base", "sft", "grpo", "own_gain", "single") if n in played):
        found = rules(played[name])
        for rule, column in found.items():
            if name == "single" and rule != "step_0":
                continue
            own = "-" if rule == "step_0" else _difference(_gain(column, found["step_0"], clusters))
            against = "-" if column is base else _difference(_gain(column, base, clusters))
            cells = _cells(list(scores(column, METRICS).values()))
            lines.append([name, marked(rule, column.oracle), *cells, own, against])
    head = ["version 2", "rule", *map(title, METRICS), "Acc@0.5 - own step 0", "Acc@0.5 - base single shot"]
    return render(head, lines, left=2)


def claims(played: Mapping[str, Played]) -> list[Claim]:
    """What the paper says of its recipe, held against these rollouts."""
    clusters = outcomes(played["base"].episodes).image_ids
    base, sft, grpo = (rules(played[name]) for name in ("base", "sft", "grpo"))
    fall = _gain(base["last_step"], base["step_0"], clusters)
    repair = _gain(sft["last_step"], base["last_step"], clusters)
    seen = _gain(sft["oracle_best"], base["last_step"], clusters)
    lost = drop(played["sft"])
    repaired = "SFT repairs it: its last step is better than the untrained loop's"
    repaired_1 = "SFT repairs it as version 1 counts: its best step * is better than the untrained loop's last"
    made = [
        Claim("the untrained loop collapses", _down(fall), f"last step - step 0: {_difference(fall)}"),
        Claim(repaired, _up(repair), f"last step, SFT - base: {_difference(repair)}"),
        Claim(repaired_1, _up(seen), f"{_difference(seen)} (reported: 48.7 -> 82.0)"),
        Claim("SFT's refinements make boxes worse", lost > 0, f"IoU drop per step {lost:+.3f} (reported: 0.140)"),
    ]
    made += _what_grpo_did("GRPO", played["sft"], played["grpo"], clusters, " (reported: 0.140 -> 0.029, 4.8 times)")
    for name, found in (("SFT", sft), ("GRPO", grpo)):
        ceiling = _gain(found["oracle_best"], found["step_0"], clusters)
        gains = {r: _gain(c, found["step_0"], clusters) for r, c in found.items() if not c.oracle and r != "step_0"}
        text = f"the mirage after {name}: the oracle gains on step 0, no rule without ground truth does"
        figures = f"oracle {_difference(ceiling)}; " + ", ".join(f"{r} {_difference(c)}" for r, c in gains.items())
        made.append(Claim(text, _up(ceiling) and not any(_up(c) for c in gains.values()), figures))
    if "own_gain" in played:
        made += _what_grpo_did("GRPO on own gains", played["sft"], played["own_gain"], clusters)
    return made


def _what_grpo_did(
    name: str, before: Played, after: Played, clusters: Sequence[str], reported: str = ""
) -> list[Claim]:
    """Whether the drop per step fell five times, and whether that cost an accuracy without ground truth."""
    sft, grpo = rules(before), rules(after)
    lost, left = drop(before), drop(after)
    times = lost / left if left > 0 else np.inf
    figures = f"{lost:+.3f} -> {left:+.3f}"
    figures += f", {times:.1f} times" if np.isfinite(times) else ", no drop is left"
    text = f"{name} lowers the drop per step at least five times"
    fewer = Claim(text, lost > 0 and times >= 5, figures + reported)
    shared = [r for r in sft if r in grpo and not sft[r].oracle]
    moved = {r: _gain(grpo[r], sft[r], clusters) for r in shared}
    figures = f"{name} - SFT: " + ", ".join(f"{r} {_difference(c)}" for r, c in moved.items())
    text = f"no Acc@0.5 falls through {name}"
    return [fewer, Claim(text, not any(_down(c) for c in moved.values()), figures)]


def report(played: Mapping[str, Played], what: str) -> str:
    """Both tables and what came out, as text."""
    text = [what, "", version_1(played), "", ORACLE_NOTE, "", version_2(played), "", ORACLE_NOTE, REPORTED_2, ""]
    text += ["Differences are paired over images, in points; the 95 % bootstrap interval of a difference that is"]
    text += ["'n.s.' (not significant) holds zero. Boxes that no answer could be read from:"]
    failed = {name: rollout_summary(outcomes(p.episodes)).parse_failures.value for name, p in played.items()}
    text += [f"  {name}: {100 * share:.1f} % of actions" for name, share in failed.items()]
    told = [f"[{'yes' if claim.holds else 'NO'}] {claim.text}\n      {claim.figures}" for claim in claims(played)]
    return "\n".join([*text, "", *told])


def results(played: Mapping[str, Played]) -> dict[str, Any]:
    """The same as plain JSON values."""
    found: dict[str, Any] = {}
    for name, one in played.items():
        found[name] = {
            "rules": {rule: scores(column, METRICS) for rule, column in rules(one).items()},
            "oracle_rules": [rule for rule, column in rules(one).items() if column.oracle],
            "changes": as_json(step_changes(outcomes(one.episodes))),
            "rollout": as_json(rollout_summary(outcomes(one.episodes))),
        }
    return {"policies": found, "claims": [as_json(c) for c in claims(played)]}


def _gain(a: Column, b: Column, clusters: Sequence[str]) -> Difference:
    return compare(a.name, a, b.name, b, clusters, "Acc@0.5", n_boot=N_BOOT).difference


def _up(d: Difference) -> bool:
    return d.shown and d.diff > 0


def _down(d: Difference) -> bool:
    return d.shown and d.diff < 0


def _difference(d: Difference) -> str:
    return difference(d.diff, d.shown, d.num_clusters, "Acc@0.5")
