"""What both learners need: run folders, metrics, and checkpoints that are whole or not there."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator


class RunError(ValueError):
    """A run folder or checkpoint that cannot be used. Says which, and what to do."""


def make_accelerator(mixed_precision: str) -> Accelerator:
    """For one process or several, with or without GPUs.

    Unless it is told "cpu", accelerate makes each of several processes without a GPU a run of its own,
    and all of them would write into one folder.

    Args:
        mixed_precision: ``no`` or ``bf16``.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    return Accelerator(mixed_precision=mixed_precision, cpu=not alone and not torch.cuda.is_available())


class MetricsLog:
    """Metrics as JSON lines and, on request, TensorBoard; silent on all but the main process."""

    def __init__(self, folder: Path, enabled: bool = True, tensorboard: bool = True, keep_until: int | None = None):
        """Open the log.

        Args:
            folder: of the run.
            enabled: false on all processes but the main one.
            tensorboard: also write event files.
            keep_until: when a run is resumed, lines of later steps are dropped first.
        """
        self._file = self._board = None
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        if keep_until is not None and path.exists():
            lines = [x for x in path.read_text().splitlines() if json.loads(x)["step"] <= keep_until]
            path.write_text("".join(x + "\n" for x in lines))
        elif path.exists():
            path.unlink()
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=keep_until)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line; NaN means *not measured* and is left out."""
        values = {k: float(v) for k, v in metrics.items() if np.isfinite(v)}
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        if self._board is not None:
            for key, value in values.items():
                self._board.add_scalar(key, value, step)

    def close(self) -> None:
        """Flush and close."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


class Stopwatch:
    """Seconds by phase of one training step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Give the time since the last lap to ``phase``."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


def seed_everything(*parts: int) -> None:
    """Seed Python, NumPy and torch from a tuple of integers, for example (seed, step, rank)."""
    seed = int(np.random.SeedSequence(parts).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def derived_seed(*parts: int) -> int:
    """One 63-bit seed from several integers; equal parts give equal seeds on every machine."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")
    partial.replace(path)


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any], keep: int = 2) -> Path:
    """Write ``checkpoints/step-N`` whole or not at all, and forget all but the last ``keep``.

    Args:
        folder: of the run.
        step: number of finished training steps.
        state: what ``torch.load(weights_only=True)`` can read back.
        keep: how many checkpoints to keep.
    """
    parent = folder / "checkpoints"
    final, partial = parent / f"step-{step:06d}", parent / f"partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    torch.save({"step": step, **state}, partial / "state.pt")
    shutil.rmtree(final, ignore_errors=True)
    partial.replace(final)
    for old in sorted(parent.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return final


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """The newest checkpoint of a run.

    Raises:
        RunError: where there is none, or it cannot be read.
    """
    found = sorted((folder / "checkpoints").glob("step-*"))
    if not found:
        raise RunError(f"nothing to resume in {folder}: no checkpoints/step-*; start without --resume")
    path = found[-1] / "state.pt"
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise RunError(f"{path} cannot be read ({error}); remove {found[-1]} to resume from the one before") from error
    return state
