"""The recipe of arXiv 2606.13156 from end to end, and both versions of its table.

    python -m experiments.paper --out runs/paper                                    # the tiny model on the scenes
    python -m experiments.paper --config configs/paper_qwen3vl_4b.yaml --out runs/paper4b --data-root data
    python -m experiments.paper --config configs/paper_qwen3vl_4b.yaml --dry-run    # what would run, and what it needs

1. SFT on walks from the student's own bad first boxes to the target, without any stop.
2. GRPO on it: one reward for the final box, every episode with all its refinements.
3. GRPO on it again with the first box alone: the control that never iterates.
4. Where the file has a part `own_gain`, GRPO on it once more, not the paper's: what it changes of `grpo`.
5. Base, SFT and the GRPO policies play one split, forced to make every refinement.

The first version of the paper's table lets the target choose the step; the second chooses without it. Both
are printed, ours beside what is reported of the paper. What is trained, and how, stands in the configuration
file: its part `sft` is that of ``train_sft.py``, its part `grpo` that of ``train_grpo.py``. A stage that is
done is not done again, and GRPO that was cut off goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from experiments.paper_tables import Played, report, results
from ivt_agents.command import progress_bars, run_command
from ivt_agents.config import has_section, load_config
from ivt_agents.grpo import train as train_grpo
from ivt_agents.play.on_split import play, samples_to_compare
from ivt_agents.sft import train as train_sft
from ivt_agents.training.folder import CONFIG, RunError, check_least, checkpoints, write_json
from ivt_agents.vlm.load import load_policy
from ivt_agents.vlm.policy import forbid_stop
from ivt_env.episodes import save_episodes
from ivt_env.files import asked_of, lock_folder, refuse_other, write_whole
from ivt_env.metrics.columns import columns
from ivt_env.rollouts import make_vector_env

STAGE_FILE = "stage.json"
"""Written into a stage's folder when it is done: the options that it was run with."""

NOT_DECISIVE = frozenset(
    {"out", "config", "resume", "overwrite", "report_to", "dry_run", "gpu_memory_gb", "image", "max_unusable"}
)
"""Options of a stage that may differ from those it was done with: they change no policy."""


@dataclass
class Args:
    """Train by the paper's recipe, evaluate, and print both versions of its table."""

    config: Path = Path("configs/paper_scenes.yaml")
    """YAML file with the parts `sft` and `grpo`: the whole recipe."""
    out: Path = Path("runs/paper")
    """Folder of everything; the file's own `out` is not used."""
    samples: int = 1000
    """Samples to evaluate on, from the beginning of the split; all of it if it has fewer."""
    split: str = "test"
    """Split to evaluate on."""
    seed: int | None = None
    """Of all stages. None: as the file says."""
    data_root: str | None = None
    """Folder of real data sets. None: as the file says."""
    num_envs: int = 100
    """Episodes of the evaluation played side by side."""
    dry_run: bool = False
    """Say what would run with which options and how much memory it would need, and end."""
    gpu_memory_gb: float = 80.0
    """Memory of the GPU that a dry run reckons with."""


@dataclass(frozen=True)
class Recipe:
    """The options of the trainings."""

    sft: train_sft.Args
    grpo: train_grpo.Args
    single: train_grpo.Args
    own_gain: train_grpo.Args | None
    """Not the paper's: the file need not have it."""

    @property
    def stages(self) -> dict[str, train_grpo.Args]:
        """The GRPO trainings by name."""
        found = {"single": self.single, "grpo": self.grpo, "own_gain": self.own_gain}
        return {name: stage for name, stage in found.items() if stage is not None}


def main(args: Args) -> dict[str, Any]:
    """Train, play, write and print; returns what ``results.json`` holds, and nothing for a dry run."""
    recipe = load_recipe(args)
    check_least(args, {"samples": 1, "num_envs": 1})
    if args.dry_run:
        explain(args, recipe)
        return {}
    # What is wrong with a later stage, or with the split at the end, must not be found after an hour of training.
    train_sft.check_options(recipe.sft)
    for stage in recipe.stages.values():
        stage.check_model(stage.lora_r)
        stage.measured_on()
    env = make_vector_env(recipe.sft.env, 1, split=args.split, data_root=recipe.sft.data_root, strict=True)
    env.close()
    count = len(samples_to_compare(env.dataset, args.samples))
    with lock_folder(args.out):
        return _run(args, recipe, count)


def _run(args: Args, recipe: Recipe, count: int) -> dict[str, Any]:
    if made := asked_of(args.out, "results.json"):
        shown = {"samples": args.samples, "split": args.split}
        refuse_other(args.out, made.get("args", {}), shown, "give another --out")
    going_on = replace(recipe.sft, resume=(recipe.sft.out / CONFIG).exists())
    _once(recipe.sft, lambda: train_sft.main(going_on))
    for stage in recipe.stages.values():
        again = replace(stage, resume=bool(checkpoints(stage.out)))
        _once(stage, lambda again=again: train_grpo.main(again))  # type: ignore[misc]
    played = evaluate(args, recipe, count)
    found = results(played)
    text = report(played, f"{recipe.sft.env}, split {args.split}, n = {len(played['base'].episodes)}")
    write_whole(args.out / "table.txt", text + "\n")
    write_json(args.out / "results.json", {"args": asdict(args), **asdict(recipe), **found})
    for claim in found["claims"]:
        print(f"[{'yes' if claim['holds'] else 'NO'}] {claim['text']}")
    print(f"both tables, and the figures of each claim: {args.out / 'table.txt'}")
    return found


