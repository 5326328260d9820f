"""What a model weighs: parameters by part, memory by part, and the batch that fits a GPU.

Counts of parameters, bytes of weights and visual tokens are exact. Everything about activations is an
**estimate**, with its formula beside it; the allocator's waste and the context of the GPU are a flat
allowance. Pure functions of shapes: nothing here loads weights or touches a GPU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

LORA_MODULES = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
"""Which matrices get adapters: all of the language model, none of the vision tower."""

WEIGHT_FORMATS = ("float32", "bfloat16", "nf4")

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes per quantised weight: 4 bits, one 8-bit scale for 64 weights and one float32 for 256 scales
(double quantisation, QLoRA, arXiv 2305.14314, section 3)."""

TRAINED_BYTES = 12
"""Per trained parameter beside its own value: float32 gradient and AdamW's two moments."""

LOGIT_BYTES = 24
"""Per sampled token and vocabulary entry. The backward pass keeps the log-softmax, its exponential and its
clamped copy in float32 (12); as much again lives for a moment while they and their gradients are made."""

CONTEXT_BYTES = 10**9
"""CUDA's own memory."""
USABLE = 0.92
"""Share of the rest that can be filled before fragmentation ends the run."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Numbers of parameters."""

    vision: int
    text: int
    """Decoder layers and norms."""
    embeddings: int
    """Input embeddings, and the output head where it is a matrix of its own."""
    quantisable: int
    """Of all, those that ``--quantize nf4`` quantises: the matrices of the decoder layers; no biases."""

    @property
    def total(self) -> int:
        """All of them; a parameter in two places counts once."""
        return self.vision + self.text + self.embeddings


def count_parts(model: nn.Module) -> Parts:
    """Count a Qwen-VL model's parameters; it may live on the meta device."""
    sums = {"vision": 0, "text": 0, "embeddings": 0}
    for name, parameter in model.named_parameters():
        part = "vision" if "visual." in name else "text"
        if "embed_tokens" in name or "lm_head" in name:
            part = "embeddings"
        sums[part] += parameter.numel()
    linear = (m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "language_model.layers" in name)
    return Parts(**sums, quantisable=sum(m.weight.numel() for m in linear))


def lora_parameters(model: nn.Module, rank: int) -> int:
    """Parameters of adapters of this rank on ``LORA_MODULES``: rank * (in + out) for each matrix."""
    found = (m for name, m in model.named_modules() if isinstance(m, nn.Linear) and re.fullmatch(LORA_MODULES, name))
    return sum(rank * (m.in_features + m.out_features) for m in found)


def weight_bytes(parts: Parts, weight_format: str) -> float:
    """Bytes of the frozen or trained weights themselves."""
    if weight_format == "nf4":
        return parts.quantisable * NF4_BYTES + (parts.total - parts.quantisable) * 2
    return parts.total * {"float32": 4, "bfloat16": 2}[weight_format]


def training_bytes(parts: Parts, lora: int) -> float:
    """Bytes of what training adds to the weights: adapters (float32), gradients and AdamW's moments.

    Args:
        parts: of the model.
        lora: number of adapter parameters; 0: every weight is trained.
    """
    return lora * (4 + TRAINED_BYTES) if lora else parts.total * TRAINED_BYTES


