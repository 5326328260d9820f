"""Shapes of the Qwen-VL models, so that ``--dry-run`` needs no network and no weights.

A configuration on disk (a folder, or the hub's cache) always comes first; these numbers are used only
where there is none. Where they are from, and how they were checked:

- Qwen3-VL 2B: the configuration printed in github.com/xorbitsai/inference/issues/4592.
- Qwen3-VL 4B: text as Qwen3-4B (keras-hub's Qwen3 4B configuration), vision and merger from
  github.com/InternLM/xtuner, xtuner/v1/model/compose/qwen3_vl/qwen3_vl_config.py.
- Qwen3-VL 8B: the same xtuner file, and the configuration of a fine-tune of that size,
  huggingface.co/Steinate/Cortex.
- Qwen2.5-VL 3B and 7B: their printed configurations and module trees (github.com/acproject/duorou,
  docs/qwen2.5vl_graph.md), vocabulary sizes from github.com/QwenLM/Qwen3-VL/issues/1973.

These are third parties' copies: no configuration was read from Qwen's own pages. They give 2.128, 4.438,
8.767, 3.755 and 8.292 billion parameters; for the 8B model lmstudio.ai publishes 8.77 billion.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from ivt_agents.vlm.sources import AGAIN, CONFIG, PROCESSOR, PolicyError, find_source, pixel_limits, scaled
from ivt_env.failures import reading


@dataclass(frozen=True, slots=True)
class _Size:
    """What differs between the sizes of one family."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool
    vocabulary: int = 151_936
    large_vision: bool = False
    """Qwen3-VL from 8B on has the larger vision tower."""


_QWEN3 = {
    "2B": _Size(2048, 6144, 28, 16, 8, tied=True),
    "4B": _Size(2560, 9728, 36, 32, 8, tied=True),
    "8B": _Size(4096, 12288, 36, 32, 8, tied=False, large_vision=True),
}
_QWEN25 = {
    "3B": _Size(2048, 11008, 36, 16, 2, tied=True),
    "7B": _Size(3584, 18944, 28, 28, 4, tied=False, vocabulary=152_064),
}

KNOWN = (
    *(f"Qwen/Qwen3-VL-{size}-{kind}" for size in _QWEN3 for kind in ("Instruct", "Thinking")),
    *(f"Qwen/Qwen2.5-VL-{size}-Instruct" for size in _QWEN25),
)
"""Hub names whose shapes are shipped."""

QWEN3_PIXELS = (65_536, 16_777_216)
"""Smallest and largest image in pixels after resizing, as Qwen3-VL ships its image processor."""
QWEN25_PIXELS = (3_136, 12_845_056)
"""The same for Qwen2.5-VL."""

_TOKENS = {
    "image_token_id": 151_655,
    "video_token_id": 151_656,
    "vision_start_token_id": 151_652,
    "vision_end_token_id": 151_653,
}


def shipped_config(name: str) -> Any:
    """The configuration of a model of ``KNOWN``."""
    size_name = name.split("-")[2]
    if name.startswith("Qwen/Qwen3-VL"):
        return _qwen3(_QWEN3[size_name])
    return _qwen25(_QWEN25[size_name])


def _qwen3(size: _Size) -> Qwen3VLConfig:
    return Qwen3VLConfig(
        text_config={
            "vocab_size": size.vocabulary,
            "hidden_size": size.hidden,
            "intermediate_size": size.intermediate,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "head_dim": 128,
            "max_position_embeddings": 262_144,
            "tie_word_embeddings": size.tied,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5_000_000.0,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 27 if size.large_vision else 24,
            "hidden_size": 1152 if size.large_vision else 1024,
            "intermediate_size": 4304 if size.large_vision else 4096,
            "num_heads": 16,
            "in_channels": 3,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": size.hidden,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [8, 16, 24] if size.large_vision else [5, 11, 17],
        },
        tie_word_embeddings=size.tied,
        **_TOKENS,
    )


def _qwen25(size: _Size) -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": size.vocabulary,
            "hidden_size": size.hidden,
            "intermediate_size": size.intermediate,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "max_position_embeddings": 128_000,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": size.tied,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]},
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "in_channels": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "out_hidden_size": size.hidden,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        tie_word_embeddings=size.tied,
        **_TOKENS,
    )


def find_config(name: str) -> tuple[Any, str]:
    """The configuration of a model and where it is from; nothing is downloaded.

    Raises:
        PolicyError: where it is neither on disk nor among the shipped shapes, or is no Qwen-VL model.
    """
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
            config, source = shipped_config(base), "shapes shipped with this project (see agents/vlm/architectures.py)"
    if config.model_type not in _CLASSES:
        raise PolicyError(f"{name} is a {config.model_type!r}; a dry run knows {sorted(_CLASSES)}")
    return config, source


_CLASSES = {"qwen3_vl": Qwen3VLForConditionalGeneration, "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration}


def build_without_weights(config: Any) -> Any:
    """The real model class on the meta device: every parameter has its shape and no memory."""
    with torch.device("meta"):
        model = _CLASSES[config.model_type](config)
    # Input and output embeddings are one parameter where the configuration says so.
    model.tie_weights()
    return model


def image_limits(config: Any, name: str, pixels: float | None = None) -> tuple[int, int]:
    """Smallest and largest number of pixels that the model's image processor hands on, ``pixels`` times the most."""
    source = find_source(name)
    folder = source.find(*PROCESSOR)
    limits = QWEN3_PIXELS if config.model_type == "qwen3_vl" else QWEN25_PIXELS
    if folder is not None:
        with reading(f"image processor of {folder}", AGAIN, PolicyError), suppress(OSError):  # a hub name: not here
            limits = pixel_limits(
                AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True), folder
            )
    return limits if pixels is None else scaled(limits, pixels, folder or source.base)
