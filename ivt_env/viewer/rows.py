"""Episodes as rows of a page: a short one of each for the list, and the rest for when it is looked at."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ivt_env import boxes
from ivt_env.data.sample import DataError
from ivt_env.episodes import Episode, Step

_SAME_BOX = 1e-4
"""Two runs agree on a target within this much: one of them may hold float32 numbers."""


class Content:
    """Runs to show, checked. A page needs the overview at once and each episode's details later."""

    def __init__(self, runs: Mapping[str, Sequence[Episode]]) -> None:
        """Check every episode; DataError if one cannot be shown, or two runs disagree about a sample."""
        self.runs = {name: list(run) for name, run in runs.items()}
        _check_runs_agree(self.runs)
        self.images: list[Episode] = []
        """The first episode of each distinct image; its place here is the image's number."""
        self._number_of_image: dict[tuple[str, str], int] = {}
        self._haystacks: dict[str, list[str]] = {}
        for run in self.runs.values():
            for episode in run:
                self.number_of_image(episode)
                details(episode)

    def number_of_image(self, episode: Episode) -> int:
        """The number of an episode's image, which is given when it is first asked for."""
        key = episode.dataset, episode.image_id
        if key not in self._number_of_image:
            self._number_of_image[key] = len(self.images)
            self.images.append(episode)
        return self._number_of_image[key]

    def overview(self) -> list[dict[str, Any]]:
        """Name and short rows of each run, JSON-able."""
        return [{"name": name, "episodes": [self.short(e) for e in run]} for name, run in self.runs.items()]

    def short(self, episode: Episode) -> dict[str, Any]:
        """What the list, the filters and the summary need of an episode, JSON-able."""
        steps = episode.steps
        # IoUs stay exact: rounding 0.49999 to 0.5 would change the outcome that the page shows.
        row: dict[str, Any] = {
            "sample": episode.sample_id,
            "expression": episode.expression,
            "dataset": episode.dataset,
            "split": episode.split,
            "image": self.number_of_image(episode),
            "count": len(steps),
            "first": float(steps[0].iou) if steps else 0.0,
            "final": float(episode.final_iou),
            "best": float(max((s.iou for s in steps), default=0.0)),
            "stopped": bool(steps) and steps[-1].stop or None,
            "unparsable": any(s.parse_failure or s.invalid is not None for s in steps) or None,
            "started": episode.initial_box is not None or None,
        }
        return without_none(row)

    def search(self, run: str, query: str) -> list[int]:
        """Places of the episodes whose expression, sample id or text holds ``query``; case is ignored."""
        if run not in self._haystacks:
            self._haystacks[run] = [
                "\n".join([e.expression, e.sample_id, *(s.text for s in e.steps)]).lower() for e in self.runs[run]
            ]
        wanted = query.lower()
        return [place for place, text in enumerate(self._haystacks[run]) if wanted in text]

    def add(self, run: str, episode: Episode) -> None:
        """One more episode at the end of a run."""
        self.runs[run].append(episode)
        self._haystacks.pop(run, None)

    def served(self) -> str:
        """Which data sets were really read, and how many samples of each."""
        samples = {(e.dataset, e.split, e.sample_id) for run in self.runs.values() for e in run}
        counts = sorted(Counter(f"{dataset} / {split}" for dataset, split, _ in samples).items())
        return ", ".join(f"{which} ({n:,} sample{'s' if n > 1 else ''})" for which, n in counts)


def where_of(episode: Episode) -> str:
    """An episode's sample in words, for a message."""
    return f"sample {episode.sample_id!r} of {episode.dataset}/{episode.split}"


def details(episode: Episode) -> dict[str, Any]:
    """What the page shows of an episode beyond its row in the list, JSON-able.

    Raises:
        DataError: for a number that is not finite, a box without four numbers or an impossible size.
    """
    where = where_of(episode)
    height, width = (int(side) for side in episode.size)
    if height < 1 or width < 1:
        raise DataError(f"{where}: the image's size is {episode.size}, it must be (height, width) in pixels")
    row: dict[str, Any] = {
        "imageId": episode.image_id,
        "target": _box_row(episode.target, f"{where}: target"),
        "size": [height, width],
        "steps": [_step_row(step, f"{where}, step {n}") for n, step in enumerate(episode.steps)],
        "agent": episode.agent or None,
        "seed": None if episode.seed is None else int(episode.seed),
    }
    if episode.initial_box is not None:
        row["initial"] = _box_row(episode.initial_box, f"{where}: initial box")
        row["initialIou"] = float(boxes.iou(episode.initial_box, episode.target))
    return without_none(row)


def without_none(row: dict[str, Any]) -> dict[str, Any]:
    """``row`` without the keys whose value is None."""
    return {key: value for key, value in row.items() if value is not None}


def _check_runs_agree(runs: Mapping[str, Sequence[Episode]]) -> None:
    """Side by side means the same question: same image, expression and target."""
    seen: dict[tuple[str, str, str], tuple[str, Episode]] = {}
    for name, run in runs.items():
        for episode in run:
            key = (episode.dataset, episode.split, episode.sample_id)
            other_name, other = seen.setdefault(key, (name, episode))
            for what in ("image_id", "expression", "size", "target"):
                mine, theirs = getattr(episode, what), getattr(other, what)
                same = mine == theirs
                if what == "target":
                    same = not any(abs(a - b) > _SAME_BOX for a, b in zip(mine, theirs, strict=False))
                if not same:
                    raise DataError(
                        f"{where_of(episode)}: {what} is {mine!r} in run {name!r} and {theirs!r} in run "
                        f"{other_name!r}; they are not the same sample, write one page for each run"
                    )


def _step_row(step: Step, where: str) -> dict[str, Any]:
    row: dict[str, Any] = {
        "box": None if step.box is None else _box_row(step.box, f"{where}: box"),
        "iou": _finite(step.iou, f"{where}: iou"),
        "reward": round(_finite(step.reward, f"{where}: reward"), 5),
        "stop": step.stop or None,
        "invalid": step.invalid,
        "text": step.text or None,
        "parseFailure": step.parse_failure or None,
    }
    for key, name in (("stopProbability", "stop_probability"), ("confidence", "confidence")):
        if (value := getattr(step, name)) is not None:
            row[key] = round(_finite(value, f"{where}: {name}"), 4)
    return without_none(row)


def _box_row(box: Sequence[float], where: str) -> list[float]:
    if len(box) != 4:
        raise DataError(f"{where} is {box}, a box has 4 numbers")
    return [round(_finite(v, where), 5) for v in box]


def _finite(value: float, where: str) -> float:
    if not math.isfinite(value):
        raise DataError(f"{where} is {value}, it must be a finite number")
    return float(value)