def resized(height: int, width: int, patch: int, merge: int, limits: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an image after the image processor: the library's own rule."""
    rows, columns = smart_resize(height, width, patch * merge, *limits)
    return int(rows), int(columns)


def visual_tokens(height: int, width: int, patch: int, merge: int, limits: tuple[int, int]) -> int:
    """Tokens that an image takes in the language model: one for merge x merge patches. Exact."""
    rows, columns = resized(height, width, patch, merge, limits)
    return rows // (patch * merge) * (columns // (patch * merge))


@dataclass(frozen=True, slots=True)
class Shape:
    """Widths and depths that activations depend on."""

    hidden: int
    intermediate: int
    layers: int
    query: int
    """Query heads times head size."""
    key_value: int
    """Key-value heads times head size."""
    vocabulary: int
    vision_hidden: int
    vision_intermediate: int
    vision_layers: int
    patch: int
    merge: int
    deepstack: int
    """Extra feature maps that the vision tower hands to the first text layers."""

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Read from a Qwen-VL configuration."""
        text, vision = config.text_config, config.vision_config
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            hidden=text.hidden_size,
            intermediate=text.intermediate_size,
            layers=text.num_hidden_layers,
            query=text.num_attention_heads * head,
            key_value=text.num_key_value_heads * head,
            vocabulary=text.vocab_size,
            vision_hidden=vision.hidden_size,
            vision_intermediate=vision.intermediate_size,
            vision_layers=vision.depth,
            patch=vision.patch_size,
            merge=vision.spatial_merge_size,
            # Qwen2.5-VL has none.
            deepstack=len(getattr(vision, "deepstack_visual_indexes", ())),
        )


@dataclass(frozen=True, slots=True)
class Workload:
    """What one training step looks like to the memory."""

    image_tokens: int
    """Visual tokens of one image."""
    text_tokens: int
    """Prompt tokens beside the image."""
    new_tokens: int
    """Sampled or taught tokens of a turn, at most."""
    turns: int
    """Actions of an episode."""

    @property
    def turn_tokens(self) -> int:
        """One turn: each is a fresh prompt with one image."""
        return self.image_tokens + self.text_tokens + self.new_tokens


def layer_bytes(shape: Shape, numbers: str = "autocast") -> int:
    """Kept for the backward pass by one adapted decoder layer, per token. Estimate.

    With h hidden, q query, k key-value and m intermediate width, in elements of 4 bytes (``float32``) or 2:

    - ``float32``: inputs of both norms and of the seven adapted matrices (4h, of which q, k, v share one, as
      do gate and up), of the norms of queries and keys (q + k), attention without a stored L x L matrix (q
      in and out, k and v: 2q + 2k), the gated product and what goes into down (4m).
    - ``autocast`` (float32 residuals, bf16 matrices): norms and their inputs in float32 (4h, 2q + 2k), and a
      cast copy for each adapter (5h, q); the rest as above.
    - ``bfloat16`` without autocast: as with it, but peft gives its float32 adapters float32 copies
      (5h, q and m more).

    A test compares all with what autograd keeps: within 2 %, but for autocast over float32 weights, where
    the estimate is a fifth too high.
    """
    h, q, k, m = shape.hidden, shape.query, shape.key_value, shape.intermediate
    if numbers == "float32":
        return 4 * (4 * h + 3 * q + 3 * k + 4 * m)
    elements = 9 * h + 5 * q + 4 * k + 4 * m
    return 2 * (elements if numbers == "autocast" else elements + 5 * h + q + m)


def activation_bytes(
    shape: Shape, work: Workload, turns: int, checkpointing: bool, trains_vision: bool, numbers: str = "autocast"
) -> float:
    """Kept by the forward pass of a micro-batch of ``turns`` turns until its backward pass. Estimate.

    With checkpointing a layer keeps its input alone (h elements) and one layer at a time is computed
    again in full. The vision tower keeps nothing while it is frozen but its result (one vector for each
    merged token and deepstack map); where it is trained, a layer keeps 8h + 2m elements per patch. Logits
    are computed at answer tokens only and cost ``LOGIT_BYTES`` * vocabulary for each.
    """
    tokens = turns * work.turn_tokens
    element = 4 if numbers == "float32" else 2
    layer = layer_bytes(shape, numbers) * tokens
    text = tokens * element * shape.hidden * shape.layers + layer if checkpointing else layer * shape.layers
    patches = turns * work.image_tokens * shape.merge**2
    block = element * patches * (8 * shape.vision_hidden + 2 * shape.vision_intermediate)
    vision = block  # frozen: one block at a time
    if trains_vision and checkpointing:
        vision = block + element * patches * shape.vision_hidden * shape.vision_layers
    elif trains_vision:
        vision = block * shape.vision_layers
    features = turns * work.image_tokens * shape.hidden * element * (1 + shape.deepstack)
    logits = turns * work.new_tokens * shape.vocabulary * LOGIT_BYTES
    return text + vision + features + logits


def cache_bytes(shape: Shape, work: Workload, episodes: int, layout: str = "fresh", element: int = 2) -> int:
    """Key-value cache of ``episodes`` episodes played side by side. Exact for full rows.

    Args:
        shape: of the model.
        work: lengths.
        episodes: rows of a generation batch.
        layout: ``fresh``: each turn is a prompt of its own and the cache is dropped after it, which is
            what this project plays. ``prefix``: one growing sequence with an image a turn.
        element: bytes of one number.
    """
    length = work.turn_tokens * (work.turns if layout == "prefix" else 1)
    return 2 * shape.layers * shape.key_value * element * length * episodes


def rollout_bytes(shape: Shape, work: Workload, rows: int, element: int = 2) -> int:
    """Peak of generation beside the weights: the cache, and one layer of the prefill. Estimate.

    Args:
        shape: of the model.
        work: lengths.
        rows: episodes in one generation batch; behind the first turn every prompt is another.
        element: bytes of one number.
    """
    # Nothing is kept for a backward pass: this is one layer's, with room to spare.
    prefill = rows * (work.image_tokens + work.text_tokens) * layer_bytes(shape, "float32") * element // 4
    patches = rows * work.image_tokens * shape.merge**2
    vision = element * patches * (8 * shape.vision_hidden + 2 * shape.vision_intermediate)
    step = rows * shape.vocabulary * 4 * 4  # logits, a masked copy, log-softmax and its exponential
    return cache_bytes(shape, work, rows, element=element) + max(prefill, vision) + step


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of one way to train: what a dry run prints, and what a benchmark is compared with."""

    weights: float
    training: float
    rollout: float
    copies: float
    """bf16 copies that autocast makes of float32 matrices and adapters, which the backward pass needs again."""
    turn: float
    """Activations of one turn."""

    def update(self, micro_batch: int) -> float:
        """A forward and backward pass of ``micro_batch`` turns."""
        return self.copies + self.turn * micro_batch

    def peak(self, micro_batch: int) -> float:
        """Weights and training, and the larger of rollout and update."""
        return self.weights + self.training + max(self.rollout, self.update(micro_batch))


def need(
    parts: Parts,
    lora: int,
    shape: Shape,
    work: Workload,
    rows: int,
    weight_format: str,
    checkpointing: bool,
    autocast: bool,
) -> Need:
    """What training with weights in ``weight_format`` needs.

    Args:
        parts: of the model.
        lora: number of adapter parameters; 0: every weight is trained.
        shape: of the model.
        work: lengths.
        rows: episodes played side by side.
        weight_format: one of ``WEIGHT_FORMATS``.
        checkpointing: layers are computed again in the backward pass.
        autocast: the update runs in bf16.
    """
    element = 4 if weight_format == "float32" else 2
    numbers = "autocast" if autocast else "float32" if element == 4 else "bfloat16"
    return Need(
        weight_bytes(parts, weight_format),
        training_bytes(parts, lora),
        rollout_bytes(shape, work, rows, element),
        2 * (lora + (parts.text if element == 4 else 0)) if autocast else 0,
        activation_bytes(shape, work, 1, checkpointing, lora == 0, numbers),
    )


def room(gpu_bytes: float) -> float:
    """What of a GPU's memory tensors can fill."""
    return max(0.0, (gpu_bytes - CONTEXT_BYTES) * USABLE)


def largest_batch(one: float, fixed: float, gpu_bytes: float) -> int:
    """Most turns, or episodes, of ``one`` byte count each that fit beside ``fixed`` bytes; 0: not even one.

    Activations and caches are proportional to their number, so a division says it all.
    """
    return max(0, int((room(gpu_bytes) - fixed) // one))
