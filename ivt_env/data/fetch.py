"""Downloads that resume, retry, compare checksums, and check the disk before anything is written.

A download grows in ``<file>.partial`` and gets its name when its size and checksum are right, so a file under its own
name is complete. ``<file>.sha256`` (as ``sha256sum`` writes it) stays beside it, for comparison where no checksum is
published. ``<file>.partial.tag`` holds the server's validator (ETag or time), so that two versions are never mixed.

Neither pooch 1.9 nor huggingface_hub 2.4 keeps a partial file when its process ends, hence the code below.
"""

from __future__ import annotations

import concurrent.futures
import fcntl
import hashlib
import http.client
import io
import logging
import os
import re
import shutil
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from email.message import Message
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from ivt_env.data.images import read_image
from ivt_env.data.sample import DataError
from ivt_env.files import naming, write_whole

Progress = Callable[[int, int | None], None]
"""Called with what is done and the total (None: unknown), both in bytes or in images."""

ATTEMPTS = 6
"""In a row without a byte of progress, before it is an error."""
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
"""Before the second attempt, doubled each time; never longer, whatever the server asks for."""
TIMEOUT_S = 30.0
"""Without a sign from the server."""
_CHUNK = 1 << 18
_TRANSIENT_STATUS = frozenset((408, 425, 429, 500, 502, 503, 504))
_SPARE_BYTES = 64 << 20
"""Left free on the disk: a full one disturbs everything else that runs on the machine."""
_SMALL_FILE = 64 << 20
_FAILURES_IN_A_ROW = 20
"""So many failed images in a row mean that the server or the network is gone."""

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


