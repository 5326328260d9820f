"""Lessons in looking: say what the close-up shows, then keep the box, correct it, or look elsewhere.

Every sample is taught in several states of an episode: no box yet, the student's own box, the target's box with a
small or a large error, the box of another object. What is right follows from where the box lies. In search scenes the
whole image does not tell which object is meant, so the next look is at the leftmost one that was not looked at yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ivt_agents.sft.demonstrations import Demonstration, demonstration, in_closeup
from ivt_agents.sft.teacher.template import FITS, MISSES, WRONG_OBJECT, critique
from ivt_env import boxes
from ivt_env.data.sample import Dataset, Sample
from ivt_env.rendering import Surroundings

Box = NDArray[np.float64]

ON = 0.3
"""A box lies on an object if their IoU is at least this."""
SHOWN = 0.4
"""A close-up is worth a look if its sides are at most this share of the image's: it then enlarges 2.5 times or more.
Boxes of larger objects did not become better (``docs/experiments.md``)."""
GOOD_IOU = 0.9
"""Where the question does not count looks, a box is kept from this IoU."""
LARGE_IOU = 0.7
"""Where it does, a box whose close-up enlarges too little is kept from this IoU; others are corrected once."""


@dataclass(frozen=True, slots=True)
class Shares:
    """How often each state is taught, per sample."""

    first: float = 1.0
    """No box yet: the student's own first answer, repeated so that it does not change. Left out where another model
    gives the first boxes."""
    own: float = 1.0
    """The student's own first box."""
    corrected: float = 1.0
    """The target's box with an error that hardly matters, after one with a larger error."""
    shifted: float = 1.0
    """The target's box, moved and scaled."""
    other: float = 0.2
    """The box of another object, where the data set knows one. Kept low: a policy that learns to expect
    wrong objects also moves away from right ones."""
    candidate: float = 0.5
    """In search scenes, each of the other objects."""
    again: float = 0.2
    """Share of the boxes on other objects at which the episode has looked before."""


def teach_to_look(
    dataset: Dataset,
    indices: Sequence[int],
    student_boxes: Sequence[Sequence[float] | None],
    rng: np.random.Generator,
    view: str,
    around: Surroundings,
    *,
    shares: Shares | None = None,
    counted: bool = False,
) -> list[Demonstration]:
    """Demonstrations of keeping, correcting and looking elsewhere, each with what is seen.

    ``student_boxes`` are the student's first box of each sample, None where it gave none. With view ``both`` a box near
    the target is corrected in the frame of the close-up, which shows what is ``around`` it. Where the question says
    how often the episode has looked there (``counted``), the second look is to confirm, and to stop. Elsewhere a box is
    kept from an IoU of 0.9.
    """
    shares, made = shares or Shares(), []
    for index, own in zip(indices, student_boxes, strict=True):
        sample = dataset[int(index)]
        target = np.asarray(sample.box)
        others = [np.asarray(box) for box in sample.siblings]
        shown: list[tuple[Box, list[Box]]] = []
        if own is not None and boxes.invalid_reason(own) is None:
            if rng.random() < shares.first:
                made.append(demonstration(sample, dataset, int(index), None, own))
            if rng.random() < shares.own:
                shown.append((np.asarray(own, dtype=np.float64), []))
        search = sample.meta.get("kind") == "mark"
        if rng.random() < shares.shifted:
            shown.append((_jitter(target, rng.uniform(0.005, 0.2), rng), _visited(others, search, rng)))
        if rng.random() < shares.corrected:
            before = _visited(others, search, rng) + _usable([_jitter(target, rng.uniform(0.01, 0.2), rng)])
            shown.append((_jitter(target, rng.uniform(0.005, 0.03), rng), before))
        for k in rng.permutation(len(others))[: None if search else 1]:
            if rng.random() < (shares.candidate if search else shares.other):
                before = _visited([box for j, box in enumerate(others) if j != k], search, rng)
                if rng.random() < shares.again:
                    before += _usable([_jitter(others[k], rng.uniform(0.005, 0.1), rng)])
                shown.append((_jitter(others[k], rng.uniform(0.005, 0.1), rng), before))
        for box, before in shown:
            if boxes.invalid_reason(box) is None:
                made.append(_lesson(sample, dataset, int(index), box, before, search, view, around, counted))
    return made


def _visited(others: Sequence[Box], search: bool, rng: np.random.Generator) -> list[Box]:
    """Boxes of an episode so far: in search scenes some of the other objects, elsewhere one in 20 % of cases."""
    if search:
        chosen = rng.permutation(len(others))[: int(rng.integers(len(others) + 1))]
    else:
        chosen = rng.permutation(len(others))[: int(rng.random() < 0.2)]
    return _usable([_jitter(others[k], rng.uniform(0.005, 0.1), rng) for k in chosen])


def _usable(drawn: list[Box]) -> list[Box]:
    return [box for box in drawn if boxes.invalid_reason(box) is None]


def _lesson(
    sample: Sample,
    dataset: Dataset,
    index: int,
    shown: Box,
    before: Sequence[Box],
    search: bool,
    view: str,
    around: Surroundings,
    counted: bool,
) -> Demonstration:
    target = np.asarray(sample.box)
    candidates = np.array([target, *sample.siblings])
    overlaps = np.asarray(boxes.iou(shown, candidates))
    on = int(overlaps.argmax())
    looks = sample.meta.get("looks")
    seen = ""
    if looks and overlaps[on] >= ON:
        seen = f"{'An' if looks[on][0] in 'aeiou' else 'A'} {looks[on]}. "
    if on == 0 and overlaps[0] >= ON:
        window = around.window(shown, sample.size)
        fits = overlaps[0] >= (LARGE_IOU if counted else GOOD_IOU)
        if counted and (window[2:] - window[:2]).max() <= SHOWN:
            fits = boxes.looks_at(shown, list(before)) > 1
        if fits:
            return demonstration(sample, dataset, index, shown, None, seen + FITS, before=before)
        image = 2 if view == "both" and in_closeup(shown, target, around, sample.size) else 1
        # On a close-up without the box nobody sees what is wrong with it, so nothing is said about it.
        said = critique(shown, target) if image == 1 or around.drawn else ""
        said = "" if said == FITS else said
        return demonstration(sample, dataset, index, shown, target, (seen + said).strip(), image, before)
    said = WRONG_OBJECT if overlaps[on] >= ON else MISSES
    following = target
    if search:
        # A box between two objects lies on the one that it covers more of.
        looked = {int(np.asarray(boxes.iou(box, candidates)).argmax()) for box in before} | ({on} if seen else set())
        following = min((box for k, box in enumerate(candidates) if k not in looked), key=lambda box: box[0])
    return demonstration(sample, dataset, index, shown, following, seen + said, before=before)


def _jitter(box: Box, share: float, rng: np.random.Generator) -> Box:
    """A box whose edges are off by about ``share`` of its sides, inside the image."""
    sides = np.tile(box[2:] - box[:2], 2)
    return np.asarray(boxes.clip(box + rng.normal(0, share, 4) * sides))
