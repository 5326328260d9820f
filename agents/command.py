"""How every command of the project starts and fails."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import gymnasium as gym
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from agents.config import load_config

T = TypeVar("T")


def parse(args: type[T], argv: list[str] | None = None, section: str | None = None) -> T:
    """``args`` from the command line and, where a script has a ``section``, the file that ``--config`` names."""
    argv = sys.argv[1:] if argv is None else argv
    if section is None:
        return tyro.cli(args, args=argv)
    # Only --config is looked for here; what else stands on the command line is tyro's, help included.
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    chosen: Path | None = finder.parse_known_args(argv)[0].config
    if chosen is None:
        return tyro.cli(args, args=argv)
    return tyro.cli(args, args=argv, default=load_config(chosen, args, section))


def run_command(
    main: Callable[[T], Any], args: type[T], argv: list[str] | None = None, section: str | None = None
) -> None:
    """Parse ``args`` from the command line and run ``main``.

    ``section`` is the part of a ``--config`` file that the script reads; None: it takes no such file.

    What the user can mend (a wrong option, missing data, a broken checkpoint) ends with one line on
    standard error and exit status 2; anything else is a bug and shows its traceback.
    """
    try:
        main(parse(args, argv, section))
        sys.stdout.flush()
    except BrokenPipeError as error:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end of the process
        raise SystemExit(1) from error
    except (ValueError, FileNotFoundError, gym.error.Error) as error:
        # DataError, PolicyError and RunError are ValueErrors.
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def progress_bars(*, note: bool = False, disable: bool = False) -> Progress:
    """Bars on standard error, so that what a command prints can be piped.

    Args:
        note: tasks have a field ``note``, shown behind the bar.
        disable: show nothing.
    """
    columns = [TextColumn("{task.description:>14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    columns += [TimeRemainingColumn(), *([TextColumn("{task.fields[note]}")] if note else [])]
    return Progress(
        *columns, console=Console(stderr=True), redirect_stdout=False, redirect_stderr=False, disable=disable
    )
