"""``ivt data fetch NAME``: download a data set to where its reader looks for it.

Shows the licence and the size first and asks before more than 1 GB. Everything that is interrupted
goes on where it stopped when the same command is run again. Images come as one archive, or one by
one where a split needs a fraction of it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath

from ivt_env.data import data_folder
from ivt_env.data.archives import unpack
from ivt_env.data.catalogue import CATALOGUE, Entry, ImageSource, RemoteFile, entry, hub_files, mirrored
from ivt_env.data.fetch import (
    Progress,
    check_space,
    download,
    fetch_images,
    held_file,
    partial_path,
    readable,
    remote_size,
)
from ivt_env.data.sample import DataError
from ivt_env.files import write_whole

ASK_ABOVE_BYTES = 1_000_000_000
_MANY = 20
"""Files of a data set; more are downloaded several at a time and summed up in a line."""
_COCO_NAME = re.compile(r"COCO_train2014_\d{12}\.jpg")
_REFER_SETS = ("refcocog", "refcoco", "refcocoplus")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``run`` needs to a parser."""
    parser.add_argument("name", metavar="NAME", help=f"data set: {', '.join(CATALOGUE)}")
    parser.add_argument(
        "--mirror", metavar="URL", help="another server: takes the place of scheme and host in every address"
    )
    parser.add_argument("--yes", action="store_true", help="download more than 1 GB without asking")
    parser.add_argument(
        "--split", help="only what this split needs, where it can be had alone (images one by one unless told else)"
    )
    parser.add_argument(
        "--images",
        choices=("archive", "single", "none"),
        help="as one archive (default), one by one as the annotations name them (default with --split), or not at all",
    )
    parser.add_argument("--workers", type=_workers, default=8, metavar="N", help="downloads at a time (default: 8)")
    parser.add_argument(
        "--keep-archives", action="store_true", help="keep an archive after it is unpacked (default: delete it)"
    )


def _workers(word: str) -> int:
    if not word.isdecimal() or not 1 <= int(word) <= 64:
        raise argparse.ArgumentTypeError(f"{word!r} is not a number of downloads at a time (1 to 64)")
    return int(word)


def run(args: argparse.Namespace) -> int:
    """Fetch a data set."""
    found = entry(args.name)
    if args.split is not None and args.split not in found.splits:
        raise DataError(f"{found.name} has no split {args.split!r}; it has {', '.join(found.splits)}")
    how = args.images or ("single" if args.split and found.images and found.images.single_url else "archive")
    if how == "single" and (found.images is None or found.images.single_url is None):
        raise DataError(f"the images of {found.name} are not served one by one; leave --images out to get them with it")
    root = data_folder(args.data_root)
    print(f"{found.title} ({found.homepage})\nLicence: {found.licence}\n{found.notice}\nInto {root}")
    on_hub = [file for folder in found.hub for file in hub_files(folder, args.split, args.mirror)]
    if found.hub and not on_hub:
        raise DataError(f"{', '.join(f.dataset for f in found.hub)}: none holds files of split {args.split!r}")
    wanted = [*found.files, *on_hub]
    if found.images is not None and how == "archive" and not _is_complete_elsewhere(found.images, root):
        wanted.append(found.images.archive)
    files = [replace(file, url=mirrored(file.url, args.mirror)) for file in wanted]
    absent = [file for file in files if not is_ready(file, root)]
    try:
        _ask([_size(file, root) for file in absent], args.yes)
        plain = [file for file in absent if file.unpack_into is None]
        if len(plain) > _MANY:
            _obtain_many(plain, root, args.workers)
            absent = [file for file in absent if file.unpack_into is not None]
        for file in absent:
            _obtain(file, root, args.keep_archives)
        if found.images is not None and how == "single":
            _obtain_images(found, found.images, root, args)
    except KeyboardInterrupt:
        print("\nrun the same command again to go on from here", file=sys.stderr)
        raise
    print(f"{found.name}: complete in {root}" + (" (without images)" if found.images and how == "none" else ""))
    return 0


# --- What there is to do --------------------------------------------------------------------------


