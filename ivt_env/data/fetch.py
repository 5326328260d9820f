"""Downloading files: with resume, retries, checksum, and a check of the disk before anything is written.

A download grows in ``<file>.partial`` and gets its name only when its size and checksum are right, so
a file under its own name is whole. Beside it stays ``<file>.sha256`` (as ``sha256sum`` writes it): what
was received, for comparison where no checksum is published. An interrupted download goes on where it
stopped; ``<file>.partial.json`` holds what the server said about it, so that a file that has changed
meanwhile is started again and never mixed from two versions.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import io
import json
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import IO, Any

from ivt_env.data.sample import DataError
from ivt_env.files import write_whole

Progress = Callable[[int, int | None], None]
"""Called with what is done and what there is in all (None: unknown), both in bytes or in images."""

_CHUNK = 1 << 18
_TRANSIENT_STATUS = frozenset((408, 425, 429, 500, 502, 503, 504))
_SPARE_BYTES = 64 << 20
"""Left free on the disk: a full one disturbs everything else that runs on the machine."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to bear with a server."""

    attempts: int = 6
    """In a row without a byte of progress, before it is an error."""
    first_wait_s: float = 1.0
    """Before the second attempt; doubled each time."""
    longest_wait_s: float = 60.0
    timeout_s: float = 30.0
    """Without a sign from the server."""

    def wait(self, failures: int, asked_s: float | None = None, stop: threading.Event | None = None) -> None:
        """Sleep before the next attempt, at least as long as the server asked for (within the longest)."""
        seconds = min(max(self.first_wait_s * 2 ** (failures - 1), asked_s or 0.0), self.longest_wait_s)
        time.sleep(seconds) if stop is None else stop.wait(seconds)


PATIENCE = Patience()


@dataclass(frozen=True, slots=True)
class Received:
    """A whole file on this machine."""

    path: Path
    bytes: int
    sha256: str
    downloaded: bool
    """False where it was there already."""


def readable(size_bytes: float) -> str:
    """A size for people, in powers of 1000: ``13.5 GB``."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.1f} {unit}"
    return f"{size_bytes:.0f} bytes"


# --- One file -------------------------------------------------------------------------------------


def download(
    url: str,
    target: Path,
    *,
    size: int | None = None,
    sha256: str | None = None,
    space_factor: float = 0.0,
    patience: Patience = PATIENCE,
    progress: Progress | None = None,
) -> Received:
    """Download a file, or go on with a download that was interrupted.

    Args:
        url: http or https.
        target: where it ends up; its folder is made.
        size: exact size in bytes, where known.
        sha256: checksum, where known. Without it the file is compared with the note of an earlier
            download (``<target>.sha256``), where there is one.
        space_factor: room for what is unpacked from it afterwards, as a multiple of its size.
        patience: retries, waits and the timeout.
        progress: told of bytes received.

    Returns:
        What is at ``target`` now. A file that was there already and is right is not downloaded again.

    Raises:
        DataError: where the server does not give the file, gives another one than published or than
            received earlier, or the disk is full or must not be written. Names file, url and remedy.
    """
    held = held_file(target, size, sha256)
    if held is not None:
        return held
    wanted = _Wanted(url, target, size, sha256, space_factor)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(wanted) as file:
            have = _size_of(file)
            if size is not None and have > size:
                have = _restart(file)
            if not have or have not in (size, _read_facts(wanted.facts).get("size")):
                _receive_patiently(wanted, file, patience, progress)
            digest, have = _digest(file)
            _verify(wanted, have, digest, file)
            os.fsync(file.fileno())
        os.replace(wanted.partial, target)
        wanted.facts.unlink(missing_ok=True)
        _write_note(target, digest)
    except OSError as error:
        raise disk_error(error, target) from error
    return Received(target, have, digest, downloaded=True)


def held_file(target: Path, size: int | None = None, sha256: str | None = None) -> Received | None:
    """The file, if it is there and right; None where it must be downloaded.

    Raises:
        DataError: where no checksum is published and the file is not the one that its note tells of.
    """
    try:
        if not target.exists():
            return None
        if not target.is_file():
            raise DataError(f"{target}: is no file, so none can be downloaded to it; move it away")
        found_size = target.stat().st_size
        if size is not None and found_size != size:
            _log.warning("%s: has %d bytes, not %d: downloading it again", target, found_size, size)
            return None
        with target.open("rb") as file:
            digest, _ = _digest(file)
    except OSError as error:
        raise disk_error(error, target) from error
    if sha256 is not None:
        if digest != sha256:
            _log.warning("%s: is not the published file (sha256 %s): downloading it again", target, digest)
            return None
    else:
        noted = read_note(target)
        if noted is not None and noted != digest:
            raise DataError(
                f"{target}: has changed since it was downloaded (sha256 {digest}, its note {note_path(target).name} "
                f"says {noted}). Delete the file to download it again, or the note to keep the file as it is"
            )
        if noted is None:
            try:
                _write_note(target, digest)
            except OSError as error:
                raise disk_error(error, note_path(target)) from error
    return Received(target, found_size, digest, downloaded=False)


def note_path(target: Path) -> Path:
    """The note of what was received, beside the file."""
    return target.with_name(f"{target.name}.sha256")


def read_note(target: Path) -> str | None:
    """The SHA-256 that was received for ``target``; None where there is no note that can be read."""
    try:
        words = note_path(target).read_text("utf-8").split()
    except (OSError, UnicodeDecodeError):
        return None
    return words[0] if words and re.fullmatch("[0-9a-f]{64}", words[0]) else None


def bytes_to_come(target: Path, size: int) -> int:
    """How much of ``size`` bytes a download that may have been interrupted still has to receive."""
    try:
        return max(0, size - partial_path(target).stat().st_size)
    except OSError:
        return size


def check_space(folder: Path, needed: int, what: str) -> None:
    """Refuse what will not fit on the disk of ``folder`` (which need not exist yet).

    Raises:
        DataError: where ``needed`` bytes, and a little to spare, are not free.
    """
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed + _SPARE_BYTES:
        raise DataError(
            f"{folder}: {what} needs {readable(needed)} (and {readable(_SPARE_BYTES)} to spare), but only "
            f"{readable(free)} are free there; make room, or name a folder on another disk with --data-root (or the "
            "variable IVT_DATA)"
        )


def disk_error(error: OSError, path: Path) -> DataError:
    """What an error of the file system means for the user, who wanted ``path``."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(
            f"{path}: the disk (or your share of it) is full ({reason}); what was received is kept: make room and "
            "run the same command again, or name a folder on another disk with --data-root (or IVT_DATA)"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        place = error.filename or path.parent
        return DataError(
            f"{path}: no permission to read or write there ({reason}: {place}); make the folder yours, or name another "
            "one with --data-root (or the variable IVT_DATA)"
        )
    if error.errno == errno.EFBIG:
        return DataError(
            f"{path}: larger than a file can be there ({reason}); name a folder on another disk with --data-root "
            "(FAT disks end at 4 GB), or raise the limit (ulimit -f)"
        )
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return DataError(
            f"{path}: a file is in the way of a folder ({reason}: {error.filename}); move it, or name another folder "
            "with --data-root (or the variable IVT_DATA)"
        )
    return DataError(f"{path}: cannot be written or read ({reason}); check the disk, or name another folder")


