"""``ivt data check | convert | show | mix | render-screens``: look after the data sets on this machine."""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from PIL import Image

from ivt_env.commands import fetch
from ivt_env.data import NAMES, data_folder, find_source, load_dataset, splits
from ivt_env.data.checks import Report, check_source, leaks
from ivt_env.data.converters import Converted, export, from_coco
from ivt_env.data.custom import SPLITS as OWN_SPLITS
from ivt_env.data.label_studio import from_label_studio
from ivt_env.data.mixture import held_ids, open_mixture, redraw
from ivt_env.data.sample import DataError, DataMissingError
from ivt_env.data.sheet import can_draw, contact_sheet
from ivt_env.data.table import Source, Table, open_table
from ivt_env.files import FileError, whole_file

_ON_DISK = tuple(name for name in NAMES if name not in ("scenes", "photos", "mixed"))


def add_subcommands(parser: argparse.ArgumentParser) -> None:
    """Add ``fetch``, ``check``, ``convert``, ``show``, ``mix`` and ``render-screens`` below ``ivt data``."""
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    one = commands.add_parser(
        "fetch",
        help="download a data set",
        description="Downloads a data set to where its reader looks for it. Shows the licence and the size first and "
        "asks before more than 1 GB. Run it again after an interruption: it goes on where it stopped.",
    )
    _add_root(one)
    fetch.add_arguments(one)
    one.set_defaults(run=fetch.run)

    one = commands.add_parser(
        "check",
        help="is it whole, readable and free of leaks?",
        description="Reads every row and every image. With several data sets it also says which images "
        "of one's training split are in another's validation or test. Exit status 1: not fit for use.",
    )
    one.add_argument("names", nargs="+", metavar="NAME", help=f"data set: {', '.join(_ON_DISK)}")
    one.add_argument("--split", action="append", metavar="SPLIT", help="only this one (may be repeated)")
    one.add_argument("--no-images", action="store_true", help="rows only (much faster)")
    one.add_argument("--workers", type=int, default=4, metavar="N", help="images decoded at a time (%(default)s)")
    one.add_argument("--json", action="store_true", help="print JSON and nothing else")
    _add_root(one)
    one.set_defaults(run=_check)

    one = commands.add_parser(
        "convert",
        help="into this project's form, from COCO or Label Studio, or into plain JSONL",
        description="With a data set's name: reads its annotations once, so that later openings are quick; with "
        "--out also writes it as plain JSONL. With --from: turns an export into a data set of your own.",
    )
    one.add_argument("source", metavar="NAME|FILE", help="data set, or the file to convert (with --from)")
    one.add_argument("--from", dest="kind", choices=("coco", "label-studio"), help="what the file is")
    one.add_argument("--images", type=Path, metavar="FOLDER", help="with --from: where the images are")
    one.add_argument("--out", type=Path, metavar="FOLDER", help="folder for dataset.json, SPLIT.jsonl and images/")
    one.add_argument("--name", metavar="LABEL", help="with --out: the new data set's label")
    one.add_argument("--expression-key", metavar="KEY", help="with --from: where the file holds the expression")
    one.add_argument("--split", default=None, metavar="SPLIT", help="the split to write (default: train, or all)")
    one.add_argument(
        "--shares", type=float, nargs=3, metavar=("TRAIN", "VAL", "TEST"), help="with --from: divide the images"
    )
    one.add_argument("--seed", type=int, default=0, help="of the division (%(default)s)")
    one.add_argument("--copy", action="store_true", help="copy the images instead of linking them")
    _add_root(one)
    one.set_defaults(run=_convert)

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
    one.add_argument("--columns", type=int, default=4, metavar="N", help="images in a row (%(default)s)")
    one.add_argument("--side", type=int, default=300, metavar="PX", help="of one image (%(default)s)")
    one.add_argument("--out", type=Path, default=Path("sheet.png"), metavar="FILE", help="default: %(default)s")
    _add_root(one)
    one.set_defaults(run=_show)

    one = commands.add_parser(
        "mix",
        help="draw the paper's mixture",
        description="Chooses the samples of IVT-Mixed-v0 and writes their ids to mixed/ids.json; share that file to "
        "share the mixture.",
    )
    one.add_argument("--seed", type=int, default=0, help="of the choice (%(default)s)")
    one.add_argument("--again", action="store_true", help="draw anew although there are ids")
    _add_root(one)
    one.set_defaults(run=_mix)

    one = commands.add_parser(
        "render-screens",
        help="screenshots of HTML pages, with an expression and a box for what is on them",
        description="Renders every .html file below FOLDER in headless Chromium and writes a data set of your own "
        "(docs/data/screens.md). Each expression is checked against the browser's accessibility tree; what does not "
        "fit exactly one element there is left out.",
    )
    one.add_argument("folder", type=Path, metavar="FOLDER", help="HTML pages, and what they need")
    one.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for dataset.json, SPLIT.jsonl, images/")
    one.add_argument("--name", required=True, metavar="LABEL", help="the new data set's label")
    one.add_argument(
        "--size", type=int, nargs=2, default=(2560, 1440), metavar=("WIDTH", "HEIGHT"), help="in pixels (2560 1440)"
    )
    one.add_argument("--scale", type=float, default=1.25, metavar="X", help="pixels per pixel of a page (%(default)s)")
    one.add_argument("--split", metavar="SPLIT", help="everything into this one (default: pages divided 40 : 20 : 40)")
    one.add_argument("--seed", type=int, default=0, help="of the division and of what is left out (%(default)s)")
    one.set_defaults(run=_render_screens)


