"""Options of both training commands that say how a large model is held and computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from ivt_agents.command import Hidden
from ivt_agents.training.run import RunError
from ivt_agents.vlm.load import check_weights
from ivt_agents.vlm.speed import can_pack, checkpoint_layers, compile_layers


@dataclass
class ModelOptions:
    """How a model is held and computed; the same in ``train_sft.py`` and ``train_grpo.py``."""

    lora_alpha: Hidden[int | None] = None
    """Adapters count lora_alpha / lora_r times. None: twice, or as an adapter says that is trained further."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Format of the weights. None: bfloat16 under nf4, else as a policy folder records it, or float32."""
    quantize: Literal["none", "nf4"] | None = None
    """nf4: the language model's matrices in four bits, with LoRA alone. None: as a policy folder records it."""
    attn_implementation: Hidden[Literal["eager", "sdpa", "flash_attention_2"] | None] = None
    """Attention code. None: sdpa on a GPU, eager on a CPU. With flash_attention_2, turns no longer share a row in
    the update, because it takes no mask that could tell them apart."""
    gradient_checkpointing: Hidden[bool] = False
    """Keep each layer's input alone for the backward pass and compute the layer again there: less memory, about
    a third more time in the update. The result is the same."""
    torch_compile: Hidden[bool] = False
    """Compile the decoder layers' part of the update. The first steps take minutes. Not timed on a GPU yet, so it
    may gain nothing; rollouts are never compiled."""

    def check_model(self, lora_r: int) -> None:
        """Refuse what contradicts itself (RunError) or cannot be had here (PolicyError), before anything is loaded."""
        if self.lora_alpha is not None and (lora_r == 0 or self.lora_alpha < 1):
            raise RunError(
                f"lora_alpha {self.lora_alpha} with lora_r {lora_r}: no adapter would learn; give both at least 1"
            )
        low = self.quantize if self.quantize == "nf4" else self.dtype
        if lora_r == 0 and low in ("nf4", "bfloat16"):
            raise RunError(
                f"lora_r 0 with weights in {low}: every weight would be trained, and steps of AdamW smaller than"
                " 1/256 of a weight are lost in the rounding; give a --lora-r, or leave out --dtype and --quantize"
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        usual = "bfloat16" if self.quantize == "nf4" else "float32"
        check_weights(self.dtype or usual, self.quantize or "none", self.attn_implementation, device)

    def loading(self) -> dict[str, Any]:
        """Those that ``load_policy`` takes."""
        return {"dtype": self.dtype, "quantize": self.quantize, "attention": self.attn_implementation}

    def prepare_update(self, model: Any) -> None:
        """Switch on what changes the update alone; the model's adapters must be in place."""
        if self.gradient_checkpointing:
            checkpoint_layers(model)
        if self.torch_compile:
            compile_layers(model)
        if not can_pack(model):
            print("attention flash_attention_2: packing is off, each turn is computed in a row of its own")