def readable(size_bytes: float) -> str:
    """A size for people, in powers of 1000: ``13.5 GB``."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes:.0f} bytes"


def check_space(folder: Path, needed: int, what: str) -> None:
    """DataError where ``needed`` bytes, and a little to spare, are not free on the disk of ``folder``."""
    place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(place).free
    if free < needed + _SPARE_BYTES:
        raise DataError(
            f"{folder}: {what} needs {readable(needed)} (and {readable(_SPARE_BYTES)} to spare), but only "
            f"{readable(free)} are free there; make room, or name a folder on another disk with --data-root (or the "
            "variable IVT_DATA)"
        )


# --- One file -------------------------------------------------------------------------------------


def download(
    url: str,
    target: Path,
    *,
    size: int | None = None,
    sha256: str | None = None,
    space_factor: float = 0.0,
    progress: Progress = lambda done, total: None,
) -> str:
    """Download a file, or resume a download, unless the file is there and right; gives its SHA-256.

    Its exact ``size`` in bytes and its checksum are compared where they are known; without the checksum the file is
    compared with the note of an earlier download (``<target>.sha256``), where there is one. ``space_factor`` is the
    room for what is unpacked from it afterwards, as a multiple of its size; ``progress`` is told of bytes received.

    Raises:
        DataError: where the server does not give the file, or another one than published or received earlier, or the
            disk is too small.
    """
    held = held_file(target, size, sha256)
    if held is not None:
        return held
    partial, tag = partial_path(target), target.with_name(f"{target.name}.partial.tag")
    with naming(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(partial) as file:

            def restart() -> None:
                file.seek(0)
                file.truncate()
                tag.unlink(missing_ok=True)

            def received() -> int:
                return file.seek(0, io.SEEK_END)

            def attempt() -> None:
                have = received()
                validator = tag.read_text("latin-1").strip() if tag.exists() else ""
                headers = {}
                # Without a validator the server cannot say that the file has changed; then only a checksum can.
                if have and (validator or sha256):
                    headers = {"Range": f"bytes={have}-"} | ({"If-Range": validator} if validator else {})
                with _open(url, str(target), headers) as response:
                    offered, (start, total) = _validator(response.headers), _extent(response)
                    if response.status == 416 and total == have:  # it was complete already
                        return
                    if response.status == 416 or start and (start != have or validator and offered != validator):
                        restart()
                        raise _TransientError("the server went on with something else than asked; starting from zero")
                    # Checked before anything that is here is given up.
                    if response.headers.get_content_type() == "text/html":
                        raise DataError(
                            f"{target}: {url} sends a web page instead of the file; open it in a browser: it may ask "
                            "to log in or show an error. What was received before is kept"
                        )
                    if size is not None and total not in (None, size):
                        raise DataError(
                            f"{target}: {url} offers {total} bytes, the published file has {size}; give another server "
                            "with --mirror, or see whether a newer version of this package knows the new file"
                        )
                    if not start:
                        restart()
                    tag.write_text(offered, "latin-1")
                    expected = size if total is None else total
                    if expected is not None:
                        needed = expected - start + round(expected * space_factor)
                        doing = "downloading and unpacking" if space_factor else "downloading"
                        check_space(target.parent, needed, f"{doing} {target.name}")
                    have = start
                    for block in _blocks(response):
                        file.write(block)
                        have += len(block)
                        if size is not None and have > size:
                            break
                        progress(have, expected)
                    if size is not None and have < size:
                        raise _TransientError(f"the connection ended after {readable(have)} of {readable(size)}")

            if size is not None and received() > size:
                restart()
            if size is None or received() != size:
                _patiently(attempt, str(target), url, received)
            have = received()
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if size not in (None, have) or sha256 not in (None, digest):
                restart()
                raise DataError(
                    f"{target}: what {url} gave is not the published file ({have} bytes, sha256 {digest}, instead of "
                    f"{size or 'any number of'} bytes, {sha256 or 'any'}); nothing was kept: run the same command "
                    "again, or give another server with --mirror"
                )
            if sha256 is None and _read_note(target) not in (None, digest):
                raise DataError(
                    f"{target}: {url} now gives another file than at the last download (sha256 {digest}; its note says "
                    f"{_read_note(target)}), so results would not be comparable. To take the new file, delete the note "
                    f"{note_path(target)} and run the same command again"
                )
            os.fsync(file.fileno())
            os.replace(partial, target)
        tag.unlink(missing_ok=True)
        _write_note(target, digest)
    return digest


def held_file(target: Path, size: int | None = None, sha256: str | None = None) -> str | None:
    """The SHA-256 of the file, if it is there and right; None where it must be downloaded.

    Where no checksum is published and the file is not the one that its note tells of, that is a DataError.
    """
    if not target.exists():
        return None
    if size not in (None, target.stat().st_size):
        _log.warning("%s: has %d bytes, not %d: downloading it again", target, target.stat().st_size, size)
        return None
    with target.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    noted = _read_note(target)
    if sha256 not in (None, digest):
        _log.warning("%s: is not the published file (sha256 %s): downloading it again", target, digest)
        return None
    if sha256 is None and noted not in (None, digest):
        raise DataError(
            f"{target}: has changed since it was downloaded (sha256 {digest}, its note {note_path(target).name} "
            f"says {noted}). Delete the file to download it again, or the note to keep the file as it is"
        )
    if noted is None:
        _write_note(target, digest)
    return digest


def note_path(target: Path) -> Path:
    """The note of what was received, beside the file."""
    return target.with_name(f"{target.name}.sha256")


def partial_path(target: Path) -> Path:
    """Where a download grows before it gets its name."""
    return target.with_name(f"{target.name}.partial")


def _read_note(target: Path) -> str | None:
    noted = note_path(target)
    words = noted.read_text("latin-1").split() if noted.is_file() else []
    return words[0] if words and re.fullmatch("[0-9a-f]{64}", words[0]) else None


def _write_note(target: Path, digest: str) -> None:
    write_whole(note_path(target), f"{digest}  {target.name}\n")


@contextmanager
def _locked(partial: Path) -> Iterator[io.BufferedRandom]:
    """The partial file, locked against a second process; it disappears if it is empty in the end."""
    with open(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"{partial}: another process downloads this file; wait for it, or end it first") from error
        try:
            yield file
        finally:
            if not os.fstat(file.fileno()).st_size:
                partial.unlink(missing_ok=True)
                partial.with_name(f"{partial.name}.tag").unlink(missing_ok=True)


# --- Many small images ----------------------------------------------------------------------------


def fetch_images(
    file_names: Iterable[str],
    folder: Path,
    url_of: Callable[[str], str],
    workers: int = 8,
    *,
    progress: Progress = lambda done, total: None,
) -> int:
    """Download images, several at a time, except those that are there and whole; gives how many were downloaded.

    ``file_names`` are plain names, without a folder; ``progress`` is told of images that are done.

    Raises:
        DataError: where any failed, after all others were tried; lists them. A server that is gone ends it early.
    """
    names = sorted(set(file_names))
    for name in names:
        if PurePosixPath(name).name != name or "\\" in name or "\0" in name or name == "..":
            raise DataError(f"image name {name!r} is not the plain name of a file; the annotations are damaged")
    stop = threading.Event()

    def fetch(name: str) -> bool:
        """Whether it had to be downloaded."""
        target, url = folder / name, url_of(name)
        if stop.is_set() or _is_whole_image(target):
            return False
        body, _ = get_bytes(url, str(target), stop)
        try:
            read_image(body, name)
        except DataError as error:
            raise DataError(f"{target}: what {url} gave ({len(body)} bytes) is not a whole image") from error
        write_whole(target, body, sync=False)  # one that a power cut left empty is fetched again
        return True

    failed: dict[str, str] = {}
    downloaded = in_a_row = done = 0
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(fetch, name): name for name in names}
        try:
            for done, future in enumerate(concurrent.futures.as_completed(futures), start=1):
                try:
                    downloaded += future.result()
                    in_a_row = 0
                except DataError as error:
                    failed[futures[future]] = str(error)
                    in_a_row += 1
                progress(done, len(names))
                if in_a_row >= _FAILURES_IN_A_ROW:
                    break
        finally:  # after an error or Ctrl-C it ends the rest
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
    if failed:
        untried = len(names) - done
        raise DataError(
            f"{folder}: {len(failed)} of {len(names)} images could not be downloaded"
            + (f", and {untried} were not tried, because so many failed in a row" if untried else "")
            + "; those that came are kept, run the same command again for the rest:\n  "
            + "\n  ".join(list(failed.values())[:20])
            + (f"\n  and {len(failed) - 20} more" if len(failed) > 20 else "")
        )
    return downloaded


def _is_whole_image(path: Path) -> bool:
    """Whether a file is a whole image: a JPEG by its end; anything else, and a JPEG with bytes after it, is decoded."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        file.seek(-min(1024, path.stat().st_size), io.SEEK_END)
        if file.read().rstrip(b"\0").endswith(b"\xff\xd9"):
            return True
    try:
        read_image(path, path.name)
    except DataError:
        return False
    return True


