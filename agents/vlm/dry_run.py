"""``--dry-run``: the true architecture without weights and network, what it needs, and what fits.

A configuration on disk (a folder, or the hub's cache) comes first; these numbers are used only where there is none.
They are third parties' copies, not read from Qwen's own pages:

- Qwen3-VL 2B: the configuration printed in github.com/xorbitsai/inference/issues/4592.
- Qwen3-VL 4B: text as Qwen3-4B (keras-hub's configuration), vision and merger from github.com/InternLM/xtuner,
  xtuner/v1/model/compose/qwen3_vl/qwen3_vl_config.py.
- Qwen3-VL 8B: the same xtuner file, and the configuration of a fine-tune, huggingface.co/Steinate/Cortex.
- Qwen2.5-VL 3B and 7B: github.com/acproject/duorou, docs/qwen2.5vl_graph.md; vocabulary sizes from
  github.com/QwenLM/Qwen3-VL/issues/1973.

They give 2.128, 4.438, 8.767, 3.755 and 8.292 billion parameters; lmstudio.ai publishes 8.77 billion for the 8B model.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen3VLConfig

from ivt_agents.vlm import footprint
from ivt_agents.vlm.sources import AGAIN, CONFIG, PROCESSOR, PolicyError, find_source, pixel_limits, scaled
from ivt_env.failures import reading
from ivt_env.metrics.table import render

# Hidden and intermediate width, layers, heads, key-value heads; output head tied; vocabulary.
_SIZES: dict[str, tuple[int, int, int, int, int, bool, int]] = {
    "Qwen3-VL-2B": (2048, 6144, 28, 16, 8, True, 151_936),
    "Qwen3-VL-4B": (2560, 9728, 36, 32, 8, True, 151_936),
    "Qwen3-VL-8B": (4096, 12288, 36, 32, 8, False, 151_936),
    "Qwen2.5-VL-3B": (2048, 11008, 36, 16, 2, True, 151_936),
    "Qwen2.5-VL-7B": (3584, 18944, 28, 28, 4, False, 152_064),
}

KNOWN = tuple(
    f"Qwen/{size}-{kind}"
    for size in _SIZES
    for kind in (("Instruct", "Thinking") if size.startswith("Qwen3") else ("Instruct",))
)
"""Hub names whose shapes are shipped."""

PIXELS = {"qwen3_vl": (65_536, 16_777_216), "qwen2_5_vl": (3_136, 12_845_056)}
"""Smallest and largest image in pixels after resizing, as the image processors are shipped, by model type."""

TEXT_TOKENS = 160
"""Assumed for a prompt beside its image: the question (about 100), the expression, the box, the chat template.
Counting them would need the model's tokenizer."""

GENERATION_ROWS = 64
"""Most prompts that ``load_policy`` generates for at once."""

_GB = 1e9


