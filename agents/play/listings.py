"""``ivt agents``, ``ivt envs`` and ``ivt prompts``: what can be named on the command line, and what it would be."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import textwrap
from pathlib import Path
from typing import Any

_ABOUT = {
    "agents": "Every form that --agent takes, and the trained policies below FOLDER. --policies of `ivt evaluate` "
    "takes the same after `name=`; there a policy's folder needs no `vlm:`.",
    "envs": "Every registered environment, the splits of its data set, and what each split would serve now.",
    "prompts": "Without a name: the shipped prompt files. With one: the file itself, to be read, or copied and "
    "changed. With --into: says in a model's folder what the model is asked (policy.json).",
}


def add_listing(commands: Any, name: str, line: str) -> None:
    """Add one of the three, with its line of help, to the commands of ``add_subparsers``."""
    one: argparse.ArgumentParser = commands.add_parser(name, help=line, description=_ABOUT[name])
    one.set_defaults(run={"agents": _agents, "envs": _envs, "prompts": _prompts}[name])
    if name == "prompts":
        one.add_argument("name", nargs="?", metavar="NAME_OR_FILE", help="a shipped prompt file, or a file")
        one.add_argument("--into", type=Path, metavar="FOLDER", help="of a model: write its policy.json")
        one.add_argument("--overwrite", action="store_true", help="replace the policy.json that is there")
        return
    one.add_argument("--json", action="store_true", help="print JSON and nothing else")
    if name == "agents":
        says = "searched for policies (%(default)s)"
        one.add_argument("--runs", type=Path, default=Path("runs"), metavar="FOLDER", help=says)
    else:
        says = "folder of the real data sets (default: the variable IVT_DATA, then the user's cache)"
        one.add_argument("--data-root", type=Path, metavar="FOLDER", help=says)


def built_in_agents() -> dict[str, str]:
    """Every form of an agent's name and what it is: the table in the documentation of ``load_agent``."""
    from ivt_agents.play.by_name import load_agent

    table = (load_agent.__doc__ or "").split("=\n")[1]
    return {spec: what.replace("``", "") for spec, what in re.findall(r"``([^`]+)`` +(.+?)\s*$", table, re.M)}


def policies(folder: Path) -> list[dict[str, Any]]:
    """The trained policies below ``folder``: spec and record of each, in order of their paths.

    A broken file is left out of the list; ``load_agent`` says what is wrong with it.
    """
    found = []
    for path in sorted(folder.glob("**/policy.json")):
        if not any(part.startswith("checkpoint") for part in path.parts):
            with contextlib.suppress(OSError, ValueError):
                record = json.loads(path.read_text(encoding="utf-8"))
                found += [{"spec": f"vlm:{path.parent}", "record": record}] if isinstance(record, dict) else []
    return found


def environments(data_root: Path | None) -> list[dict[str, Any]]:
    """Every registered id, JSON-able: its data set, and per split whether it is served and from where."""
    import ivt_env
    from ivt_env.data import data_folder, find_source, splits
    from ivt_env.data.mixture import PARTS

    root = data_folder(data_root)
    rows = []
    for name, options in ivt_env.IDS.items():
        dataset = str(options["dataset"])
        row: dict[str, Any] = {"id": name, "dataset": dataset, "looked_in": None, "splits": {}}
        for split in splits(dataset):
            if dataset in ("scenes", "photos", "screens"):
                row["splits"][split] = {"serves": dataset, "from": "embedded"}
                continue
            row["looked_in"] = str(root)
            if dataset == "mixed":
                whole = all(find_source(*part, root) for group in PARTS.values() for part in group)
                folder = str(root) if whole else None
            else:
                source = find_source(dataset, split, root)
                folder = None if source is None else f"{source.folder} ({source.layout})"
            # Nothing replaces one's own data.
            serves = dataset if folder else None if dataset == "custom" else "scenes"
            row["splits"][split] = {"serves": serves, "from": folder}
        rows.append(row)
    return rows


def _agents(args: argparse.Namespace) -> int:
    forms, trained = built_in_agents(), policies(args.runs)
    if args.json:
        listed = [{"spec": spec, "what": what} for spec, what in forms.items()]
        print(json.dumps({"agents": listed, "policies": trained}, indent=2))
        return 0
    width = max(map(len, forms)) + 2
    for spec, what in forms.items():
        print(f"{spec:<{width}}{what}")
    print(f"\ntrained policies below {args.runs}: {'none' if not trained else ''}".rstrip())
    for one in trained:
        print(f"  {one['spec']}")
    print("vlm:tiny is the model that is shipped with the package.")
    return 0


def _envs(args: argparse.Namespace) -> int:
    rows = environments(args.data_root)
    if args.json:
        print(json.dumps({"environments": rows}, indent=2))
        return 0
    for row in rows:
        print(f"{row['id']:<22}data set {row['dataset']}")
        by_place: dict[str, list[str]] = {}
        for split, found in row["splits"].items():
            by_place.setdefault(_words(row, found), []).append(split)
        for words, names in by_place.items():
            print(textwrap.indent(f"{', '.join(names)}: {words}", "    "))
    return 0


def _words(row: dict[str, Any], found: dict[str, Any]) -> str:
    if found["from"] == "embedded":
        return "embedded, always there"
    if found["from"] is not None:
        return f"from {found['from']}"
    if found["serves"] is None:
        return f"nothing: no data set of your own in {row['looked_in']} (docs/data/custom.md)"
    get = "" if row["dataset"] == "mixed" else f"; to get it: ivt data fetch {row['dataset']}"
    return f"not in {row['looked_in']}: EMBEDDED SCENES in its place, or an error with strict{get}"


def _prompts(args: argparse.Namespace) -> int:
    from ivt_agents.vlm.codec import ANSWER
    from ivt_agents.vlm.prompts import POLICY_FILE, PromptError, find_prompts, load_prompts, shipped_prompts
    from ivt_env.files import write_whole

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
