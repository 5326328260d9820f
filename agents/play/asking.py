"""``ivt prompts``: the prompt files, and the ``policy.json`` of a model folder made from one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ivt_agents.vlm.codec import ANSWER
from ivt_agents.vlm.prompts import POLICY_FILE, PromptError, find_prompts, load_prompts, shipped_prompts
from ivt_env.files import write_whole

DESCRIPTION = (
    "Without a name: the shipped prompt files. With one: the file itself, to be read, or copied and changed. With "
    "--into: says in a model's folder what the model is asked (policy.json)."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``ivt prompts`` to ``parser``."""
    parser.add_argument("name", nargs="?", metavar="NAME_OR_FILE", help="a shipped prompt file, or a file")
    parser.add_argument("--into", type=Path, metavar="FOLDER", help="of a model: write its policy.json")
    parser.add_argument("--overwrite", action="store_true", help="replace the policy.json that is there")


def run(args: argparse.Namespace) -> int:
    """List, show or write; the exit status.

    Raises:
        PromptError: for a file or folder that is not there or in the way, and prompts that a model on this machine
            cannot have.
    """
    if args.name is None:
        if args.into is not None:
            raise PromptError(f"--into {args.into}: name the prompts, one of {', '.join(shipped_prompts())}, or a file")
        for name in shipped_prompts():
            asked = load_prompts(name)
            print(f"{name:<12}{asked.codec.frame:<16}{asked.layout:<8}{asked.codec.answer}")
        return 0
    path, asked = find_prompts(args.name), load_prompts(args.name)
    if args.into is None:
        print(path.read_text(encoding="utf-8"), end="")
        return 0
    if asked.codec.answer != ANSWER:
        raise PromptError(f"{path}: answers are {asked.codec.answer}; a model on this machine answers {ANSWER}")
    if not args.into.is_dir():
        raise PromptError(f"--into {args.into}: no such folder; give that of a model")
    target = args.into / POLICY_FILE
    if target.exists() and not args.overwrite:
        raise PromptError(f"{target} is there: what the model was trained on may stand in it; add --overwrite")
    write_whole(target, json.dumps(asked.settings(), indent=1) + "\n")
    print(target)
    return 0
