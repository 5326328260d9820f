"""Options that change the update's memory or speed and not its result. Rollouts run in eval mode, as they were."""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch

from ivt_agents.vlm.generation import core_of

SMALL = 10_000_000
"""Parameters up to which a model gains nothing, and loses much on a busy machine, by more than one thread."""

_COMPILED: dict[type, type] = {}


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


def compile_layers(model: Any) -> None:
    """Compile each decoder layer's training pass at its first use; adapters must be in place already."""
    for layer in core_of(model).model.language_model.layers:
        kind = type(layer)
        if kind not in _COMPILED:
            _COMPILED[kind] = _compiled(kind)
        layer.__class__ = _COMPILED[kind]


def _compiled(kind: type) -> type:
    """A decoder layer class whose training pass is compiled.

    A class and not a function on the instance: a deep copy of the model must run its own layers. The
    library wraps the new ``forward`` in its checkpointing again, so that comes before the compiled part.
    """
    plain = inspect.unwrap(kind.forward)  # type: ignore[attr-defined]
    fast = torch.compile(plain, dynamic=True)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        chosen = fast if self.training and torch.is_grad_enabled() else plain
        return chosen(self, *args, **kwargs)

    return type(f"Compiled{kind.__name__}", (kind,), {"forward": forward, "__module__": __name__})
