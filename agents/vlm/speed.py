"""Options that change the update's memory or speed and not its result. Rollouts run in eval mode, as they were."""

from __future__ import annotations

from typing import Any

from ivt_agents.vlm.generation import core_of


def can_pack(model: Any) -> bool:
    """Whether turns may share a row in the update: flash attention takes no mask that could tell them apart."""
    return bool(core_of(model).config._attn_implementation != "flash_attention_2")


def checkpoint_layers(model: Any) -> None:
    """Keep each layer's input alone for the backward pass and compute the layer again there.

    Non-reentrant: gradients reach adapters inside a layer although no input of the first layer requires one.
    """
    core_of(model).activation_checkpointing_enable({"use_reentrant": False})