class _TransientError(Exception):
    """A failure that may be gone at the next attempt."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


@dataclass(frozen=True, slots=True)
class _Wanted:
    url: str
    target: Path
    size: int | None
    sha256: str | None
    space_factor: float

    @property
    def partial(self) -> Path:
        return partial_path(self.target)

    @property
    def facts(self) -> Path:
        """What the server said about the file that is partly here."""
        return self.target.with_name(f"{self.target.name}.partial.json")


def _receive_patiently(wanted: _Wanted, file: IO[bytes], patience: Patience, progress: Progress | None) -> None:
    failures, best = 0, _size_of(file)
    while True:
        try:
            _receive(wanted, file, patience.timeout_s, progress)
            return
        except _TransientError as error:
            have = _size_of(file)
            failures = 1 if have > best else failures + 1
            best = max(best, have)
            if failures >= patience.attempts:
                kept = f"the {readable(have)} received so far are kept in {wanted.partial.name}: " if have else ""
                raise DataError(
                    f"{wanted.target}: could not be downloaded from {wanted.url}: {error} (tried {failures} times in "
                    f"a row); {kept}run the same command again later, or give another server with --mirror"
                ) from error
            _log.warning("%s: %s; trying again", wanted.url, error)
            patience.wait(failures, error.wait_s)


def _receive(wanted: _Wanted, file: IO[bytes], timeout_s: float, progress: Progress | None) -> None:
    """One attempt: append what is missing, or start from zero where the server or a change demands it."""
    url, target, size = wanted.url, wanted.target, wanted.size
    facts = _read_facts(wanted.facts)
    have = _size_of(file)
    headers = {}
    # Without a validator the server cannot say that the file has changed; then only a checksum can.
    if have and (facts.get("validator") or wanted.sha256 is not None):
        headers["Range"] = f"bytes={have}-"
        if facts.get("validator"):
            headers["If-Range"] = facts["validator"]
    elif have:
        have = _restart(file)
    try:
        response = _open(url, headers, timeout_s, str(target))
    except _RangeRefusedError as error:
        _restart(file)
        wanted.facts.unlink(missing_ok=True)
        raise _TransientError("the server refused to go on with the download; starting from zero") from error
    with response:
        validator = _validator(response.headers)
        if response.status == 206:
            start, total = _content_range(response.headers)
            total = facts.get("size") if total is None else total
            validator = validator or facts.get("validator")
            same = validator == facts.get("validator", validator) and total == facts.get("size", total)
            if start != have or not same:  # a server without regard to If-Range
                _restart(file)
                wanted.facts.unlink(missing_ok=True)
                raise _TransientError("the server went on with something else than asked; starting from zero")
        else:
            total = _content_length(response.headers)
        # Before anything that is here is given up for it.
        if response.headers.get_content_type() == "text/html":
            raise DataError(
                f"{target}: {url} sends a web page instead of the file; open it in a browser: it may ask to log in or "
                "tell of an error. What was received before is kept"
            )
        if size is not None and total is not None and total != size:
            raise DataError(
                f"{target}: {url} offers {total} bytes, the published file has {size}; the file there is another "
                "one: give another server with --mirror, or see whether a newer version of this package knows it"
            )
        if response.status != 206:
            have = _restart(file)
        write_whole(wanted.facts, json.dumps({"url": url, "validator": validator, "size": total}))
        expected = size if total is None else total
        if expected is not None:
            needed = expected - have + round(expected * wanted.space_factor)
            doing = "downloading and unpacking" if wanted.space_factor else "downloading"
            check_space(target.parent, needed, f"{doing} {target.name}")
        file.seek(0, io.SEEK_END)
        while True:
            try:
                block = response.read1(_CHUNK)
            except (OSError, http.client.HTTPException) as error:
                raise _TransientError(f"the connection broke after {readable(have)} ({_reason(error)})") from error
            if not block:
                break
            _write_all(file, block)
            have += len(block)
            if expected is not None and have > expected:
                _restart(file)
                raise DataError(
                    f"{target}: {url} sends more than the {expected} bytes it announced; nothing was kept: run the "
                    "same command again, or give another server with --mirror"
                )
            if progress is not None:
                progress(have, expected)
    if expected is not None and have < expected:
        raise _TransientError(f"the connection ended after {readable(have)} of {readable(expected)}")


def _verify(wanted: _Wanted, have: int, digest: str, file: IO[bytes]) -> None:
    """Refuse what is not the file that was wanted; wrong bytes are thrown away."""
    url, target = wanted.url, wanted.target
    again = "nothing was kept: run the same command again, or give another server with --mirror"
    if wanted.size is not None and have != wanted.size:
        _restart(file)
        raise DataError(f"{target}: {url} gave {have} bytes, the published file has {wanted.size}; {again}")
    if wanted.sha256 is not None and digest != wanted.sha256:
        _restart(file)
        raise DataError(
            f"{target}: what {url} gave is not the published file (sha256 {digest} instead of {wanted.sha256}); {again}"
        )
    noted = read_note(target)
    if wanted.sha256 is None and noted is not None and noted != digest:
        raise DataError(
            f"{target}: {url} now gives another file than at the last download (sha256 {digest}, the note "
            f"{note_path(target)} says {noted}), so results would not be comparable. To take the new file, delete "
            "the note and run the same command again (the download is kept)"
        )


@contextlib.contextmanager
def _exclusive(wanted: _Wanted) -> Iterator[IO[bytes]]:
    """The partial file, open for writing and reading, locked against a second process where that works."""
    partial = wanted.partial
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
    # buffering=0: what has been written is in the file whenever the process dies.
    with open(os.open(partial, flags, 0o666), "r+b", buffering=0) as file:
        try:
            import fcntl
        except ImportError:  # Windows
            pass
        else:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DataError(
                    f"{partial}: another process is downloading this file; wait for it, or end it first"
                ) from error
            except OSError as error:  # a file system without locks
                _log.info("%s: cannot be locked (%s)", partial, error)
        try:
            yield file
        finally:
            if not _size_of(file):  # nothing to go on with
                with contextlib.suppress(OSError):  # Windows keeps an open file; it is empty
                    partial.unlink()
                wanted.facts.unlink(missing_ok=True)


def _restart(file: IO[bytes]) -> int:
    if _size_of(file):
        file.truncate(0)
    file.seek(0)
    return 0


def _write_all(file: IO[bytes], block: bytes) -> None:
    """A file without a buffer may take only a part at a time, as on a disk that is nearly full."""
    view = memoryview(block)
    while view:
        view = view[file.write(view) :]


def _size_of(file: IO[bytes]) -> int:
    return os.fstat(file.fileno()).st_size


def _digest(file: IO[bytes]) -> tuple[str, int]:
    file.seek(0)
    digest, size = hashlib.sha256(), 0
    while block := file.read(1 << 20):
        digest.update(block)
        size += len(block)
    return digest.hexdigest(), size


def partial_path(target: Path) -> Path:
    """Where a download grows before it gets its name."""
    return target.with_name(f"{target.name}.partial")


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):  # without them the download cannot go on, and starts again
        return {}
    return {key: value for key, value in facts.items() if value is not None} if isinstance(facts, dict) else {}


def _write_note(target: Path, digest: str) -> None:
    write_whole(note_path(target), f"{digest}  {target.name}\n")


# --- Talking to a server --------------------------------------------------------------------------


class _RangeRefusedError(Exception):
    """The server answered 416."""


def _make_opener() -> urllib.request.OpenerDirector:
    """Only http and https: a redirect to anything else is an error."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener


