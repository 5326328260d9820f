"""How a vision-language policy is loaded from a folder or the hub."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ivt_agents.vlm.codec import FRAMES, BoxCodec
from ivt_agents.vlm.generation import core_of
from ivt_agents.vlm.policy import POLICY_FILE, VLMPolicy
from ivt_agents.vlm.precision import DTYPES, use_float32_head
from ivt_agents.vlm.prompts import QWEN, Prompts
from ivt_agents.vlm.tiny import weights_folder
from ivt_env.failures import read_json, reading

TINY_NAME = "tiny"
"""The name of the shipped model, wherever a model folder or hub name is taken."""


ATTENTION = ("eager", "sdpa", "flash_attention_2")


class PolicyError(ValueError):
    """A model folder that cannot be used. Says which file, and what to do."""


def load_policy(
    name: str | Path,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    max_new_tokens: int | None = None,
    dtype: torch.dtype | str | None = None,
    quantize: str | None = None,
    attention: str | None = None,
    device: str | None = None,
    batch_size: int = 64,
    layout: str | None = None,
    view: str | None = None,
    reuse: bool = True,
    pixels: float | None = None,
) -> VLMPolicy:
    """Load a policy: the shipped ``tiny`` model, a folder, or a model of the hub by name.

    A folder may hold a whole model or a peft adapter, which is put on the base that it names. The
    tokenizer and the image processor are loaded apart: the combined processor needs torchvision.

    Args:
        name: of the model.
        temperature: 0 for greedy.
        seed: of the sampling.
        max_new_tokens: limit of a turn. None: 48 for a vocabulary of whole words and numbers as the tiny
            model's, else 160.
        dtype: of the weights. None: as the folder says, else float32, or bfloat16 under nf4.
        quantize: ``none`` or ``nf4``, of the base. None: as the folder says, else none.
        attention: one of ``ATTENTION``. None: sdpa on a GPU, else eager.
        device: None: a GPU if there is one.
        batch_size: rows in one forward pass of generation.
        layout: see ``VLMPolicy``. None: as the folder says, else fresh.
        reuse: see ``VLMPolicy``.
        view: see ``VLMPolicy``. None: as the folder says, else overlay.
        pixels: multiplies the most pixels that the image processor hands on of a picture, and is saved with
            the policy. A picture that is smaller than that as it is is not enlarged. None: as the folder says.

    Raises:
        PolicyError: for a folder that is not there, is no model, or does not fit its own weights; for
            ``pixels`` that leave fewer than the processor's least.
    """
    folder = weights_folder() if str(name) == TINY_NAME else Path(name)
    source: str = str(folder) if folder.exists() else str(name)
    looks_like_path = folder.is_absolute() or str(name).startswith((".", "runs")) or str(name).count("/") != 1
    if not folder.exists() and looks_like_path:
        raise PolicyError(
            f"no model at {name}: give a folder that holds one, 'tiny', or a hub name like Qwen/Qwen3-VL-4B-Instruct"
        )
    if folder.exists() and not any((folder / f).exists() for f in ("config.json", "adapter_config.json")):
        raise PolicyError(f"{folder} holds neither config.json nor adapter_config.json: it is no model folder")
    adapter = folder / "adapter_config.json"
    base = source
    if folder.exists() and adapter.exists():
        base = base_of(adapter)
        base = str(weights_folder()) if base == TINY_NAME else base
    recorded = _recorded(folder)
    quantize = quantize or recorded.get("quantize", "none")
    if quantize == "none" and recorded.get("quantize") == "nf4":
        raise PolicyError(
            f"quantize none: {folder} is an adapter that was trained on NF4 weights, which differ from the others by"
            " their rounding; on those it would be another policy. Leave quantize out"
        )
    usual = "bfloat16" if quantize == "nf4" else recorded.get("dtype", "float32")
    dtype = str(dtype or usual).removeprefix("torch.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    # The fused attention kernel's backward pass takes twice as long as plain matrix products at the
    # sizes that a CPU can train.
    attention = attention or ("eager" if device == "cpu" else "sdpa")
    check_weights(dtype, quantize, attention, device)
    model = _load_model(base, dtype, quantize, device)
    if base != source:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, source)
    if quantize == "none":  # quantised weights were made where they are to stay
        model.to(device)
    core_of(model).set_attn_implementation(attention)
    use_float32_head(model)
    settings: dict[str, Any] = {"frame": FRAMES.get(model.config.model_type), "layout": "fresh", "view": "overlay"}
    settings |= {"prompt": QWEN.text, "closeup": QWEN.closeup, "with_closeup": QWEN.with_closeup}
    settings |= recorded
    if settings["frame"] is None:
        raise PolicyError(f"{name}: model type {model.config.model_type!r} has no box codec; known: {sorted(FRAMES)}")
    whole_words = model.config.get_text_config().vocab_size < 10_000
    return VLMPolicy(
        model,
        AutoTokenizer.from_pretrained(source, padding_side="left"),
        _image_processor(source, pixels),
        Prompts(settings["prompt"], settings["closeup"], settings["with_closeup"]),
        BoxCodec(settings["frame"]),
        max_new_tokens=max_new_tokens or (48 if whole_words else 160),
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
        layout=layout or settings["layout"],
        view=view or settings["view"],
        reuse=reuse,
    )


def _image_processor(source: str, pixels: float | None) -> Any:
    """The image processor of a model, with ``pixels`` times its budget.

    Pillow's, also where torchvision is installed: its resizing gives other pixels, so the same model would
    see other images on another machine.
    """
    processor = AutoImageProcessor.from_pretrained(source, backend="pil")
    if pixels is None:
        return processor
    # "Edges" by name, areas by meaning: the least and the most pixels of a picture after resizing.
    least, most = int(processor.size["shortest_edge"]), int(processor.size["longest_edge"])
    wanted = round(most * pixels) if math.isfinite(pixels) else 0
    if wanted < least:
        raise PolicyError(
            f"pixels {pixels:g}: {source} takes at most {most} pixels of a picture and never fewer than {least};"
            f" give at least {least / most:g}"
        )
    return AutoImageProcessor.from_pretrained(
        source, backend="pil", size={"shortest_edge": least, "longest_edge": wanted}
    )


def _recorded(folder: Path) -> dict[str, Any]:
    """What ``VLMPolicy.save`` wrote about a policy; empty for any other model."""
    path = folder / POLICY_FILE
    return read_json(path, kind=PolicyError) if path.exists() else {}


def base_of(adapter: Path) -> str:
    """The base model that an ``adapter_config.json`` names."""
    with reading(adapter, kind=PolicyError):
        return str(read_json(adapter)["base_model_name_or_path"])


def check_weights(dtype: str, quantize: str, attention: str | None, device: str) -> None:
    """Refuse formats that cannot be had here, before anything is read.

    Raises:
        PolicyError: says what is missing, or what contradicts what.
    """
    if dtype not in DTYPES:
        raise PolicyError(f"dtype {dtype}: give one of {', '.join(DTYPES)}")
    if quantize not in ("none", "nf4"):
        raise PolicyError(f"quantize {quantize}: give none or nf4")
    if quantize == "nf4" and dtype != "bfloat16":
        raise PolicyError(f"dtype {dtype} with quantize nf4: what is not quantised is held in bfloat16; leave it out")
    if quantize == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise PolicyError('quantize nf4 needs the package bitsandbytes: pip install "ivt-env[quantize]"')
    if attention not in (None, *ATTENTION):
        raise PolicyError(f"attention {attention}: give one of {', '.join(ATTENTION)}")
    if attention != "flash_attention_2":
        return
    if device == "cpu" or importlib.util.find_spec("flash_attn") is None:
        raise PolicyError("attention flash_attention_2 needs a GPU and the package flash-attn; sdpa needs neither")
    if dtype != "bfloat16":
        raise PolicyError(f"attention flash_attention_2 with dtype {dtype}: it needs 16 bits; add --dtype bfloat16")


def _load_model(source: str, dtype: str, quantize: str, device: str) -> Any:
    """The model, refusing weights that do not fit their own configuration."""
    if Path(source).exists():
        transformers_logging.disable_progress_bar()  # a local file is read in a blink
    options: dict[str, Any] = {"dtype": DTYPES[dtype], "output_loading_info": True}
    if quantize == "nf4":
        options |= {"quantization_config": nf4_config(), "device_map": {"": device}}
    try:
        model, report = AutoModelForImageTextToText.from_pretrained(source, **options)
    except (RuntimeError, OSError, ValueError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise PolicyError(
            f"{source} could not be loaded ({first}). Is it complete, and do weights and config.json belong together?"
        ) from error
    wrong = {
        k: sorted(map(str, report[k])) for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[k]
    }
    if wrong:
        kind, keys = next(iter(wrong.items()))
        raise PolicyError(
            f"{source}: weights and config.json do not belong together: {kind.replace('_', ' ')} {keys[:3]}"
        )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On some CPUs bitsandbytes lays out the weights anew at the first pass in eval mode, for a
            # kernel without a backward pass: every gradient that passes through them would be lost.
            module.support_avx512bf16_for_cpu = False
    return model


def nf4_config() -> Any:
    """Four bits for the decoder's matrices, computed with in bfloat16, scales quantised once more.

    Vision tower, embeddings, norms and output head stay in bfloat16: together they are a fifth of a 4B
    model, and errors there reach every token.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )
