"""Lessons in verifying: what to do about a good box, a shifted one, and the box of another object.

The corrective walks of ``demonstrations.teach`` teach a policy to move; they hold few boxes to keep and
no wrong object, so a policy that learned from them alone changes its box because there *is* one. Here
every sample is shown several boxes, and what is right depends on how good the drawn one is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agents.sft.demonstrations import Demonstration, demonstration, in_closeup
from ivt_env import boxes
from ivt_env.data.sample import Dataset, Sample


@dataclass(frozen=True, slots=True)
class LessonPlan:
    """How often each lesson is given, per sample."""

    first: float = 1.0
    """The first answer: no box shown."""
    own: float = 1.0
    """The student's own first box."""
    sibling: float = 0.5
    """The box of another object of the target's class, where there is one."""
    random: float = 0.25
    """A box that has nothing to do with the target."""
    shifted: float = 0.75
    """The target's box, moved and scaled."""
    good: float = 0.5
    """The target's box with an error that does not matter."""


def teach_to_verify(
    dataset: Dataset,
    indices: Sequence[int],
    student_boxes: Sequence[Sequence[float] | None],
    rng: np.random.Generator,
    *,
    closeups: bool,
    plan: LessonPlan | None = None,
    good_iou: float = 0.92,
) -> list[Demonstration]:
    """Demonstrations of keeping, refining and looking elsewhere. No words, so that an answer is short.

    Args:
        dataset: the split being taught.
        indices: which samples.
        student_boxes: the student's step-0 box for each; None where it gave none.
        rng: decides which lessons are given, and their boxes.
        closeups: a close-up stands beside the picture (``view="both"``): boxes near the target are then
            mended in its coordinates, which are finer.
        plan: how often each lesson is given.
        good_iou: from here on the answer is to stop.
    """
    plan, made = plan or LessonPlan(), []
    for index, own in zip(indices, student_boxes, strict=True):
        sample = dataset[int(index)]
        target = np.asarray(sample.box)
        shown: list[NDArray[np.float64]] = []
        if own is not None and rng.random() < plan.own:
            shown.append(np.asarray(own, dtype=np.float64))
        if sample.siblings and rng.random() < plan.sibling:
            shown.append(_jitter(np.asarray(sample.siblings[int(rng.integers(len(sample.siblings)))]), 0.03, rng))
        if rng.random() < plan.random:
            shown.append(_anywhere(rng))
        if rng.random() < plan.shifted:
            shown.append(_jitter(target, float(rng.uniform(0.03, 0.3)), rng))
        if rng.random() < plan.good:
            shown.append(_jitter(target, 0.01, rng))
        if rng.random() < plan.first:
            made.append(demonstration(sample, dataset, int(index), None, sample.box))
        made += [
            _lesson(sample, dataset, int(index), box, closeups, good_iou)
            for box in shown
            if boxes.invalid_reason(box) is None
        ]
    return made


def _lesson(
    sample: Sample, dataset: Dataset, index: int, shown: NDArray[np.float64], closeups: bool, good_iou: float
) -> Demonstration:
    """Keep a good box; mend one that is near in the close-up; look elsewhere for any other."""
    if float(boxes.iou(shown, sample.box)) >= good_iou:
        return demonstration(sample, dataset, index, shown, None)
    return demonstration(
        sample, dataset, index, shown, sample.box, picture=2 if closeups and in_closeup(shown, sample.box) else 1
    )


def _jitter(box: NDArray[np.float64], share: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """A box whose edges are off by about ``share`` of its sides, inside the picture."""
    sides = np.tile(box[2:] - box[:2], 2)
    return boxes.clip(box + rng.normal(0, share, 4) * sides)


def _anywhere(rng: np.random.Generator) -> NDArray[np.float64]:
    size = rng.uniform(0.05, 0.5, 2)
    low = rng.uniform(0, 1 - size)
    return np.concatenate([low, low + size])
