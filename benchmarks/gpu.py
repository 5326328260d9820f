"""Parts of `benchmarks/gpu.sh`: what one GPU does with this project, each part a process of its own.

    python -m benchmarks.gpu PART --out FOLDER            # card, agreement, step, decode, commands, tiny
    python -m benchmarks.gpu table --out FOLDER           # one table of what the parts found
    python -m benchmarks.gpu PART --out FOLDER --small    # the same code, shrunken, on a CPU

- `card`: what the card's matrix unit and memory really do.
- `agreement`: does the sampler have the log-probabilities of the scorer, and the GPU those of the CPU?
- `step`: a GRPO step of Qwen3-VL-4B with random weights (`benchmarks/large_model.py`).
- `decode`: the answers of its first turn, with a growing cache and with a CUDA graph.
- `commands`: `train_grpo.py` on the tiny model from beginning to end.
- `tiny`: pretraining of the tiny model in `--seconds`, and its first boxes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from benchmarks import large_model
from ivt_agents.grpo.collect import collect
from ivt_agents.training.folder import write_json
from ivt_agents.vlm import pretrain
from ivt_agents.vlm.decode import decode_fixed
from ivt_agents.vlm.generation import TokenScorer
from ivt_agents.vlm.load import load_policy
from ivt_agents.vlm.policy import VLMPolicy
from ivt_agents.vlm.turns import Turn
from ivt_env.metrics.table import render
from ivt_env.rollouts import make_vector_env

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Args:
    """One part of the GPU benchmark."""

    part: tyro.conf.Positional[Literal["card", "agreement", "step", "decode", "commands", "tiny", "table"]]
    """What to measure; `table` prints what the others found."""
    out: Path = Path("runs/gpu")
    """Folder for one JSON file a part."""
    small: bool = False
    """Shrunken, on a CPU."""
    seconds: float = 240.0
    """`tiny`: as many steps of pretraining as fit in."""

    @property
    def device(self) -> str:
        """Where it runs."""
        return "cpu" if self.small else "cuda"


# --- The card ---------------------------------------------------------------------------------------


def timed(args: Args, run: Callable[[], Any], repeats: int) -> float:
    """Median seconds of ``run`` after one call that warms up."""
    run()
    wait = (lambda: None) if args.small else torch.cuda.synchronize  # until the device has done what it was given
    seconds = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        run()
        wait()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def card(args: Args) -> dict[str, Any]:
    """Measured rates of a bf16 matrix product on random numbers, and of a copy in memory."""
    side, length = (256, 10**6) if args.small else (8192, 2**30)
    a = torch.randn(side, side, device=args.device, dtype=torch.bfloat16)
    b = torch.randn_like(a)
    block = torch.randn(length, device=args.device, dtype=torch.bfloat16)
    target = torch.empty_like(block)
    product, copy = timed(args, lambda: a @ b, 10), timed(args, lambda: target.copy_(block), 10)
    return {
        "name": "CPU" if args.small else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "bf16 product, 10^12 operations a second": 2 * side**3 / product / 1e12,
        "copy, 10^9 bytes a second": 2 * block.nbytes / copy / 1e9,
    }


# --- Sampler and scorer -----------------------------------------------------------------------------

LIMITS = {"float32": (1e-3, 1e-4), "bfloat16": (1.0, 2e-2)}
"""Largest and mean difference of log-probabilities that is rounding alone."""


def agreement(args: Args) -> dict[str, Any]:
    """Differences of log-probabilities of the shipped tiny model, as it samples and as it is scored."""
    torch.backends.cudnn.allow_tf32 = False  # else the patch embedding alone rounds to 10 bits
    settings = [
        (dtype, attention, decode, layout)
        for dtype in ("float32", "bfloat16")
        for attention, decode in (("eager", "growing"), ("sdpa", "growing"), ("sdpa", "fixed"))
        for layout in (("fresh",) if decode == "growing" else ("fresh", "prefix"))
    ]
    if args.small:
        settings = settings[2:4]
    rows, wrong = [], []
    for dtype, attention, decode, layout in settings:
        name = f"{dtype}, {attention}, {decode}, {layout}"
        how = {"dtype": dtype, "attention": attention, "layout": layout}
        policy = load_policy("tiny", device=args.device, temperature=1.0, **how)
        policy.decode = decode_fixed if decode == "fixed" else None
        turns = played(policy, args)
        scorer = TokenScorer(policy.core, policy.sampling, frozen_vision=True)
        found = {"setting": name, "tokens": sum(len(t.completion) for t in turns)}
        found |= difference(turns, scorer)
        if dtype == "float32" and layout == "fresh":
            found |= against_cpu(turns, scorer, policy.core)
        scorer(turns[:32])[0].sum().backward()
        finite = all(p.grad.isfinite().all() for p in policy.core.parameters() if p.grad is not None)
        rows.append(found)
        most, mean = LIMITS[dtype]
        bad = not (finite and found["max"] <= most and found["mean"] <= mean and found.get("gradient", 0.0) <= 1e-3)
        wrong += [name] if bad or not found.get("cpu", 0.0) <= most else []
        print(found, flush=True)
    return {"rows": rows, "wrong": wrong}


def played(policy: VLMPolicy, args: Args) -> list[Turn]:
    """Turns of episodes on the scenes."""
    samples, group = (2, 2) if args.small else (16, 4)
    env = make_vector_env("IVT-Scenes-v0", samples * group, split="val", max_steps=3)
    groups = collect(env, policy, list(range(samples)), group)
    return [turn for episode in groups.turns for turn in episode]


@torch.no_grad()
def scored(turns: list[Turn], scorer: TokenScorer) -> torch.Tensor:
    """Log-probabilities of all sampled tokens, in micro-batches."""
    return torch.cat([scorer(turns[k : k + 32])[0].float().cpu() for k in range(0, len(turns), 32)])


def difference(turns: list[Turn], scorer: TokenScorer) -> dict[str, float]:
    """Between what was recorded at sampling and what the scorer says: mean and largest."""
    away = (scored(turns, scorer) - torch.tensor([v for t in turns for v in t.log_probs])).abs()
    return {"mean": float(away.mean()), "max": float(away.max())}


def against_cpu(turns: list[Turn], scorer: TokenScorer, core: Any) -> dict[str, float]:
    """The same turns scored on a CPU: largest difference, and how far the gradients are apart, relatively."""
    twin = load_policy("tiny", device="cpu", attention="eager")
    other = TokenScorer(twin.core, scorer.sampling, frozen_vision=True)
    here = scored(turns, scorer)
    gradients = []
    for model, each in ((core, scorer), (twin.core, other)):
        forget(turns)
        each(turns[:16])[0].sum().backward()
        named = {n: p.grad.float().cpu().flatten() for n, p in model.named_parameters() if p.grad is not None}
        gradients.append(torch.cat([named[n] for n in sorted(named)]))
    forget(turns)
    there = scored(turns, other)
    forget(turns)
    apart = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    return {"cpu": float((here - there).abs().max()), "gradient": float(apart)}


def forget(turns: list[Turn]) -> None:
    """Drop kept encodings: they lie on the other device."""
    for turn in turns:
        for image in turn.prompt.images:
            image.features = image.deepstack = None


# --- Qwen3-VL-4B ------------------------------------------------------------------------------------


def of_true_size(args: Args) -> large_model.Args:
    """Three turns, six episodes of each of 16 samples, images of 640 pixels, LoRA r = 64, answers of 64 tokens."""
    out = args.out / "step.json"
    if not args.small:
        return large_model.Args(tokens=64, steps=2, out=out)
    small = {"prompts": 2, "group": 2, "turns": 2, "tokens": 6, "pixels": 128 * 128, "steps": 1, "lora_rank": 4}
    return large_model.Args(size="tiny", device="cpu", micro_batch=4, out=out, **small)  # type: ignore[arg-type]


def step(args: Args) -> dict[str, Any]:
    """Seconds, tokens, utilisation and memory of a GRPO step."""
    return large_model.main(of_true_size(args))


def decode(args: Args) -> dict[str, Any]:
    """Seconds and log-probabilities of the first turn's answers, decoded in both ways."""
    options = of_true_size(args)
    policy = large_model.make_policy(options)
    policy.model.eval()
    count = options.prompts * options.group
    env = make_vector_env("IVT-Photos-v0", count, split="train", max_steps=options.turns, canvas=640)
    seen, _ = env.reset(seed=0)
    scorer = TokenScorer(policy.core, policy.sampling, frozen_vision=True)
    # Adapters are multiplied in bf16, as in a training step.
    policy.autocast = lambda: torch.autocast(args.device, torch.bfloat16)
    passes, out = options.tokens - 1, {}
    for name, function in (("growing", None), ("fixed", decode_fixed)):
        policy.decode = function
        with torch.no_grad():
            prefill = timed(args, lambda: answered(policy, seen, 1), 1)
            seconds = timed(args, lambda: answered(policy, seen, options.tokens), 1) - prefill
        turns = [t for t in policy.turns if t is not None]
        with policy.autocast():
            found = difference(turns[: 2 * options.group], scorer)
        out[name] = {"seconds": seconds, "milliseconds a pass": 1e3 * seconds / passes, **found}
        out[name]["tokens a second"] = count * passes / seconds
        print(name, out[name], flush=True)
    out["ratio"] = out["growing"]["seconds"] / out["fixed"]["seconds"]
    return out


