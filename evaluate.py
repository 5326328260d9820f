"""Plays policies on one split and puts their columns side by side.

    python evaluate.py --policies base=tiny sft=runs/sft/policy grpo=runs/grpo/policy
    python evaluate.py --policies floor=random ceiling=my_module:MyAgent --samples 200

Each policy is played twice on the same samples: with its stop honoured, and forced to make every
refinement. From these come step 0, the last step, the learned stop, a random step and the oracle's
best step. Only the last of them looks at the target; it is there to be distrusted. Differences are
paired over pictures; one whose 95 % interval holds zero is printed as *not shown*.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from agents.base import load_agent
from agents.command import run_command
from agents.evaluation import METRICS
from agents.plots import plot_accuracy_by_step, plot_training
from agents.training import write_json
from agents.vlm.load import TINY_NAME
from ivt_env.episodes import Episode, save_episodes
from ivt_env.metrics.columns import Column, columns, outcomes
from ivt_env.metrics.scores import break_rate, correction_rate, rollout_summary, step_changes
from ivt_env.metrics.table import Comparison, Row, as_json, compare, difference_table, policy_table, score_rows
from ivt_env.rollouts import make_vector_env, rollout
from ivt_env.vector_env import GroundingVectorEnv
from ivt_env.viewer import write_page

COLUMNS = ("step_0", "last_step", "learned_stop", "random_step", "oracle_best")


@dataclass
class Args:
    """Columns of several policies on the same samples."""

    policies: list[str] = field(default_factory=lambda: ["base=tiny"])
    """`name=policy`: a model folder, `tiny`, a built-in agent, or `module:Class`. The first is the base."""
    env: str = "IVT-Scenes-v0"
    """Registered id."""
    split: str = "test"
    """Split to play."""
    data_root: str | None = None
    """Folder of real data sets."""
    samples: int = 1000
    """Samples, from the beginning of the split; all of it if it has fewer."""
    max_steps: int = 3
    """Actions in an episode."""
    view: Literal["overlay", "closeup", "both"] | None = None
    """What a box is shown on, for every policy. None: what each was trained for (`overlay` where it does not say)."""
    out: Path = Path("runs/evaluation")
    """Folder for the tables, episodes, plots and the page."""
    runs: list[Path] = field(default_factory=list)
    """Run folders whose training curves are plotted beside."""
    page_episodes: int = 200
    """Episodes of each policy on the page."""
    num_envs: int = 100
    """Episodes played side by side."""
    seed: int = 0
    """Of agents that draw, and of the intervals."""


@dataclass
class Played:
    """One policy's two rollouts and what came of them."""

    stopping: list[Episode]
    forced: list[Episode]
    columns: dict[str, Column]


