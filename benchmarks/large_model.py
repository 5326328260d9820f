"""What a GRPO step of Qwen3-VL costs at its true size, by phase: time, memory, share of the GPU's peak.

    python benchmarks/large_model.py --size 4b                      # one GPU, no downloads
    python benchmarks/large_model.py --size 4b --checkpointing --micro-batch 32
    python benchmarks/large_model.py --size 4b --decode growing     # without CUDA graphs
    python benchmarks/large_model.py --size tiny --device cpu       # the same code, shrunken, in seconds

The architecture is the true one (`agents/vlm/dry_run.py`), the weights are random and made on the
device, and everything else is this project's own: policy, environment, GRPO trainer with LoRA and a KL
divergence to the reference. What is not as in a real run, and why:

- Random weights neither stop nor write boxes. Every answer has exactly `--tokens` tokens, no end token is
  known, and the box of the next overlay is drawn at random.
- The tokenizer is the tiny model's. The prompt is padded with words to `--text-tokens` tokens, and every
  image is resized to about `--pixels` pixels.
- Only five photographs exist, so at the first turn members of different groups share images that in a
  real run would be encoded separately (one image in twenty of all that are shown).

**Phases** are exclusive and end with a synchronisation of the device; `sampling, parsing` holds all of a
rollout that is not a forward pass. The first step warms up and is left out.

**Model FLOPs** of n tokens in rows of length L, with N parameters of the decoder, A of the adapters, h
hidden and q query width, V vocabulary, l layers; padding is not counted:

    prefill, decode     2 (N + A) n + 2 l q sum(L^2 of new, 2 past new)     + 2 h V per vocabulary row
    vision tower        2 N_v p + 4 l_v h_v sum(p_i^2)                      p patches, p_i of one image
    update forward      as prefill, once for the policy and once for the reference
    update backward     2 N n + 4 A n + 4 l q sum(L^2) + 2 h V per vocabulary row

The base is frozen, so its backward pass is the gradient of the activations alone (as much as a forward
pass) and adapters pay for both. Passes that checkpointing repeats are not counted, so it lowers the
utilisation. Utilisation is FLOPs over time over `--peak-tflops` (989: bf16 dense of an H100 SXM).

Decoding is bound by memory: each pass reads the decoder's weights, the head's and the rows' keys and values.
Its utilisation is those bytes over time over `--peak-gbps` (3,350: an H100 SXM). With `--decode fixed` the
head and the sampling are part of the recorded pass, so the phase `decode` holds them.
"""

from __future__ import annotations

import contextlib
import math
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from transformers import AutoModelForImageTextToText

from ivt_agents.grpo import train as train_grpo
from ivt_agents.grpo.trainer import GRPOTrainer
from ivt_agents.training.folder import write_json
from ivt_agents.training.run import MetricsLog
from ivt_agents.vlm.adapters import make_trainable
from ivt_agents.vlm.codec import BoxCodec
from ivt_agents.vlm.decode import decode_fixed
from ivt_agents.vlm.dry_run import shipped_config
from ivt_agents.vlm.footprint import Parts, Shape, Workload, count_parts, need, visual_tokens
from ivt_agents.vlm.generation import core_of
from ivt_agents.vlm.load import checkpoint_layers
from ivt_agents.vlm.policy import VLMPolicy
from ivt_agents.vlm.precision import DTYPES, use_float32_head
from ivt_agents.vlm.prompts import TINY
from ivt_agents.vlm.tiny import tiny_image_processor, tiny_tokenizer
from ivt_env.metrics.table import render
from ivt_env.rollouts import make_vector_env

PAPER_PROMPTS = 2400
"""Samples of the paper's GRPO stage; six episodes of three turns each."""
TARGET_HOURS, TARGET_GB = 1.0, 40.0


