"""Where metrics go besides the run's JSON lines: TensorBoard, Weights & Biases or trackio.

All three through accelerate's tracker classes, so that what this project sends is what any of its
users would see. The JSON lines are always written; a tracker is a copy of them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

TrackerName = Literal["tensorboard", "wandb", "trackio", "none"]
TRACKERS: tuple[str, ...] = get_args(TrackerName)

PROJECT = "ivt-env"
"""Project that runs are listed under, by trackers that have projects."""

_EXTRA = {"tensorboard": "train", "wandb": "trackers", "trackio": "trackers"}


class TrackerError(ValueError):
    """A tracker that cannot be used. Says which, and what to do."""


def check_tracker(name: str) -> None:
    """Refuse (``TrackerError``) a tracker that is unknown or not installed, before anything is loaded."""
    if name not in TRACKERS:
        raise TrackerError(f"tracker {name!r}: choose one of {', '.join(TRACKERS)}")
    # A folder of that name in the working directory (wandb makes one) is found, too, but has no origin.
    if name != "none" and getattr(importlib.util.find_spec(name), "origin", None) is None:
        raise TrackerError(
            f'tracker {name}: its package is not installed; pip install "ivt-env[{_EXTRA[name]}]" (or pip install'
            f" {name}), or give --report-to none: metrics.jsonl is written in any case"
        )


def open_tracker(name: str, folder: Path, config: Mapping[str, Any], begun: int) -> Any:
    """A started tracker of accelerate, or None for ``none``; TrackerError where it is missing or does not start.

    Each start of the command is a run of its own in wandb and trackio, grouped by the run folder: they
    do not take steps twice, and the steps behind the last checkpoint of a killed run are made twice.
    ``config`` is shown beside the curves; ``begun`` are finished steps that the run goes on from.
    """
    check_tracker(name)
    if name == "none":
        return None
    from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

    title = folder.name if begun == 0 else f"{folder.name}+{begun}"
    try:
        if name == "tensorboard":
            # Events from this step on are hidden: they will be written again.
            tracker = TensorBoardTracker("tensorboard", folder, purge_step=begun + 1 if begun else None)
        elif name == "wandb":
            tracker = WandBTracker(PROJECT, name=title, group=folder.name, dir=str(folder))
        else:
            # Packages, hardware and the like are not the learner's to report.
            tracker = TrackioTracker(PROJECT, name=title, group=folder.name, embed=False)
        tracker.start()
        if name != "tensorboard":  # there it would make a run of its own, named by the time of day
            plain = bool | int | float | str | None
            tracker.store_init_configuration({k: v if isinstance(v, plain) else str(v) for k, v in config.items()})
    except Exception as error:
        # A stranger's package: not logged in, no network, a store that cannot be written, whatever it says.
        hint = "; `wandb login`, or WANDB_MODE=offline to send it later" if name == "wandb" else ""
        raise TrackerError(f"tracker {name} did not start: {' '.join(str(error).split())}{hint}") from error
    return tracker
