"""Does the loop pay? The study behind ``docs/results.md``, by one command.

    python -m agents.study                     # three seeds; under two hours on two cores
    python -m agents.study --seeds 1 --samples 300 --steps 60 --out runs/quick

For each seed a loop is trained (close-ups, lessons in verifying) and its control: the same base, the same number
of gradient steps and at least as many answer tokens, all of them spent on single shots. Then every policy and
every control of equal compute answers the same samples, and the overlay of the loop is swapped. Each part is a
command of the project, printed before it runs and written to ``commands.txt``; what is done is not done again,
so a study that was cut off goes on.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock

from agents.command import run_command
from agents.training import RunError, write_json

SPLITS = ("test", "test_distractors", "test_small")


@dataclass
class Args:
    """Train loops and controls, play them, and put them side by side."""

    out: Path = Path("runs/study")
    """Folder of everything."""
    model: str = "tiny"
    """The base that all start from."""
    seeds: int = 3
    """Seeds of the loop and of its control."""
    scenes: int = 4000
    """Training pictures of the loop; each is asked about six times."""
    steps: int = 600
    """Gradient steps of the loop, and of the control."""
    batch: int = 336
    """Demonstrations in a step."""
    samples: int = 2000
    """Samples of each test split."""
    swap_samples: int = 500
    """Samples of `test` on which the overlay is swapped."""
    jobs: int = 2
    """Commands at a time, one core each."""


@dataclass(frozen=True, slots=True)
class Job:
    """One command, and the file that says that it is done."""

    name: str
    command: tuple[str, ...]
    made: Path


def main(args: Args) -> None:
    """Run what is missing, stage by stage."""
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "study.json", asdict(args) | {"machine": _machine(), "commit": _commit()})
    for stage in (_training(args), _playing(args)):
        run_jobs(stage, args.out, args.jobs)
    print(f"tables, plots and pages: {args.out}/*/")


def _training(args: Args) -> list[Job]:
    """The loops first: they take longer."""
    shared: list[object] = ["--model", args.model, "--split", "train_asked", "--neighbours", "6"]
    shared += ["--steps", args.steps, "--batch", args.batch, "--micro-batch", args.batch // 2, "--lr", "1e-3"]
    shared += ["--optimizer", "muon", "--smoothing", "6", "--mixed-precision", "bf16", "--eval-samples", "0"]
    loop: list[object] = ["--view", "both", "--lessons", "verification", "--samples", 6 * args.scenes]
    # Every answer once: what the loop spends on looking again, the control spends on new questions.
    control: list[object] = ["--single-shot", "--samples", args.steps * args.batch]
    return [
        _job(args, f"{name}-{seed}", "train_sft", [*shared, *own, "--seed", seed], "policy/policy.json")
        for name, own in (("loop", loop), ("control", control))
        for seed in range(args.seeds)
    ]


def _playing(args: Args) -> list[Job]:
    """Every policy on every split, and the swaps."""
    seeds = range(args.seeds)
    loops = [f"loop={args.out}/loop-{s}/policy" for s in seeds]
    controls = [f"control={args.out}/control-{s}/policy" for s in seeds]
    policies = [f"base={args.model}", *loops, *controls]
    for name, spec in (("medoid", "medoid-8"), ("best-of-8", "best-of-8"), ("second shot", "second-shot")):
        policies += [f"{name}={spec}:vlm:{args.out}/control-{s}/policy" for s in seeds]
    jobs = []
    for split in SPLITS:
        options: list[object] = ["--split", split, "--samples", args.samples, "--policies", *policies]
        jobs.append(_job(args, split, "evaluate", options, "results.json"))
    options = ["--split", "test", "--samples", args.swap_samples, "--policies", *loops]
    return [*jobs, _job(args, "swaps", "agents.swaps", options, "results.json")]


def _job(args: Args, name: str, module: str, options: list[object], made: str) -> Job:
    out = args.out / name
    return Job(name, (sys.executable, "-m", module, "--out", str(out), *map(str, options)), out / made)


def run_jobs(jobs: list[Job], out: Path, workers: int) -> None:
    """Run the commands that have not been run, ``workers`` at a time, each on one core.

    Raises:
        RunError: naming the log of the first command that failed. The others are run to their end.
    """
    missing = [job for job in jobs if not job.made.exists()]
    # torch's threads wait for each other actively: two commands with two threads each take far longer than
    # the same commands with one.
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}

    lock = Lock()

    def run(job: Job) -> Job | None:
        log, started = out / f"{job.name}.log", time.time()
        print(f"{job.name}: {shlex.join(job.command[1:])}", flush=True)
        with lock, (out / "commands.txt").open("a", encoding="utf-8") as file:
            file.write(f"python {shlex.join(job.command[1:])}\n")
        with log.open("w", encoding="utf-8") as file:
            status = subprocess.run(job.command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
        print(f"{job.name}: status {status} after {(time.time() - started) / 60:.1f} minutes", flush=True)
        with lock:  # commands end at any moment, two at once too
            times = out / "minutes.json"
            known = json.loads(times.read_text(encoding="utf-8")) if times.exists() else {}
            write_json(times, known | {job.name: round((time.time() - started) / 60, 2)})
        return job if status else None

    with ThreadPoolExecutor(workers) as pool:
        failed = [job for job in pool.map(run, missing) if job is not None]
    if failed:
        raise RunError(f"{failed[0].name} failed; its log: {out / failed[0].name}.log. Mend it and run this again")


def _machine() -> str:
    import torch

    return f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or "not a git checkout"


if __name__ == "__main__":
    run_command(main, Args)