@dataclass
class Args:
    """Time, memory and utilisation of a GRPO step at true size, with random weights."""

    size: Literal["tiny", "2b", "4b", "8b"] = "4b"
    """Qwen3-VL of this size; `tiny` is the same class with a few thousand weights."""
    device: str = "cuda"
    """Where it runs."""
    prompts: int = 16
    """Samples in a step."""
    group: int = 6
    """Episodes of each."""
    turns: int = 3
    """Actions in an episode."""
    tokens: int = 40
    """Tokens of every answer."""
    text_tokens: int = 160
    """Tokens of a prompt beside its image, about."""
    pixels: int = 480 * 640
    """Pixels of an image after the image processor, about."""
    layout: Literal["fresh", "prefix"] = "fresh"
    """A prompt of its own each step, or one growing conversation."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Number format of the base's weights and of all passes."""
    attention: Literal["eager", "sdpa"] = "sdpa"
    """Attention code."""
    checkpointing: bool = False
    """Compute layers again in the backward pass."""
    lora_rank: int = 64
    """Rank of the adapters."""
    beta: float = 0.04
    """Weight of the KL divergence; 0 leaves the reference's pass out."""
    micro_batch: int = 6
    """Turns in one forward and backward pass."""
    batch_size: int = 128
    """Rows in one pass of generation."""
    steps: int = 3
    """Steps that are measured, after one that warms up."""
    decode: Literal["fixed", "growing"] = "fixed"
    """`fixed`: tensors that stay where they are, one CUDA graph for every token. `growing`: a cache that grows."""
    peak_tflops: float = 989.0
    """The device's dense bf16 peak in 10^12 operations a second."""
    peak_gbps: float = 3350.0
    """Bytes that the device's memory moves in a second, in 10^9."""
    out: Path = Path("runs/large_model.json")
    """Where the numbers are written."""


# --- The model --------------------------------------------------------------------------------------


def architecture(size: str, tokenizer: Any) -> Any:
    """Qwen3-VL's configuration with the special tokens where this tokenizer has them."""
    config = shipped_config(f"Qwen/Qwen3-VL-{'4B' if size == 'tiny' else size.upper()}-Instruct")
    text, vision = config.text_config, config.vision_config
    if size == "tiny":
        text.hidden_size, text.intermediate_size, text.num_hidden_layers = 64, 192, 2
        text.num_attention_heads, text.num_key_value_heads, text.head_dim = 4, 2, 16
        text.rope_parameters = {**text.rope_parameters, "mrope_section": [4, 2, 2]}
        text.vocab_size = len(tokenizer)
        vision.depth, vision.hidden_size, vision.intermediate_size, vision.num_heads = 2, 64, 128, 4
        vision.out_hidden_size, vision.deepstack_visual_indexes = 64, [0]
    config.image_token_id, config.video_token_id = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    ends = tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>"])
    config.vision_start_token_id, config.vision_end_token_id = ends
    return config


def random_model(config: Any, device: str, dtype: torch.dtype, end_id: int) -> Any:
    """The true class with random weights, made on the device in their final format."""
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                # Activations keep their size from layer to layer, whatever the width.
                fan_in = parameter[0].numel()
                parameter.normal_(0.0, 0.02 if "embed" in name else 1 / math.sqrt(fan_in))
    model.generation_config.eos_token_id = end_id
    return model


class ForcedPolicy(VLMPolicy):
    """Answers of a fixed length; where it would have to read a box from them, it draws one."""

    def act(self, observations: Mapping[str, Any]) -> dict[str, Any]:
        """As ``VLMPolicy.act``, with a valid box and without a stop."""
        actions = super().act(observations)
        rng = np.random.default_rng(int(actions["confidence"].sum() * 1e9) % 2**32)
        count = len(actions["stop"])
        # Boxes around the middle: nearly all overlap their target, so no group earns alike and is skipped.
        corners = np.concatenate([rng.uniform(0, 0.4, (count, 2)), rng.uniform(0.6, 1, (count, 2))], axis=1)
        actions |= {"box": corners.astype(np.float32), "stop": np.zeros(count, dtype=np.int64)}
        actions["parse_failure"] = np.zeros(count, dtype=bool)
        for turn in self.turns:
            if turn is not None:
                turn.finished = True  # what is cut off by the limit would have no gradient
        return actions


def make_policy(args: Args) -> ForcedPolicy:
    """The policy with its adapter."""
    tokenizer = tiny_tokenizer()
    config = architecture(args.size, tokenizer)
    model = random_model(config, args.device, DTYPES[args.precision], tokenizer.eos_token_id)
    model.set_attn_implementation(args.attention)
    use_float32_head(model)
    model = make_trainable(model, args.lora_rank)
    if args.checkpointing:
        checkpoint_layers(model)
    processor = tiny_image_processor()
    processor.patch_size = 16
    processor.size = {"shortest_edge": args.pixels, "longest_edge": int(args.pixels * 1.1)}
    plain = len(tokenizer(TINY.text)["input_ids"])
    prompts = replace(TINY, text=TINY.text + " the" * max(0, args.text_tokens - plain - 10))
    settings: dict[str, Any] = {"temperature": 1.0, "batch_size": args.batch_size, "layout": args.layout}
    policy = ForcedPolicy(model, tokenizer, processor, prompts, BoxCodec(), max_new_tokens=args.tokens, **settings)
    policy.sampling = replace(policy.sampling, end_ids=(), stop_id=None)
    policy.decode = decode_fixed if args.decode == "fixed" and args.attention == "sdpa" else None
    return policy


