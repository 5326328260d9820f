"""Does refinement help? The study behind ``docs/results.md``, by one command.

    python -m experiments.study                     # three seeds; about two hours on two cores
    python -m experiments.study --seeds 1 --samples 300 --steps 60 --out runs/quick

For each seed a policy is trained to refine (close-ups, lessons in verifying) and a control: the same base, the same
number of gradient steps and demonstrations, all of them single shots. In the loop the base gives the first box and the
policy goes on. Three more controls spend their compute on several
answers, and with ``--large`` one on a larger image. Then every policy answers the same samples of every test split,
and the overlay of the loop is swapped. Each part is a command of the project, printed before it runs and written to
``commands.txt``; what is done is not done again, so a study that was cut off goes on.
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock

from experiments.study_tables import summary
from ivt_agents.command import run_command
from ivt_agents.config import with_new_names
from ivt_agents.training.checkpoints import CONFIG
from ivt_agents.training.run import RunError, check_least, write_json
from ivt_env.failures import end_with_parent
from ivt_env.files import asked_of, lock_folder, refuse_other, write_whole

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
    scenes: int = 20_000
    """Training images of the loop; each is asked about six times."""
    steps: int = 600
    """Gradient steps of each policy."""
    batch: int = 240
    """Demonstrations in a step; an even number, because half of them make one forward pass."""
    samples: int = 2000
    """Samples of each test split."""
    episode_steps: int = 2
    """Actions in an episode: a box, then a better one or a stop."""
    swap_samples: int = 300
    """Samples of `test` on which the overlay is swapped."""
    answers: list[str] = field(default_factory=lambda: ["medoid-8", "best-of-8", "second-shot"])
    """Controls that spend their compute on several answers of the first seed's control."""
    alone: bool = False
    """Also play each trained policy by itself, from its own first box."""
    large: bool = False
    """Train one more control, whose image has twice the pixels: half an hour more on two cores."""
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
    numbers = ("seeds", "scenes", "steps", "batch", "samples", "episode_steps", "swap_samples", "jobs")
    check_least(args, dict.fromkeys(numbers, 1) | {"episode_steps": 2, "batch": 2})
    if args.batch % 2:
        raise RunError(f"batch {args.batch}: a step is two forward passes of equal size; give an even number")
    with lock_folder(args.out):
        if made := asked_of(args.out, "study.json"):
            refuse_other(args.out, with_new_names(made), asdict(args), "give another --out", may_differ={"out", "jobs"})
        write_json(args.out / "study.json", asdict(args) | {"machine": _machine(), "commit": _commit()})
        for stage in (_training, _playing, _scoring, _reporting):
            run_jobs(stage(args), args.out, args.jobs)
        write_whole(args.out / "summary.md", summary(args.out, SPLITS))
    print(f"tables: {args.out}/summary.md")
    print(f"reports: {args.out}/report.html ({SPLITS[0]}, with swaps), {', '.join(f'{s}/report.html' for s in SPLITS)}")


