"""Episode records: what an agent did, step by step, and what it earned.

The file format is JSON lines, one episode a line, with the images beside it (``images/``, one file per distinct
image).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ivt_env.data.sample import DataError, ImageArray
from ivt_env.failures import reading
from ivt_env.files import whole_file, write_lines

Box = tuple[float, float, float, float]

_LONGEST_NAME = 200
"""Of an image's file, in bytes, before what tells it from others; file systems allow 255."""


@dataclass(slots=True)
class Step:
    """One action and what the environment made of it."""

    proposal: Box | None
    """The box the agent put forward, xyxy relative; None when it stopped or gave none."""
    stop: bool
    box: Box | None
    """The current box after the step; None while nothing valid has been proposed."""
    iou: float
    """IoU of the current box with the target after the step (0 without a box)."""
    reward: float
    invalid: str | None = None
    """Why the environment refused the proposal, or None."""
    text: str = ""
    """The agent's own words."""
    parse_failure: bool = False
    """The agent's text held no usable action."""
    stop_probability: float | None = None
    """That the agent states, as is its confidence in [0, 1] in the action taken."""
    confidence: float | None = None
    tokens: int | None = None
    """Of the question and the answer, as the model counts them."""
    seconds: float | None = None
    """That a served model took to answer."""


@dataclass(slots=True)
class Episode:
    """One sample played to its end."""

    sample_id: str
    image_id: str
    dataset: str
    """What was really served, never merely asked for."""
    split: str
    expression: str
    target: Box
    size: tuple[int, int]
    """(height, width) of the image in pixels."""
    steps: list[Step]
    initial_box: Box | None = None
    """The box the episode started from, when it did not start from none."""
    terminated: bool = False
    truncated: bool = False
    agent: str = ""
    seed: int | None = None
    siblings: list[Box] = field(default_factory=list)

    @property
    def final_iou(self) -> float:
        """IoU of the current box when the episode ended: label-free, nothing is picked."""
        return self.steps[-1].iou if self.steps else 0.0

    @property
    def proposal_ious(self) -> list[float]:
        """IoU after each step that was not a stop, in order."""
        return [s.iou for s in self.steps if not s.stop]

    @property
    def total_reward(self) -> float:
        """Undiscounted sum of the rewards."""
        return float(sum(s.reward for s in self.steps))


def image_file(image_id: str) -> str:
    """File name (inside ``images/``) of an image id: safe on every file system."""
    safe = re.sub(r"[^A-Za-z0-9_.-]", "_", image_id).lstrip(".") or "image"
    if safe != image_id or len(safe) > _LONGEST_NAME:
        # Ids that differ only in what was replaced or cut off must not share a file.
        safe = safe[:_LONGEST_NAME] + "-" + hashlib.sha256(image_id.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return safe + ".png"


def save_episodes(
    folder: str | Path, episodes: Sequence[Episode], image_of: Callable[[Episode], ImageArray] | None = None
) -> Path:
    """Write ``episodes.jsonl`` and, with ``image_of``, each distinct image; returns the file.

    Each file appears whole or not at all, the episodes last.
    """
    folder = Path(folder)
    if image_of is not None:
        for episode in {e.image_id: e for e in episodes}.values():
            save_image(folder / "images" / image_file(episode.image_id), image_of(episode))
    path = folder / "episodes.jsonl"
    write_lines(path, map(asdict, episodes))
    return path


def save_image(path: Path, image: ImageArray) -> None:
    """Write a PNG file whole or not at all."""
    with whole_file(path, sync=False) as file:  # a power cut may cost an image, which is named and taken from the data
        Image.fromarray(image).save(file, "PNG")


def load_episodes(path: str | Path) -> list[Episode]:
    """Read what ``save_episodes`` wrote; ``path`` is the folder or the JSONL file.

    Raises:
        DataError: for a line that is no episode, naming file and line.
    """
    path = Path(path)
    path = path / "episodes.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise DataError(f"no episodes at {path}: give the folder or file that a rollout or run wrote")
    # Bytes, so that a line that is no UTF-8 is reported like any other bad line.
    with path.open("rb") as file:
        return [_parse(line, f"{path}:{number}") for number, line in enumerate(file, 1) if line.strip()]


def _parse(line: bytes, where: str) -> Episode:
    with reading(where, "was the file cut off or edited?", DataError, "not an episode"):
        row: dict[str, Any] = json.loads(line.decode("utf-8"))
        steps = [Step(**_with_boxes(step, ("proposal", "box"))) for step in row.pop("steps")]
        for step in steps:
            _check_number("iou", step.iou)
            _check_number("reward", step.reward)
        height, width = row["size"]
        row |= {"size": (height, width), "siblings": [_box(b) for b in row.get("siblings", [])]}
        return Episode(steps=steps, **_with_boxes(row, ("target", "initial_box")))


def _with_boxes(row: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return row | {k: _box(row[k]) for k in keys if row.get(k) is not None}


def _box(values: Any) -> Box:
    x1, y1, x2, y2 = values
    for value in (x1, y1, x2, y2):
        _check_number("a box coordinate", value)
    return (x1, y1, x2, y2)


def _check_number(name: str, value: Any) -> None:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, not a finite number")
