"""What a model weighs: parameters by part, memory by part, and the batch that fits a GPU.

Parameters, bytes of weights and visual tokens are exact. Activations are an **estimate**, with its formula beside it;
the allocator's waste and the context of the GPU are a flat allowance.
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
    """Adapters (float32), gradients and AdamW's moments; ``lora`` of them, 0: every weight is trained."""
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
        heads = (text.num_attention_heads * head, text.num_key_value_heads * head)
        widths = (text.hidden_size, text.intermediate_size, text.num_hidden_layers, *heads, text.vocab_size)
        tower = (vision.hidden_size, vision.intermediate_size, vision.depth)
        # Qwen2.5-VL has no deepstack.
        deepstack = len(getattr(vision, "deepstack_visual_indexes", ()))
        return cls(*widths, *tower, vision.patch_size, vision.spatial_merge_size, deepstack)


@dataclass(frozen=True, slots=True)
class Workload:
    """Tokens of a turn (of the image, of the prompt beside it, sampled or taught at most), and turns of an episode."""

    image_tokens: int
    text_tokens: int
    new_tokens: int
    turns: int

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

    All are within 2 % of what autograd keeps, except autocast over float32 weights: there a fifth too high.
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

    With checkpointing a layer keeps its input alone (h elements) and one layer at a time is computed again in full.
    A frozen vision tower keeps its result (a vector for each merged token and deepstack map); in a trained one a
    layer keeps 8h + 2m elements per patch. Logits cost ``LOGIT_BYTES`` * vocabulary for each completion token.
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
    """KV cache of ``episodes`` episodes played side by side, ``element`` bytes a number. Exact for full rows."""
    length = work.turn_tokens * (work.turns if layout == "prefix" else 1)
    return 2 * shape.layers * shape.key_value * element * length * episodes


def rollout_bytes(shape: Shape, work: Workload, rows: int, element: int = 2) -> int:
    """Peak of generating ``rows`` completions beside the weights: the cache, one layer of the prefill. Estimate."""
    # Nothing is kept for a backward pass: this is one layer's, with room to spare.
    prefill = rows * (work.image_tokens + work.text_tokens) * layer_bytes(shape, "float32") * element // 4
    patches = rows * work.image_tokens * shape.merge**2
    vision = element * patches * (8 * shape.vision_hidden + 2 * shape.vision_intermediate)
    step = rows * shape.vocabulary * 4 * 4  # logits, a masked copy, log-softmax and its exponential
    return cache_bytes(shape, work, rows, element=element) + max(prefill, vision) + step


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of one way to train."""

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
    """What training needs with weights in ``weight_format`` and ``rows`` episodes side by side."""
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
    """Most turns, or episodes, of ``one`` bytes each that fit beside ``fixed`` bytes; 0: not even one."""
    return max(0, int((room(gpu_bytes) - fixed) // one))
