"""Training runs that are killed for real: a process with its imports done, and when it dies.

Importing torch takes longer than the runs themselves, so each process is forked from one that has it
loaded. What is killed is ``train_grpo.main`` in a process of its own, by SIGKILL: nothing is cleaned up.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train_grpo"])

FILE_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")


def train(options: dict[str, Any], die_at_file: int | None = None) -> None:
    """Runs in the forked process.

    Args:
        options: fields of the command's ``Args``.
        die_at_file: number of the file operation in the run folder that is never made.
    """
    import torch

    from ivt_agents.grpo import train as train_grpo

    torch.set_num_threads(1)
    folder, seen = str(options["out"]), 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        # Removing a tree names its files without their folder.
        if event in FILE_EVENTS and (event in FILE_EVENTS[2:4] or folder in str(arguments[0])):
            seen += 1
            if seen == die_at_file:
                os.kill(os.getpid(), signal.SIGKILL)

    if die_at_file is not None:
        sys.addaudithook(hook)
    with open(os.devnull, "w") as nowhere:
        sys.stdout = nowhere
        train_grpo.main(train_grpo.Args(**options))


def run(options: dict[str, Any], kill_after: float | None = None, die_at_file: int | None = None) -> tuple[int, float]:
    """Start a run and wait for its end, or kill it after so many seconds; returns its exit code and its seconds."""
    process = CONTEXT.Process(target=train, args=(options, die_at_file))
    begun = time.perf_counter()
    process.start()
    process.join(kill_after)
    if process.is_alive():
        process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, time.perf_counter() - begun


def with_out(options: dict[str, Any], out: Path, **changes: Any) -> dict[str, Any]:
    return options | {"out": out} | changes
