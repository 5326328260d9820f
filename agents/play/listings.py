"""``ivt agents`` and ``ivt envs``: what can be named on the command line, and what it would be."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import textwrap
from pathlib import Path
from typing import Any


def add_listing(commands: Any, name: str, line: str) -> None:
    """Add ``ivt agents`` or ``ivt envs``, with its line of help, to the commands of ``add_subparsers``."""
    if name == "agents":
        about = "Every form that --agent takes, and the trained policies below FOLDER. --policies of `ivt evaluate` "
        about += "takes the same after `name=`; there a policy's folder needs no `vlm:`."
    else:
        about = "Every registered environment, the splits of its data set, and what each split would serve now."
    one: argparse.ArgumentParser = commands.add_parser(name, help=line, description=about)
    one.add_argument("--json", action="store_true", help="print JSON and nothing else")
    if name == "agents":
        says = "searched for policies (%(default)s)"
        one.add_argument("--runs", type=Path, default=Path("runs"), metavar="FOLDER", help=says)
    else:
        says = "folder of the real data sets (default: the variable IVT_DATA, then the user's cache)"
        one.add_argument("--data-root", type=Path, metavar="FOLDER", help=says)
    one.set_defaults(run=_agents if name == "agents" else _envs)


def built_in_agents() -> dict[str, str]:
    """Every form of an agent's name and what it is: the table in the documentation of ``load_agent``."""
    from ivt_agents.play.by_name import load_agent

    rows = re.findall(r"^\s*``([^`]+)``\s{2,}(.+?)\s*$|^\s*``([^`]+)`` (.+?)\s*$", load_agent.__doc__ or "", re.M)
    return {a or c: (b or d).replace("``", "") for a, b, c, d in rows if not (c and d.startswith("is "))}


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
    """Every registered id, JSON-able: its data set, and per split whether it is served and from where.

    Raises:
        DataError: for a home folder that does not exist.
    """
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
    from ivt_env.data import GUI

    if found["from"] == "embedded":
        return "embedded, always there"
    if found["from"] is not None:
        return f"from {found['from']}"
    if found["serves"] is None:
        return f"nothing: no data set of your own in {row['looked_in']} (docs/data/custom.md)"
    how = "docs/data/gui.md" if row["dataset"] in GUI else f"ivt data fetch {row['dataset']}"
    get = "" if row["dataset"] == "mixed" else f"; to get it: {how}"
    return f"not in {row['looked_in']}: EMBEDDED SCENES in its place, or an error with strict{get}"
