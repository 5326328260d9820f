"""Files and folders that are complete or absent, also after SIGKILL, on a full disk or after a power cut, and locks.

What a killed process left of a file or folder is removed by the next one that writes it, and all that lies in a folder
by the next one that locks it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import stat
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ivt_env.failures import read_json, system_error

ASKED = "asked.json"
"""What a folder was asked for; written by ``whole_folder``."""
LOCK = ".lock"
"""Who works in a folder; lies there only while somebody does, or where its process was killed."""

_PARTIAL = re.compile(r"\.[0-9a-f]{16}\.partial")
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2
_HERE = -100  # AT_FDCWD


class FileError(ValueError):
    """A file or folder that is in the way, in use, or was made for something else. Says which, and what to do."""


@contextlib.contextmanager
def whole_file(path: str | Path, mode: str = "wb", *, sync: bool = True, **kwargs: Any) -> Iterator[IO[Any]]:
    """Open a file for writing that gets its name when the block ends without an error.

    Args:
        path: of the file; what is no regular file (a device, a folder, a link) is refused.
        mode: of ``open``; text is UTF-8 and has its newlines as they are.
        sync: false where a power cut may leave the file empty, because whoever reads it notices and makes it again.
        kwargs: for ``open``.
    """
    path = Path(path)
    if "b" not in mode:
        kwargs = {"encoding": "utf-8", "newline": "\n"} | kwargs
    with naming(path):
        _check_target(path, stat.S_ISREG)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial, handle = _open_partial(path)
        with os.fdopen(handle, mode, **kwargs) as file:
            try:
                yield file
                file.flush()
                if sync:
                    os.fsync(handle)
                _check_target(path, stat.S_ISREG)
                os.replace(partial, path)
            except BaseException:  # all of it while the lock is held
                partial.unlink(missing_ok=True)
                raise
        if sync:
            _sync(path.parent)


def write_whole(path: str | Path, content: bytes | str, *, sync: bool = True) -> None:
    """Write a file complete or not at all (``whole_file``)."""
    with whole_file(path, "wb", sync=sync) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_lines(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of JSON lines, one a row, complete or not at all; ValueError for a number that is not finite."""
    with whole_file(path, "w") as file:
        for row in rows:
            file.write(json.dumps(row, allow_nan=False) + "\n")


