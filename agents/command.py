"""How every command of the project starts and fails."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import gymnasium as gym
import tyro

T = TypeVar("T")


def run_command(main: Callable[[T], Any], args: type[T], argv: list[str] | None = None) -> None:
    """Parse ``args`` from the command line and run ``main``.

    What the user can mend (a wrong option, missing data, a broken checkpoint) ends with one line on
    standard error and exit status 2; anything else is a bug and shows its traceback.
    """
    try:
        parsed = tyro.cli(args, args=argv)
        main(parsed)
    except (ValueError, FileNotFoundError, gym.error.Error) as error:
        # DataError, PolicyError and RunError are ValueErrors.
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
