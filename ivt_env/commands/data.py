"""``ivt data check | convert | show | mix``: look after the data sets on this machine."""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from ivt_env.commands import fetch
from ivt_env.data import NAMES, data_folder, find_source, load_dataset, splits
from ivt_env.data.checks import Finding, Report, check_source, leaks
from ivt_env.data.converters import Converted, export, from_coco, from_label_studio
from ivt_env.data.mixture import IDS_FILE, open_mixture
from ivt_env.data.sample import DataError, DataMissingError
from ivt_env.data.sheet import contact_sheet
from ivt_env.data.table import Source, Table, open_table

_ON_DISK = tuple(name for name in NAMES if name not in ("scenes", "photos", "mixed"))

_FETCH = (
    "Downloads a data set to where its reader looks for it. Shows the licence and the size first and asks before more "
    "than 1 GB. Run it again after an interruption: it goes on where it stopped."
)


def add_subcommands(parser: argparse.ArgumentParser) -> None:
    """Add ``fetch``, ``check``, ``convert``, ``show`` and ``mix`` below ``ivt data``."""
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    one = commands.add_parser("fetch", help="download a data set", description=_FETCH)
    fetch.add_arguments(one)
    one.set_defaults(run=fetch.run)

    one = commands.add_parser(
        "check",
        help="is it whole, readable and free of leaks?",
        description="Reads every row and every picture. With several data sets it also says which pictures "
        "of one's training split are in another's validation or test. Exit status 1: not fit for use.",
    )
    one.add_argument("names", nargs="+", metavar="NAME", help=f"data set: {', '.join(_ON_DISK)}")
    one.add_argument("--split", action="append", metavar="SPLIT", help="only this one (may be repeated)")
    one.add_argument("--no-pictures", action="store_true", help="rows only (much faster)")
    one.add_argument("--workers", type=int, default=4, metavar="N", help="pictures decoded at a time (%(default)s)")
    one.add_argument("--json", action="store_true", help="print JSON and nothing else")
    _add_root(one)
    one.set_defaults(run=_guarded(_check))

    one = commands.add_parser(
        "convert",
        help="into this project's form, from COCO or Label Studio, or into plain JSONL",
        description="With a data set's name: reads its annotations once, so that later openings are quick; with "
        "--out also writes it as plain JSONL. With --from: turns an export into a data set of your own.",
    )
    one.add_argument("source", metavar="NAME|FILE", help="data set, or the file to convert (with --from)")
    one.add_argument("--from", dest="kind", choices=("coco", "label-studio"), help="what the file is")
    one.add_argument("--pictures", type=Path, metavar="FOLDER", help="with --from: where the pictures are")
    one.add_argument("--out", type=Path, metavar="FOLDER", help="folder for dataset.json, SPLIT.jsonl and images/")
    one.add_argument("--name", metavar="LABEL", help="with --out: the new data set's label")
    one.add_argument("--expression-key", metavar="KEY", help="with --from: where the expression stands in the file")
    one.add_argument("--split", default=None, metavar="SPLIT", help="the split to write (default: train, or all)")
    one.add_argument(
        "--shares", type=float, nargs=3, metavar=("TRAIN", "VAL", "TEST"), help="with --from: divide the pictures"
    )
    one.add_argument("--seed", type=int, default=0, help="of the division (%(default)s)")
    one.add_argument("--copy", action="store_true", help="copy the pictures instead of linking them")
    _add_root(one)
    one.set_defaults(run=_guarded(_convert))

    one = commands.add_parser(
        "show",
        help="a contact sheet with the boxes drawn",
        description="Target green, other objects of its class blue. Look before you train.",
    )
    one.add_argument("name", metavar="NAME", help=f"data set: {', '.join(NAMES)}")
    one.add_argument("--split", default=None, metavar="SPLIT", help="default: the first that there is")
    one.add_argument("--number", type=int, default=12, metavar="N", help="samples (%(default)s)")
    one.add_argument("--index", type=int, nargs="+", metavar="I", help="these samples instead of random ones")
    one.add_argument("--seed", type=int, default=0, help="of the choice (%(default)s)")
    one.add_argument("--columns", type=int, default=4, metavar="N", help="pictures in a row (%(default)s)")
    one.add_argument("--side", type=int, default=300, metavar="PX", help="of one picture (%(default)s)")
    one.add_argument("--out", type=Path, default=Path("sheet.png"), metavar="FILE", help="default: %(default)s")
    _add_root(one)
    one.set_defaults(run=_guarded(_show))

    one = commands.add_parser(
        "mix",
        help="draw the paper's mixture",
        description="Chooses the samples of IVT-Mixed-v0 and writes their ids to mixed/ids.json; share that file to "
        "share the mixture.",
    )
    one.add_argument("--seed", type=int, default=0, help="of the choice (%(default)s)")
    one.add_argument("--again", action="store_true", help="draw anew although there are ids")
    _add_root(one)
    one.set_defaults(run=_guarded(_mix))


def _add_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-root", metavar="FOLDER", help="where data sets lie (default: the variable IVT_DATA, else the cache)"
    )