# --- Measuring --------------------------------------------------------------------------------------


class Phases:
    """Exclusive seconds and FLOPs by phase: what runs inside another phase is not counted for that one."""

    def __init__(self, device: str) -> None:
        self.cuda = torch.device(device).type == "cuda"
        self.forget()

    def forget(self) -> None:
        """Start anew."""
        self.seconds: dict[str, float] = defaultdict(float)
        self.flops: dict[str, float] = defaultdict(float)
        self.tokens: dict[str, float] = defaultdict(float)
        self.bytes: dict[str, float] = defaultdict(float)
        self.open: list[str] = []
        self.last = self.now()

    def now(self) -> float:
        """Seconds, once the device has done what it was given."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def lap(self) -> None:
        """Give the time since the last mark to the innermost open phase."""
        now = self.now()
        self.seconds[self.open[-1] if self.open else "rest"] += now - self.last
        self.last = now

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """A phase."""
        self.lap()
        self.open.append(name)
        try:
            yield
        finally:
            self.lap()
            self.open.pop()

    def watch(self, owner: Any, method: str, name: str | Callable[..., str], flops: Any = None) -> None:
        """Let every call of a method be a phase; ``flops(phase, *args, **kwargs)`` counts its operations.

        Decoding is one phase with all that is called in it: a graph that is being recorded cannot wait.
        """
        inner = getattr(owner, method)

        def outer(*args: Any, **kwargs: Any) -> Any:
            if "decode" in self.open:
                return inner(*args, **kwargs)
            phase = name if isinstance(name, str) else name(*args, **kwargs)
            if flops is not None:
                flops(phase, *args, **kwargs)
            with self(phase):
                return inner(*args, **kwargs)

        setattr(owner, method, outer)


class Counter:
    """FLOPs of each pass, by the formulas above."""

    def __init__(self, phases: Phases, model: Any, pad: int) -> None:
        core = core_of(model)
        parts = count_parts(core)
        self.phases, self.pad, self.shape = phases, pad, Shape.of(core.config)
        # Both are counted on the model with its adapters, so theirs are taken off.
        self.adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.text, self.vision = parts.text - self.adapters, parts.vision
        element = core.lm_head.weight.element_size()
        self.read = element * (self.text + self.shape.hidden * self.shape.vocabulary) + 4 * self.adapters
        """Bytes of weights that a pass reads."""
        self.column = 2 * self.shape.layers * self.shape.key_value * element
        """Bytes of one token's keys and values."""

    def decoder(self, phase: str, *_: Any, input_ids: torch.Tensor, past_key_values: Any = None, **__: Any) -> None:
        """A pass of the language model."""
        if input_ids.shape[1] == 1:
            new = torch.ones(len(input_ids))
        else:
            new = (input_ids != self.pad).sum(1).double().cpu()
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        attention = 2 * self.shape.layers * self.shape.query * float((new * (new + 2 * past)).sum())
        tokens = float(new.sum())
        self.phases.tokens[phase] += tokens
        if phase == "decode":
            self.phases.bytes[phase] += self.read + self.column * len(new) * past
        self.phases.flops[phase] += 2 * (self.text + self.adapters) * tokens + attention
        if phase == "update forward" and torch.is_grad_enabled():
            backward = (2 * self.text + 4 * self.adapters) * tokens + 2 * attention
            self.phases.flops["update backward"] += backward

    def answers(self, phase: str, model: Any, cache: Any, *rest: Any) -> None:
        """All passes of a batch of answers that have a fixed length, their heads included."""
        _, rows, _, _, _, sampling, *_ = rest
        for done in range(1, sampling.max_new_tokens):
            past = cache.get_seq_length() + done - 1
            attention = 2 * self.shape.layers * self.shape.query * len(rows) * (1 + 2 * past)
            matrices = 2 * (self.text + self.adapters) + 2 * self.shape.hidden * self.shape.vocabulary
            self.phases.flops[phase] += len(rows) * matrices + attention
            self.phases.bytes[phase] += self.read + self.column * len(rows) * past
            self.phases.tokens[phase] += len(rows)

    def tower(self, phase: str, _: Any, grid: torch.Tensor, *__: Any, **___: Any) -> None:
        """A pass of the vision tower; ``grid`` (images, 3)."""
        patches = grid.prod(1).double().cpu()
        attention = 4 * self.shape.vision_layers * self.shape.vision_hidden * float((patches**2).sum())
        self.phases.flops[phase] += 2 * self.vision * float(patches.sum()) + attention

    def head(self, phase: str, hidden: torch.Tensor) -> None:
        """Logits of rows of hidden states."""
        once = 2 * self.shape.hidden * self.shape.vocabulary * hidden.numel() // hidden.shape[-1]
        self.phases.flops[phase] += once
        if phase == "update forward" and torch.is_grad_enabled():
            self.phases.flops["update backward"] += once


