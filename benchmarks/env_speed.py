"""Steps per second of the environment alone at 640 pixels, and its memory over a million steps.

    python benchmarks/env_speed.py

Every way plays the same random boxes on the same made-up images, in turns. The ratios to the plain Pillow loop are
what counts; the CPU time of the process is disturbed less by other programs. The first rows know no resets, as the
plain loop opens its image once; rows named "episodes" are episodes of 3 steps with their resets (the vector environment
plays groups of 8 on one sample, and places its image once for them). `docs/benchmarks.md` says what was found.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ivt_agents.command import run_command
from ivt_agents.training.folder import check_least
from ivt_env.data.sample import ImageArray, Sample
from ivt_env.env import GroundingEnv
from ivt_env.vector_env import GroundingVectorEnv

SIDE, SIZE, FILL = 640, (480, 640), (255, 0, 0, 90)
ENDLESS = 10**9
EPISODES = "episodes, one environment"
Way = Callable[[], int]
"""Plays for a while and returns how many steps that were, over all environments."""


@dataclass
class Args:
    """Options."""

    repetitions: int = 9
    """Times that every way is measured; medians are printed."""
    steps: int = 200
    """Steps of each way in a repetition."""
    num_envs: tuple[int, ...] = (4, 16, 32)
    """Numbers of environments of the vector environment."""
    memory_steps: int = 1_000_000
    """Steps over which memory is watched, once in one environment and once in the vector environment."""
    json: bool = False
    """Print JSON and nothing else."""

    def __post_init__(self) -> None:
        """Refuse what measures nothing."""
        check_least(self, {"repetitions": 1, "steps": 1, "memory_steps": 0})
        if not self.num_envs or min(self.num_envs) < 1:
            raise ValueError(f"num_envs {self.num_envs}: give numbers of at least 1")


class MadeUp:
    """Eight images of 640 x 480 in memory, four samples on each."""

    name, split = "made-up", "train"

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        coarse = rng.integers(0, 256, (8, 12, 16, 3), dtype=np.uint8)
        large = [Image.fromarray(c).resize(SIZE[::-1], Image.Resampling.BICUBIC) for c in coarse]
        self.images = [np.asarray(image) for image in large]
        self.boxes = random_boxes(len(self), seed=1).astype(float).tolist()

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Sample:
        return Sample(f"s{index}", f"p{index // 4}", "the thing", tuple(self.boxes[index]), SIZE, self.name, self.split)

    def image(self, sample: Sample) -> ImageArray:
        """One of the eight, shared."""
        return self.images[int(sample.image_id[1:])]


def random_boxes(count: int, seed: int = 0) -> np.ndarray:
    """Valid boxes (count, 4), float32: two uniform corners, a ninth of the image on average."""
    corners = np.sort(np.random.default_rng(seed).random((count, 2, 2)), axis=1)
    return corners.reshape(count, 4).astype(np.float32)


def plain(image: ImageArray, boxes: np.ndarray) -> Way:
    """The loop as one would write it with Pillow: paste, draw in RGBA, composite, to an array."""
    opened = Image.fromarray(image)

    def play() -> int:
        for x1, y1, x2, y2 in boxes:
            canvas = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 255))
            canvas.paste(opened, (0, 0))
            layer = Image.new("RGBA", (SIDE, SIDE))
            corners = (x1 * opened.width, y1 * opened.height, x2 * opened.width, y2 * opened.height)
            ImageDraw.Draw(layer).rectangle([float(c) for c in corners], fill=FILL)
            np.array(Image.alpha_composite(canvas, layer).convert("RGB"))
        return len(boxes)

    return play


def single(dataset: MadeUp, boxes: np.ndarray, view: str = "overlay", max_steps: int = ENDLESS) -> Way:
    """One environment; with a small ``max_steps`` each episode begins with a reset."""
    env = GroundingEnv(dataset, view=view, max_steps=max_steps)
    env.reset(seed=0)

    def play() -> int:
        for box in boxes:
            _, _, terminated, truncated, _ = env.step({"box": box, "stop": 0})
            if terminated or truncated:
                env.reset()
        return len(boxes)

    return play


def batched(dataset: MadeUp, boxes: np.ndarray, num_envs: int, copy: bool, episode: int | None = None) -> Way:
    """The vector environment; the boxes of a batch differ.

    With ``episode`` steps it plays whole episodes with their resets, in groups of 8 on one sample, as GRPO does.
    """
    env = GroundingVectorEnv(num_envs, dataset, max_steps=episode or ENDLESS, copy=copy, autoreset_mode="Disabled")
    env.reset(seed=0)
    length = episode or max(1, len(boxes) // num_envs)
    count = max(1, len(boxes) // (length * num_envs))
    chosen = np.resize(boxes, (count * length * num_envs, 4)).reshape(count, length, num_envs, 4)
    stops = np.zeros(num_envs, dtype=np.int64)
    played = 0

    def play() -> int:
        nonlocal played
        for batches in chosen:
            if episode:
                observations, _ = env.reset(seed=[played + i // 8 for i in range(num_envs)])
                played += num_envs
            for batch in batches:
                observations, *_ = env.step({"box": batch, "stop": stops})  # held during the next step, as agents do
        return count * length * num_envs

    return play


def measured(ways: dict[str, Way], repetitions: int) -> dict[str, dict[str, float]]:
    """Milliseconds a step of every way, medians over repetitions that take them in turn."""
    for play in ways.values():
        play()  # fills caches and pages
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(repetitions):
        order = list(ways) if repetition % 2 else list(ways)[::-1]
        for name in order:
            start, start_cpu = time.perf_counter(), time.process_time()
            steps = ways[name]()
            wall[name].append(1e3 * (time.perf_counter() - start) / steps)
            cpu[name].append(1e3 * (time.process_time() - start_cpu) / steps)
    return {name: {"wall_ms": float(np.median(wall[name])), "cpu_ms": float(np.median(cpu[name]))} for name in ways}


def memory(dataset: MadeUp, boxes: np.ndarray, steps: int, num_envs: int) -> dict[str, float]:
    """Resident memory in MB after a tenth of the steps and after all, episodes of 3 steps with resets."""
    shape: tuple[int, ...] = (4,)
    if num_envs == 1:
        env: Any = GroundingEnv(dataset)
    else:
        env, shape = GroundingVectorEnv(num_envs, dataset), (num_envs, 4)
    env.reset(seed=0)
    stop = 0 if num_envs == 1 else np.zeros(num_envs, dtype=np.int64)
    calls = max(10, steps // num_envs)
    early = 0.0
    for call in range(calls):
        if call == calls // 10:
            early = resident()
        rows = np.arange(call, call + num_envs) % len(boxes)
        _, _, terminated, truncated, _ = env.step({"box": boxes[rows].reshape(shape), "stop": stop})
        if num_envs == 1 and (terminated or truncated):
            env.reset()
    return {"steps": calls * num_envs, "mb_at_10_percent": early, "mb_at_100_percent": resident()}


def resident() -> float:
    """Resident memory of this process in MB; Linux only."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def in_a_plain_process() -> None:
    """Begin anew where the allocator was told to keep its memory: a user's is not."""
    told = [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]
    if told:
        plain = {name: value for name, value in os.environ.items() if name not in told}
        os.execve(sys.executable, [sys.executable, *sys.argv], plain)


