"""Options that change the update's memory or speed and not its result. Rollouts run in eval mode, as they were."""

from __future__ import annotations

import os
from typing import Any

import torch

from ivt_agents.vlm.generation import core_of

SMALL = 10_000_000
"""Parameters up to which a model gains nothing, and loses much on a busy machine, by more than one thread."""


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