def instrument(phases: Phases, trainer: GRPOTrainer) -> None:
    """Watch everything that a training step consists of."""
    policy, accelerator = trainer.policy, trainer.accelerator
    core = core_of(policy.model)
    count = Counter(phases, policy.model, policy.sampling.pad_id)

    def during(*_: Any, input_ids: Any = None, **__: Any) -> str:
        if "update forward" in phases.open:
            return "update forward"
        return "decode" if input_ids is not None and input_ids.shape[1] == 1 else "prefill"

    def head(hidden: torch.Tensor) -> str:
        return "update forward" if "update forward" in phases.open else "output head"

    phases.watch(trainer.env, "reset", "environment")
    phases.watch(trainer.env, "step", "environment")
    phases.watch(policy, "act", "sampling, parsing")
    phases.watch(policy.dialogue, "process", "image processing")
    phases.watch(core, "get_image_features", "vision tower", count.tower)
    phases.watch(core.model, "forward", during, count.decoder)
    phases.watch(core.lm_head, "forward", head, count.head)
    if policy.decode is not None:
        phases.watch(policy, "decode", "decode", count.answers)
    phases.watch(trainer, "_loss", "update forward")
    phases.watch(accelerator, "backward", "update backward")
    phases.watch(accelerator, "clip_grad_norm_", "optimizer")
    phases.watch(trainer.optimizer, "step", "optimizer")


def peak_gb(device: str) -> float:
    """Most memory ever held, in 10^9 bytes: of the GPU, or of this process."""
    if torch.device(device).type == "cuda":
        return float(torch.cuda.max_memory_allocated() / 1e9)
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)


def measure(args: Args) -> dict[str, Any]:
    """Run the steps and return what was found."""
    torch.manual_seed(0)
    policy = make_policy(args)
    env = make_vector_env("IVT-Photos-v0", args.prompts * args.group, split="train", max_steps=args.turns, canvas=640)
    config = train_grpo.Args(
        steps=args.steps + 1,
        prompts=args.prompts,
        num_generations=args.group,
        learning_rate=1e-5,
        warmup_steps=1,
        beta=args.beta,
        per_device_train_batch_size=args.micro_batch,
        save_steps=10**9,
    )
    with tempfile.TemporaryDirectory() as folder:
        # Adapters are float32; under autocast they are computed with in bfloat16, as fast as the base.
        mixed = "bf16" if args.precision == "bfloat16" else "no"
        accelerator = Accelerator(mixed_precision=mixed, cpu=torch.device(args.device).type == "cpu")
        log = MetricsLog(Path(folder), enabled=False)
        trainer = GRPOTrainer(policy, env, config, accelerator, log, Path(folder))
        phases = Phases(args.device)
        instrument(phases, trainer)
        trainer.train_step()
        phases.forget()
        metrics: dict[str, float] = {}
        for step in range(args.steps):
            trainer.step = step + 1
            metrics = trainer.train_step()
        phases.lap()
    parts, shape = count_parts(core_of(policy.model)), Shape.of(core_of(policy.model).config)
    adapters = sum(p.numel() for p in trainer.parameters)
    base = replace(parts, text=parts.text - adapters)
    seconds, flops, tokens, moved = (
        {k: v / args.steps for k, v in found.items()}
        for found in (phases.seconds, phases.flops, phases.tokens, phases.bytes)
    )
    step_seconds = sum(seconds.values())
    update = sum(seconds[k] for k in ("update forward", "update backward"))
    work = sum(flops[k] for k in ("update forward", "update backward"))
    peak = args.peak_tflops * 1e12
    return {
        "options": asdict(args),
        "device": torch.cuda.get_device_name() if phases.cuda else "CPU",
        "torch": torch.__version__,
        "parameters": {"all": base.total, "adapters": adapters},
        "layers": shape.layers,
        "seconds": seconds,
        "flops": flops,
        "tokens": tokens,
        "step_seconds": step_seconds,
        "peak_gb": peak_gb(args.device),
        "estimated_gb": estimated_gb(args, base, adapters, shape),
        "utilisation": {
            "prefill": flops["prefill"] / seconds["prefill"] / peak,
            "decode": moved["decode"] / seconds["decode"] / (args.peak_gbps * 1e9),
            "update": work / update / peak,
            "step": sum(flops.values()) / step_seconds / peak,
        },
        "hours_of_the_paper": PAPER_PROMPTS / args.prompts * step_seconds / 3600,
        "skipped_groups": metrics["rollout/zero_variance_groups"],
        "sampler_scorer_difference": metrics["train/sampler_scorer_difference"],
        "sampler_scorer_difference_max": metrics["train/sampler_scorer_difference_max"],
    }