def is_ready(file: RemoteFile, root: Path) -> bool:
    """Whether a file is where it belongs, whole; an archive: whether it is unpacked."""
    if file.unpack_into is None:
        return held_file(root / file.path, file.bytes, file.sha256) is not None
    counted = file.must_hold is None or file.must_hold[1] > 1  # else only the note of the unpacking proves it complete
    return (counted or _unpacked_note(file, root).is_file()) and not _missing(file, root)


def _missing(file: RemoteFile, root: Path) -> str | None:
    """What unpacking should have left and is not there."""
    for path in file.must_exist:
        place = root / path
        if not place.is_file() or not place.stat().st_size:
            return f"{place} is not there"
    if file.must_hold is not None:
        folder, number = file.must_hold
        count = _files_in(root / folder)
        if count < number:
            return f"{root / folder} holds {count} files, not {number}"
    return None


def _files_in(folder: Path) -> int:
    return sum(not entry.name.endswith(".partial") for entry in os.scandir(folder)) if folder.is_dir() else 0


def _is_complete_elsewhere(images: ImageSource, root: Path) -> bool:
    """Whether a user keeps all images in another of the folders that the reader looks into."""
    must_hold = images.archive.must_hold
    return must_hold is not None and any(_files_in(root / f) >= must_hold[1] for f in images.folders[1:])


def _size(file: RemoteFile, root: Path) -> int | None:
    """Bytes still to come; None where not even the server says."""
    target = root / file.path
    if file.unpack_into is not None and target.is_file():
        return 0
    size = file.bytes or file.about_bytes or remote_size(file.url, str(target))
    partial = partial_path(target)
    return None if size is None else max(0, size - (partial.stat().st_size if partial.exists() else 0))


def _ask(sizes: Sequence[int | None], agreed: bool) -> None:
    """Tell the size, and ask before more than 1 GB or an unknown size."""
    known = sum(size for size in sizes if size is not None)
    if not known and None not in sizes:
        return
    text = f"about {readable(known)}" + (" and a file whose size the server does not tell" if None in sizes else "")
    print(f"To download: {text}")
    if agreed or (known <= ASK_ABOVE_BYTES and None not in sizes):
        return
    if not sys.stdin.isatty():
        raise DataError(
            f"this would download {text}, more than 1 GB or unknown, and nobody can be asked here; give --yes to agree"
        )
    try:
        answer = input("Go on? [y/N] ")
    except EOFError:  # Ctrl-D
        print()
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise DataError("nothing was downloaded")


# --- Doing it -------------------------------------------------------------------------------------


def _obtain(file: RemoteFile, root: Path, keep: bool) -> None:
    """Download a file, and unpack it where it is an archive."""
    target = root / file.path
    with _shown(target.name) as progress:
        sha256 = download(
            file.url, target, size=file.bytes, sha256=file.sha256, space_factor=file.unpack_factor,
            progress=progress,
        )  # fmt: skip
    checked = "as published" if file.sha256 is not None else "no published one to compare with; noted beside it"
    print(f"{target}: {readable(target.stat().st_size)}, sha256 {sha256} ({checked})")
    if file.unpack_into is None:
        return
    folder = root / file.unpack_into
    with _shown(f"unpacking {target.name}") as progress:
        files, size = unpack(target, folder, only=file.only, below=file.below, flatten=file.flatten, progress=progress)
    missing = _missing(file, root)
    if missing is not None:
        raise DataError(
            f"{target}: was unpacked into {folder}, but {missing}; the archive has another layout than is known here: "
            "put its files there by hand, or see whether a newer version of this package knows it"
        )
    write_whole(_unpacked_note(file, root), f"{files} files, {size} bytes, of sha256 {sha256}\n")
    if not keep:
        target.unlink()
    print(f"{target.name}: {files} files in {folder}" + ("" if keep else "; the archive is deleted"))


