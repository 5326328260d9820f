"""How the cost of whole commands grows with the amount of work: seconds and peak memory, each size in a fresh process.

    python benchmarks/growth.py
    python benchmarks/growth.py --only score check

A command's start is a fixed cost, so each row gives the cost of a unit **beyond the smaller size of the row above**:
where the cost is linear, these agree. GRPO's rows are steps of one training each, without its start.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
Part = Literal["evaluate", "score", "check", "view", "groups", "turns"]


@dataclass
class Args:
    """Options."""

    only: tuple[Part, ...] = ("evaluate", "score", "check", "view", "groups", "turns")
    """What to measure."""
    evaluate: tuple[int, ...] = (500, 1500, 5000)
    """Samples of `ivt evaluate`, tiny model."""
    score: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    """Rows of `ivt score`, with intervals."""
    check: tuple[int, ...] = (8_000, 24_000, 80_000)
    """Expressions of `ivt data check`, four an image, every image decoded."""
    view: tuple[int, ...] = (1_000, 10_000, 100_000)
    """Episodes of `ivt view --serve`, looked at in headless Chromium."""
    groups: tuple[int, ...] = (4, 8, 16, 32)
    """Completions of a group in GRPO, four groups of three turns."""
    turns: tuple[int, ...] = (1, 2, 4, 6)
    """Turns of an episode in GRPO, four groups of eight."""
    json: Path | None = None
    """Also write the rows there."""


@dataclass
class Row:
    """One command at one size."""

    part: Part
    size: int
    seconds: float
    processor: float
    """Seconds of processor time, of all its threads."""
    peak_mb: float
    more: str = ""


def main(args: Args) -> None:
    """Measure and print."""
    rows: list[Row] = []
    for part in args.only:
        for size in getattr(args, part):
            with tempfile.TemporaryDirectory() as folder:
                rows.append(_PARTS[part](size, Path(folder)))
            _say(rows)
    if args.json is not None:
        args.json.write_text(json.dumps([row.__dict__ for row in rows], indent=1) + "\n")


_UNITS = {"evaluate": "sample", "score": "row", "check": "row", "view": "episode", "groups": "episode", "turns": "turn"}


def _say(rows: list[Row]) -> None:
    """The last row, with what a unit cost beyond the row before it."""
    row, before = rows[-1], rows[-2] if len(rows) > 1 and rows[-2].part == rows[-1].part else None
    if before is None:
        print(f"\n{row.part:<9}    size   seconds  processor  peak MB  ms / {_UNITS[row.part]}, beyond the row above")
    line = f"{'':<9}{row.size:>8,}  {row.seconds:>8.1f}  {row.processor:>9.1f}  {row.peak_mb:>7.0f}"
    if row.part in ("groups", "turns"):
        each = row.size * 4 if row.part == "groups" else row.size * 4 * 8
        line += f"  {1000 * row.seconds / each:.2f} (all of it)"
    elif before is not None and before.size != row.size:
        line += f"  {1000 * (row.seconds - before.seconds) / (row.size - before.size):.4f}"
        line += f", {1024 * (row.peak_mb - before.peak_mb) / (row.size - before.size):.2f} kB"
    print(f"{line}  {row.more}", flush=True)


def _timed(part: Part, size: int, words: list[str], **kwargs: Any) -> Row:
    """Run ``ivt`` with these words to its end."""
    command = [sys.executable, "-m", "ivt_agents.cli", *words]
    start = time.monotonic()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, **kwargs)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{said.read().decode()[-3000:]}")
    return Row(part, size, time.monotonic() - start, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def _evaluate(size: int, folder: Path) -> Row:
    words = f"evaluate --policies tiny=tiny --split val --samples {size} --out".split()
    return _timed("evaluate", size, [*words, str(folder / "out")])


def _own_set(size: int, folder: Path, images: int) -> Path:
    """A data set of one's own: ``size`` expressions on ``images`` images (links to 20 JPEG files of 640 x 480)."""
    rng, root = np.random.default_rng(0), folder / "set"
    (root / "images").mkdir(parents=True)
    for number in range(images):
        path = root / "images" / f"{number}.jpg"
        if number < 20:
            noise = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
            noise.resize((640, 480), Image.Resampling.BICUBIC).save(path)
        else:
            path.hardlink_to(root / "images" / f"{number % 20}.jpg")
    (root / "dataset.json").write_text(json.dumps({"name": "grown", "box": "xyxy", "frame": "px"}))
    with (root / "test.jsonl").open("w") as file:
        for n, box in enumerate(_boxes(rng, size).tolist()):
            row = {"id": str(n), "image": f"{n % images}.jpg", "expression": f"thing {n}", "bbox": box}
            file.write(json.dumps(row | {"width": 640, "height": 480}) + "\n")
    return root