def _training(args: Args) -> list[Job]:
    """The loops first: they take longer."""
    shared: list[object] = ["--model", args.model, "--split", "train_asked", "--neighbours", "6"]
    shared += ["--steps", args.steps, "--learning-rate", "8e-4"]
    shared += ["--per-device-train-batch-size", args.batch // 2, "--gradient-accumulation-steps", 2]
    shared += ["--optim", "muon", "--smoothing", "6", "--bf16", "--eval-samples", "0"]
    loop: list[object] = ["--view", "closeup", "--lessons", "verification", "--decision-weight", "3"]
    # In the relay it never gives a first answer, so none is taught.
    loop += ["--samples", 6 * args.scenes, "--harvested", "1", "--first-answers", "0"]
    # Every answer once: what the loop spends on looking again, the control spends on new questions.
    control: list[object] = ["--single-shot", "--samples", args.steps * args.batch]
    seeds = range(args.seeds)
    wanted = [(f"loop-{s}", loop, s) for s in seeds] + [(f"control-{s}", control, s) for s in seeds]
    if args.large:  # one seed, to see whether pixels alone would do
        wanted.append(("large-0", [*control, "--pixels", "2"], 0))
    return [
        _job(args, name, "train_sft", [*shared, *own, "--seed", seed], "policy/policy.json")
        for name, own, seed in wanted
    ]


def _playing(args: Args) -> list[Job]:
    """Every policy on every split by itself, so that a core is never idle; and the swaps."""
    seeds = range(args.seeds)
    large = ["large-0"] if args.large else []
    controls = [f"control-{s}" for s in seeds]
    policies = {name: str(args.out / name / "policy") for name in [*controls, *large]}
    # What learned to refine goes on from the first box of the base, on which it learned.
    trained = [str(args.out / f"loop-{s}" / "policy") for s in seeds]
    policies |= {f"loop-{s}": f"relay:vlm:{args.model},vlm:{trained[s]}" for s in seeds}
    policies |= {f"alone-{s}": trained[s] for s in seeds if args.alone}
    # Answers that are sampled are one control of the first seed: they are compared with its greedy answer.
    first = policies[controls[0]]
    policies |= {name: f"{name}:vlm:{first}" for name in args.answers}
    policies["base"] = args.model
    options: list[object] = ["--split", "test", "--samples", args.swap_samples, "--episode-steps", args.episode_steps]
    options += ["--steps", "1", "--policies", *(f"loop-{s}={policies[f'loop-{s}']}" for s in seeds)]
    jobs = [_job(args, "swaps", "ivt_agents.evaluation.swaps", options)]
    for split in SPLITS:
        for name, spec in policies.items():
            # A single shot's first box is its answer. The base is made to go on where the collapse is to be seen.
            single = name in (*controls, *large) or (name == "base" and split != SPLITS[0])
            options = [
                "--split",
                split,
                "--samples",
                args.samples,
                "--episode-steps",
                1 if single else args.episode_steps,
            ]
            options += ["--policies", f"{name}={spec}", "--page-episodes", 1]
            # What every step would have given is asked once, of the policies that are to take several.
            forced = split == SPLITS[0] and (name == "base" or name.startswith("loop-"))
            options += [] if forced else ["--no-forced"]
            jobs.append(_job(args, f"played/{split}/{name}", "evaluate", options, "report.html"))
    return jobs


def _scoring(args: Args) -> list[Job]:
    """All policies of a split in one table, by name: several seeds of one are one policy."""
    jobs = []
    for split in SPLITS:
        several = ["control", "loop", *(["alone"] if args.alone else [])]
        names = ["base", *(f"{name}-{s}" for name in several for s in range(args.seeds))]
        names += ["large-0"] if args.large else []
        names += args.answers
        folders = [f"{_policy(name)}={args.out}/played/{split}/{name}/episodes/{name}" for name in names]
        jobs.append(_job(args, split, "evaluate", ["--episodes", *folders], "report.html"))
    return jobs


def _reporting(args: Args) -> list[Job]:
    """The page of `test`, with the swaps."""
    page = args.out / "report.html"
    options = (str(args.out / "test"), "--swaps", str(args.out / "swaps"), "--out", str(page))
    return [Job("report", (sys.executable, "-m", "ivt_agents.evaluation.report", *options), page)]


def _policy(name: str) -> str:
    """The name in the tables: without the seed where there are several."""
    head, _, _ = name.rpartition("-")
    return head if head in ("loop", "alone", "control", "large") else name


def _job(args: Args, where: str, module: str, options: list[object], made: str = "results.json") -> Job:
    out = args.out / where
    name = where.replace("/", "-")
    again = ["--resume"] if (out / CONFIG).exists() else []  # it was cut off
    return Job(name, (sys.executable, "-m", module, "--out", str(out), *map(str, options), *again), out / made)


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
    running: list[subprocess.Popen[bytes]] = []

    def run(job: Job) -> Job | None:
        log, started = out / f"{job.name}.log", time.time()
        print(f"{job.name}: {shlex.join(job.command[1:])}", flush=True)
        with lock, (out / "commands.txt").open("a", encoding="utf-8") as file:
            file.write(f"python {shlex.join(job.command[1:])}\n")
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                job.command, stdout=file, stderr=subprocess.STDOUT, env=environment, preexec_fn=end_with_parent
            )
            running.append(process)
            status = process.wait()
        print(f"{job.name}: status {status} after {(time.time() - started) / 60:.1f} minutes", flush=True)
        with lock:  # commands end at any moment, two at once too
            times = out / "minutes.json"
            known = json.loads(times.read_text(encoding="utf-8")) if times.exists() else {}
            write_json(times, known | {job.name: round((time.time() - started) / 60, 2)})
        return job if status else None

    with ThreadPoolExecutor(workers) as pool:
        try:
            failed = [job for job in pool.map(run, missing) if job is not None]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.terminate()
            raise
    if failed:
        raise RunError(f"{failed[0].name} failed; its log: {out / failed[0].name}.log. Fix it and run this again")


def _machine() -> str:
    import torch

    return f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or "not a git checkout"


if __name__ == "__main__":
    run_command(main, Args)