def _obtain_many(files: Sequence[RemoteFile], root: Path, workers: int) -> None:
    """Download files that need no unpacking, several at a time; the first that cannot be had ends it."""
    sizes = [file.bytes or 0 for file in files]
    check_space(root, sum(sizes), f"downloading {len(files)} files")
    with _shown("files", "files") as progress, concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = [
            pool.submit(download, file.url, root / file.path, size=file.bytes, sha256=file.sha256) for file in files
        ]
        try:
            for done, future in enumerate(concurrent.futures.as_completed(futures), start=1):
                future.result()
                progress(done, len(files))
        finally:  # after an error or Ctrl-C those under way end, and are kept
            pool.shutdown(cancel_futures=True)
    unpublished = sum(file.sha256 is None for file in files)
    said = "all as published" if not unpublished else f"{unpublished} without a published checksum"
    print(f"{root}: {len(files)} files, {readable(sum(sizes))} ({said})")


def _unpacked_note(file: RemoteFile, root: Path) -> Path:
    return root / f"{file.path}.unpacked"


def _obtain_images(found: Entry, images: ImageSource, root: Path, args: argparse.Namespace) -> None:
    """Download the images that the annotations name, one by one."""
    single_url = images.single_url
    assert single_url is not None
    asked = (args.split,) if args.split else found.splits
    names = sorted({name for split in asked for name in image_names(found.name, split, root)})
    folder = next((root / f for f in images.folders if (root / f).is_dir()), root / images.folders[0])
    absent = sum(not (folder / name).is_file() for name in names)
    print(f"{found.name} {'/'.join(asked)}: {len(names)} images, {absent} of them not in {folder}")
    estimate = absent * images.mean_bytes
    _ask([estimate], args.yes)
    check_space(folder, estimate, f"downloading {absent} images")
    with _shown("images", "images") as progress:
        downloaded = fetch_images(
            names, folder, lambda name: mirrored(single_url.format(name=name), args.mirror), args.workers,
            progress=progress,
        )  # fmt: skip
    print(f"{folder}: {downloaded} images downloaded, {len(names) - downloaded} were there")


def image_names(name: str, split: str, root: Path) -> list[str]:
    """The images of COCO train2014 that a split names, sorted; its annotations must be there, its images not."""
    from ivt_env.data import refcoco, refer
    from ivt_env.data.table import open_table

    find = refer.find if name in _REFER_SETS else getattr(refcoco, name)
    names: set[str] = set()
    for part in (name,) if name in _REFER_SETS else _REFER_SETS:
        source = find(root, part)
        if source is None or split not in source.splits:
            continue
        for path in open_table(source, split, need_images=False).file_names():
            plain = PurePosixPath(path).name
            if not _COCO_NAME.fullmatch(plain):
                raise DataError(
                    f"{source.folder}: {part} {split} names the image {path!r}, which is none of COCO's train2014 "
                    "and cannot be downloaded alone; use --images none, and put the images there by hand"
                )
            names.add(plain)
    if not names:
        raise DataError(f"{root}: holds no annotations of {name} for split {split!r}; fetch {name} there first")
    return sorted(names)


# --- Saying how far it is -------------------------------------------------------------------------


@contextmanager
def _shown(label: str, unit: str = "bytes") -> Iterator[Progress]:
    """Progress on standard error: one line rewritten in place on a terminal, elsewhere a line every 30 seconds."""
    terminal = sys.stderr.isatty()
    start, shown_at, first, text = time.monotonic(), time.monotonic(), -1, ""

    def amount(value: float) -> str:
        return readable(value) if unit == "bytes" else f"{value:.0f}"

    def show(end: str) -> None:
        print(f"\r{text}\x1b[K" if terminal else text, end=end, file=sys.stderr, flush=True)

    def progress(done: int, total: int | None) -> None:
        nonlocal shown_at, first, text
        first, now = done if first < 0 else first, time.monotonic()
        speed = (done - first) / max(now - start, 1e-3)  # of this run, without what was there
        text = f"{label}: {amount(done)}"
        text += f" of {amount(total)} ({100 * done // max(total, 1)} %)" if total is not None else ""
        text += f"{'' if unit == 'bytes' else f' {unit}'}, {amount(speed)}/s"
        if total is not None and 0 < speed and done < total:
            text += f", {(total - done) / speed / 60:.0f} min left"
        if now - shown_at >= (0.2 if terminal else 30.0):
            shown_at = now
            show("" if terminal else "\n")

    try:
        yield progress
    finally:
        if text:
            show("\n")