def answered(policy: VLMPolicy, seen: Any, tokens: int) -> None:
    """All environments answered with ``tokens`` tokens, always with the same random numbers."""
    policy.sampling = replace(policy.sampling, max_new_tokens=tokens)
    policy.generator.manual_seed(0)
    policy.act(seen)


# --- The tiny model ---------------------------------------------------------------------------------


def commands(args: Args) -> dict[str, Any]:
    """GRPO as a user starts it: does it end well, and in how many seconds?"""
    options = "--steps 3 --prompts 8 --num-generations 8 --eval-samples 64"
    if args.small:
        options = "--steps 1 --prompts 2 --num-generations 2 --eval-samples 0"
    command = f"train_grpo.py --model tiny --overwrite --report-to none --bf16 {options}"
    start = time.perf_counter()
    words = [sys.executable, *command.split(), "--out", str(args.out / "grpo")]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{command} ended with {run.returncode}: {run.stderr.strip().splitlines()[-1:]}")
    lines = (args.out / "grpo" / "metrics.jsonl").read_text().splitlines()
    steps = [m for m in map(json.loads, lines) if "train/sampler_scorer_difference" in m]
    return {"command": command, "seconds": time.perf_counter() - start, "last": steps[-1]}


def tiny(args: Args) -> dict[str, Any]:
    """Pretraining of the tiny model in nine tenths of the time that is left: seconds by stage, and what came of it."""
    whole = pretrain.Args(out=args.out / "tiny_qwen3vl", workers=1 if args.small else 15, seconds=0.9 * args.seconds)
    whole.pair_steps = 200  # after the time that the first two stages are given
    if args.small:
        small = {"vision_steps": 2, "vision_batch": 4, "steps": 2, "batch": 2, "seconds": None, "pair_steps": 2}
        whole = replace(whole, scenes=40, search_scenes=40, **small)  # type: ignore[arg-type]
    pretrain.main(whole)
    record = json.loads((whole.out / "training.json").read_text())
    out = {"seconds": record["seconds"], "steps": record["args"]["steps"], "marks read": record["marks read"]["end"]}
    rate = out["steps"] * whole.batch / out["seconds"]["grounding"]
    return out | {"images a second": rate} | single_shot(whole.out, args)