def _boxes(rng: np.random.Generator, count: int) -> np.ndarray[Any, Any]:
    low = rng.integers(0, (500, 340), (count, 2))  # (count, 2)
    return np.concatenate([low, low + rng.integers(20, 140, (count, 2))], axis=1)


def _score(size: int, folder: Path) -> Row:
    root = _own_set(size, folder, min(size, 1000))
    with (folder / "boxes.jsonl").open("w") as file:
        for n, box in enumerate(_boxes(np.random.default_rng(1), size).tolist()):
            file.write(json.dumps({"sample_id": str(n), "box": box}) + "\n")
    words = f"score {folder}/boxes.jsonl --dataset custom --split test --samples {size} --data-root {root}".split()
    return _timed("score", size, [*words, "--format", "xyxy", "--frame", "px", "--trust-declaration"])


def _check(size: int, folder: Path) -> Row:
    return _timed("check", size, ["data", "check", "custom", "--data-root", str(_own_set(size, folder, size // 4))])


def _view(size: int, folder: Path) -> Row:
    from ivt_agents.play.scripted import RandomAgent
    from ivt_env.data.render_screens import browser
    from ivt_env.episodes import save_episodes
    from ivt_env.rollouts import make_vector_env, rollout

    played = rollout(make_vector_env("IVT-Scenes-v0", 50, split="train"), RandomAgent(), 500, 0, agent_name="random")
    save_episodes(folder / "run", [replace(played[n % 500], sample_id=f"train-{n}") for n in range(size)])
    command = [sys.executable, "-m", "ivt_agents.cli", "view", str(folder / "run"), "--serve"]
    start = time.monotonic()
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout is not None
    try:
        while not (address := re.search(r"http://\S+", server.stdout.readline())):
            pass
        ready = time.monotonic() - start
        with browser(folder / "profile") as driver:
            driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": _WATCH})
            driver.get(address[0])
            loads, tasks, heaps = [], [], []
            for _ in range(3):
                driver.get(address[0])
                while driver.execute_script("return byId('panels').getAttribute('aria-busy') !== 'false'"):
                    time.sleep(0.005)
                loads.append(driver.execute_script("return performance.now()"))
                driver.execute_script(_NEXT)
                time.sleep(0.5)
                tasks.append(driver.execute_script("return Math.max(0, ...window.longTasks)"))
                heaps.append(driver.execute_script("return performance.memory.usedJSHeapSize") / 2**20)
        status = Path(f"/proc/{server.pid}/status").read_text()
        peak = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]
        times = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()
        processor = (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")
    finally:
        server.kill()
        server.wait()
    more = f"list there in {np.median(loads):.0f} ms, longest task {np.median(tasks):.0f} ms"
    more += f", page {np.median(heaps):.0f} MB"
    return Row("view", size, ready, processor, peak, more)


_NEXT = "document.body.dispatchEvent(new KeyboardEvent('keydown', {key: 'j', bubbles: true}))"
_WATCH = """
window.longTasks = [];
new PerformanceObserver(list => list.getEntries().forEach(e => window.longTasks.push(e.duration)))
  .observe({type: "longtask", buffered: true});
"""


def _grpo(part: Part, size: int, folder: Path, group: int, turns: int) -> Row:
    words = f"train-grpo --model tiny --prompts 4 --num-generations {group} --steps 4 --episode-steps {turns}".split()
    words += "--eval-samples 0 --report-to none --out".split()
    row = _timed(part, size, [*words, str(folder / "run")])
    steps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    times = ["rollout_environment", "rollout_model", "reward", "update"]
    steps = [step for step in steps if "time/update" in step]
    found = np.array([[step[f"time/{name}"] for name in times] for step in steps])[1:]
    environment, model, _, update = np.median(found, axis=0)
    played = np.mean([step["rollout/actions_per_episode"] for step in steps])
    more = (
        f"environment {environment:.2f} s, sampling {model:.2f} s, update {update:.2f} s; {played:.2f} turns an episode"
    )
    return replace(row, seconds=float(np.median(found.sum(axis=1))), more=more)


_PARTS: dict[str, Callable[[int, Path], Row]] = {
    "evaluate": _evaluate,
    "score": _score,
    "check": _check,
    "view": _view,
    "groups": lambda size, folder: _grpo("groups", size, folder, size, 3),
    "turns": lambda size, folder: _grpo("turns", size, folder, 8, size),
}

if __name__ == "__main__":
    main(tyro.cli(Args))
