"""Several processes of one training, as torchrun starts them, without the seconds that its own process takes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from server_processes import free_port

ROOT = Path(__file__).parent.parent


def launch(processes: int, script: str | Path, *arguments: object, seconds: float = 280) -> None:
    """Run ``script`` on so many processes to their end; one that fails ends the others and is shown."""
    command = [sys.executable, str(script), *map(str, arguments)]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    shared |= {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(processes)}
    with ExitStack() as stack:
        said = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(processes)]
        running = []
        for rank, output in enumerate(said):
            environment = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            running.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output))
        until = time.monotonic() + seconds
        try:
            while any(p.poll() is None for p in running) and not any(p.returncode for p in running):
                assert time.monotonic() < until, f"{command} takes longer than {seconds} s"
                time.sleep(0.05)
        finally:
            for process in running:
                process.kill()
                process.wait()
        for rank, (process, output) in enumerate(zip(running, said, strict=True)):
            output.seek(0)
            assert not process.returncode, f"rank {rank}: {output.read().decode()[-4000:]}"
