"""``ivt``: one command for everything. ``ivt COMMAND --help`` says what each does.

The exit status of every command is that of ``ivt_env.failures``.
"""

from __future__ import annotations

import argparse
import importlib
import io
import logging
import sys
from collections.abc import Sequence
from typing import NamedTuple

_STATUS = "exit status: 0 done, 1 data unfit for use, 2 an error to fix, 130 interrupted"
_EXAMPLES = """examples:
  ivt envs                                  what is there, and from where
  ivt rollout --agent random --episodes 20  play, print and save episodes
  ivt view runs/rollout                     look at them in a browser
  ivt play                                  draw the boxes yourself
  ivt train-sft && ivt train-grpo           both learners, on what is embedded
  ivt evaluate --policies base=tiny grpo=runs/grpo/policy
"""


class Command(NamedTuple):
    """Where a command is, and what it does in one line."""

    module: str
    help: str
    script: bool = False
    """Its options are those of the module's dataclass ``Args``, passed on as they are; else it has a parser."""
    section: str | None = None
    """Part of a ``--config`` file that it reads."""


COMMANDS = {
    "rollout": Command("ivt_agents.play.rollout", "play episodes with any agent, print and save them", True, "rollout"),
    "view": Command("ivt_env.commands.view", "look at recorded episodes: one HTML file, or a local server"),
    "play": Command("ivt_env.commands.play", "draw the boxes yourself, scored by the environment and saved"),
    "evaluate": Command(
        "ivt_agents.evaluation.evaluate",
        "compare policies on the same samples: scores, intervals, plots",
        True,
        "evaluate",
    ),
    "report": Command("ivt_agents.evaluation.report", "rebuild the report page of an evaluation", True),
    "train-sft": Command("ivt_agents.sft.train", "teach a policy corrective traces", True, "sft"),
    "train-grpo": Command("ivt_agents.grpo.train", "train a policy by multi-turn GRPO on IoU gains", True, "grpo"),
    "data": Command("ivt_env.commands.data", "fetch, check, convert and look at data sets"),
    "score": Command(
        "ivt_env.commands.score", "score a file of predictions, by the benchmark's own rule and a common one"
    ),
    "prompts": Command("ivt_agents.play.listings", "list, show and copy what models are asked"),
    "agents": Command("ivt_agents.play.listings", "list the built-in agents and the trained policies found here"),
    "envs": Command("ivt_agents.play.listings", "list the environments, what data each would serve now and from where"),
}


def build_parser(chosen: str | None = None) -> argparse.ArgumentParser:
    """The parser of the whole command; of modules only that of ``chosen`` is imported, so that help starts at once."""
    parser = argparse.ArgumentParser(
        "ivt",
        description="Iterative visual grounding: environments, agents, training and evaluation.",
        epilog=f"{_EXAMPLES}\n{_STATUS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    parser.add_argument("-v", "--verbose", action="store_true", help="show what is read, written and left out")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, command in COMMANDS.items():
        if name != chosen or command.script:
            commands.add_parser(name, help=command.help, add_help=not command.script)
            continue
        found = importlib.import_module(command.module)
        if name == "data":
            found.add_subcommands(commands.add_parser(name, help=command.help))
        elif name in ("agents", "envs", "prompts"):
            found.add_listing(commands, name, command.help)
        else:
            one = commands.add_parser(name, help=command.help, description=getattr(found, "DESCRIPTION", command.help))
            found.add_arguments(one)
            one.set_defaults(run=found.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without the letters of a path or expression
        sys.stdout.reconfigure(errors="backslashreplace")
    # No option that stands before the command takes a value.
    place = next((i for i, word in enumerate(words) if not word.startswith("-")), len(words))
    chosen = words[place] if place < len(words) else None
    if chosen not in COMMANDS:
        return _run_parsed(build_parser(), words)
    try:
        from ivt_env import failures
    except KeyboardInterrupt:  # Gymnasium takes a moment to import
        print("\ninterrupted", file=sys.stderr)
        return 130
    return failures.run(lambda: _run(chosen, place, words))


def _run(chosen: str, place: int, words: list[str]) -> int:
    command = COMMANDS[chosen]
    if not command.script:
        return _run_parsed(build_parser(chosen), words)
    _log(build_parser().parse_args(words[: place + 1]).verbose)
    parse = importlib.import_module("ivt_agents.command").parse
    module = importlib.import_module(command.module)
    words = words[place + 1 :]
    given, sys.argv = sys.argv, [f"ivt {chosen}", *words]  # the name that help and errors show
    try:
        done = module.main(parse(module.Args, words, command.section))
        return done if type(done) is int else 0  # a training script returns where it wrote
    finally:
        sys.argv = given


def _run_parsed(parser: argparse.ArgumentParser, words: list[str]) -> int:
    args = parser.parse_args(words)
    if args.version:
        from ivt_env import __version__

        print(f"ivt-env {__version__}")
        return 0
    if args.command is None:
        parser.error("the following arguments are required: COMMAND (ivt --help lists them)")
    _log(args.verbose)
    return int(args.run(args))


def _log(verbose: bool) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(message)s")


if __name__ == "__main__":
    raise SystemExit(main())
