"""``--dry-run``: the true architecture without weights, what it needs, and what fits."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ivt_agents.vlm.architectures import build_without_weights, find_config, image_limits
from ivt_agents.vlm.footprint import (
    CONTEXT_BYTES,
    USABLE,
    WEIGHT_FORMATS,
    Shape,
    Workload,
    cache_bytes,
    count_parts,
    largest_batch,
    lora_parameters,
    need,
    resized,
    rollout_bytes,
    room,
    visual_tokens,
)
from ivt_env.metrics.table import render

TEXT_TOKENS = 160
"""Assumed for a prompt beside its image: the question (about 100), the expression, the box, the chat template.
Counting them would need the model's tokenizer."""

GENERATION_ROWS = 64
"""Most prompts that ``load_policy`` generates for at once."""

_GB = 1e9


@dataclass(frozen=True, slots=True)
class Plan:
    """What a training command would do, as far as memory cares."""

    model: str
    gpu_memory_gb: float
    """Gigabytes of 10^9 bytes."""
    image: tuple[int, int]
    """Height and width as the environment shows it."""
    new_tokens: int
    turns: int
    """Actions of an episode; 1 where single answers are taught."""
    rollout_rows: int
    """Episodes played side by side."""
    micro_batch: int
    """Turns in one forward and backward pass."""
    lora_rank: int
    """0: every weight is trained."""
    autocast: bool
    """The update runs in bf16."""
    reference_copy: bool = False
    """A frozen copy of all weights is kept for the KL divergence."""
    pixels: float | None = None
    """Times the most pixels that the model may be shown of an image."""

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if self.gpu_memory_gb <= 0:
            raise ValueError(f"gpu_memory_gb {self.gpu_memory_gb}: give the GPU's gigabytes")
        if min(self.image) < 1:
            raise ValueError(f"image {self.image}: give height and width in pixels")


def dry_run(plan: Plan) -> str:
    """The report of a dry run, as text."""
    config, source = find_config(plan.model)
    model = build_without_weights(config)
    parts, lora = count_parts(model), lora_parameters(model, plan.lora_rank)
    shape, limits = Shape.of(config), image_limits(config, plan.model, plan.pixels)
    size = resized(*plan.image, shape.patch, shape.merge, limits)
    tokens = visual_tokens(*plan.image, shape.patch, shape.merge, limits)
    work = Workload(tokens, TEXT_TOKENS, plan.new_tokens, plan.turns)
    kind = "episode" if plan.turns > 1 else "demonstration"
    fresh, prefix = (cache_bytes(shape, work, 1, layout) / _GB for layout in ("fresh", "prefix"))
    cache = f"key-value cache of one {kind}, bf16: {fresh:.3f} GB"
    if plan.turns > 1:
        cache += (
            f" with a fresh prompt a turn, {prefix:.3f} GB as one conversation; the table reckons with fresh prompts"
        )
    counts = {"vision tower": parts.vision, "text layers": parts.text, "embeddings": parts.embeddings}
    counts["total"] = parts.total
    if plan.lora_rank:
        counts[f"LoRA, r = {plan.lora_rank} (trained)"] = lora
    gpu, rows = plan.gpu_memory_gb * _GB, []
    # Weights that are trained themselves cannot be quantised, and bf16 is too coarse for AdamW's steps.
    for weight_format in WEIGHT_FORMATS if plan.lora_rank else ("float32",):
        for checkpointing in (False, True):
            needs = need(parts, lora, shape, work, plan.rollout_rows, weight_format, checkpointing, plan.autocast)
            if plan.reference_copy:
                needs = replace(needs, weights=2 * needs.weights)
            peak, fixed = needs.peak(plan.micro_batch), needs.weights + needs.training
            turns = largest_batch(needs.turn, fixed + needs.copies, gpu)
            episodes = largest_batch(rollout_bytes(shape, work, 1, 4 if weight_format == "float32" else 2), fixed, gpu)
            figures = needs.weights, needs.training, needs.rollout, needs.update(plan.micro_batch), peak
            row = [weight_format, "yes" if checkpointing else "no", *(f"{v / _GB:.1f}" for v in figures)]
            row += ["yes" if peak <= room(gpu) else "NO", str(turns)]
            rows.append([*row, *([str(turns // work.turns)] if work.turns > 1 else []), str(episodes)])
    header = ["weights in", "checkpointing", "weights", "training", f"rollout of {plan.rollout_rows}"]
    header += [f"update of {plan.micro_batch}", "peak", "fits", "largest micro-batch"]
    header += [*([f"= {kind}s"] if work.turns > 1 else []), "largest rollout"]
    lines = [
        f"{plan.model}: {type(model).__name__} on the meta device, no weights loaded",
        f"shape from {source}",
        "",
        render(["parameters", "number"], [[name, f"{number:,}"] for name, number in counts.items()]),
        "",
        f"image of {plan.image[0]} x {plan.image[1]} -> {size[0]} x {size[1]} pixels -> {tokens} visual tokens "
        f"(patch {shape.patch}, {shape.merge} x {shape.merge} patches a token); exact",
        f"a turn: {tokens} visual + {TEXT_TOKENS} text (assumed) + {plan.new_tokens} new = {work.turn_tokens} tokens"
        + (f"; an episode has {plan.turns}" if plan.turns > 1 else ""),
        cache,
        "",
        "memory in GB (10^9 bytes)\n" + render(header, rows),
        "",
        "training: adapters, gradients, AdamW's moments. peak: weights + training + the larger of rollout and update.",
        f"The peak must stay below {room(gpu) / _GB:.1f} GB: {plan.gpu_memory_gb:g} GB less "
        f"{CONTEXT_BYTES / _GB:g} GB for CUDA, of which {USABLE:.0%} can be filled.",
        "Parameters, weights, visual tokens and cache are exact; rollout and update are estimates (formulas in "
        "agents/vlm/footprint.py).",
        "Every row can be run: --dtype bfloat16, --quantize nf4, --gradient-checkpointing. bfloat16 was run on a GPU.",
    ]
    return "\n".join(lines)
