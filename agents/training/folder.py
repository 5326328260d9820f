"""Run folders that can be gone on with: what a run was begun with, its metrics, and what goes before it begins anew.

A run's folder holds ``config.json``, which says what was asked for. A command that finds one goes on with it
(``--resume``, the same options), begins anew (``--overwrite``: what the run made goes first, so that nothing of it
ever lies beside another configuration) or is refused. Nothing here imports torch,
so an evaluation of agents that need none starts without it.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ivt_env
from ivt_env.failures import reading
from ivt_env.files import as_read, asked_of, forget, write_whole

CONFIG = "config.json"
"""What a run was asked for."""

PROCESSES = "processes"
"""Key of the recorded configuration for the number of processes. Each process samples with its own seed."""


class RunError(ValueError):
    """A run folder, checkpoint or option that cannot be used. Says which, and what to do."""


def check_least(options: object, least: Mapping[str, int]) -> None:
    """Refuse (``RunError``) attributes of ``options`` below the ``least`` of each name, and NaN."""
    for name, number in least.items():
        if not getattr(options, name) >= number:
            raise RunError(f"{name} {getattr(options, name)}: give at least {number}")


def check_new(folder: Path, results: Sequence[str]) -> None:
    """Refuse (``RunError``) to begin a run where checkpoints or ``results`` of another lie."""
    there, found = [name for name in results if (folder / name).exists()], checkpoints(folder)
    if there or found:
        run = f"a run of {number_of(found[-1])} steps" if found else f"the results of another run ({', '.join(there)})"
        raise RunError(
            f"{folder} holds {run}: add --resume to go on with it, --overwrite to lose it, or give another --out"
        )


def recorded_options(folder: Path) -> dict[str, Any]:
    """What ``config.json`` of a run holds; RunError where it is missing, FileError where it cannot be read."""
    if (recorded := asked_of(folder, CONFIG)) is None:
        raise RunError(f"nothing to resume in {folder}: no {CONFIG}; start without --resume")
    return recorded


def check_resume(recorded: Mapping[str, Any], given: Mapping[str, Any], out: Path, may_change: Collection[str]) -> None:
    """Refuse (``RunError``) to go on with a run under other options than it was begun with: no command describes it.

    ``given`` are the options of this command with ``processes``, None filled in; on those that ``may_change`` no result
    depends.
    """
    now = as_read(given)
    different = {k: v for k, v in now.items() if k not in may_change and (k not in recorded or recorded[k] != v)}
    if not different:
        return
    told = [f"{k}: the run has {recorded.get(k)!r}, this command {v!r}" for k, v in different.items()]
    flags = [_flag(k, recorded.get(k)) for k in different if k != PROCESSES and recorded.get(k) is not None]
    advice = [f"give {' '.join(flags)} to go on"] if flags else []
    advice += [f"start {recorded.get(PROCESSES)} processes to go on"] if PROCESSES in different else []
    advice += ["or begin another run with a new --out"]
    raise RunError(f"{out} is a run with other options. {'; '.join(told)}. {', '.join(advice)}".replace("\n", " "))


def _flag(name: str, value: Any) -> str:
    """The option as it is written on the command line."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def forget_run(folder: Path, results: Sequence[str]) -> None:
    """Remove what a run made, in this order, and at last what it was asked for.

    Whenever this is cut off, what is left belongs to the configuration that is left.
    """
    for name in (*results, CONFIG):
        forget(folder / name)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [p for p in (folder / "checkpoints").glob("step-*") if p.name[5:].isdecimal()]
    return sorted(found, key=number_of)


def what_is_kept(folder: Path, lr: float) -> str:
    """What remains of a run that stops because something is not finite, and what to do."""
    kept = checkpoints(folder)
    rate = f"begin another run with other options, for example a --learning-rate below {lr:g}"
    return f"The last good checkpoint is {kept[-1]}; {rate}" if kept else f"No checkpoint was written yet; {rate}"


def number_of(checkpoint: Path) -> int:
    """Training steps that a checkpoint has seen."""
    return int(checkpoint.name[5:])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``, none where it is missing; RunError for one that is broken.

    A process that is killed may leave its last line unfinished: that one is dropped.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines[:-1], 1):  # behind the last newline stands what was cut off, or nothing
        with reading(f"{path}, line {number}", "remove it to go on", RunError, "is not a line of metrics"):
            row = json.loads(line)
            row["step"] = int(row["step"])
        rows.append(row)
    return rows


def made_by() -> dict[str, Any]:
    """What makes a result: this version and commit, the date, the machine, and the libraries that compute."""
    source = Path(__file__).resolve().parents[2]
    commit = None  # of an installed package nothing is known
    if (source / ".git").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            asked = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=12"]
            commit = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        machine += f", {torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return {
        "version": ivt_env.__version__,
        "commit": commit,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "python": platform.python_version(),
        "torch": None if torch is None else torch.__version__,
    }


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_whole(path, json.dumps(value, indent=1, default=str) + "\n")
