"""Demonstrations: what a teacher would answer at one step of an episode.

A demonstration names a sample of a registered environment, the box that stands drawn on it (or
none), and the answer. The file format is JSON lines, one demonstration a line, so that any other
teacher can write it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ivt_agents.sft.teacher.template import critique
from ivt_env import boxes
from ivt_env.data.sample import DataError, Dataset, Sample
from ivt_env.failures import reading
from ivt_env.files import write_lines
from ivt_env.rendering import Surroundings

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Demonstration:
    """One step: what is shown, and the right answer."""

    dataset: str
    """What was really read; a file for one data set is refused on another."""
    split: str
    index: int
    """Of the sample in the split."""
    sample_id: str
    shown: Box | None
    """The drawn box, xyxy relative; None before the first proposal."""
    answer: Box | None
    """The box to answer with; None: stop."""
    trace: str = ""
    """Reasoning that precedes the answer."""
    image: int = 1
    """In the frame of which image the answer is written: 1 the first (the whole image, or the only one
    shown), 2 the close-up beside it, where there is one. The box itself is always relative to the whole."""
    before: tuple[Box, ...] = ()
    """Boxes proposed before the one shown, in their order."""


def save_demonstrations(path: str | Path, demonstrations: Sequence[Demonstration]) -> None:
    """Write JSON lines; the file appears whole or not at all."""
    write_lines(path, map(asdict, demonstrations))


def load_demonstrations(path: str | Path, dataset: Dataset) -> list[Demonstration]:
    """Read demonstrations for ``dataset``; DataError names the line that is none, of other data, or has no good box."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no demonstrations at {path}: give a JSON-lines file, or leave --demonstrations out")
    with path.open(encoding="utf-8") as file:
        found = [_parse(line, f"{path}:{number}", dataset) for number, line in enumerate(file, 1) if line.strip()]
    if not found:
        raise DataError(f"{path} holds no demonstrations")
    return found


def _parse(line: str, where: str, dataset: Dataset) -> Demonstration:
    with reading(where, kind=DataError, problem="not a demonstration"):
        row = json.loads(line)
        for key in ("shown", "answer"):
            row[key] = None if row[key] is None else tuple(float(v) for v in row[key])
        row["before"] = tuple(tuple(float(v) for v in box) for box in row.get("before", ()))
        demonstration = Demonstration(**row)
    made_for, served = f"{demonstration.dataset}/{demonstration.split}", f"{dataset.name}/{dataset.split}"
    if made_for != served:
        raise DataError(f"{where}: made for {made_for}, but {served} is being served")
    named = [("shown", demonstration.shown), ("answer", demonstration.answer)]
    for name, box in [*named, *(("before", b) for b in demonstration.before)]:
        if box is not None and (why := boxes.invalid_reason(box)):
            raise DataError(f"{where}: {name}: {why}")
    if demonstration.image not in (1, 2):
        raise DataError(f"{where}: image {demonstration.image!r}: give 1 (the whole image) or 2 (its close-up)")
    if not 0 <= demonstration.index < len(dataset):
        raise DataError(f"{where}: index {demonstration.index} is outside the {len(dataset)} samples of the split")
    # Scenes know it without being made, which would take minutes for a long file.
    known = getattr(dataset, "sample_id", lambda index: dataset[index].sample_id)(demonstration.index)
    if known != demonstration.sample_id:
        raise DataError(f"{where}: sample {demonstration.index} is {known!r}, not {demonstration.sample_id!r}")
    return demonstration


def teach_as_the_paper(
    dataset: Dataset, indices: Sequence[int], student_boxes: Sequence[Sequence[float] | None], steps: int = 2
) -> list[Demonstration]:
    """The trajectories of arXiv 2606.13156: refinements of the student's own bad first boxes, and nothing else.

    Student boxes with IoU in [0, 0.85] are kept; whatever their distance, they walk to the target in
    ``steps`` equal parts, each explained. What was right from the start is dropped, so no box is ever to be
    kept and nothing ends the episode. A trajectory is learned as a whole, the student's own first box with it:
    that the paper's policies learned to give bad first boxes from bad ones in the data says that it was.
    Without it nothing holds the first box in place (``docs/paper.md``). ``student_boxes`` are the student's first box
    of each sample, None where it gave none; ``steps`` is T in the paper.
    """
    made: list[Demonstration] = []
    for index, first in zip(indices, student_boxes, strict=True):
        sample = dataset[int(index)]
        if first is None or boxes.invalid_reason(first) is not None:
            continue
        target, walked = np.asarray(sample.box), [np.asarray(first, dtype=np.float64)]
        if float(boxes.iou(walked[0], target)) > 0.85:
            continue
        made.append(demonstration(sample, dataset, int(index), None, first))
        for hop in range(steps):
            shown = walked[-1]
            following = shown + (target - shown) / (steps - hop)
            trace = critique(shown, target, sample.siblings)
            made.append(demonstration(sample, dataset, int(index), shown, following, trace, before=walked[:-1]))
            walked.append(following)
    return made


def demonstration(
    sample: Sample,
    dataset: Dataset,
    index: int,
    shown: Sequence[float] | np.ndarray | None,
    answer: Sequence[float] | np.ndarray | None,
    trace: str = "",
    image: int = 1,
    before: Sequence[Sequence[float] | np.ndarray] = (),
) -> Demonstration:
    """A demonstration for ``sample``, its boxes rounded for the file."""
    name, split, history = dataset.name, dataset.split, tuple(map(_box, before))
    drawn, right = (None if box is None else _box(box) for box in (shown, answer))
    return Demonstration(name, split, index, sample.sample_id, drawn, right, trace, image, history)


def _box(box: Sequence[float] | np.ndarray) -> Box:
    x1, y1, x2, y2 = (round(float(v), 6) for v in box)
    return (x1, y1, x2, y2)


def in_closeup(
    shown: Sequence[float] | np.ndarray, target: Sequence[float] | np.ndarray, around: Surroundings, size: Sequence[int]
) -> bool:
    """Whether the close-up around ``shown`` holds all of the target, in an image of ``size`` (height, width) pixels."""
    inside = boxes.into_window(target, around.window(shown, size))
    return bool((inside[:2] >= 0).all() and (inside[2:] <= 1).all())


def can_be_said(demonstration: Demonstration, view: str, around: Surroundings, size: Sequence[int]) -> bool:
    """Whether the answer's box lies in the image in whose frame it is to be written.

    Where the only image shown is a close-up, each box must lie in the close-up around the one before.
    """
    shown, answer = demonstration.shown, demonstration.answer
    if view == "closeup":
        chain = [box for box in (*demonstration.before, shown, answer) if box is not None]
        return all(in_closeup(a, b, around, size) for a, b in zip(chain, chain[1:], strict=False))
    if demonstration.image == 1 or answer is None:
        return True
    return view == "both" and shown is not None and in_closeup(shown, answer, around, size)
