"""Boxes that episodes begin with in training, made as the lessons make them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ivt_agents.sft.lessons import jitter
from ivt_env import boxes
from ivt_env.data.sample import Sample

NEAR, SHIFTED = (0.005, 0.05), (0.05, 0.3)
"""Errors of the edges, as shares of the box's sides."""


def start_boxes(samples: Sequence[Sample], share: float, rng: np.random.Generator) -> list[list[float] | None]:
    """A box for about ``share`` of the samples, None for the others, whose first box is the policy's own.

    A policy whose first boxes are mostly right meets too few wrong ones to keep what it was taught about them. So a box
    is the target's with a small or a large error, or another object's of its class, as often each.
    """
    made: list[list[float] | None] = []
    for sample in samples:
        kind = rng.integers(3 if sample.siblings else 2)
        around = sample.siblings[int(rng.integers(len(sample.siblings)))] if kind == 2 else sample.box
        box = jitter(np.asarray(around, dtype=np.float64), rng.uniform(*(SHIFTED if kind == 1 else NEAR)), rng)
        chosen = rng.random() < share and boxes.invalid_reason(box) is None
        made.append([float(v) for v in box] if chosen else None)
    return made
