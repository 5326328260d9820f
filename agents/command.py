"""How every command of the project starts and fails."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ivt_agents.config import ConfigError, load_config, meant
from ivt_env import failures

T = TypeVar("T")

Hidden = Annotated[T, "not in --help"]
"""An option that one experiment needs: accepted like any other, but listed in docs/command_line.md alone."""


def parse(args: type[T], argv: list[str] | None = None, section: str | None = None) -> T:
    """``args`` from the command line and, where a script has a ``section``, the file that ``--config`` names."""
    argv = sys.argv[1:] if argv is None else argv
    for flag in (word.partition("=")[0] for word in argv if word.startswith("--")):
        if told := meant(flag.removeprefix("--no-").removeprefix("--"), args):
            raise ConfigError(f"{flag}: {told}")
    hints = get_type_hints(args, include_extras=True)
    hidden = {n: h for n, h in hints.items() if "not in --help" in getattr(h, "__metadata__", ())}
    if hidden and {"-h", "--help"} & set(argv):
        shown = {name: Annotated[hint, tyro.conf.Suppress] for name, hint in hidden.items()}
        try:  # tyro would not accept what it does not show, so that the help is that of another class
            tyro.cli(type(args.__name__, (args,), {"__annotations__": shown, "__doc__": args.__doc__}), args=argv)
        finally:
            print(f"{len(hidden)} more options are listed in docs/command_line.md.")
    # Only --config is looked for here; what else stands on the command line is tyro's, help included.
    given = [*zip(argv, argv[1:], strict=False), *(word.split("=", 1) for word in argv if "=" in word)]
    chosen = {name: value for name, value in given}.get("--config")
    if section is None or chosen is None:
        return tyro.cli(args, args=argv)
    return tyro.cli(args, args=argv, default=load_config(Path(chosen), args, section))


def run_command(
    main: Callable[[T], Any], args: type[T], argv: list[str] | None = None, section: str | None = None
) -> None:
    """Parse ``args`` (see ``parse``) and run ``main``; the exit status is that of ``ivt_env.failures``."""
    if status := failures.run(lambda: main(parse(args, argv, section))):
        raise SystemExit(status)


def progress_bars(*, note: bool = False, disable: bool = False) -> Progress:
    """Bars on standard error, so that what a command prints can be piped; ``note``: shown behind, a field of tasks."""
    columns = [TextColumn("{task.description:>14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    columns += [TimeRemainingColumn(), *([TextColumn("{task.fields[note]}")] if note else [])]
    return Progress(
        *columns, console=Console(stderr=True), redirect_stdout=False, redirect_stderr=False, disable=disable
    )