@contextlib.contextmanager
def whole_folder(path: str | Path, asked: Mapping[str, Any]) -> Iterator[Path]:
    """Build a folder beside its place, which is yielded; it gets its name when the block ends without an error.

    A folder that is there is replaced if it was made here, too. What it was ``asked`` for (JSON-able) is kept in it as
    ``asked.json``.
    """
    path = Path(path)
    with naming(path):
        _check_target(path, stat.S_ISDIR)
        if path.exists() and not (path / ASKED).exists() and any(path.iterdir()):
            raise FileError(f"{path} holds other files and would be replaced: give another folder, or delete it")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial, handle = _open_partial(path, folder=True)
        try:
            yield partial
            write_whole(partial / ASKED, json.dumps(as_read(asked), indent=1) + "\n")
            for folder, _, names in os.walk(partial):
                for name in names:
                    _sync(Path(folder, name))
                _sync(Path(folder))
            _put(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            os.close(handle)
        _sync(path.parent)


def forget(path: str | Path) -> None:
    """Remove a file or folder; a folder loses its name first, so that what bears the name is always complete."""
    path = Path(path)
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    partial, handle = _open_partial(path, folder=True)
    try:
        os.rename(path, partial)
        shutil.rmtree(partial)
    finally:
        os.close(handle)


def as_read(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for as it is read back: paths as text, tuples as lists."""
    found: dict[str, Any] = json.loads(json.dumps(dict(asked), default=str))
    return found


def asked_of(path: str | Path, name: str = ASKED) -> dict[str, Any] | None:
    """What a folder was asked for; None where it does not say."""
    path = Path(path) / name
    return read_json(path, f"delete {path.parent}, or give another folder", FileError) if path.exists() else None


def refuse_other(
    path: str | Path, made: Mapping[str, Any], asked: Mapping[str, Any], remedy: str, may_differ: Collection[str] = ()
) -> None:
    """Refuse a folder made for something else, but for what ``may_differ``; names the first option that differs."""
    for name, value in as_read(asked).items():
        if name not in may_differ and (name not in made or made[name] != value):
            raise FileError(f"{path} was made with {name} {made.get(name)!r}, not {value!r}: {remedy}")


@contextlib.contextmanager
def lock_folder(path: str | Path) -> Iterator[None]:
    """Work in a folder alone. A process that ends, however it does, holds no lock any more.

    What killed processes left half-written in the folder is removed. FileError where somebody works there, this process
    included.
    """
    folder = Path(path)
    _check_target(folder, stat.S_ISDIR, follow=True)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        while (handle := _locked(folder / LOCK, os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX | fcntl.LOCK_NB)) is None:
            pass
    except BlockingIOError:
        holder = "another process"
        with contextlib.suppress(OSError):  # it ends at this moment
            holder = (folder / LOCK).read_text(encoding="utf-8", errors="replace").strip() or holder
        raise FileError(f"{folder} is in use by {holder}: wait for it or end it, or give another folder") from None
    _held.add(handle)
    try:
        os.ftruncate(handle, 0)
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200]
        os.write(handle, f"process {os.getpid()} ({command})\n".encode(errors="replace"))
        for left in folder.rglob(".*.partial"):
            if _PARTIAL.fullmatch(left.name):
                _remove(left)
        yield
    finally:
        if handle in _held:  # a forked child has none
            _held.discard(handle)
            (folder / LOCK).unlink(missing_ok=True)
            os.close(handle)
            with contextlib.suppress(OSError):
                if made:  # and nothing was written
                    folder.rmdir()


_held: set[int] = set()


def _let_go() -> None:
    """In a forked child: its parent holds the lock, and when that is killed nobody does."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)


def _locked(path: Path, flags: int, operation: int) -> int | None:
    """A file or folder, open and locked; None where the one that held the lock has removed the name."""
    handle = os.open(path, flags | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(handle, operation)
        if os.path.samestat(os.fstat(handle), os.lstat(path)):
            return handle
    except FileNotFoundError:
        pass
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return None


def _open_partial(path: Path, folder: bool = False) -> tuple[Path, int]:
    """The name that a file or folder has while it is written, empty and locked, and the handle that holds the lock.

    The name follows from the file's, so that the next writer of the file takes over what a killed one left, and
    two writers of one file come one after the other. It is short, however long the file's name is.
    """
    partial = _partial(path)
    flags = os.O_RDONLY | os.O_DIRECTORY if folder else os.O_RDWR | os.O_CREAT
    is_kind = stat.S_ISDIR if folder else stat.S_ISREG
    while True:
        with contextlib.suppress(FileNotFoundError):
            if not is_kind(partial.lstat().st_mode):
                _remove(partial)
        if folder:
            partial.mkdir(exist_ok=True)
        handle = _locked(partial, flags, fcntl.LOCK_EX)
        if handle is not None:
            break
    try:
        if folder:
            for left in partial.iterdir():
                _remove(left)
        else:
            os.ftruncate(handle, 0)
    except BaseException:
        os.close(handle)
        raise
    return partial, handle


def _partial(path: Path) -> Path:
    return path.with_name(f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.partial")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _check_target(path: Path, is_kind: Any, follow: bool = False) -> None:
    try:
        found = path.stat() if follow else path.lstat()
    except (FileNotFoundError, NotADirectoryError):  # making its folder says what is in the way
        return
    if is_kind(found.st_mode):
        return
    if stat.S_ISLNK(found.st_mode):
        raise FileError(f"{path} is a link to {os.readlink(path)}: give that name itself, or another one")
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFREG: "a file", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    kind = kinds.get(stat.S_IFMT(found.st_mode), "a device")
    raise FileError(f"{path} is {kind} and would be replaced: give another name")


def _put(partial: Path, path: Path) -> None:
    """Give a folder its name; the folder that had it disappears."""
    if not path.exists():
        os.rename(partial, path)
        return
    try:  # both change their names at once
        exchange = ctypes.CDLL(None).renameat2
        failed = exchange(_HERE, os.fsencode(partial), _HERE, os.fsencode(path), _EXCHANGE)
    except AttributeError:  # not Linux
        failed = True
    if failed:  # the file system cannot: the name is absent for a moment
        old = _partial(path.with_name(f"{path.name}.old"))
        _remove(old)
        os.rename(path, old)
        os.rename(partial, path)
        partial = old
    shutil.rmtree(partial)


def _sync(path: Path) -> None:
    """Make what was written, or a rename in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors name what the user named: that of a full disk names nothing, and the name while writing tells little."""
    try:
        yield
    except ValueError:
        raise
    except Exception as caught:  # some libraries raise an error of their own for that of the disk
        error = caught if isinstance(caught, OSError) else system_error(caught)
        named = error is not None and error.filename is not None and not _PARTIAL.search(str(error.filename))
        if error is None or error.errno is None or named:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from caught