# --- Talking to a server --------------------------------------------------------------------------


def get_bytes(url: str, what: str, stop: threading.Event | None = None) -> tuple[bytes, Message]:
    """A small file (up to 64 MiB) in memory, and the headers of the answer; DataError, with ``what``, where it fails.

    There is no further attempt once ``stop`` is set.
    """

    def attempt() -> tuple[bytes, Message]:
        with _open(url, what) as response:
            body = bytearray()
            for block in _blocks(response):
                body += block
                if len(body) > _SMALL_FILE:
                    raise DataError(f"{what}: {url} sends more than {readable(_SMALL_FILE)}; it is something else")
            return bytes(body), response.headers

    return _patiently(attempt, what, url, stop=stop)


def remote_size(url: str, what: str) -> int | None:
    """The size in bytes that the server announces; None where it does not say. DataError where it has no such file."""

    def attempt() -> int | None:
        with _open(url, what, method="HEAD") as response:
            return _extent(response)[1]

    return _patiently(attempt, what, url)


class _TransientError(Exception):
    """A failure that may be gone at the next attempt."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


def _patiently(
    attempt: Callable[[], _T],
    what: str,
    url: str,
    received: Callable[[], int] = lambda: 0,
    stop: threading.Event | None = None,
) -> _T:
    """What ``attempt`` returns; it is repeated after failures that may pass, longer while ``received`` grows."""
    failures, best = 0, received()
    while True:
        try:
            return attempt()
        except _TransientError as error:
            have = received()
            failures = 1 if have > best else failures + 1
            best = max(best, have)
            if failures >= ATTEMPTS or (stop is not None and stop.is_set()):
                kept = f"; the {readable(have)} received so far are kept" if have else ""
                raise DataError(
                    f"{what}: could not be downloaded from {url}: {error} (tried {failures} times in a row){kept}; "
                    "run the same command again later, or give another server with --mirror"
                ) from error
            # One of thousands of images is told of only where it cannot be had.
            _log.log(logging.WARNING if stop is None else logging.INFO, "%s: %s; trying again", url, error)
            seconds = min(max(FIRST_WAIT_S * 2 ** (failures - 1), error.wait_s), LONGEST_WAIT_S)
            time.sleep(seconds) if stop is None else stop.wait(seconds)


def _open(url: str, what: str, headers: dict[str, str] | None = None, method: str = "GET") -> Any:
    """The response; failures sorted into those that may pass and those that will not. 416 is a response."""
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise DataError(f"{what}: {url!r} is not an http or https address")
    # Compressed bytes would have another size and checksum.
    sent = {"User-Agent": "ivt-env", "Accept-Encoding": "identity"} | (headers or {})
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=sent, method=method), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416 and "Range" in sent:
            return error
        answer = f"the server answers {error.code} ({error.reason})"
        if error.code in _TRANSIENT_STATUS:
            waits = error.headers.get("Retry-After", "")
            raise _TransientError(answer, float(waits) if waits.isdecimal() else 0.0) from error
        remedy = "it may have moved: give another server with --mirror, or download it by hand to that place"
        if error.code in (401, 403):
            remedy = "it is not given to everyone: open its page in a browser, or give another server with --mirror"
        raise DataError(f"{what}: {answer} for {url}; {remedy}") from error
    except (ValueError, http.client.InvalidURL) as error:  # a space, a port that is no number
        raise DataError(f"{what}: {url!r} is not an address that can be opened ({error})") from error
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        cause = getattr(error, "reason", error)
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise DataError(
                f"{what}: {url}: the server's certificate cannot be trusted ({cause.verify_message}); check this "
                "machine's clock and certificates, or give another server with --mirror"
            ) from error
        raise _TransientError(f"no connection ({cause})") from error


def _blocks(response: Any) -> Iterator[bytes]:
    """The body; _TransientError where it ends early."""
    left = response.length
    try:
        while block := response.read1(_CHUNK):
            left = None if left is None else left - len(block)
            yield block
    except (OSError, http.client.HTTPException) as error:
        raise _TransientError(f"the connection broke ({error})") from error
    if left:
        raise _TransientError(f"the connection ended {readable(left)} early")


def _validator(headers: Message) -> str:
    """What If-Range may be given: a strong ETag, else the time of change, else nothing."""
    etag = headers.get("ETag") or ""
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified") or ""


def _extent(response: Any) -> tuple[int, int | None]:
    """First byte of the body, and size of the whole file (None: not told)."""
    length = response.headers.get("Content-Length") or ""
    if response.status not in (206, 416):
        return 0, int(length) if length.isdecimal() else None
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", (response.headers.get("Content-Range") or "").strip())
    start, total = match.groups() if match else (None, "*")
    return -1 if start is None else int(start), None if total == "*" else int(total)
