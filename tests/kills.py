"""Commands that write, ended at any moment, and disks that fill up: what lies in the folder afterwards.

    python tests/kills.py --kills 200 --full-disks 50 --seed 0

A process with its imports done is forked for each command. It ends itself by SIGKILL, SIGTERM or SIGINT, either before
one of its file operations or after a while, in the middle of whatever it does. Then everything in the folder that bears
a final name must be complete, what was finished before must be as it was, and the same command must go on to its end.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from forked import before_file_operations, forked

SIGNALS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}

TRAINING = ["--eval-samples", "2", "--report-to", "none", "--save-steps", "1"]
SFT = [
    *"train-sft --samples 4 --steps 2 --per-device-train-batch-size 4 --gradient-accumulation-steps 1".split(),
    *TRAINING,
]
GRPO = ["train-grpo", "--model", "tiny", "--steps", "2", "--prompts", "1", "--num-generations", "2", *TRAINING]
GRPO += ["--max-completion-length", "14", "--lora-r", "4", "--episode-steps", "3"]
# Both must begin anew where the killed one had come to its end.
SWAPS = "ivt_agents.evaluation.swaps --policies a=centre b=random --samples 4 --overwrite".split()
PPO = "ivt_agents.sb3.train --steps 128 --samples 8 --num-envs 4 --rollout 8 --batch 16 --epochs 1".split()
PPO += "--held-out 4 --overwrite".split()
PRETRAIN = "ivt_agents.vlm.pretrain --scenes 20 --search-scenes 12 --vision-steps 2 --vision-batch 4".split()
PRETRAIN += "--steps 2 --batch 4 --pair-steps 2 --pair-batch 4 --save-seconds 0 --workers 1".split()
CONVERT = "data convert {run}/coco.json --from coco --images {run}/coco --expression-key caption --copy".split()
CONVERT += ["--name", "mine"]
EVALUATE = ["evaluate", "--policies", "base=random", "centre=centre", "--samples", "4", "--page-episodes", "2"]


@dataclass(frozen=True)
class Command:
    """One that writes."""

    words: list[str]
    """A module with a command, or the words of ``ivt``. ``{out}``: the folder that is looked at; ``{run}``: a finished
    rollout; ``{evaluation}``: a finished evaluation."""
    again: list[str] = field(default_factory=list)
    """What is added to go on with a run that was cut off."""
    finished: str = ""
    """What is there when it is done; what lies beside it then is never lost but by ``--overwrite``."""
    weight: int = 1


COMMANDS = {
    "rollout": Command(["rollout", "--episodes", "3", "--agent", "random", "--out", "{out}"], weight=4),
    "rollout of photographs": Command(["rollout", "--env", "IVT-Photos-v0", "--episodes", "2", "--out", "{out}"]),
    "view": Command(["view", "{run}", "--out", "{out}/view.html"], weight=2),
    "sheet": Command(["data", "show", "photos", "--number", "4", "--out", "{out}/sheet.png"], weight=2),
    "convert": Command([*CONVERT, "--out", "{out}"], weight=2),
    "evaluate": Command([*EVALUATE, "--out", "{out}"], ["--resume"], "report.html", weight=4),
    "report": Command(["report", "{evaluation}", "--out", "{out}/page.html"], weight=2),
    "swaps": Command([*SWAPS, "--out", "{out}"], weight=2),
    "ppo": Command([*PPO, "--out", "{out}"]),
    "pretrain": Command([*PRETRAIN, "--out", "{out}"]),
    "train-sft": Command([*SFT, "--out", "{out}"], ["--resume"], "before_after.json", weight=2),
    "train-grpo": Command([*GRPO, "--out", "{out}"], ["--resume"], "before_after.json", weight=2),
}


def _command(words: list[str], folder: str, count: str, die: tuple[int, int, float] | None, limit: int) -> None:
    """Runs in the forked process. ``die``: signal, number of the file operation (0: none), seconds."""
    from ivt_agents.cli import main
    from ivt_agents.command import parse
    from ivt_env import failures

    signal.signal(signal.SIGINT, signal.default_int_handler)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    seen = 0

    def told(number: int) -> None:
        nonlocal seen
        seen = number
        if die is not None and number == die[1]:
            os.kill(os.getpid(), die[0])

    def end(way: int) -> None:
        # The command handles SIGTERM and SIGINT from its first line to its last; before and after there is none to end.
        while way != signal.SIGKILL and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            time.sleep(0.001)
        os.kill(os.getpid(), way)

    before_file_operations(folder, told)
    if die is not None and not die[1]:
        timer = threading.Timer(die[2], end, (die[0],))
        timer.daemon = True
        timer.start()
    if "." in words[0]:
        module = importlib.import_module(words[0])
        status = failures.run(lambda: module.main(parse(module.Args, words[1:])))
    else:
        status = main(words)
    if die is None and not limit:
        Path(count).write_text(str(seen))
    sys.stdout.flush()
    os._exit(status)


def run(
    words: list[str], folder: Path, log: Path, die: tuple[int, int, float] | None = None, limit: int = 0
) -> tuple[int, float]:
    """Exit status and seconds of a command."""
    begun = time.perf_counter()
    process = forked(log, _command, words, str(folder), f"{log}.count", die, limit)
    process.join(300)
    assert process.exitcode is not None, f"{words} hangs"
    return process.exitcode, time.perf_counter() - begun


def faults_of(folder: Path) -> list[str]:
    """What bears a final name and is not complete, or does not belong to the configuration that lies there."""
    import torch
    from PIL import Image
    from safetensors.torch import load_file

    from ivt_agents.training.folder import read_metrics
    from ivt_env.files import asked_of

    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()):
        if any(part.endswith(".partial") or part == ".lock" for part in path.relative_to(folder).parts):
            continue
        try:
            if path.name == "metrics.jsonl":  # a line at a time: the last may be cut off, and is then dropped
                read_metrics(path)
            elif path.suffix in (".png", ".jpg"):
                with Image.open(path) as image:
                    image.load()
            elif path.suffix == ".jsonl":
                for line in path.read_bytes().removesuffix(b"\n").split(b"\n"):
                    json.loads(line)
            elif path.suffix == ".json":
                json.loads(path.read_bytes())
            elif path.suffix == ".html":
                assert path.read_text().rstrip().endswith("</html>"), "cut off"
            elif path.suffix == ".safetensors":
                load_file(path)
            elif path.suffix == ".pt":
                torch.load(path, weights_only=True)
            else:
                assert path.stat().st_size, "empty"
        except Exception as error:
            found.append(f"{path.relative_to(folder)}: {error!r}"[:200])
    options = asked_of(folder, "config.json")
    for made in ("policy", "adapter", "episodes/base", "episodes/centre"):
        asked = asked_of(folder / made)
        if (folder / made).exists() and asked is None:
            found.append(f"{made} does not say what it was asked for")
        if asked is not None and (options is None or asked.get("seed") != options.get("seed")):
            found.append(f"{made} is of seed {asked.get('seed')}, the configuration of another")
    if (folder / "policy").exists() and not (folder / "policy" / "policy.json").exists():
        found.append("a policy without its policy.json")
    return found


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


class Trials:
    """Kills and full disks, and what was wrong after each."""

    def __init__(self, work: Path, seed: int) -> None:
        self.work, self.rng = work, random.Random(seed)
        self.log = work / "log"
        self.done: dict[str, Path] = {}
        self.measured: dict[str, tuple[int, float]] = {}
        self.ended: dict[str, int] = {}
        self.wrong: list[str] = []

    def words(self, name: str, out: Path) -> list[str]:
        given = {"out": out, "run": self.work / "run", "evaluation": self.work / "evaluation"}
        return [word.format(**given) for word in COMMANDS[name].words]

    def prepare(self, names: list[str]) -> None:
        """Run each command once: what it makes, how many file operations and seconds it takes."""
        for name, folder in (("rollout", self.work / "run"), ("evaluate", self.work / "evaluation")):
            status, _ = run(self.words(name, folder), folder, self.log)
            assert status == 0, self.log.read_text()
        write_coco(self.work / "run")
        for name in names:
            out = self.work / "done" / name.replace(" ", "-")
            status, seconds = run(self.words(name, out), out, self.log)
            assert status == 0, f"{name}: {self.log.read_text()}"
            assert not (wrong := faults_of(out)), wrong
            self.done[name] = out
            self.measured[name] = int(Path(f"{self.log}.count").read_text()), seconds

    def choose(self, names: list[str]) -> str:
        return self.rng.choices(names, [COMMANDS[n].weight for n in names])[0]

    def fault(self, what: str, told: str) -> None:
        self.wrong.append(f"{what}: {told}")
        print("WRONG", self.wrong[-1], flush=True)

    def kill(self, number: int, names: list[str]) -> None:
        """End one command somewhere, look, and let it go on to its end."""
        name, rng = self.choose(names), self.rng
        command, out = COMMANDS[name], self.work / "kill"
        shutil.rmtree(out, ignore_errors=True)
        # A folder that is new, one that is finished, or one that is begun anew with another seed.
        case = rng.choice(["new", "new", "finished", "anew"]) if command.finished else "new"
        words = self.words(name, out)
        if case != "new":
            shutil.copytree(self.done[name], out)
            words += ["--seed", "1", "--overwrite"] if case == "anew" else ["--resume"]
        before = content_of(out) if case == "finished" else {}
        operations, seconds = self.measured[name]
        way = rng.choice(list(SIGNALS))
        at = rng.randint(1, operations) if rng.random() < 0.5 else 0
        status, _ = run(words, out, self.log, (way, at, rng.uniform(0, seconds)))
        told = self.log.read_text(errors="replace")
        what = f"kill {number}, {way.name} of {name}, {case}, {f'operation {at}' if at else 'some time'}"
        self.ended[way.name if status else "done"] = self.ended.get(way.name if status else "done", 0) + 1
        if status not in (0, SIGNALS[way]):
            self.fault(what, f"status {status}: {told[-300:]}")
        if "Traceback" in told:
            self.fault(what, f"a traceback: {told[max(0, told.index('Traceback') - 200) :][:1500]}")
        for one in faults_of(out):
            self.fault(what, one)
        # Tables and plots of an evaluation are made again from its episodes, a policy from its last checkpoint.
        kept = ("episodes/", "policy/", "demonstrations.jsonl", "before.json", "episodes.jsonl")
        after = content_of(out)
        finished = [n for n in before if n.startswith(kept) and not n.endswith("/asked.json")]
        for lost in (n for n in finished if after.get(n) != before[n]):
            self.fault(what, f"{lost} was finished and is lost")
        going = self.words(name, out)
        if command.finished:
            # Where the kill came before the first file there is nothing to go on with.
            going += ["--seed", "1"] if case == "anew" and '"seed": 1' in config_of(out) else []
            going += command.again if (out / "config.json").exists() else []
        if name == "convert":
            shutil.rmtree(out, ignore_errors=True)  # it never writes into a folder that holds a data set
        if name == "train-grpo" and not list(out.glob("checkpoints/step-*")):
            going = [w for w in going if w != "--resume"]
        status, _ = run(going, out, self.log)
        if status:
            self.fault(what, f"cannot go on, status {status}: {self.log.read_text()[-300:]}")
        for one in faults_of(out):
            self.fault(what, f"after going on: {one}")
        if left := [p for p in out.rglob("*") if p.name.endswith(".partial") or p.name == ".lock"]:
            self.fault(what, f"left over: {left}")

    def full_disk(self, number: int, names: list[str], disk: Path | None) -> None:
        """Run one command where room ends somewhere."""
        name, rng = self.choose(names), self.rng
        size = sum(p.stat().st_size for p in self.done[name].rglob("*") if p.is_file())
        room = max(4096, int(size * rng.uniform(0.02, 0.98)))
        out = (disk or self.work) / "full"
        shutil.rmtree(out, ignore_errors=True)
        old = name.startswith("rollout") and rng.random() < 0.5
        limit = 0
        if disk is None:
            largest = max(p.stat().st_size for p in self.done[name].rglob("*") if p.is_file())
            limit = max(1, int(largest * rng.uniform(0.02, 0.98)))
        else:
            taken = size + 65536 if old else 0
            subprocess.run(["mount", "-o", f"remount,size={max(1, (taken + room) // 1024)}k", str(disk)], check=True)
        if old:
            shutil.copytree(self.done[name], out)
        before = content_of(out) if old else {}
        status, _ = run(self.words(name, out), out, self.log, None, limit)
        told = self.log.read_text(errors="replace")
        what = f"full disk {number}, {name}, {'an older one there' if old else 'new'}, room {limit or room}"
        self.ended[f"status {status}"] = self.ended.get(f"status {status}", 0) + 1
        line = told.strip().splitlines()[-1] if told.strip() else ""
        if status not in (0, 2) or "Traceback" in told:
            self.fault(what, f"status {status}: {told[-600:]}")
        elif status == 2 and not any(w in line for w in ("No space left", "File too large", "disk", "is full")):
            self.fault(what, f"the message does not name it: {line}")
        for one in faults_of(out) if out.exists() else []:
            self.fault(what, one)
        if out.exists() and (left := [p for p in out.rglob("*") if p.name.endswith(".partial")]):
            self.fault(what, f"left over: {left}")
        if before and not (out / "episodes.jsonl").exists():
            self.fault(what, "the older episodes are lost")


def write_coco(folder: Path) -> None:
    """A small set of one's own, to be converted."""
    from PIL import Image

    (folder / "coco").mkdir()
    images, annotations = [], []
    for number in range(4):
        name = f"{number}.png"
        Image.effect_noise((200, 150), 80).convert("RGB").save(folder / "coco" / name)
        images.append({"id": number, "file_name": name, "width": 200, "height": 150})
        one = {"id": number, "image_id": number, "category_id": 1, "bbox": [10, 10, 50, 60]}
        annotations.append(one | {"caption": f"the grey thing {number}"})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "coco.json").write_text(json.dumps(content))


def config_of(folder: Path) -> str:
    path = folder / "config.json"
    return path.read_text() if path.exists() else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--full-disks", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="*", default=list(COMMANDS), choices=list(COMMANDS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        trials = Trials(Path(work), args.seed)
        trials.prepare(args.commands)
        for number in range(args.kills):
            trials.kill(number, args.commands)
            if number % 20 == 19:
                print(f"{number + 1} kills, {len(trials.wrong)} wrong, ended by {trials.ended}", flush=True)
        print(f"{args.kills} kills: ended by {trials.ended}; wrong: {len(trials.wrong)}", flush=True)
        trials.ended.clear()
        disk = Path(work) / "disk"
        disk.mkdir()
        mounted = os.geteuid() == 0 and not subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(disk)]).returncode
        try:
            for number in range(args.full_disks):
                # By turns: a disk without room (where it can be mounted), and a limit on the size of a file.
                trials.full_disk(number, args.commands, disk if mounted and number % 2 == 0 else None)
        finally:
            if mounted:
                subprocess.run(["umount", str(disk)], check=True)
        print(f"{args.full_disks} full disks: ended with {trials.ended}; wrong in all: {len(trials.wrong)}")
    sys.exit(bool(trials.wrong))


if __name__ == "__main__":
    main()
