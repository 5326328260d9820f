"""Shapes of the Qwen-VL models, so that ``--dry-run`` needs no network and no weights.

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
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen3VLConfig

from ivt_agents.vlm.sources import AGAIN, CONFIG, PROCESSOR, PolicyError, find_source, pixel_limits, scaled
from ivt_env.failures import reading

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
            config, source = shipped_config(base), "shapes shipped with this project (see agents/vlm/architectures.py)"
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