def _open(url: str, headers: dict[str, str], timeout_s: float, what: str, method: str = "GET") -> Any:
    """The response; failures sorted into those that may pass and those that will not."""
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise DataError(f"{what}: {url!r} is not an http or https address")
    # Compressed bytes would have another size and checksum.
    sent = {"User-Agent": "ivt-env", "Accept-Encoding": "identity"} | headers
    try:
        request = urllib.request.Request(url, headers=sent, method=method)
        return _make_opener().open(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and "Range" in headers:
                raise _RangeRefusedError from error
            answer = f"the server answers {error.code} ({error.reason})"
            if error.code in _TRANSIENT_STATUS:
                raise _TransientError(answer, _retry_after(error.headers)) from error
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
        raise _TransientError(f"no connection ({_reason(cause)})") from error


def get_bytes(
    url: str, limit_bytes: int, what: str, patience: Patience = PATIENCE, stop: threading.Event | None = None
) -> tuple[bytes, Message]:
    """A small file in memory, and the headers of the answer.

    Args:
        url: http or https.
        limit_bytes: more than that is refused.
        what: how an error names it.
        patience: retries, waits and the timeout.
        stop: no further attempt once it is set.

    Raises:
        DataError: where the server does not give it.
    """
    failures = 0
    while True:
        try:
            with _open(url, {}, patience.timeout_s, what) as response:
                expected = _content_length(response.headers)
                try:
                    body: bytes = response.read(limit_bytes + 1)
                except (OSError, http.client.HTTPException) as error:
                    raise _TransientError(f"the connection broke ({_reason(error)})") from error
                if len(body) > limit_bytes:
                    raise DataError(f"{what}: {url} sends more than {readable(limit_bytes)}; it is something else")
                if expected is not None and len(body) < expected:
                    raise _TransientError(f"the connection ended after {len(body)} of {expected} bytes")
                return body, response.headers
        except _TransientError as error:
            failures += 1
            if failures >= patience.attempts or (stop is not None and stop.is_set()):
                raise DataError(f"{what}: {error} ({url}, tried {failures} times); run it again later") from error
            # One of thousands of images is told of only where it cannot be had.
            _log.log(logging.WARNING if stop is None else logging.INFO, "%s: %s; trying again", url, error)
            patience.wait(failures, error.wait_s, stop)


def remote_size(url: str, what: str, patience: Patience = PATIENCE) -> int | None:
    """The size in bytes that the server announces; None where it does not say.

    Raises:
        DataError: where the server does not have the file or cannot be reached.
    """
    failures = 0
    while True:
        try:
            with _open(url, {}, patience.timeout_s, what, method="HEAD") as response:
                return _content_length(response.headers)
        except _TransientError as error:
            failures += 1
            if failures >= patience.attempts:
                raise DataError(f"{what}: {error} ({url}, tried {failures} times); run it again later") from error
            _log.warning("%s: %s; trying again", url, error)
            patience.wait(failures, error.wait_s)


def _validator(headers: Message) -> str | None:
    """What If-Range may be given: a strong ETag, else the time of change."""
    etag = headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")


def _content_length(headers: Message) -> int | None:
    value = headers.get("Content-Length")
    return int(value) if value is not None and value.isdecimal() else None


def _content_range(headers: Message) -> tuple[int | None, int | None]:
    """First byte and whole size of a 206 answer."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", (headers.get("Content-Range") or "").strip())
    if match is None:
        return None, None
    return int(match[1]), None if match[2] == "*" else int(match[2])


def _retry_after(headers: Message) -> float | None:
    value = headers.get("Retry-After")
    return float(value) if value is not None and value.isdecimal() else None


def _reason(error: object) -> str:
    return f"{type(error).__name__}: {error}" if isinstance(error, Exception) else str(error)