def _add_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-root", metavar="FOLDER", help="where data sets lie (default: the variable IVT_DATA, else the cache)"
    )


def _sources(name: str, root: Path, wanted: Sequence[str] | None) -> list[tuple[Source, list[str]]]:
    """Every layout of a data set that is needed to serve the splits, with those that it serves."""
    if name not in _ON_DISK:
        raise DataError(f"no data set {name!r} that lies on a disk; there are {', '.join(_ON_DISK)}")
    found: dict[str, tuple[Source, list[str]]] = {}
    for split in wanted or splits(name):
        source = find_source(name, split, root)
        if source is not None and (wanted or split not in source.unions):
            found.setdefault(source.layout, (source, []))[1].append(split)
        elif wanted:
            load_dataset(name, split, root, strict=True)  # says why it cannot be served
    if not found:
        load_dataset(name, splits(name)[0], root, strict=True)
    return list(found.values())


def _check(args: argparse.Namespace) -> int:
    if not 1 <= args.workers <= 256:
        raise DataError(f"--workers {args.workers}: give 1 to 256")
    root = data_folder(args.data_root)
    reports: list[Report] = []
    tables: dict[tuple[str, str], Table] = {}
    for name in args.names:
        for source, of_source in _sources(name, root, args.split):
            report = check_source(source, of_source, not args.no_images, args.workers, _progress)
            reports.append(report)
            tables |= {(source.name, s): open_table(source, s, need_images=False) for s in of_source}
            if not args.json:
                print(report)
    pairs = sorted((a, b) for a in tables for b in tables if a[0] != b[0] and a[1] == "train")
    across = [found for a, b in pairs for found in leaks({a: tables[a], b: tables[b]}, every=args.json)]
    if args.json:
        found = {"data_sets": [r.as_json() for r in reports], "across": [asdict(finding) for finding in across]}
        print(json.dumps(found, indent=1))
    else:
        for finding in across:
            more = ", ... (--json names all)" if finding.count > len(finding.examples) else ""
            print(
                f"  {finding.level.upper():<8} {finding.text} ({finding.count:,}): {', '.join(finding.examples)}{more}"
            )
    return 0 if all(report.ok for report in reports) else 1


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done:,} of {total:,} images", end="\n" if done == total else "", file=sys.stderr, flush=True)


