"""Rollouts for GRPO: what sharing gains, in both conversation layouts, and where a training step's time goes.

    python benchmarks/rollouts.py

The same episodes three ways, in turn: with everything shared (equal prompts computed once, image encodings kept,
conversations continued on their caches), without any of it (the policy's own ``reuse=False``), and with the library's
``generate`` on the whole conversation, which is what one writes first. Answers are cut off at a fixed length and boxes
are drawn at random, so that all ways play three turns of equally many tokens.

The floor of a rollout and of a training step is the time of its matrix products alone: every product that torch was
asked for is recorded with its shapes, and all are made again, with nothing between them.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
import tyro
from peft.tuners.lora import Linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from transformers import DynamicCache

from ivt_agents.grpo import train as train_grpo
from ivt_agents.grpo.trainer import GRPOTrainer
from ivt_agents.training.run import MetricsLog, make_accelerator
from ivt_agents.vlm import generation
from ivt_agents.vlm.adapters import make_trainable
from ivt_agents.vlm.load import load_policy
from ivt_agents.vlm.policy import VLMPolicy
from ivt_agents.vlm.turns import Turn
from ivt_env.metrics.table import render
from ivt_env.rollouts import make_vector_env
from ivt_env.vector_env import GroundingVectorEnv


@dataclass
class Args:
    """Measure rollouts and the parts of a training step."""

    model: str = "tiny"
    """A model folder, or `tiny`."""
    prompts: int = 8
    """Groups."""
    group: int = 8
    """Episodes of each."""
    turns: int = 3
    """Actions of every episode."""
    tokens: int = 12
    """Tokens of every answer."""
    rounds: int = 5
    """Times that each way is measured, in turn; medians are printed."""
    view: Literal["overlay", "both"] = "overlay"
    """What a box is shown on."""
    out: Path | None = None
    """Write the figures as JSON."""


def play(env: GroundingVectorEnv, policy: VLMPolicy, args: Args, generated: bool = False) -> float:
    """Seconds of one rollout of all groups; every episode takes ``args.turns`` turns."""
    count = args.prompts * args.group
    rng = np.random.default_rng(0)
    corners = np.sort(rng.random((args.turns, count, 2, 2)), axis=2).reshape(args.turns, count, 4)
    boxes = np.clip(corners + [0, 0, 0.01, 0.01], 0, 1).astype(np.float32)
    indices = [k for k in range(args.prompts) for _ in range(args.group)]
    start = time.perf_counter()
    observations, _ = env.reset(seed=0, options={"index": indices})
    policy.reset(np.ones(count, dtype=bool))
    policy.seen = []  # type: ignore[attr-defined]
    for turn in range(args.turns):
        if generated:
            _library_turn(policy, observations, count)
        else:
            policy.act(observations)
        observations, *_ = env.step({"box": boxes[turn], "stop": np.zeros(count, dtype=np.int64)})
    return time.perf_counter() - start


def _library_turn(policy: VLMPolicy, observations: Any, count: int) -> None:
    """One turn by the model's own ``generate``: whole conversations, all images."""
    prompts = policy.prompts_for(observations, range(count))
    for before in policy.seen:  # type: ignore[attr-defined]
        policy.dialogue.process(before)
    if policy.layout == "prefix":
        policy.seen.append([np.ascontiguousarray(image) for image in observations["image"]])  # type: ignore[attr-defined]
    width = max(len(p.ids) for p in prompts)
    pad = policy.sampling.pad_id
    ids = torch.tensor([[pad] * (width - len(p.ids)) + p.ids for p in prompts])
    mask = torch.tensor([[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in prompts])
    encoded = [one for p in prompts for one in p.images]
    out = policy.core.generate(
        input_ids=ids,
        attention_mask=mask,
        mm_token_type_ids=(ids == policy.image_token).int(),
        pixel_values=torch.cat([p.patches for p in encoded]),
        image_grid_thw=torch.tensor([p.grid for p in encoded]),
        do_sample=True,
        top_k=0,
        temperature=1.0,
        max_new_tokens=policy.sampling.max_new_tokens,
        min_new_tokens=policy.sampling.max_new_tokens,
        suppress_tokens=list(policy.sampling.suppressed),
    )
    if policy.layout == "prefix":
        policy._said = {r: (Turn(p, out[r, width:].tolist()), None) for r, p in enumerate(prompts)}


def fixed_length(policy: VLMPolicy, tokens: int) -> None:
    """No answer ends by itself, so that every way samples equally many tokens."""
    suppressed = (*policy.sampling.suppressed, *policy.sampling.end_ids)
    policy.sampling = replace(policy.sampling, max_new_tokens=tokens, end_ids=(), suppressed=suppressed)


_PRODUCTS = [
    getattr(torch.ops.aten, name)
    for name in (
        *("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"),
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    )
]


class Products(TorchDispatchMode):
    """Records the matrix products, attention's included, of what runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self._calls: dict[str, Callable[[], Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in _PRODUCTS:
            shapes = tree_map(lambda v: (v.shape, v.stride(), v.dtype) if isinstance(v, torch.Tensor) else v, args)
            key = f"{func}{shapes}{kwargs}"
            self.seen[key] += 1
            if key not in self._calls:
                copies = tree_map(lambda v: v.detach().clone() if isinstance(v, torch.Tensor) else v, args)
                self._calls[key] = lambda: func(*copies, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def seconds(self) -> float:
        """What all of them take, one after the other; each shape by the fastest of four tries."""
        total = 0.0
        for key, count in self.seen.items():
            tries = []
            for _ in range(4):
                start = time.perf_counter()
                for _ in range(8):
                    self._calls[key]()
                tries.append((time.perf_counter() - start) / 8)
            total += count * min(tries)
        return total


def compare_ways(args: Args) -> list[dict[str, Any]]:
    """Median seconds of each way in each layout."""
    rows = []
    for layout in ("fresh", "prefix"):
        env = make_vector_env(
            "IVT-Scenes-v0", args.prompts * args.group, split="train", view=args.view, max_steps=args.turns
        )
        ways = {}
        for name, reuse in (("shared", True), ("nothing shared", False), ("library's generate", False)):
            policy = load_policy(args.model, temperature=1.0, layout=layout, reuse=reuse)
            fixed_length(policy, args.tokens)
            ways[name] = policy
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.rounds + 1):  # the first round warms up
            for name, policy in ways.items():
                seconds[name].append(play(env, policy, args, generated=name.startswith("library")))
        best = median(seconds["shared"][1:])
        with torch.no_grad(), Products() as products:
            play(env, ways["shared"], args)
        seconds["its matrix products alone"] = [0.0, products.seconds()]
        for name, values in seconds.items():
            took = median(values[1:])
            rows.append({"layout": layout, "way": name, "seconds": took, "ratio": took / best})
    return rows


@contextlib.contextmanager
def timed(owner: Any, name: str, seconds: list[float]) -> Iterator[None]:
    """Add the time of every outermost call of a method to ``seconds``."""
    original = getattr(owner, name)
    depth = 0

    def wrapper(*values: Any, **named: Any) -> Any:
        nonlocal depth
        depth += 1
        start = time.perf_counter()
        try:
            return original(*values, **named)
        finally:
            depth -= 1
            if depth == 0:
                seconds.append(time.perf_counter() - start)

    setattr(owner, name, wrapper)
    try:
        yield
    finally:
        setattr(owner, name, original)


def share_of_arithmetic(args: Args) -> dict[str, float]:
    """Seconds of a training step (the trainer's defaults) inside the model, its gradients and the optimizer."""
    policy = load_policy(args.model, temperature=1.0, max_new_tokens=40)
    policy.model = make_trainable(policy.model, 16)
    config = train_grpo.Args(steps=1, prompts=16, warmup_steps=1, save_steps=100)
    env = make_vector_env("IVT-Scenes-v0", config.prompts * config.num_generations, split="train", max_steps=args.turns)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        log = MetricsLog(Path(folder), enabled=False)
        trainer = GRPOTrainer(policy, env, config, make_accelerator(False), log, Path(folder))
        trainer.train_step()
        for _ in range(args.rounds):
            inside: list[float] = []
            core = policy.core
            with contextlib.ExitStack() as stack:
                for owner, name in (
                    (core.model, "forward"),
                    (core, "get_image_features"),
                    (core.lm_head, "forward"),
                    (generation, "log_softmax"),
                    (generation, "sample"),
                    (DynamicCache, "batch_select_indices"),
                    (Linear, "get_delta_weight"),
                    (trainer.accelerator, "backward"),
                    (trainer.optimizer, "step"),
                ):
                    stack.enter_context(timed(owner, name, inside))
                start = time.perf_counter()
                trainer.train_step()
                found.append((time.perf_counter() - start, sum(inside)))
            trainer.step += 1
        with Products() as products:
            trainer.train_step()
    whole, inside_median = (median(column) for column in zip(*found, strict=True))
    return {"seconds": whole, "model": inside_median, "rest": median(1 - b / a for a, b in found)} | {
        "products": products.seconds()
    }


def main(args: Args) -> None:
    """Measure and print."""
    rows = compare_ways(args)
    episodes = args.prompts * args.group
    print(f"{args.prompts} groups of {args.group}, {args.turns} turns of {args.tokens} tokens, view {args.view}\n")
    lines = [
        [r["layout"], r["way"], f"{r['seconds']:.2f}", f"{episodes / r['seconds']:.0f}", f"{r['ratio']:.1f}"]
        for r in rows
    ]
    print(render(["layout", "way", "s a rollout", "episodes/s", "times shared"], lines))
    step = share_of_arithmetic(args)
    print(
        f"\na training step of 16 x 8 episodes: {step['seconds']:.2f} s, of which model, gradients and optimizer"
        f" {step['model']:.2f} s; the rest is {100 * step['rest']:.1f} %. Its matrix products alone take"
        f" {step['products']:.2f} s"
    )
    if args.out is not None:
        figures = {"args": asdict(args), "rollouts": rows, "step": step}
        args.out.write_text(json.dumps(figures, indent=1, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Args))