def load_recipe(args: Args) -> Recipe:
    """The trainings that a file describes, each in a folder of its own; RunError where they are not the paper's."""
    shared = {"seed": args.seed, "data_root": args.data_root}
    changes = {k: v for k, v in shared.items() if v is not None}
    sft = replace(load_config(args.config, train_sft.Args, "sft"), out=args.out / "sft", **changes)  # type: ignore[arg-type]
    grpo = load_config(args.config, train_grpo.Args, "grpo")
    grpo = replace(grpo, model=str(sft.out / "policy"), out=args.out / "grpo", **changes)  # type: ignore[arg-type]
    single = replace(grpo, episode_steps=1, out=args.out / "single-step")
    own_gain = None
    if has_section(args.config, "own_gain"):
        own_gain = load_config(args.config, train_grpo.Args, "own_gain", grpo)
        own_gain = replace(own_gain, model=grpo.model, out=args.out / "own-gain", **changes)  # type: ignore[arg-type]
    fixed: dict[str, object] = {"stop": False, "advantage": "trajectory", "reward": "final"}
    fixed |= {name: getattr(sft, name) for name in ("env", "layout", "view", "bf16")}
    wanted: list[tuple[str, object, object]] = [("sft.lessons", sft.lessons, "paper")]
    wanted += [(f"grpo.{name}", getattr(grpo, name), right) for name, right in fixed.items()]
    if own_gain is not None:  # played as the others are
        same = ("stop", "env", "layout", "view", "episode_steps", "bf16")
        wanted += [(f"own_gain.{name}", getattr(own_gain, name), getattr(grpo, name)) for name in same]
    wrong = [f"{name} is {found!r}, not {right!r}" for name, found, right in wanted if found != right]
    if grpo.episode_steps < 2:
        wrong.append(f"grpo.episode_steps is {grpo.episode_steps}, which leaves no refinement (the paper: 3)")
    if wrong:
        raise RunError(
            f"{args.config} is not the paper's recipe: {'; '.join(wrong)}. Change the file, or use the scripts"
        )
    recipe = Recipe(sft, grpo, single, own_gain)
    for stage in recipe.stages.values():
        train_grpo.check_options(stage)
    return recipe


def explain(args: Args, recipe: Recipe) -> None:
    """Print each stage's options and what it needs; nothing is loaded, played or written."""
    base = recipe.sft.model
    titles = {"single": "GRPO, first box alone", "grpo": "GRPO", "own_gain": "GRPO, not the paper's"}
    trained: dict[str, train_sft.Args | train_grpo.Args] = {"SFT": recipe.sft}
    trained |= {titles[name]: stage for name, stage in recipe.stages.items()}
    for name, stage in trained.items():
        print(f"== {name}, to {stage.out}")
        defaults = asdict(type(stage)())
        changed = {k: v for k, v in asdict(stage).items() if v != defaults[k] and k != "out"}
        print("   " + ", ".join(f"{k} {v}" for k, v in changed.items()))
        if isinstance(stage, train_sft.Args):
            train_sft.main(replace(stage, dry_run=True, gpu_memory_gb=args.gpu_memory_gb))
        else:  # its model is the SFT policy, which is not there yet and is of the base's size
            train_grpo.main(replace(stage, model=base, dry_run=True, gpu_memory_gb=args.gpu_memory_gb))
        print()
    horizon = recipe.grpo.episode_steps
    print(f"== evaluation on split {args.split} of {recipe.sft.env}: {args.samples} samples, {horizon} boxes each,")
    print(f"   of {base} (base), sft and each grpo; the first box alone of single-step")


def evaluate(args: Args, recipe: Recipe, count: int) -> dict[str, Played]:
    """Forced greedy rollouts of the policies on the first ``count`` samples, by name; episodes are saved."""
    sft, horizon = recipe.sft, recipe.grpo.episode_steps
    policies = {"base": (sft.model, horizon), "sft": (str(sft.out / "policy"), horizon)}
    policies |= {n: (str(s.out / "policy"), 1 if n == "single" else horizon) for n, s in recipe.stages.items()}
    played: dict[str, Played] = {}
    with progress_bars() as progress:
        for name, (model, steps) in policies.items():
            task = progress.add_task(name, total=count)
            policy = load_policy(model, max_new_tokens=recipe.grpo.max_completion_length, **sft.loading())
            forbid_stop(policy)
            how: dict[str, Any] = {"num_envs": args.num_envs, "agent_name": name, "max_steps": steps, **policy.shown}
            how["on_progress"] = lambda n, task=task: progress.advance(task, n)
            how |= {"data_root": sft.data_root, "strict": True}
            episodes = play(policy, sft.env, args.split, range(count), **how)
            save_episodes(args.out / "episodes" / name, episodes)
            played[name] = Played(episodes, columns(episodes_forced=episodes))
    return played


def _once(stage: train_sft.Args | train_grpo.Args, train: Callable[[], object]) -> None:
    """Run a stage unless it is done; refuse one that was done with other options."""
    options = {k: v for k, v in asdict(stage).items() if k not in NOT_DECISIVE}
    if (done := asked_of(stage.out, STAGE_FILE)) is not None:
        refuse_other(stage.out, done, options, "give another --out")
        print(f"{stage.out} is done already")
        return
    print(f"training {stage.out}")
    train()
    write_json(stage.out / STAGE_FILE, options)


if __name__ == "__main__":
    run_command(main, Args)