def single_shot(folder: Path, args: Args) -> dict[str, float]:
    """Greedy first boxes on the validation scenes."""
    count = 4 if args.small else 500
    policy = load_policy(folder, device=args.device, batch_size=256)
    env = make_vector_env("IVT-Scenes-v0", count, split="val", max_steps=1)
    seen, _ = env.reset(seed=0, options={"index": list(range(count))})
    env.step(policy.act(seen))
    ious = np.array([game.iou for game in env.games])
    return {"samples": count, "Acc@0.5": float((ious >= 0.5).mean()), "mIoU": float(ious.mean())}


# --- The table --------------------------------------------------------------------------------------


def lines_of(part: str, found: dict[str, Any]) -> list[list[str]]:
    """What a part found, as rows of (part, what, value, target)."""
    rows: list[list[str]] = []
    if "error" in found:
        return [[part, "failed", found["error"], ""]]
    if part == "card":
        return [[part, k, f"{v:,.0f}" if isinstance(v, float) else str(v), ""] for k, v in found.items()]
    if part == "agreement":
        for row in found["rows"]:
            extra = f", CPU {row['cpu']:.1e}, gradient {row['gradient']:.1e}" if "cpu" in row else ""
            most, mean = LIMITS[row["setting"].split(",")[0]]
            value = f"mean {row['mean']:.1e}, max {row['max']:.1e}{extra}"
            rows.append([part, row["setting"], value, f"{mean:g}, {most:g}"])
        return rows
    if part == "step":
        for name, seconds in sorted(found["seconds"].items(), key=lambda item: -item[1]):
            tokens = found["tokens"].get(name)
            rows.append([part, name, f"{seconds:.2f} s" + (f", {tokens:,.0f} tokens" if tokens else ""), ""])
        used = found["utilisation"]
        return [
            *rows,
            [part, "a step", f"{found['step_seconds']:.2f} s", ""],
            [part, "utilisation of prefill", f"{used['prefill']:.1%}", "40%"],
            [part, "utilisation of update", f"{used['update']:.1%}", "40%"],
            [part, "decode, of the memory's rate", f"{used['decode']:.1%}", ""],
            [part, "peak memory, GB", f"{found['peak_gb']:.1f}", f"{large_model.TARGET_GB:g}"],
            [part, "the dry run's estimate, GB", f"{found['estimated_gb']:.1f}", ""],
            [part, "the paper's GRPO stage, hours", f"{found['hours_of_the_paper']:.2f}", "1"],
            [part, "sampler - scorer, mean", f"{found['sampler_scorer_difference']:.1e}", ""],
        ]
    if part == "decode":
        for name in ("growing", "fixed"):
            one = found[name]
            value = f"{one['milliseconds a pass']:.1f} ms a pass, {one['tokens a second']:,.0f} tokens/s"
            rows.append([part, name, f"{value}, sampler - scorer {one['mean']:.1e}", ""])
        return [*rows, [part, "growing / fixed", f"{found['ratio']:.1f}", "3"]]
    if part == "commands":
        last = found["last"]["train/sampler_scorer_difference"]
        return [[part, "train_grpo.py", f"{found['seconds']:.0f} s, sampler - scorer {last:.1e}", ""]]
    rows = [[part, name, f"{seconds:.0f} s", ""] for name, seconds in found["seconds"].items()]
    return rows + [[part, k, f"{found[k]:.3g}", ""] for k in ("steps", "images a second", "Acc@0.5", "mIoU")]


def table(args: Args) -> dict[str, Any]:
    """One table; every part that was asked for has a row, also where it failed."""
    found = {path.stem: json.loads(path.read_text()) for path in args.out.glob("*.json") if path.stem != "gpu"}
    order = [p for p in ("card", "agreement", "step", "decode", "commands", "tiny") if p in found]
    print(render(["part", "what", "found", "target"], [r for p in order for r in lines_of(p, found[p])]))
    return {p: found[p] for p in order}


PARTS = {f.__name__: f for f in (card, agreement, step, decode, commands, tiny)}


def main(args: Args) -> int:
    """Run one part, keep what it found, or its error in one line; 1 where it failed or disagreed."""
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part == "table":
        found = table(args)
        write_json(args.out / "gpu.json", found)
        return int(any("error" in part or part.get("wrong") for part in found.values()))
    kept = args.out / f"{args.part}.json"
    try:
        found = PARTS[args.part](args)
    except Exception as error:
        # The other parts go on: each costs time on a machine that may be lent for minutes.
        write_json(kept, {"error": f"{type(error).__name__}: {str(error).strip()}"[:300]})
        raise
    write_json(kept, found)
    return int(bool(found.get("wrong")))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
