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

from ivt_agents.sft.demonstrations import Demonstration, demonstration, in_closeup
from ivt_env import boxes
from ivt_env.data.sample import Dataset, Sample


@dataclass(frozen=True, slots=True)
class LessonPlan:
    """How often each box is shown, per image, and about how many of its samples it is asked."""

    first: float = 1.0
    """The first answer, per *sample*: no box shown."""
    own: float = 1.0
    """A first box of the student's own."""
    wrong: float = 3.0
    """How much likelier one of its wrong boxes is taken than a right one. They are the hard cases: other
    objects that the student takes for the target."""
    sibling: float = 0.4
    """The box of another object of a target's class, where there is one."""
    random: float = 0.15
    """A box that has nothing to do with a target."""
    shifted: float = 1.0
    """A target's box, moved and scaled."""
    good: float = 0.7
    """A target's box with an error that does not matter."""
    contrast: float = 1.0
    """Samples that a box is *not* about and is asked of all the same, for each that it is about; one at least."""


def teach_to_verify(
    dataset: Dataset,
    indices: Sequence[int],
    student_boxes: Sequence[Sequence[float] | None],
    rng: np.random.Generator,
    *,
    view: str,
    plan: LessonPlan | None = None,
    good_iou: float = 0.92,
) -> list[Demonstration]:
    """Demonstrations of keeping, refining and looking elsewhere. No words, so that an answer is short.

    The same box is shown with the expressions that it fits and with others about the same image, so that
    nothing but the expression tells what to do.

    Args:
        dataset: the split being taught.
        indices: which samples.
        student_boxes: the student's step-0 box for each; None where it gave none.
        rng: decides which lessons are given, and their boxes.
        view: of the environment. With ``both`` a close-up stands beside the image, and boxes near the target
            are kept or corrected in its coordinates, which are finer.
        plan: how often each lesson is given.
        good_iou: from here on the answer is to stop.
    """
    plan, made = plan or LessonPlan(), []
    images: dict[str, list[tuple[int, Sample, Sequence[float] | None]]] = {}
    for index, own in zip(indices, student_boxes, strict=True):
        sample = dataset[int(index)]
        images.setdefault(sample.image_id, []).append((int(index), sample, own))
    for asked in images.values():
        made += [
            demonstration(sample, dataset, index, None, sample.box)
            for index, sample, _ in asked
            if rng.random() < plan.first
        ]
        for box, author in _shown(asked, plan, rng):
            if boxes.invalid_reason(box) is not None:
                continue
            about = [k for k, (_, s, _) in enumerate(asked) if k == author or float(boxes.iou(box, s.box)) >= _NEAR]
            others = [k for k in range(len(asked)) if k not in about]
            count = min(len(others), max(1, round(plan.contrast * len(about))))
            for k in [*about, *rng.permutation(others)[:count].tolist()]:
                index, sample, _ = asked[int(k)]
                made.append(_lesson(sample, dataset, index, box, view, good_iou))
    return made


_NEAR = 0.3
"""IoU with a target from which on a box counts as being about it."""


def _shown(
    asked: Sequence[tuple[int, Sample, Sequence[float] | None]], plan: LessonPlan, rng: np.random.Generator
) -> list[tuple[NDArray[np.float64], int]]:
    """The boxes to show on one image, each with the number of the sample that it was proposed for (-1: none)."""
    shown: list[tuple[NDArray[np.float64], int]] = []

    def anyone() -> Sample:
        return asked[int(rng.integers(len(asked)))][1]

    own = [(k, np.asarray(b, dtype=np.float64)) for k, (_, _, b) in enumerate(asked) if b is not None]
    if own and rng.random() < plan.own:
        weights = np.array([1.0 if float(boxes.iou(b, asked[k][1].box)) >= 0.5 else plan.wrong for k, b in own])
        k, box = own[int(rng.choice(len(own), p=weights / weights.sum()))]
        shown.append((box, k))
    target = anyone()
    if target.siblings and rng.random() < plan.sibling:
        sibling = np.asarray(target.siblings[int(rng.integers(len(target.siblings)))])
        shown.append((_jitter(sibling, 0.03, rng), -1))
    if rng.random() < plan.random:
        shown.append((_anywhere(rng), -1))
    if rng.random() < plan.shifted:
        shown.append((_jitter(np.asarray(anyone().box), float(rng.uniform(0.03, 0.3)), rng), -1))
    if rng.random() < plan.good:
        shown.append((_jitter(np.asarray(anyone().box), 0.01, rng), -1))
    return shown


def _lesson(
    sample: Sample, dataset: Dataset, index: int, shown: NDArray[np.float64], view: str, good_iou: float
) -> Demonstration:
    """First write down where the target is, as in a first answer; then keep the drawn box, correct it, or leave it.

    To compare two boxes in numbers is easier than to see whether one fits, and where to look is what a first
    answer has taught already.
    """
    target, keep = sample.box, float(boxes.iou(shown, sample.box)) >= good_iou
    near = float(boxes.iou(shown, target)) >= _NEAR and in_closeup(shown, target)
    looks: list[tuple[int, Sequence[float]]] = []
    image = 1
    if near and view == "both":
        # The close-up beside the image is finer: what is seen roughly there is seen exactly here.
        looks, image = [(1, target)], 2
    if keep:
        return demonstration(sample, dataset, index, shown, None, looks=[*looks, (image, target)])
    return demonstration(sample, dataset, index, shown, target, image=image, looks=looks)


def _jitter(box: NDArray[np.float64], share: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """A box whose edges are off by about ``share`` of its sides, inside the image."""
    sides = np.tile(box[2:] - box[:2], 2)
    return boxes.clip(box + rng.normal(0, share, 4) * sides)


def _anywhere(rng: np.random.Generator) -> NDArray[np.float64]:
    size = rng.uniform(0.05, 0.5, 2)
    low = rng.uniform(0, 1 - size)
    return np.concatenate([low, low + size])
