"""How a vision-language policy is loaded from a folder or the hub."""

from __future__ import annotations

import importlib.util
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from ivt_agents.vlm import sources
from ivt_agents.vlm.generation import core_of
from ivt_agents.vlm.policy import OWN, VLMPolicy
from ivt_agents.vlm.precision import DTYPES, can_merge, stored_as, use_float32_head
from ivt_agents.vlm.prompts import LAYOUTS
from ivt_agents.vlm.sources import AGAIN, CONFIG, PolicyError
from ivt_env.failures import reading

ATTENTION = ("eager", "sdpa", "flash_attention_2")
SMALL = 10_000_000
"""Parameters up to which a model gains nothing, and loses much on a busy machine, by more than one thread."""


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

    A folder may hold a whole model or a peft adapter, which is put on the base that it names (a model, or an adapter
    again). Tokenizer and image processor are loaded apart: the combined processor needs torchvision. One answer is
    asked for, so that a folder that cannot be played is refused here. Beside a small model on a CPU PyTorch gets one
    thread (see ``fit_threads``).

    What is None is as the folder says. Else: ``max_new_tokens`` 48 for a vocabulary of whole words like the tiny
    model's, and 160; ``dtype`` float32, or bfloat16 under ``quantize`` ``nf4``; ``attention`` sdpa;
    ``device`` a GPU if there is one; ``layout`` fresh; ``view`` overlay. ``pixels`` multiplies the most pixels of an
    image after the image processor, which never enlarges it to that, and is saved with the policy. ``layout``,
    ``view`` and ``reuse``: see ``VLMPolicy``. With another view than the folder's, boxes are drawn as the environment
    draws them by default. PolicyError for what cannot be used.
    """
    if layout not in (None, *LAYOUTS):
        raise PolicyError(f"layout {layout!r}: choose {' or '.join(LAYOUTS)}")
    source = sources.find_source(name)
    with reading(Path(source.base) / CONFIG, AGAIN, PolicyError):
        config = AutoConfig.from_pretrained(source.base)
    asked, held = sources.read_settings(source, config.model_type)
    quantize = quantize or held.get("quantize", "none")
    if quantize == "none" and held.get("quantize") == "nf4":
        raise PolicyError(
            f"quantize none: {source.name} is an adapter that was trained on NF4 weights, which differ from the others"
            " by their rounding; on those it would be another policy. Leave quantize out"
        )
    usual = "bfloat16" if quantize == "nf4" else held.get("dtype", "float32")
    dtype = str(dtype or usual).removeprefix("torch.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    attention = attention or "sdpa"
    check_weights(dtype, quantize, attention, device)
    with reading(Path(source.base) / CONFIG, AGAIN, PolicyError):
        sources.check_config(source, config)
    tokenizer = sources.load_tokenizer(source, config)
    processor = sources.load_image_processor(source, config, pixels)
    model = _load_model(source, dtype, quantize, device)
    if quantize == "none":  # quantised weights were made where they are to stay
        model.to(device)
    fit_threads(model)
    shown = asked.shown
    if view not in (None, asked.view):
        # In another view than its own, its overlay may hide what no close-up shows.
        shown |= {"view": view, "overlay": {"trail": bool((asked.overlay or {}).get("trail"))}}
    with reading(source.name, AGAIN, PolicyError):
        core_of(model).set_attn_implementation(attention)
        use_float32_head(model)
        _read_back(model, source, {"dtype": dtype, "quantize": quantize}, attention)
        whole_words = config.get_text_config().vocab_size < 10_000
        policy = VLMPolicy(
            model,
            tokenizer,
            processor,
            asked.prompts,
            asked.codec,
            max_new_tokens=max_new_tokens or (48 if whole_words else 160),
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
            layout=layout or asked.layout,
            shown=shown,
            reuse=reuse,
            name=str(name),
        )
        policy.check()
    opener = held.get("first_answers", OWN)
    if opener != OWN:
        same: dict[str, Any] = {"dtype": dtype, "attention": attention, "device": device, "batch_size": batch_size}
        with reading(source.name, kind=PolicyError):
            policy.opener = load_policy(opener, **same, max_new_tokens=max_new_tokens, reuse=reuse)
    return policy


def _read_back(model: Any, source: sources.Source, held: dict[str, str], attention: str) -> None:
    """Refuse a model that is not held and computed as it was asked for, or whose weights are not finite."""
    core = core_of(model)
    parts = (core.config, core.config.get_text_config(), core.config.vision_config)
    found = stored_as(model) | {"attention": "/".join(sorted({str(part._attn_implementation) for part in parts}))}
    for key, wanted in (held | {"attention": attention}).items():
        if found[key] != wanted:
            raise PolicyError(f"{source.name}: {key} {wanted} was asked for, and it is {found[key]}")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.isfinite().all():
            raise PolicyError(f"{source.name}: weight {name} is not finite (NaN or infinity); {AGAIN}")


def check_weights(dtype: str, quantize: str, attention: str | None, device: str) -> None:
    """Refuse (``PolicyError``) formats that cannot be had here or contradict each other, before anything is read."""
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


def _load_model(source: sources.Source, dtype: str, quantize: str, device: str) -> Any:
    """The model with its adapters, refusing weights that do not fit their own configuration."""
    if Path(source.base).exists():
        transformers_logging.disable_progress_bar()  # a local file is read in a blink
    options: dict[str, Any] = {"dtype": DTYPES[dtype], "output_loading_info": True}
    if quantize == "nf4":
        # Vision tower, embeddings, norms and output head stay in bfloat16: together they are a fifth of a 4B model, and
        # errors there reach every token.
        four_bits = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["model.visual", "lm_head"],
        )
        options |= {"quantization_config": four_bits, "device_map": {"": device}}
    with reading(source.base, f"is it complete, and do weights and {CONFIG} belong together? {AGAIN}", PolicyError):
        model, report = AutoModelForImageTextToText.from_pretrained(source.base, **options)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, report[kind])):
            what = f"{kind.replace('_', ' ')} {keys[:3]}"
            raise PolicyError(f"{source.base}: weights and {CONFIG} do not belong together: {what}; {AGAIN}")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On some CPUs bitsandbytes lays out the weights anew at the first pass in eval mode, for a
            # kernel without a backward pass: every gradient that passes through them would be lost.
            module.support_avx512bf16_for_cpu = False
    for folder in reversed(source.adapters):
        if hasattr(model, "merge_and_unload"):
            if not can_merge(model):
                raise PolicyError(
                    f"{folder} is an adapter on an adapter, whose merging into weights in {dtype}, quantize {quantize}"
                    " would change the policy: load it with dtype float32 and quantize none"
                )
            model = model.merge_and_unload()
        model = _put_on(model, folder)
    return model


def _put_on(model: Any, folder: Path) -> Any:
    """A model with the adapter of a folder, all of which must have found its place."""
    from peft import PeftModel
    from peft.utils import load_peft_weights

    with reading(folder, f"does the adapter belong to this base? {AGAIN}", PolicyError), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*missing adapter keys.*")  # compared below
        model = PeftModel.from_pretrained(model, str(folder))
        stored = {key for key in load_peft_weights(str(folder), device="cpu") if "lora_" in key}
    held = {name.replace(".default", "") for name, _ in model.named_parameters() if "lora_" in name}
    if held != stored:
        raise PolicyError(
            f"{folder}: adapter_config.json and weights do not belong together: {len(held - stored)} matrices have no"
            f" weights, and {len(stored - held)} weights have no matrix; {AGAIN}"
        )
    return model


def fit_threads(model: Any) -> None:
    """One thread for a small model on a CPU, unless OMP_NUM_THREADS or MKL_NUM_THREADS says otherwise.

    Threads of so short operations wait for each other most of the time. By size and not by a measurement, because the
    number of threads decides the last digits, and a run must be the same when it is repeated.
    """
    small = sum(p.numel() for p in model.parameters()) < SMALL
    if small and model.device.type == "cpu" and not {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys():
        torch.set_num_threads(1)


def can_pack(model: Any) -> bool:
    """Whether turns may share a row in the update: flash attention takes no mask that could tell them apart."""
    return bool(core_of(model).config._attn_implementation != "flash_attention_2")


def checkpoint_layers(model: Any) -> None:
    """Keep each layer's input alone for the backward pass and compute the layer again there.

    Non-reentrant: gradients reach adapters inside a layer although no input of the first layer requires one.
    """
    core_of(model).activation_checkpointing_enable({"use_reentrant": False})
