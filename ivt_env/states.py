"""What ``get_state`` of the environments returns is made of, and how ``set_state`` checks it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ivt_env.data.sample import Dataset, Sample
from ivt_env.rendering import Overlay
from ivt_env.rewards import RewardConfig


def made_with(
    dataset: Dataset,
    max_steps: int,
    initial_box: Sequence[float] | None,
    reward: RewardConfig,
    view: str,
    canvas: int,
    overlay: Overlay,
) -> dict[str, Any]:
    """The options that decide what is seen and earned, JSON-able: a state fits environments that share them."""
    return {
        "dataset": dataset.name,
        "split": dataset.split,
        "samples": len(dataset),
        "max_steps": max_steps,
        "initial_box": None if initial_box is None else [float(v) for v in initial_box],
        "reward": asdict(reward),
        "view": view,
        "canvas": canvas,
        "overlay": asdict(overlay) | {"colour": list(overlay.colour)},
    }


def check_state(state: Any, keys: Sequence[str], options: Mapping[str, Any]) -> None:
    """Whether a state has its parts and is of an environment made with ``options``.

    Raises:
        ValueError: if not; names the part, or the option with both its values.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"a state is the dict that get_state() returned, not a {type(state).__name__}")
    missing = [key for key in (*keys, "made_with") if key not in state]
    if missing:
        raise ValueError(f"the state lacks {', '.join(missing)}: give what get_state() returned")
    for name, value in options.items():
        theirs = state["made_with"].get(name)
        if theirs != value:
            raise ValueError(
                f"the state is of an environment with {name} {theirs!r}, this one has {value!r}: "
                "make both with the same options"
            )


def stated_sample(dataset: Dataset, index: int, sample_id: str) -> Sample:
    """The sample that a state was taken at; ValueError where the data set holds another one there."""
    if not 0 <= index < len(dataset):
        raise ValueError(f"index {index} of the state: {dataset.name} {dataset.split} has {len(dataset)} samples")
    sample = dataset[index]
    if sample.sample_id != sample_id:
        raise ValueError(
            f"the state was taken at sample {sample_id!r}; number {index} of {dataset.name} {dataset.split} "
            f"is {sample.sample_id!r} here: open the same data set"
        )
    return sample


def rng_state(rng: np.random.Generator) -> dict[str, Any]:
    """The state of a generator, in plain integers; ValueError for another kind than NumPy's default."""
    state = rng.bit_generator.state
    if state["bit_generator"] != "PCG64":
        raise ValueError(f"np_random is a {state['bit_generator']}; only the state of a PCG64 can be kept")
    return dict(state)


def rng_at(state: Any) -> np.random.Generator:
    """A generator that goes on where ``rng_state`` was taken; ValueError for anything else."""
    bits = np.random.PCG64()
    try:
        bits.state = state
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"the state of the random generator cannot be used: {error}") from error
    return np.random.Generator(bits)
