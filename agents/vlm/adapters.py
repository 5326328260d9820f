"""LoRA adapters: put on, kept beside a frozen copy, merged where merging is exact enough.

Merging writes ``W + BA`` into the format of ``W``. In float32 that is the same policy; in bfloat16 it rounds away most
of a small adapter, and in NF4 it quantises the sum anew. So adapters on such a base are never merged: they are saved
as adapters, and a later stage trains the adapter further.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from ivt_agents.training.folder import RunError
from ivt_agents.vlm.footprint import LORA_MODULES, lora_parameters
from ivt_agents.vlm.precision import can_merge, stored_as

# peft imports bitsandbytes where it is installed, and that warns of a kernel for CPUs that nobody asked for.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

TRAINED, REFERENCE = "default", "reference"
"""Names of the adapter that learns (peft's own default) and of the frozen copy of where it started."""


def add_lora(model: Any, rank: int, alpha: int | None = None) -> Any:
    """A fresh LoRA adapter on every matrix of the language model; dropout 0, so that ratios start at 1.

    It counts ``alpha / rank`` times; None: twice. Adapters are float32 whatever the base is: AdamW's steps are too
    small for bfloat16.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha or 2 * rank, lora_dropout=0.0, target_modules=LORA_MODULES)
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 by a name that is being retired; nothing a user can do.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        wanted = lora_parameters(model, rank)
        model = get_peft_model(model, config)
    found = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if found != wanted:
        raise RunError(f"lora_r {rank}: {wanted:,} parameters of adapters were asked for, and peft made {found:,}")
    return model


def make_trainable(model: Any, rank: int, alpha: int | None = None, reference: bool = False) -> Any:
    """Decide what is trained: every weight (``rank`` 0), a fresh adapter, or the adapter that the model came with.

    An adapter on float32 weights is merged first, so that "without adapter" is the policy as given. On any other base
    it is trained further; ``reference`` then keeps a frozen copy of it. RunError where that cannot be.
    """
    held = stored_as(model)
    if rank == 0 and not can_merge(model):
        raise RunError(
            f"lora_r 0 on weights in {_words(held)}: every weight would be trained, and steps of AdamW are lost in"
            " the rounding; give a --lora-r, or load with --dtype float32 --quantize none"
        )
    if hasattr(model, "merge_and_unload"):
        if not can_merge(model):
            return _go_on(model, rank, alpha, held, reference)
        # A second adapter would replace the first, and "without adapter" would be the model before its warm start:
        # the reference of the KL divergence must be the policy as given.
        model = model.merge_and_unload()
    model.requires_grad_(rank == 0)
    return add_lora(model, rank, alpha) if rank else model


def layer_matrices(model: Any) -> dict[str, torch.nn.Parameter]:
    """The matrices of the language model's layers that are trained, by name: what Muon is made for."""
    named = ((n, p) for n, p in model.named_parameters() if p.requires_grad)
    return {n: p for n, p in named if p.ndim == 2 and "language_model.layers" in n and "lora_" not in n}


def _go_on(model: Any, rank: int, alpha: int | None, held: dict[str, str], reference: bool) -> Any:
    """Train the adapter that is there."""
    found = model.peft_config[TRAINED].r
    if found != rank:
        raise RunError(
            f"lora_r {rank}, but the model is an adapter of rank {found} on weights in {_words(held)}, which is trained"
            f" further, because merging it would change the policy; give --lora-r {found}"
        )
    if alpha not in (None, scale := model.peft_config[TRAINED].lora_alpha):
        raise RunError(
            f"lora_alpha {alpha}, but the model is an adapter with lora_alpha {scale}, which is trained further; leave"
            " it out"
        )
    if reference:
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        model.add_adapter(REFERENCE, copy.deepcopy(model.peft_config[TRAINED]))
        weights = get_peft_model_state_dict(model, adapter_name=TRAINED)
        set_peft_model_state_dict(model, weights, adapter_name=REFERENCE)
    model.requires_grad_(False)
    model.set_adapter(TRAINED)  # its parameters, and no others, require gradients
    return model


@contextlib.contextmanager
def folded(model: Any) -> Iterator[None]:
    """Inside, each adapted matrix is one matrix, ``W + BA``: a rollout makes hundreds of passes with the same adapter.

    The base's own tensors are put back afterwards, to the bit; nothing is ever subtracted. Where the sum would
    be another policy (weights or passes that are not float32), or the weights are shared out, nothing changes.
    """
    from peft.tuners.lora import Linear

    layers = [m for m in model.modules() if isinstance(m, Linear)]
    autocast = torch.is_autocast_enabled(model.device.type) if layers else False
    exact = not autocast and all(m.base_layer.weight.dtype == torch.float32 and _is_plain(m) for m in layers)
    if not exact or any(isinstance(m, FSDPModule) for m in model.modules()):
        yield
        return
    kept = []
    try:
        with torch.no_grad():
            for layer in layers:
                weight = layer.base_layer.weight
                kept.append((layer, weight.data))
                active = layer.active_adapters[0]
                weight.data = weight.data + layer.get_delta_weight(active)
                layer.merged_adapters.append(active)
        yield
    finally:
        for layer, weight in kept:
            layer.base_layer.weight.data = weight
            layer.merged_adapters.clear()


def _is_plain(layer: Any) -> bool:
    """Whether a layer computes W + BA and nothing else: no DoRA or other variant, no bias, one adapter, switched on."""
    active = list(layer.active_adapters)
    return (
        len(active) == 1
        and active[0] in layer.lora_A
        and active[0] not in layer.lora_variant
        and not layer.lora_bias[active[0]]
        and not layer.disable_adapters
        and not layer.merged
    )


@contextlib.contextmanager
def reference_adapter(model: Any) -> Iterator[None]:
    """Inside, the frozen copy takes the place of the adapter that learns."""
    model.set_adapter(REFERENCE, inference_mode=True)
    try:
        yield
    finally:
        model.set_adapter(TRAINED)


def has_reference(model: Any) -> bool:
    """Whether a frozen copy of the adapter is kept."""
    return REFERENCE in getattr(model, "peft_config", {})


def drop_reference(model: Any) -> None:
    """Forget the frozen copy, so that it is not saved with the policy."""
    if has_reference(model):
        model.delete_adapter(REFERENCE)


def merged(model: Any) -> Any:
    """The model as it is to be saved: one whole where that is exact, else with its adapter."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") and can_merge(model) else model


def _words(held: dict[str, str]) -> str:
    return "NF4" if held["quantize"] == "nf4" else held["dtype"]
