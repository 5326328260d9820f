"""What both learners need: accelerator, metrics log, clock and seeds."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed

from ivt_agents.training.finite import check_finite
from ivt_agents.training.folder import RunError, read_metrics
from ivt_agents.training.tracking import open_tracker
from ivt_agents.vlm.precision import bf16_pays
from ivt_env.files import naming, write_whole

log = logging.getLogger(__name__)


def make_accelerator(bf16: bool) -> Accelerator:
    """For one process or several, with or without GPUs; ``bf16``: compute in bfloat16, by autocast.

    Unless it is told "cpu", accelerate makes each of several processes without a GPU a run of its own, and all of them
    would write into one folder. RunError where the launcher was told to shard the model, and accelerate would not.
    """
    if bf16 and not bf16_pays():
        log.warning("--bf16: this processor computes more slowly in bfloat16 than in float32; leave it out")
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    cpu = not alone and not torch.cuda.is_available()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise RunError("DeepSpeed was asked for, which this training does not know; use configs/accelerate/fsdp.yaml")
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and (alone or cpu):
        why = "one process has no one to share with" if alone else "there is no GPU"
        raise RunError(
            f"FSDP was asked for, but {why}: accelerate would hold the whole model in every process without a word;"
            " launch without it (configs/accelerate/ddp.yaml)"
        )
    # accelerate's launcher sets MASTER_ADDR when it is asked for several processes, WORLD_SIZE only if it starts them.
    if alone and not torch.cuda.is_available() and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= set(os.environ):
        log.warning(
            "accelerate launch was asked for several processes and started one, because there is no GPU: this is one"
            " process; torchrun --standalone --nproc_per_node N starts N"
        )
    accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no", cpu=cpu)
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise RunError("FSDP version 1 cannot gather weights as rollouts need them; set fsdp_version: 2")
    return accelerator


def end_training(accelerator: Accelerator) -> None:
    """Wait for the other processes and leave the group: without it the one that ends first can abort them.

    gloo's threads drop the tensors of the last reduction a moment after it is done, and need the interpreter's lock for
    that. A model of DistributedDataParallel that goes at that moment holds the lock and waits for these threads: the
    process would hang at its end (5 of 25 runs, torch 2.13). Hence the pause.
    """
    accelerator.wait_for_everyone()
    if accelerator.num_processes > 1:
        time.sleep(0.5)
    accelerator.end_training()


class MetricsLog:
    """Metrics as JSON lines and, on request, in a tracker; silent on all but the main process."""

    def __init__(
        self,
        folder: Path,
        enabled: bool = True,
        tracker: str = "none",
        keep_until: int | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        """Open the log of a run (``RunError``), without lines of steps after ``keep_until``.

        ``tracker`` is one of ``TRACKERS`` (``TrackerError``) and is shown ``config``.
        """
        self._file = self._tracker = None
        self._kept: list[dict[str, float]] = []
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        if keep_until is not None:
            self._kept = [row for row in read_metrics(path) if row["step"] <= keep_until]
        write_whole(path, "".join(json.dumps(row) + "\n" for row in self._kept))
        self._file = path.open("a", encoding="utf-8")
        self._tracker = open_tracker(tracker, folder, config or {}, keep_until or 0)

    def holds(self, step: int, prefix: str) -> bool:
        """Whether a line that was kept from before holds a value of that step, such as ``eval/...``."""
        return any(row["step"] == step and any(k.startswith(prefix) for k in row) for row in self._kept)

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """One line; None means *not measured* and is left out. NotFiniteError on all processes."""
        values = {k: float(v) for k, v in metrics.items() if v is not None}
        check_finite(step, values, "It can neither be logged nor learned from.")
        if values and self._file is not None:
            with naming(Path(self._file.name)):
                self._file.write(json.dumps({"step": step, **values}) + "\n")
                self._file.flush()
        if values and self._tracker is not None:
            self._tracker.log(values, step=step)

    def sync(self) -> None:
        """Make sure that a power cut does not lose lines; before a checkpoint, whose steps they describe."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close."""
        if self._file is not None:
            self._file.close()
        if self._tracker is not None:
            self._tracker.finish()


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
    set_seed(int(np.random.SeedSequence(parts).generate_state(1)[0]))