def shipped_config(name: str) -> Any:
    """The configuration of a model of ``KNOWN``; what is not named here is transformers' default."""
    size = name.removeprefix("Qwen/").rpartition("-")[0]
    hidden, intermediate, layers, heads, kv_heads, tied, vocabulary = _SIZES[size]
    text: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
    }
    rope = {"rope_type": "default"}
    if size.startswith("Qwen2.5"):
        text |= {"max_position_embeddings": 128_000, "rms_norm_eps": 1e-6}
        text["rope_parameters"] = rope | {"rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]}
        vision: dict[str, Any] = {"hidden_size": 1280, "out_hidden_size": hidden}
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    text |= {"max_position_embeddings": 262_144}
    mrope = {"rope_theta": 5_000_000.0, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    vision = {"out_hidden_size": hidden}
    if size != "Qwen3-VL-8B":  # whose vision tower is the default
        vision |= {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
    return Qwen3VLConfig(
        text_config=text | {"rope_parameters": rope | mrope}, vision_config=vision, tie_word_embeddings=tied
    )


def find_config(name: str) -> tuple[Any, str]:
    """The configuration of a model and where it is from; PolicyError where it is not here or no Qwen-VL model."""
    base = find_source(name).base
    with reading(Path(base) / CONFIG, AGAIN, PolicyError):
        try:
            config = AutoConfig.from_pretrained(base, local_files_only=True)
            source = base if Path(base).exists() else "the hub's cache on this machine"
        except OSError as error:
            if Path(base).exists():
                raise
            if base not in KNOWN:
                raise PolicyError(
                    f"the shape of {base} is not known without its config.json: give a folder that holds one, or one "
                    f"of {', '.join(KNOWN)}"
                ) from error
            config, source = shipped_config(base), "shapes shipped with this project (see agents/vlm/dry_run.py)"
    if config.model_type not in PIXELS:
        raise PolicyError(f"{name} is a {config.model_type!r}; a dry run knows {sorted(PIXELS)}")
    return config, source


def build_without_weights(config: Any) -> Any:
    """The real model class on the meta device: every parameter has its shape and no memory."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def image_limits(config: Any, name: str, pixels: float | None = None) -> tuple[int, int]:
    """Smallest and largest number of pixels that the model's image processor hands on, ``pixels`` times the most."""
    source = find_source(name)
    folder = source.find(*PROCESSOR)
    limits = PIXELS[config.model_type]
    if folder is not None:
        with reading(f"image processor of {folder}", AGAIN, PolicyError), suppress(OSError):  # a hub name: not here
            found = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
            limits = pixel_limits(found, folder)
    return limits if pixels is None else scaled(limits, pixels, folder or source.base)


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
        if self.gpu_memory_gb <= 0:
            raise ValueError(f"gpu_memory_gb {self.gpu_memory_gb}: give the GPU's gigabytes")
        if min(self.image) < 1:
            raise ValueError(f"image {self.image}: give height and width in pixels")


def dry_run(plan: Plan) -> str:
    """The report of a dry run, as text."""
    config, source = find_config(plan.model)
    model = build_without_weights(config)
    parts, lora = footprint.count_parts(model), footprint.lora_parameters(model, plan.lora_rank)
    shape, limits = footprint.Shape.of(config), image_limits(config, plan.model, plan.pixels)
    size = footprint.resized(*plan.image, shape.patch, shape.merge, limits)
    tokens = footprint.visual_tokens(*plan.image, shape.patch, shape.merge, limits)
    work = footprint.Workload(tokens, TEXT_TOKENS, plan.new_tokens, plan.turns)
    kind = "episode" if plan.turns > 1 else "demonstration"
    fresh, prefix = (footprint.cache_bytes(shape, work, 1, layout) / _GB for layout in ("fresh", "prefix"))
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
    for weight_format in footprint.WEIGHT_FORMATS if plan.lora_rank else ("float32",):
        for checkpointing in (False, True):
            held = weight_format, checkpointing, plan.autocast
            needs = footprint.need(parts, lora, shape, work, plan.rollout_rows, *held)
            if plan.reference_copy:
                needs = replace(needs, weights=2 * needs.weights)
            peak, fixed = needs.peak(plan.micro_batch), needs.weights + needs.training
            turns = footprint.largest_batch(needs.turn, fixed + needs.copies, gpu)
            rollout = footprint.rollout_bytes(shape, work, 1, 4 if weight_format == "float32" else 2)
            episodes = footprint.largest_batch(rollout, fixed, gpu)
            figures = needs.weights, needs.training, needs.rollout, needs.update(plan.micro_batch), peak
            row = [weight_format, "yes" if checkpointing else "no", *(f"{v / _GB:.1f}" for v in figures)]
            row += ["yes" if peak <= footprint.room(gpu) else "NO", str(turns)]
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
        f"The peak must stay below {footprint.room(gpu) / _GB:.1f} GB: {plan.gpu_memory_gb:g} GB less "
        f"{footprint.CONTEXT_BYTES / _GB:g} GB for CUDA, of which {footprint.USABLE:.0%} can be filled.",
        "Parameters, weights, visual tokens and cache are exact; rollout and update are estimates (formulas in "
        "agents/vlm/footprint.py).",
        "Every row can be run: --dtype bfloat16, --quantize nf4, --gradient-checkpointing. bfloat16 was run on a GPU.",
    ]
    return "\n".join(lines)
