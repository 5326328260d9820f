"""``ivt``: one command for everything. ``ivt COMMAND --help`` says what each does."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Sequence

from ivt_env import __version__
from ivt_env.commands import data, score


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    parser = argparse.ArgumentParser("ivt", description="Iterative visual grounding: data and scores.")
    parser.add_argument("--version", action="version", version=f"ivt-env {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="show what is read, written and left out")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    one = commands.add_parser("data", help="fetch, check, convert and look at data sets")
    data.add_subcommands(one)
    one = commands.add_parser(
        "score",
        help="score a file of predictions, by the benchmark's own rule and by one common rule",
        description="Score a file of predictions without a model.",
    )
    score.add_arguments(one)
    one.set_defaults(run=score.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status: 0 done, 2 an error that the user can mend, 130 interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without the letters of a path or expression
        sys.stdout.reconfigure(errors="backslashreplace")
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(levelname)s %(message)s")
    try:
        status = int(args.run(args))
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end of the process
        return 1
    return status


if __name__ == "__main__":
    raise SystemExit(main())
