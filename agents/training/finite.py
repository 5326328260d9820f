"""What is not finite stops a run: one NaN that is trained on is in every weight a step later."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:  # trainers of other projects need none
    from accelerate import Accelerator


class NotFiniteError(ValueError):
    """A number that is infinite or none where training went on from it. Names the step and the quantity."""


def check_finite(step: int, found: Mapping[str, float], remedy: str, accelerator: Accelerator | None = None) -> None:
    """Stop before something is made of numbers that are not finite.

    ``found`` are numbers of the training ``step`` (from 1) by name; the sum of many stands for all of them. ``remedy``,
    what is kept and what to do, ends the message. With an ``accelerator`` all processes must call this, and all stop
    where one has to (``NotFiniteError``): it would leave the others waiting for it.
    """
    wrong = [0.0 if math.isfinite(value) else 1.0 for value in found.values()]
    if accelerator is not None and accelerator.num_processes > 1:
        wrong = accelerator.reduce(torch.tensor(wrong, device=accelerator.device), "sum").tolist()
    for (name, value), processes in zip(found.items(), wrong, strict=True):
        if processes:
            where = "not finite in another process" if math.isfinite(value) else f"{value:g}"
            raise NotFiniteError(f"step {step}: {name} is {where}, so training stops before it is used. {remedy}")


def check_weights(step: int, model: nn.Module, remedy: str, accelerator: Accelerator | None = None) -> None:
    """The same for the trained weights that an optimizer's step made, before they are played with or saved."""
    name = unusable_weight((n, p) for n, p in model.named_parameters() if p.requires_grad)
    check_finite(step, {f"weight {name}" if name else "a weight": math.nan if name else 0.0}, remedy, accelerator)


def unusable_weight(named: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first tensor that holds what is not finite; of sharded ones this process's share counts."""
    shares = ((n, (p.to_local() if isinstance(p, DTensor) else p).detach()) for n, p in named)
    # Extremes, as a sum could overflow by itself; both are NaN where one entry is.
    extremes = [(n, torch.stack(torch.aminmax(p)).float()) for n, p in shares if p.is_floating_point() and p.numel()]
    values = torch.stack([v for _, v in extremes]).tolist() if extremes else []
    return next((n for (n, _), both in zip(extremes, values, strict=True) if not all(map(math.isfinite, both))), None)
