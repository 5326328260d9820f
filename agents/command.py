"""How every command of the project starts and fails."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import gymnasium as gym
import tyro

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
    except (ValueError, FileNotFoundError, gym.error.Error) as error:
        # DataError, PolicyError and RunError are ValueErrors.
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