def estimated_gb(args: Args, base: Parts, adapters: int, shape: Shape) -> float:
    """What the dry run says of the peak, in 10^9 bytes."""
    side = round(math.sqrt(args.pixels))
    images = visual_tokens(side, side, shape.patch, shape.merge, (args.pixels, int(args.pixels * 1.1)))
    work = Workload(images, args.text_tokens, args.tokens, args.turns)
    autocast = args.precision == "bfloat16"
    rows = min(args.batch_size, args.prompts * args.group)
    needs = need(base, adapters, shape, work, rows, args.precision, args.checkpointing, autocast)
    return needs.peak(args.micro_batch) / 1e9


def report(found: Mapping[str, Any]) -> str:
    """The table."""
    peak, cuda, rows = found["options"]["peak_tflops"] * 1e12, found["device"] != "CPU", []
    for name, seconds in sorted(found["seconds"].items(), key=lambda item: -item[1]):
        flops = found["flops"].get(name, 0.0)
        share = f"{flops / seconds / peak:.1%}" if flops and cuda else ""
        tokens = f"{found['tokens'][name]:,.0f}" if name in found["tokens"] else ""
        part = f"{seconds / found['step_seconds']:.0%}"
        rows.append([name, f"{seconds:.3f}", part, tokens, f"{flops / 1e12:.2f}", share])
    share = f"{found['utilisation']['step']:.1%}" if cuda else ""
    rows.append(["a step", f"{found['step_seconds']:.3f}", "", "", "", share])
    hours, gigabytes = found["hours_of_the_paper"], found["peak_gb"]
    options, held = found["options"], found["parameters"]
    lines = [
        f"Qwen3-VL {options['size']}, random weights in {options['precision']}: {held['all']:,} parameters and"
        f" {held['adapters']:,} of adapters, on {found['device']}",
        f"{options['prompts']} prompts x {options['group']} episodes x {options['turns']} turns of {options['tokens']}"
        f" tokens, layout {options['layout']}",
        "",
        render(["phase", "seconds", "share", "tokens", "10^12 operations", "of the peak"], rows),
        "",
        f"peak memory: {gigabytes:.1f} GB"
        + (f" (target: below {TARGET_GB:g})" if cuda else " (of this process)")
        + f"; the dry run's estimate: {found['estimated_gb']:.1f}",
        f"utilisation: prefill {found['utilisation']['prefill']:.2%}, update {found['utilisation']['update']:.2%};"
        f" decode {found['utilisation']['decode']:.2%} of the memory's rate",
        f"the paper's GRPO stage, once over {PAPER_PROMPTS:,} prompts: {hours:.2f} hours"
        + (f" (target: below {TARGET_HOURS:g})" if cuda else " (says nothing: not a GPU)"),
        f"log-probabilities of sampler and scorer differ by {found['sampler_scorer_difference']:.5f} on average,"
        f" {found['sampler_scorer_difference_max']:.5f} at most; groups without a gradient:"
        f" {found['skipped_groups']:.0%}",
    ]
    return "\n".join(lines)


def main(args: Args) -> dict[str, Any]:
    """Measure, print, write."""
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: no GPU here; --size tiny --device cpu runs the same code, shrunken")
    found = measure(args)
    print(report(found))
    write_json(args.out, found)
    print(f"written to {args.out}")
    return found


if __name__ == "__main__":
    main(tyro.cli(Args))
