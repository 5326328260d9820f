"""Checkpoints that are complete and fit: written whole or not at all, checked before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ivt_agents.training.folder import RunError, checkpoints, number_of
from ivt_agents.training.run import MetricsLog
from ivt_agents.training.sharding import fill_optimizer, fill_parameters, gathered_optimizer, gathered_parameters
from ivt_env.failures import reading
from ivt_env.files import forget, whole_folder

_MOMENTS = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "Muon": {"momentum_buffer"}}
"""What each optimizer keeps of a parameter that it has moved."""


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Write ``checkpoints/step-N`` of a run whole or not at all, and forget all but the last two.

    ``state`` is what ``torch.load(weights_only=True)`` can read back.
    """
    final = folder / "checkpoints" / f"step-{step:06d}"
    with whole_folder(final, {"step": step}) as partial:
        with (partial / "state.pt").open("wb") as file:  # by name, torch does not say why it could not be written
            torch.save({"step": step, **state}, file)
    for old in checkpoints(folder)[:-2]:
        forget(old)
    return final


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """The newest checkpoint of a run; RunError where there is none, or it cannot be read."""
    found = checkpoints(folder)
    if not found:
        raise RunError(f"nothing to resume in {folder}: no checkpoints/step-*; start without --resume")
    path = found[-1] / "state.pt"
    with reading(path, f"remove {found[-1]} to resume from the one before", RunError):
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    wanted = {"step", "parameters", "optimizers"}
    if not isinstance(state, dict) or not wanted <= state.keys() or state["step"] != number_of(found[-1]):
        raise RunError(
            f"{path} does not hold a checkpoint of step {number_of(found[-1])} in this version's format; remove"
            f" {found[-1]} to resume from the one before"
        )
    return state


def save_state(
    folder: Path, step: int, model: nn.Module, optimizers: Sequence[Any], accelerator: Accelerator, log: MetricsLog
) -> None:
    """Write a checkpoint of everything that the next step depends on. All processes must call it."""
    # Randomness needs no saving: each step is seeded by (seed, step, process).
    parameters = gathered_parameters(model)
    states = [gathered_optimizer(one) for one in optimizers]
    if accelerator.is_main_process:
        log.sync()
        save_checkpoint(folder, step, {"parameters": parameters, "optimizers": states})
    accelerator.wait_for_everyone()


def load_state(
    folder: Path, model: nn.Module, optimizers: Sequence[Any], accelerator: Accelerator, most_steps: int, updates: int
) -> int:
    """Go on from the newest checkpoint of a run's folder, exact to the bit on one machine; the number of its steps.

    Everything is checked (``RunError``) before anything is changed. ``model`` is as training begins with it,
    ``optimizers`` are in the order in which they were saved, with at most ``updates`` in a step; the run is to have
    ``most_steps`` at its end.
    """
    state = load_checkpoint(folder)
    steps = torch.tensor([int(state["step"])], device=accelerator.device)
    found = sorted(set(accelerator.gather(steps).tolist()))
    if len(found) > 1:
        raise RunError(
            f"processes found checkpoints of steps {found} in {folder}: several machines need one folder that"
            " all of them see"
        )
    step: int = state["step"]
    if step > most_steps:
        raise RunError(f"{folder} has made {step} steps already, more than --steps {most_steps}: give at least {step}")
    _check_fit(checkpoints(folder)[-1], model, state, optimizers, step * updates)
    fill_parameters(model, state["parameters"])
    for one, values in zip(optimizers, state["optimizers"], strict=True):
        fill_optimizer(one, values)
    return step


def _check_fit(
    path: Path, model: nn.Module, state: Mapping[str, Any], optimizers: Sequence[Any], most_updates: int
) -> None:
    """Raise ``RunError`` for the first thing by which a checkpoint is none of this model and its optimizers."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before, values, saved = gathered_parameters(model), state["parameters"], state["optimizers"]

    def require(right: bool, otherwise: str) -> None:
        if not right:
            raise RunError(f"{path / 'state.pt'}: {otherwise}; remove {path} to resume from the one before")

    def require_tensor(name: str, value: Any, like: torch.Tensor) -> None:
        require(isinstance(value, torch.Tensor) and value.layout == torch.strided, f"{name} is not a tensor")
        found, wanted = (f"{str(t.dtype)[6:]} {tuple(t.shape)}" for t in (value, like))
        require(found == wanted, f"{name} is {found}, and the model has {wanted} there")
        require(bool(torch.isfinite(value).all()), f"{name} is not finite")

    if not isinstance(values, dict) or set(values) != set(named):
        folder = path.parent.parent
        raise RunError(f"the checkpoint in {folder} was written with another --model or other LoRA options")
    for name, parameter in named.items():
        require_tensor(name, values[name], parameter)
    require(isinstance(saved, list) and len(saved) == len(optimizers), "it was written with another --optim")
    names = {id(p): n for n, p in named.items()}
    for optimizer, its in zip(optimizers, saved, strict=True):
        kind = type(getattr(optimizer, "optimizer", optimizer)).__name__
        require(isinstance(its, dict) and its.keys() == {"state", "param_groups"}, "its optimizer state is none")
        theirs, moments = its["param_groups"], its["state"]
        mine = [_settings(g) for g in optimizer.state_dict()["param_groups"]]
        same = isinstance(theirs, list) and [_settings(g) for g in theirs] == mine
        require(same, "it was written with another --optim, or with other settings of it")
        finite = all(isinstance(g["lr"], float) and math.isfinite(g["lr"]) for g in theirs)
        require(finite, "a learning rate is not a finite number")
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        known = isinstance(moments, dict) and moments.keys() <= set(range(len(parameters)))
        require(known, "its optimizer state is none")
        for number, parameter in enumerate(parameters):
            name = names[id(parameter)]
            if number not in moments:  # right where no step has moved it
                unmoved = torch.equal(values[name], before[name])
                require(unmoved, f"the optimizer knows nothing of {name}, which was trained")
                continue
            kept = moments[number]
            complete = isinstance(kept, dict) and kept.keys() == _MOMENTS[kind]
            require(complete, f"the optimizer's state of {name} is not that of {kind}")
            for key in kept:
                if key != "step":
                    require_tensor(f"{key} of {name}", kept[key], parameter)
            if kind == "AdamW":
                made = kept["step"]
                count = float(made) if isinstance(made, torch.Tensor) and made.numel() == 1 else math.nan
                whole = 1 <= count <= most_updates and count.is_integer()
                require(whole, f"step {made!r} of the optimizer for {name} is none of 1 to {most_updates}")
                require(not bool((kept["exp_avg_sq"] < 0).any()), f"exp_avg_sq of {name} is negative")


def _settings(group: Any) -> Any:
    """Of a group of parameters: all but the rate, which each step sets."""
    return {k: v for k, v in group.items() if k != "lr"} | {"lr": "lr" in group} if isinstance(group, dict) else None
