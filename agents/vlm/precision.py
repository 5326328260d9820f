"""Number formats of a model: how its weights are held, and how exactly sampler and scorer agree.

Sampling reads a key-value cache row by row, scoring reads whole sequences: in bfloat16 the two round
differently. The largest part of the difference arises in the output head, whose bfloat16 logits are
multiples of 1/16 at a size of 10. So the head always multiplies and adds in float32 here.
"""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ivt_agents.vlm.generation import core_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def stored_as(model: Any) -> dict[str, str]:
    """How the base weights are held: ``dtype`` (float32, bfloat16) and ``quantize`` (none, nf4)."""
    core = core_of(model)
    quantize = "nf4" if getattr(core, "is_loaded_in_4bit", False) else "none"
    return {"dtype": str(core.dtype).removeprefix("torch."), "quantize": quantize}


def can_merge(model: Any) -> bool:
    """Whether an adapter can be merged into the base weights without changing the policy."""
    return stored_as(model) == {"dtype": "float32", "quantize": "none"}


@lru_cache(maxsize=1)
def bf16_pays(side: int = 192) -> bool:
    """Whether this machine multiplies matrices faster in bfloat16 than in float32, measured on some of ``side``.

    Processors without instructions for it take more than a hundred times as long.
    """
    if torch.cuda.is_available():
        return True
    seconds, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other where other programs have the cores
    try:
        for dtype in (torch.float32, torch.bfloat16):
            matrix = torch.ones(side, side, dtype=dtype)
            rounds = []
            for _ in range(4):  # the first sets up, and another program may have the core in one of them
                start = time.perf_counter()
                matrix @ matrix
                rounds.append(time.perf_counter() - start)
            seconds[dtype] = min(rounds)
    finally:
        torch.set_num_threads(threads)
    return seconds[torch.bfloat16] < seconds[torch.float32]


class HeadInFloat32(nn.Linear):
    """An output head that computes in float32 whatever its weights and the surrounding autocast are."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (..., vocabulary) in float32 for hidden states (..., width)."""
        with torch.autocast(hidden.device.type, enabled=False):
            return functional.linear(hidden.float(), self.weight.float())


def use_float32_head(model: Any) -> None:
    """Let the output head compute in float32. The weights stay as they are, tied or not.

    For weights in bfloat16 each call makes a float32 copy of them: 1.6 GB for a model of 4B.

    Raises:
        TypeError: for a head that is no plain matrix.
    """
    head = core_of(model).lm_head
    if type(head) not in (nn.Linear, HeadInFloat32) or head.bias is not None:
        raise TypeError(f"an output head of type {type(head).__name__} cannot be computed in float32")
    head.__class__ = HeadInFloat32
