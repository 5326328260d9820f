"""Does a second look pay? The study behind ``docs/results.md``, and ``make train``, by one command.

    python -m experiments.study --out runs/train                     # one seed, about half an hour on two cores
    python -m experiments.study --seeds 3 --samples 2000 --out runs/study --splits test test_search ...

For each seed: SFT on lessons in looking, GRPO from it, and two controls that are trained with as many steps on single
shots, one of them on images with as many pixels as the loop looks at in all. Every policy answers the same samples of
every split, the box shown to the loop is swapped for others, and the map plays search scenes with marks of several
sizes. Each part is a command of the project, printed before it runs and written to ``commands.txt``; what is done is
not done again, so a study that was cut off goes on.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiments.study_tables import last_screen, plot_map, summary
from ivt_agents.command import run_command
from ivt_agents.training.folder import CONFIG, RunError, check_least, made_by, write_json
from ivt_agents.vlm.prompts import POLICY_FILE, TINY_NAME, load_prompts
from ivt_env.failures import end_with_parent
from ivt_env.files import asked_of, lock_folder, refuse_other, whole_folder, write_whole

TRAINED = ("sft", "grpo", "control-pixels", "control")
"""What is made anew for each seed, the longest first. All train the same parameters: the language model's."""
PIXELS = 9.0
"""Pixels of the second control's image, as a multiple of the others': 288 instead of 96 a side. The loop looks at the
whole image once, and at each later step at the whole image and a close-up: 9 images at four later steps."""


@dataclass
class Args:
    """Train the loop and its controls, play them, and put them side by side."""

    out: Path = Path("runs/train")
    """Folder of everything."""
    model: str = "tiny"
    """The base that all start from."""
    seeds: int = 1
    """Seeds of all that is trained."""
    sft_samples: int = 5_000
    """Training samples that SFT makes its lessons of."""
    sft_steps: int = 300
    """Gradient steps of SFT."""
    grpo_steps: int = 50
    """Steps of GRPO. The controls get as many steps as SFT and GRPO together."""
    half: bool = False
    """Also train an SFT of half the steps, and GRPO from it."""
    splits: list[str] = field(default_factory=lambda: ["test", "test_search"])
    """Splits on which every policy answers."""
    samples: int = 500
    """Samples of each split."""
    episode_steps: int = 8
    """Actions in an episode."""
    swap_samples: int = 100
    """Samples on which the overlay is swapped; 0: none."""
    marks: list[int] = field(default_factory=lambda: [8, 12, 16, 24, 32])
    """Sides of the marks in pixels of 768, for the map."""
    map_samples: int = 200
    """Samples of each size of mark; 0: no map."""
    jobs: int = 2
    """Commands at a time, one core each."""


@dataclass(frozen=True, slots=True)
class Job:
    """One command, the file that says that it is done, and the jobs that must be done before."""

    name: str
    command: tuple[str, ...]
    made: Path
    needs: tuple[str, ...] = ()


def main(args: Args) -> None:
    """Run what is missing, and show what came of it."""
    least = dict.fromkeys(("seeds", "sft_samples", "sft_steps", "samples", "jobs"), 1)
    check_least(args, least | {"episode_steps": 2, "grpo_steps": 0, "swap_samples": 0, "map_samples": 0})
    with lock_folder(args.out):
        if made := asked_of(args.out, "study.json"):
            refuse_other(args.out, made, asdict(args), "give another --out", may_differ={"out", "jobs"})
        write_json(args.out / "study.json", asdict(args) | made_by())
        run_jobs([*_training(args), *_playing(args), *_scoring(args)], args.out, args.jobs)
        write_whole(args.out / "summary.md", summary(args.out, args.splits, swapped=args.swap_samples > 0))
        if args.map_samples:
            plot_map(args.out, args.marks)
    print(last_screen(args.out, args.splits))


def names(args: Args) -> list[str]:
    """Everything that is trained: ``sft-0``, ``grpo-0``, ..."""
    kinds = [*TRAINED, *(("half", "half-grpo") if args.half else ())]
    return [f"{kind}-{seed}" for seed in range(args.seeds) for kind in kinds]


def _training(args: Args) -> list[Job]:
    total = args.sft_steps + args.grpo_steps
    jobs = []
    for name in names(args):
        kind, _, seed = name.rpartition("-")
        common: list[object] = ["--seed", seed, "--eval-samples", "0"]
        if kind in ("sft", "half"):
            steps = args.sft_steps // (2 if kind == "half" else 1)
            own = ["--model", args.model, "--samples", args.sft_samples, "--steps", steps]
        elif kind.endswith("grpo"):
            warm = f"{'half' if kind == 'half-grpo' else 'sft'}-{seed}"
            own = ["--model", args.out / warm / "policy", "--steps", args.grpo_steps]
            jobs.append(_job(args, name, "train_grpo", [*common, *own], "policy/policy.json", (warm,)))
            continue
        else:
            batch = 16 if kind == "control-pixels" else 48
            own = ["--model", args.model, "--single-shot", "--samples", batch * total, "--steps", total]
            if kind == "control-pixels":  # a step of it then costs about twice a step of SFT
                own += ["--pixels", PIXELS, "--per-device-train-batch-size", batch, "--gradient-accumulation-steps", 1]
        jobs.append(_job(args, name, "train_sft", [*common, *own], "policy/policy.json"))
    return jobs


