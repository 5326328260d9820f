"""Weights that are spread over processes (FSDP2), and how to have them whole.

A sharded module gathers its weights in each forward pass, together with all other processes. A rollout
cannot: processes sample answers of different lengths, so one of them would wait for passes that the
others never make. So the weights are gathered once for a whole rollout and given back after it; the
update, whose passes are equally many everywhere, stays sharded.

Without sharding every function here does nothing, or the obvious.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from ivt_agents.training.folder import RunError


def check_shareable(model: nn.Module, accelerator: Accelerator, optimizer: str = "adamw") -> None:
    """Refuse (``RunError``) what FSDP cannot share out, before it is tried; without FSDP everything passes."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    if optimizer == "muon":
        raise RunError("optimizer muon with FSDP: it needs each matrix whole; use adamw, or ddp.yaml")
    if any(not p.is_floating_point() for p in model.parameters()):
        raise RunError(
            "quantize nf4 with FSDP: packed four-bit weights cannot be cut into shares; a base in NF4 is small enough"
            " for configs/accelerate/ddp.yaml"
        )


@contextlib.contextmanager
def whole_weights(module: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Inside, each process holds all weights of ``module`` and may call its parts as often as it likes.

    All processes must enter and leave together. Nothing may be trained inside. ``module`` is as
    ``accelerator.prepare`` gave it back.
    """
    units = [m for m in module.modules() if isinstance(m, FSDPModule)]
    if not units:
        yield
        return
    if not hasattr(module, "enter_as_root"):
        # The part of a module that runs first is taken for its root. A rollout calls parts of it only,
        # so the root has to run once before: a method that counts as a forward pass and does nothing.
        module.enter_as_root = types.MethodType(lambda _: None, module)  # type: ignore[assignment]
        register_fsdp_forward_method(module, "enter_as_root")
    module.enter_as_root()  # type: ignore[operator]
    reshards = bool(accelerator.state.fsdp_plugin.reshard_after_forward)
    for unit in units:
        if unit is not module:  # the root keeps its weights after a forward pass in any case
            unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            if unit is not module:
                unit.set_reshard_after_forward(reshards, recurse=False)
            unit.reshard()


def gathered(value: Any) -> Any:
    """A tensor whole and in main memory; anything else as it is. All processes must call it."""
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value


def spread_like(value: Any, example: torch.Tensor) -> Any:
    """The inverse of ``gathered``: shared out as ``example`` is, where it has the same shape."""
    if isinstance(value, torch.Tensor) and isinstance(example, DTensor) and value.shape == example.shape:
        return distribute_tensor(value.to(example.device), example.device_mesh, example.placements)
    return value


def gathered_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained parameters of a model by name, whole and in main memory. All processes must call it."""
    return {n: gathered(p) for n, p in model.named_parameters() if p.requires_grad}


def fill_parameters(model: nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Write whole parameters into a model, sharded or not."""
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            named[name].copy_(spread_like(value, named[name]))


def gathered_optimizer(optimizer: Any) -> dict[str, Any]:
    """An optimizer's state with whole tensors. All processes must call it."""
    state = optimizer.state_dict()
    moments = {i: {k: gathered(v) for k, v in values.items()} for i, values in state["state"].items()}
    return {"state": moments, "param_groups": state["param_groups"]}


def fill_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Load a state with whole tensors into an optimizer, of sharded parameters or others."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {i: {k: spread_like(v, parameters[i]) for k, v in values.items()} for i, values in state["state"].items()}
    optimizer.load_state_dict({"state": moments, "param_groups": state["param_groups"]})
