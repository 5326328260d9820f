"""Processes forked from one that has the slow imports done, which take longer than most of what is tested.

Runs that are killed for real, and the processes of one training, as torchrun starts them.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from server_processes import free_port

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["pytest", "ivt_agents.cli", "ivt_agents.evaluation.evaluate", "ivt_agents.grpo.train", "ivt_agents.play.rollout"]
    + ["ivt_env.commands.data", "ivt_env.commands.view", "ivt_env.viewer.page", "ivt_agents.evaluation.plots", "peft"]
    + ["transformers.models.qwen3_vl.modeling_qwen3_vl", "torch.distributed.fsdp", "ivt_agents.evaluation.swaps"]
)

FILE_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


def before_file_operations(folder: str, told: Callable[[int], None]) -> None:
    """From now on ``told`` gets the number of each file operation in a folder before it is made."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        # Removing a tree names its files without their folder.
        if event in FILE_EVENTS and (event in FILE_EVENTS[2:4] or folder in str(arguments[0])):
            seen += 1
            told(seen)

    sys.addaudithook(hook)


def _called(output: str, environment: dict[str, str], function: Callable[..., None], arguments: Any) -> None:
    """Runs in the forked process."""
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    function(*arguments)


def forked(output: Path | str, function: Callable[..., None], *arguments: Any, **environment: str) -> BaseProcess:
    """A running process of a function, which writes what it says into a file."""
    process = CONTEXT.Process(target=_called, args=(str(output), environment, function, arguments))
    process.start()
    return process


def launch(processes: int, function: Callable[..., None], *arguments: Any, seconds: float = 280) -> None:
    """Run a function in so many processes of one group to their end; one that fails ends the others and is shown."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    shared |= {"LOCAL_WORLD_SIZE": str(processes)}
    with ExitStack() as stack:
        said = [Path(stack.enter_context(tempfile.NamedTemporaryFile()).name) for _ in range(processes)]
        running = [
            forked(output, function, *arguments, **shared, RANK=str(rank), LOCAL_RANK=str(rank))
            for rank, output in enumerate(said)
        ]
        until = time.monotonic() + seconds
        try:
            while any(p.exitcode is None for p in running) and not any(p.exitcode for p in running):
                assert time.monotonic() < until, f"{function} takes longer than {seconds} s"
                time.sleep(0.05)
        finally:
            for process in running:
                process.kill()
                process.join()
        for rank, (process, output) in enumerate(zip(running, said, strict=True)):
            assert not process.exitcode, f"rank {rank}: {output.read_text()[-4000:]}"