def _convert(args: argparse.Namespace) -> int:
    if args.kind is not None:
        if args.out is None or args.images is None or args.name is None:
            raise DataError("convert --from needs --images, --out and --name")
        if args.split and args.shares:
            raise DataError("--split puts everything into one split and --shares divides it: give one of them")
        divided: str | dict[str, float] = args.split or "train"
        if args.shares:
            if not any(args.shares):
                raise DataError("--shares 0 0 0: the three shares add up to 1")
            divided = {s: share for s, share in zip(("train", "val", "test"), args.shares, strict=True) if share}
        keys = {} if args.expression_key is None else {"expression_key": args.expression_key}
        convert = from_coco if args.kind == "coco" else from_label_studio
        options = {"split": divided, "seed": args.seed, "copy": args.copy, **keys}
        _say(convert(args.source, args.images, args.out, args.name, **options))
        return 0
    if Path(args.source).suffix and args.source not in NAMES:
        raise DataError(f"{args.source} is a file: say what it is with --from coco or --from label-studio")
    for option, value in (
        ("--images", args.images), ("--shares", args.shares), ("--expression-key", args.expression_key),
    ):  # fmt: skip
        if value is not None:
            raise DataError(f"{option} belongs to --from; say what {args.source} is with --from, or leave {option} out")
    if (args.out is None) != (args.name is None):
        raise DataError("to write plain JSONL give both --out FOLDER and --name LABEL")
    root = data_folder(args.data_root)
    sources = _sources(args.source, root, [args.split] if args.split else None)
    several = [split for _, of_source in sources for split in of_source if split not in OWN_SPLITS]
    if args.out is not None and len(several) > 1:
        raise DataError(
            f"{args.source} has {' and '.join(several)}, a data set of your own one test: convert one split at a time "
            f"with --split ({several[0]} is written as test)"
        )
    for source, of_source in sources:
        for split in of_source:
            table = open_table(source, split, need_images=args.out is not None)
            print(f"{source.name} {split}: {len(table):,} expressions, from {source.layout} in {source.folder}")
            if args.out is not None:
                own = split if split in OWN_SPLITS else "test"  # testA or testB, one of them
                _say(export(table, args.out, args.name, own, copy=args.copy))
    return 0


def _render_screens(args: argparse.Namespace) -> int:
    from ivt_env.data.render_screens import render

    size = tuple(args.size)
    _say(render(args.folder, args.out, args.name, size=size, scale=args.scale, split=args.split, seed=args.seed))
    return 0


def _say(done: Converted) -> None:
    counts = ", ".join(f"{split} {count:,}" for split, count in done.counts.items())
    print(f"{done.folder}: {counts} expressions on {done.images:,} images")
    for note, count in done.notes.items():
        print(f"  {note} ({count:,})")
    for reason in done.left_out[:10]:
        print(f"  left out: {reason}")
    if len(done.left_out) > 10:
        print(f"  ... and {len(done.left_out) - 10:,} more")


def _show(args: argparse.Namespace) -> int:
    if args.number < 1 or args.columns < 1 or args.side < 32:
        raise DataError("--number and --columns are at least 1, --side is at least 32")
    if args.out.suffix.lower() not in Image.registered_extensions():
        raise DataError(f"--out {args.out}: is no name of an image; give one that ends in .png or .jpg")
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
    sheet = Image.fromarray(contact_sheet(dataset, chosen, args.columns, args.side))
    try:
        with whole_file(args.out) as file:
            sheet.save(file, Image.registered_extensions()[args.out.suffix.lower()])
    except FileError:
        raise
    except (ValueError, KeyError) as error:  # a format that Pillow reads and cannot write, or not this size
        raise DataError(f"--out {args.out}: cannot be written ({error}); give a name that ends in .png") from error
    print(f"{args.out}: {len(chosen)} samples of {dataset.name} {dataset.split}")
    for index in chosen:
        if not can_draw(dataset[index].expression):
            print(f"  {index}: {' '.join(dataset[index].expression.split())} (the sheet's font lacks letters of it)")
    return 0


def _mix(args: argparse.Namespace) -> int:
    root = data_folder(args.data_root)
    held = held_ids(root)
    if held is not None and not args.again:
        raise DataError(f"{held}: there are ids, which stay as they are; --again draws anew and overwrites them")
    path = redraw(root, args.seed)
    for split in splits("mixed"):
        mixture = open_mixture(root, split, args.seed)
        print(f"mixed {split}: {len(mixture):,} samples")
    print(f"ids in {path}")
    return 0