def _guarded(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """What the user can mend becomes one line and exit status 2."""

    def guarded(args: argparse.Namespace) -> int:
        try:
            return run(args)
        except (DataError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return guarded


def _sources(name: str, root: Path, wanted: Sequence[str] | None) -> list[tuple[Source, list[str]]]:
    """Every layout of a data set that is needed to serve the splits, with those that it serves."""
    if name not in _ON_DISK:
        raise DataError(f"no data set {name!r} that lies on a disk; there are {', '.join(_ON_DISK)}")
    found: dict[str, tuple[Source, list[str]]] = {}
    for split in wanted or splits(name):
        source = find_source(name, split, root)
        if source is not None:
            found.setdefault(source.layout, (source, []))[1].append(split)
        elif wanted:
            load_dataset(name, split, root, strict=True)  # says why it cannot be served
    if not found:
        load_dataset(name, splits(name)[0], root, strict=True)
    return list(found.values())


def _check(args: argparse.Namespace) -> int:
    root = data_folder(args.data_root)
    reports: list[Report] = []
    tables: dict[tuple[str, str], Table] = {}
    for name in args.names:
        for source, of_source in _sources(name, root, args.split):
            report = check_source(source, of_source, not args.no_pictures, args.workers, _progress)
            reports.append(report)
            tables |= {(source.name, s): open_table(source, s, need_pictures=False) for s in of_source}
            if not args.json:
                print(report)
    across = _across(tables) if len(args.names) > 1 else []
    if args.json:
        found = {"data_sets": [r.as_json() for r in reports], "across": [vars_of(f) for f in across]}
        print(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        for finding in across:
            print(f"  {finding.level.upper():<8} {finding.text} ({finding.count:,}), {', '.join(finding.examples)}")
    return 0 if all(report.ok for report in reports) else 1


def _across(tables: dict[tuple[str, str], Table]) -> list[Finding]:
    pairs = {(a, b) for a in tables for b in tables if a[0] != b[0] and a[1] == "train"}
    return [finding for a, b in sorted(pairs) for finding in leaks({a: tables[a], b: tables[b]})]


def vars_of(finding: Finding) -> dict[str, object]:
    """JSON-able."""
    return {key: getattr(finding, key) for key in ("level", "split", "text", "count", "examples")}


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done:,} of {total:,} pictures", end="\n" if done == total else "", file=sys.stderr, flush=True)


def _convert(args: argparse.Namespace) -> int:
    if args.kind is not None:
        if args.out is None or args.pictures is None or args.name is None:
            raise DataError("convert --from needs --pictures, --out and --name")
        if args.split and args.shares:
            raise DataError("--split puts everything into one split and --shares divides it: give one of them")
        divided: str | dict[str, float] = args.split or "train"
        if args.shares:
            divided = {s: share for s, share in zip(("train", "val", "test"), args.shares, strict=True) if share}
        keys = {} if args.expression_key is None else {"expression_key": args.expression_key}
        convert = from_coco if args.kind == "coco" else from_label_studio
        _say(
            convert(
                args.source, args.pictures, args.out, args.name, split=divided, seed=args.seed, copy=args.copy, **keys
            )
        )
        return 0
    if Path(args.source).suffix and args.source not in NAMES:
        raise DataError(f"{args.source} is a file: say what it is with --from coco or --from label-studio")
    if (args.out is None) != (args.name is None):
        raise DataError("to write plain JSONL give both --out FOLDER and --name LABEL")
    root = data_folder(args.data_root)
    for source, of_source in _sources(args.source, root, [args.split] if args.split else None):
        for split in of_source:
            table = open_table(source, split, need_pictures=args.out is not None)
            print(f"{source.name} {split}: {len(table):,} expressions, from {source.layout} in {source.folder}")
            if args.out is not None:
                # Their own names where ours has no such split: testA and testB stay two files.
                _say(export(table, args.out, args.name, split, copy=args.copy))
    return 0


def _say(done: Converted) -> None:
    counts = ", ".join(f"{split} {count:,}" for split, count in done.counts.items())
    print(f"{done.folder}: {counts} expressions on {done.pictures:,} pictures")
    for note, count in done.notes.items():
        print(f"  {note} ({count:,})")
    for reason in done.left_out[:10]:
        print(f"  left out: {reason}")
    if len(done.left_out) > 10:
        print(f"  ... and {len(done.left_out) - 10:,} more")


def _show(args: argparse.Namespace) -> int:
    if args.number < 1 or args.columns < 1 or args.side < 32:
        raise DataError("--number and --columns are at least 1, --side is at least 32")
    # The splits that this machine can serve, where the user names none.
    for split in [args.split] if args.split else splits(args.name):
        try:
            dataset = load_dataset(args.name, split, args.data_root, strict=True)
            break
        except DataMissingError as error:
            missing = error
    else:
        raise missing
    chosen = args.index
    if chosen is None:
        chosen = sorted(random.Random(args.seed).sample(range(len(dataset)), min(args.number, len(dataset))))
    outside = [index for index in chosen if not 0 <= index < len(dataset)]
    if outside:
        raise DataError(f"--index {outside[0]}: {args.name} {dataset.split} has samples 0 to {len(dataset) - 1}")
    Image.fromarray(contact_sheet(dataset, chosen, args.columns, args.side)).save(args.out)
    print(f"{args.out}: {len(chosen)} samples of {dataset.name} {dataset.split}")
    return 0


def _mix(args: argparse.Namespace) -> int:
    root = data_folder(args.data_root)
    path = root / "mixed" / IDS_FILE
    if path.exists() and not args.again:
        raise DataError(f"{path}: there are ids, which stay as they are; --again draws anew and overwrites them")
    path.unlink(missing_ok=True)
    for split in splits("mixed"):
        mixture = open_mixture(root, split, args.seed)
        print(f"mixed {split}: {len(mixture):,} samples")
    print(f"ids in {path}")
    return 0