def main(args: Args) -> None:
    """Measure and print."""
    in_a_plain_process()
    dataset, boxes = MadeUp(), random_boxes(args.steps)
    ways: dict[str, Way] = {"plain Pillow": plain(dataset.images[0], boxes), "one environment": single(dataset, boxes)}
    batches = {
        f"num_envs={number}{'' if copy else ', copy=False'}": (number, copy)
        for number in args.num_envs
        for copy in (True, False)
    }
    ways |= {name: batched(dataset, boxes, *batch) for name, batch in batches.items()}
    ways[EPISODES] = single(dataset, boxes, max_steps=3)
    ways |= {f"episodes, {name}": batched(dataset, boxes, *batch, episode=3) for name, batch in batches.items()}
    ways['one environment, view="closeup"'] = single(dataset, boxes, view="closeup")
    speed = measured(ways, args.repetitions)
    base = speed["plain Pillow"]
    for name, row in speed.items():
        one = speed[EPISODES if name.startswith("episodes") else "one environment"]
        row["steps_per_second"] = 1e3 / row["wall_ms"]
        for against, other in (("times_plain", base), ("times_one_environment", one)):
            row[against] = other["wall_ms"] / row["wall_ms"]
            row[f"{against}_cpu"] = other["cpu_ms"] / row["cpu_ms"]
    if not args.json:
        print(f"medians of {args.repetitions} repetitions in turn, {args.steps} steps each, 640 x 480 on 640 x 640")
        print(f"{'':38s} {'wall ms':>8s} {'cpu ms':>8s} {'steps/s':>8s} {'x plain':>16s} {'x one env':>16s}")
        for name, row in speed.items():
            against = [f"{row[k]:6.2f} (cpu {row[k + '_cpu']:5.2f})" for k in ("times_plain", "times_one_environment")]
            print(
                f"{name:38s} {row['wall_ms']:8.3f} {row['cpu_ms']:8.3f} {row['steps_per_second']:8.0f} "
                f"{against[0]:>18s} {against[1]:>18s}"
            )
    kept = {}
    for number in (1, max(args.num_envs)) if args.memory_steps else ():
        kept[f"num_envs={number}"] = row = memory(dataset, random_boxes(1000), args.memory_steps, number)
        if not args.json:
            print(
                f"memory, num_envs={number}: {row['mb_at_10_percent']:.1f} MB after 10 % of {row['steps']:,} steps, "
                f"{row['mb_at_100_percent']:.1f} MB after all"
            )
    if args.json:
        json.dump({"speed": speed, "memory": kept}, sys.stdout, indent=1)


if __name__ == "__main__":
    run_command(main, Args)