def main(args: Args) -> dict[str, Played]:
    """Play, score, write and print."""
    names = dict(_named(p) for p in args.policies)
    if len(names) != len(args.policies):
        raise ValueError(f"policies: every name must be given once, not {args.policies}")
    # Named real data must be there: an evaluation never falls back.
    env_kwargs: dict[str, Any] = {"data_root": args.data_root, "strict": True}
    env_kwargs |= {"split": args.split, "max_steps": args.max_steps}
    dataset = make_vector_env(args.env, 1, **env_kwargs).dataset
    count = min(args.samples, len(dataset))
    envs: dict[str, GroundingVectorEnv] = {}

    def env_of(view: str) -> GroundingVectorEnv:
        if view not in envs:
            envs[view] = make_vector_env(args.env, min(args.num_envs, count), view=view, **env_kwargs)
        return envs[view]

    played: dict[str, Played] = {}
    bars = (TextColumn("{task.description:>22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bars, TimeRemainingColumn()) as progress:
        for name, spec in names.items():
            found = []
            for forced in (False, True):
                task = progress.add_task(f"{name}{', forced' if forced else ''}", total=count)
                # A fresh agent for each rollout: one that draws then draws the same. Its view is known once
                # it is there, and the oracle is given the environment before: only it, and it looks at no picture.
                agent = load_agent(spec, env=env_of(args.view or "overlay"), seed=args.seed)
                env = env_of(args.view or str(getattr(agent, "view", "overlay")))
                found.append(
                    rollout(
                        env,
                        agent,
                        count,
                        args.seed,
                        indices=range(count),
                        ignore_stop=forced,
                        agent_name=name,
                        on_progress=lambda n, task=task: progress.advance(task, n),  # type: ignore[misc]
                    )
                )
            stopping, forced_episodes = found
            all_columns = columns(episodes_forced=forced_episodes, episodes_stopping=stopping)
            played[name] = Played(stopping, forced_episodes, all_columns)
            save_episodes(args.out / "episodes" / name, stopping)
            save_episodes(args.out / "episodes" / f"{name}-forced", forced_episodes)
    _write(args, played, names, dataset)
    return played


def _named(text: str) -> tuple[str, str]:
    name, equals, spec = text.partition("=")
    if not equals or not name or not spec:
        raise ValueError(f"policies: write name=policy, for example base=tiny, not {text!r}")
    is_model = spec == TINY_NAME or Path(spec).is_dir()
    return name, f"vlm:{spec}" if is_model else spec


def _write(args: Args, played: Mapping[str, Played], names: Mapping[str, str], dataset: Any) -> None:
    first = next(iter(played.values()))
    clusters = outcomes(first.stopping).picture_ids
    rows: list[Row] = []
    for name, one in played.items():
        kept = {k: one.columns[k] for k in COLUMNS}
        rows += score_rows(name, kept, clusters, METRICS, n_boot=1000, seed=args.seed)
    comparisons = _comparisons(played, clusters, args.seed)
    served = f"{first.stopping[0].dataset}/{first.stopping[0].split}"
    text = [f"{args.env}, served: {served}, n = {len(first.stopping)}, at most {args.max_steps} actions"]
    text += ["", *(policy_table(rows, metric) + "\n" for metric in METRICS)]
    text += ["paired differences over pictures, 95 % bootstrap intervals:", difference_table(comparisons)]
    text += ["", _behaviour(played)]
    report = "\n".join(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "table.txt").write_text(report + "\n", encoding="utf-8")
    write_json(
        args.out / "results.json",
        {
            "args": asdict(args),
            "policies": dict(names),
            "served": served,
            "rows": as_json(rows),
            "comparisons": as_json(comparisons),
        },
    )
    plot_accuracy_by_step({k: v.forced for k, v in played.items()}, args.out / "accuracy_by_step.png")
    if args.runs:
        plot_training(args.runs, args.out / "training.png")
    by_id = {dataset[i].sample_id: i for i in range(len(first.stopping))}
    write_page(
        args.out / "episodes.html",
        {name: one.stopping[: args.page_episodes] for name, one in played.items()},
        lambda episode: dataset.picture(dataset[by_id[episode.sample_id]]),
        title=f"Episodes: {', '.join(played)} on {served}",
    )
    print(report)
    print(f"\nwritten to {args.out}: table.txt, results.json, episodes.html, *.png")


def _comparisons(played: Mapping[str, Played], clusters: tuple[str, ...], seed: int) -> list[Comparison]:
    """What each policy's loop gains on its own first box, and on the first policy's single shot."""
    base_name, base = next(iter(played.items()))
    pairs: list[tuple[str, Column, str, Column]] = []
    for name, one in played.items():
        shot, last, stop = (one.columns[c] for c in ("step_0", "last_step", "learned_stop"))
        pairs.append((f"{name} last step", last, f"{name} step 0", shot))
        pairs.append((f"{name} learned stop", stop, f"{name} step 0", shot))
        if name != base_name:
            pairs.append((f"{name} learned stop", stop, f"{base_name} step 0", base.columns["step_0"]))
            pairs.append((f"{name} step 0", shot, f"{base_name} step 0", base.columns["step_0"]))
    found = []
    for a_name, a, b_name, b in pairs:
        for metric in ("Acc@0.5", "Acc@0.9", "mIoU"):
            found.append(compare(a_name, a, b_name, b, clusters, metric, n_boot=1000, seed=seed))
    return found


def _behaviour(played: Mapping[str, Played]) -> str:
    """How each policy uses its steps, in words."""
    lines = []
    for name, one in played.items():
        stopped, forced = outcomes(one.stopping), outcomes(one.forced)
        before, after = one.columns["step_0"], one.columns["learned_stop"]
        did, change = rollout_summary(stopped), step_changes(forced)
        lines.append(
            f"{name}: {did.mean_actions:.2f} actions, stopped {100 * did.stopped.value:.0f} %, "
            f"unparsable actions {did.parse_failures.count}; corrected "
            f"{100 * np.nan_to_num(correction_rate(before, after).value):.1f} % of wrong first boxes, broke "
            f"{100 * np.nan_to_num(break_rate(before, after).value):.1f} % of right ones; forced: "
            f"IoU {change.mean_change:+.3f} a refinement, "
            f"{100 * change.samples_degrading.value:.0f} % of samples end worse"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main, Args)
