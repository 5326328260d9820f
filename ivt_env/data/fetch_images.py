"""Downloading many small images, several at a time, where a split needs a fraction of a large archive."""

from __future__ import annotations

import concurrent.futures
import io
import threading
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath

from ivt_env.data.fetch import PATIENCE, Patience, Progress, disk_error, get_bytes
from ivt_env.data.sample import DataError
from ivt_env.files import write_whole

_IMAGE_LIMIT = 64 << 20
_FAILURES_IN_A_ROW = 20
"""So many images failing one after the other mean that the server or the network is gone."""


def fetch_images(
    file_names: Iterable[str],
    folder: Path,
    url_of: Callable[[str], str],
    workers: int = 8,
    *,
    patience: Patience = PATIENCE,
    progress: Progress | None = None,
) -> tuple[int, int]:
    """Download images one by one, several at a time; those that are there and whole are skipped.

    Args:
        file_names: plain names, without a folder.
        folder: where they go; it is made.
        url_of: address of an image by its name.
        workers: how many downloads at a time.
        patience: retries, waits and the timeout.
        progress: told of images that are done.

    Returns:
        How many were downloaded, and how many were there already.

    Raises:
        DataError: where any failed, after all others were tried; lists them. Run again for the rest.
            A full disk, a missing permission or a server that is gone ends it at once.
    """
    names = sorted(set(file_names))
    for name in names:
        if PurePosixPath(name).name != name or PureWindowsPath(name).name != name or "\0" in name or name == "..":
            raise DataError(f"image name {name!r} is not the plain name of a file; the annotations are damaged")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, folder) from error
    stop = threading.Event()
    failed: dict[str, str] = {}
    downloaded = in_a_row = 0
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(_fetch_image, url_of(n), folder / n, patience, stop): n for n in names}
        try:
            for number, future in enumerate(concurrent.futures.as_completed(futures), start=1):
                try:
                    downloaded += future.result()
                    in_a_row = 0
                except OSError as error:  # of the disk: it will not get better with the next image
                    raise disk_error(error, folder / futures[future]) from error
                except DataError as error:
                    failed[futures[future]] = str(error)
                    in_a_row += 1
                if progress is not None:
                    progress(number, len(names))
                if in_a_row >= _FAILURES_IN_A_ROW:
                    break
        finally:  # after the last one it does nothing; after an error or Ctrl-C it ends the rest
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
    if failed:
        untried = len(names) - number
        raise DataError(
            f"{folder}: {len(failed)} of {len(names)} images could not be downloaded"
            + (f", and {untried} were not tried, because so many failed in a row" if untried else "")
            + "; those that came are kept, run the same command again for the rest:\n  "
            + "\n  ".join(list(failed.values())[:20])
            + (f"\n  and {len(failed) - 20} more" if len(failed) > 20 else "")
        )
    return downloaded, len(names) - downloaded


def _fetch_image(url: str, target: Path, patience: Patience, stop: threading.Event) -> bool:
    """Whether it had to be downloaded."""
    if stop.is_set() or _holds_whole_image(target):
        return False
    body, _ = get_bytes(url, _IMAGE_LIMIT, str(target), patience, stop)
    if not is_whole_image(body):
        raise DataError(f"{target}: what {url} gave ({len(body)} bytes) is not a whole image")
    write_whole(target, body, sync=False)  # one that a power cut left empty is fetched again
    return True


def _holds_whole_image(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:  # the two ends tell nearly always: 25,000 images need not be read
        ends = file.read(2)
        file.seek(-min(1024, path.stat().st_size), io.SEEK_END)
        ends += file.read()
    return ends.startswith(b"\xff\xd8") and ends.endswith(b"\xff\xd9") or is_whole_image(path.read_bytes())


def is_whole_image(content: bytes) -> bool:
    """Whether a JPEG has its end; anything without one is decoded, since some whole ones have bytes after it."""
    if content.startswith(b"\xff\xd8") and content.rstrip(b"\0").endswith(b"\xff\xd9"):
        return True
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
    except Exception:  # a decoder given broken bytes raises nearly anything
        return False
    return True