def _playing(args: Args) -> list[Job]:
    """Every policy on every split by itself, so that a core is never idle; the swaps; and the map."""
    jobs = []
    policies = {"base": _base(args)} | {name: str(args.out / name / "policy") for name in names(args)}
    last = "grpo-0"
    for name, spec in policies.items():
        # The base, which never stops, is asked for two refinements, as in the paper; controls answer once.
        kind = name.rpartition("-")[0] or name
        actions = {"base": 3, "control": 1, "control-pixels": 1}.get(kind, args.episode_steps)
        needs = () if name == "base" else (name,)
        for split in args.splits:
            options = ["--split", split, "--samples", args.samples, "--page-episodes", 1 if name != last else 50]
            options += ["--episode-steps", actions, "--policies", f"{name}={spec}"]
            # The base and the loop also play without a stop, which gives the box at every step.
            options += [] if name.partition("-")[0] in ("base", "grpo") else ["--no-forced"]
            jobs.append(_job(args, f"played/{split}/{name}", "evaluate", options, needs=needs))
        if args.map_samples and name in ("base", "grpo-0", "control-pixels-0"):
            steps = args.episode_steps if name == last else 1
            for side in args.marks:
                options = ["--split", f"test_search_{side}", "--samples", args.map_samples, "--no-forced"]
                options += ["--episode-steps", steps, "--page-episodes", 1, "--policies", f"{name}={spec}"]
                jobs.append(_job(args, f"map/{side}/{name}", "evaluate", options, needs=needs))
    if args.swap_samples:
        for split in args.splits:
            options = ["--split", split, "--samples", args.swap_samples, "--steps", "1"]
            options += ["--episode-steps", args.episode_steps, "--policies", f"loop={policies[last]}"]
            jobs.append(_job(args, f"swaps/{split}", "ivt_agents.evaluation.swaps", options, needs=(last,)))
    return jobs


def _base(args: Args) -> str:
    """The base as it is played. At later steps the tiny model gets the question it was pretrained on."""
    if args.model != TINY_NAME:
        return args.model
    from ivt_agents.vlm.tiny import weights_folder  # loads torch

    folder = args.out / "base"
    if not folder.exists():
        with whole_folder(folder, {"model": args.model}) as partial:
            shutil.copytree(weights_folder(), partial, dirs_exist_ok=True)
            write_json(partial / POLICY_FILE, load_prompts("tiny-base").settings())
    return str(folder)


def _scoring(args: Args) -> list[Job]:
    """All policies of a split in one table, by name: several seeds of one are one policy."""
    jobs = []
    for split in args.splits:
        played = ["base", *names(args)]
        at = f"{args.out}/played/{split}"
        folders = [f"{name.rpartition('-')[0] or name}={at}/{name}/episodes/{name}" for name in played]
        needs = tuple(f"played-{split}-{name}" for name in played)
        jobs.append(_job(args, split, "evaluate", ["--episodes", *folders], "report.html", needs))
        if args.swap_samples:
            page = args.out / split / "swaps.html"
            words = (str(args.out / split), "--swaps", str(args.out / "swaps" / split), "--out", str(page))
            command = (sys.executable, "-m", "ivt_agents.evaluation.report", *words)
            jobs.append(Job(f"report-{split}", command, page, (split, f"swaps-{split}")))
    return jobs


def _job(
    args: Args, where: str, module: str, options: list[object], made: str = "results.json", needs: tuple[str, ...] = ()
) -> Job:
    out = args.out / where
    name = where.replace("/", "-")
    again = ["--resume"] if (out / CONFIG).exists() else []  # it was cut off
    command = (sys.executable, "-m", module, "--out", str(out), *map(str, options), *again)
    return Job(name, command, out / made, needs)


def run_jobs(jobs: list[Job], out: Path, workers: int) -> None:
    """Run the commands that have not been run, ``workers`` at a time, each on one core, none before what it needs.

    RunError names the log of the first command that failed; those that run are run to their end.
    """
    missing = [job for job in jobs if not job.made.exists()]
    done = {job.name for job in jobs} - {job.name for job in missing}
    # torch's threads wait for each other actively: two commands with two threads each take far longer than
    # the same commands with one.
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
    running: dict[Future[int], tuple[Job, subprocess.Popen[bytes], float]] = {}
    failed: list[Job] = []
    with ThreadPoolExecutor(workers) as pool:
        try:
            while running or (missing and not failed):
                ready = [] if failed else [job for job in missing if done.issuperset(job.needs)]
                for job in ready[: workers - len(running)]:
                    missing.remove(job)
                    words = shlex.join(job.command[1:])
                    print(f"{job.name}: {words}", flush=True)
                    with (out / "commands.txt").open("a", encoding="utf-8") as file:
                        file.write(f"python {words}\n")
                    with (out / f"{job.name}.log").open("wb") as log:
                        kept: dict[str, Any] = {"stdout": log, "stderr": subprocess.STDOUT, "env": environment}
                        process = subprocess.Popen(job.command, preexec_fn=end_with_parent, **kept)
                    running[pool.submit(process.wait)] = job, process, time.time()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job, _, started = running.pop(future)
                    minutes = (time.time() - started) / 60
                    print(f"{job.name}: status {future.result()} after {minutes:.1f} minutes", flush=True)
                    times = out / "minutes.json"
                    known = json.loads(times.read_text(encoding="utf-8")) if times.exists() else {}
                    write_json(times, known | {job.name: round(minutes, 2)})
                    failed += [job] if future.result() else []
                    done.add(job.name)
        except BaseException:
            for _, process, _ in running.values():
                process.terminate()
            raise
    if failed:
        raise RunError(f"{failed[0].name} failed; its log: {out / failed[0].name}.log. Fix it and run this again")


if __name__ == "__main__":
    run_command(main, Args)
