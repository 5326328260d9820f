"""``ivt view``: look at recorded episodes in a browser.

    ivt view runs/rollout                                  # one HTML file, for any browser, without network
    ivt view runs/evaluation/episodes/base runs/evaluation/episodes/sft     # two runs side by side
    ivt view runs/large --serve                            # a local server: images when they are looked at

Exit status: 0, or 2 with one line on standard error.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ivt_env.data.sample import DataError, DataMissingError, ImageArray
from ivt_env.episodes import Episode, load_episodes

DESCRIPTION = (
    "Shows recorded episodes: a list to filter and search, and each step with its boxes, IoU, reward and the agent's "
    "words. Two runs over the same samples stand side by side. Images come from the run's folder or from the data "
    "set that its episodes name. Without --serve everything is written into one HTML file."
)
_MANY_IMAGES = 2000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``ivt view`` to ``parser``."""
    add, data_root = parser.add_argument, "folder of the real data sets (default: the variable IVT_DATA)"
    several = "holds episodes.jsonl (or is such a file); several: compare"
    add("runs", type=Path, nargs="+", metavar="FOLDER", help=several)
    add("--out", type=Path, metavar="FILE", help="the HTML file (default: view.html in the first FOLDER)")
    add("--title", help="heading of the page (default: the names of the runs)")
    add("--side", type=int, metavar="PIXELS", help="longest side of an image (default: 512, with --serve 2560)")
    add("--limit", type=int, metavar="N", help="the first N episodes of each run only")
    add("--data-root", type=Path, metavar="FOLDER", help=data_root)
    add("--serve", action="store_true", help="serve the page on this machine until Ctrl-C")
    add("--port", type=int, default=0, help="of --serve (default: any that is free)")


def run(args: argparse.Namespace) -> int:
    """Write or serve the page; the exit status."""
    from ivt_env.viewer.images import ImageFinder
    from ivt_env.viewer.page import write_page

    for option, value in (("--side", args.side), ("--limit", args.limit)):
        if value is not None and value < 1:
            raise ValueError(f"{option} {value}: give 1 or more")
    if args.serve and args.out is not None:
        raise ValueError("--out names a file and --serve writes none: give one of the two")
    places = dict(zip(_names(args.runs), args.runs, strict=True))
    runs = {name: _load(path)[: args.limit] for name, path in places.items()}
    folders = {name: path if path.is_dir() else path.parent for name, path in places.items()}
    find = ImageFinder(runs, folders, args.data_root)
    title, count = args.title or " and ".join(runs), sum(map(len, runs.values()))
    if args.serve:
        from ivt_env.viewer.server import LocalServer, ViewApp

        app = ViewApp(runs, find, title, args.side or 2560)
        app.get("/", {})  # made now, so that the browser need not wait for it
        LocalServer(app, args.port).serve(f"{count:,} episodes")
        return 0
    absent = Counter[str]()

    def image_of(episode: Episode) -> ImageArray:
        try:
            return find(episode)
        except DataMissingError as error:
            absent[str(error)] += 1
            raise

    first = next(iter(folders.values()))
    path = write_page(args.out or first / "view.html", runs, image_of, title, args.side or 512)
    for why, count in absent.items():
        print(f"warning: {count} image(s) are not on the page: {' '.join(why.split())}", file=sys.stderr)
    images = len({(e.dataset, e.image_id) for run in runs.values() for e in run})
    print(f"{path}: {count:,} episodes, {images:,} images, {path.stat().st_size / 1e6:.1f} MB")
    if images > _MANY_IMAGES:
        print("a page of this size opens slowly; --serve sends images only when they are looked at", file=sys.stderr)
    return 0


def _load(path: Path) -> list[Episode]:
    if path.is_dir() and not (path / "episodes.jsonl").is_file():
        if below := sorted(str(found.parent) for found in path.rglob("episodes.jsonl")):
            raise DataError(f"no episodes.jsonl in {path} itself; give one or more of: {', '.join(below[:20])}")
    return load_episodes(path)


def _names(paths: Sequence[Path]) -> list[str]:
    """A short name for each run: as many last parts of its path as tell it from the others."""
    full = [(p.parent if p.name == "episodes.jsonl" else p).absolute() for p in paths]
    if len(set(full)) < len(full):
        raise ValueError(f"a run is given twice in {', '.join(map(str, paths))}")
    for parts in range(1, max(len(p.parts) for p in full) + 1):
        names = [str(Path(*p.parts[-parts:])) for p in full]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("distinct paths have distinct names")
