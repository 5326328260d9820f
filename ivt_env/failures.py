"""What an expected failure of a command is, and what the shell and the user get for it.

Exit status of every command: 0 done; 1 the data are unfit for use (``ivt data check``); 2 an error that the
user can fix, in one line on standard error; 130 interrupted; 143 terminated; 141 whoever read the output has
seen enough. Anything else is a bug and shows its traceback.

Code that finds something wrong raises a ``ValueError`` that names file, row, value and remedy. It neither
prints nor exits. What a library raises for broken content is turned into one by ``reading``.
"""

from __future__ import annotations

import ctypes
import errno
import json
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

UNFIT, FAILED, INTERRUPTED, TERMINATED, UNREAD = 1, 2, 130, 143, 141
"""Exit statuses besides 0; 130, 143 and 141 are those of a shell for SIGINT, SIGTERM and SIGPIPE."""

PLUGGED_IN: set[str] = set()
"""Modules of the user's own that a command was told to use. What they raise keeps its traceback."""

_EXPECTED = {
    ("gymnasium", "Error"),
    ("pyarrow", "ArrowException"),
    ("safetensors", "SafetensorError"),
    ("torch", "OutOfMemoryError"),
    ("httpx", "HTTPError"),
}
"""Errors of libraries that are expected, by top-level module and name, so that nothing is imported to ask."""

_REMEDIES = {
    errno.ENOSPC: "free some space or choose another folder",
    errno.EDQUOT: "free some space or choose another folder",
    errno.EFBIG: "the limit on the size of a file (ulimit -f) is too small",
    errno.EACCES: "change its permissions or choose another place",
    errno.EPERM: "change its permissions or choose another place",
    errno.EROFS: "choose another place",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "a symbolic link leads back to itself",
    errno.ENOTDIR: "a file is where a folder belongs",
    errno.EISDIR: "a folder is where a file belongs",
    errno.EEXIST: "something else is there already",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
}

_LONGEST_LINE = 2000
_log = logging.getLogger(__name__)


class ReadError(ValueError):
    """Something that cannot be read. Names it, and the remedy."""


def _quiet_interrupt(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, where)


if sys.argv[:1] == ["-m"]:  # of `python -m`, until the module is imported that will call run
    sys.excepthook = _quiet_interrupt


def run(command: Callable[[], object], extra: str = "train") -> int:
    """Run a command and return its exit status; an expected failure becomes one line on standard error.

    An integer that ``command`` returns is the exit status. ``extra`` is the installation that has what it imports.
    """
    with _signals_end_quietly():
        try:
            done = command()
            if sys.stdout is not None:
                sys.stdout.flush()
            return done if type(done) is int else 0
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends the process at once
            return _end("\ninterrupted", INTERRUPTED)
        except SystemExit as ended:
            if ended.code is None or isinstance(ended.code, int):
                return ended.code or 0
            return _end(f"error: {ended.code}", FAILED)
        except BrokenPipeError:
            return _end("", UNREAD)
        except Exception as error:
            if not is_expected(error):
                raise
            _log.info("raised here", exc_info=True)
            return _end(f"error: {line_of(error, extra)}", FAILED)


def is_expected(error: BaseException) -> bool:
    """Whether a user can fix the cause of ``error``, as far as its kind tells."""
    if any(frame.f_globals.get("__name__") in PLUGGED_IN for frame, _ in traceback.walk_tb(error.__traceback__)):
        return False
    if isinstance(error, (ValueError, OSError, MemoryError)):
        return True
    if isinstance(error, ImportError):
        return _missing(error) is not None
    # A library that cannot write often raises its own kind of error while it handles that of the disk.
    return bool(_kinds(error) & _EXPECTED) or system_error(error) is not None


def line_of(error: BaseException, extra: str = "train") -> str:
    """What is wrong, in one line that a terminal can show."""
    found = system_error(error) or error
    words = str(found)
    if isinstance(found, ImportError) and (missing := _missing(found)):
        words = f'{missing} is not installed: pip install "ivt-env[{extra}]"'
    elif isinstance(found, OSError) and found.errno is not None and type(found).__str__ is OSError.__str__:
        names = [str(name) for name in (found.filename, found.filename2) if name is not None]
        remedy = _REMEDIES.get(found.errno)
        words = ": ".join([*names, found.strerror or os.strerror(found.errno)]) + (f"; {remedy}" if remedy else "")
    elif isinstance(found, MemoryError):
        words = f"not enough memory{f' ({words})' if words else ''}"
    line = " ".join(words.split()) or type(found).__name__
    # Text of unknown origin: control characters are spelt out, never sent to a terminal.
    line = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in line)
    return line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE - 4]} ..."


@contextmanager
def reading(
    source: str | Path, remedy: str = "", kind: type[ValueError] = ReadError, problem: str = "cannot be read"
) -> Iterator[None]:
    """Whatever is raised inside is the fault of ``source``: libraries raise nearly anything for broken content.

    Args:
        source: what is read, as the user knows it.
        remedy: what the user can do about it.
        kind: of the error that is raised. One of this kind passes as it is.
        problem: what is wrong with ``source`` then. A file that the system does not give always "cannot be read".
    """
    try:
        yield
    except (kind, MemoryError):
        raise
    except Exception as error:
        if _kinds(error) & {("torch", "OutOfMemoryError")}:
            raise
        what = "nested too deeply" if isinstance(error, RecursionError) else line_of(error)
        if isinstance(error, OSError) and error.strerror:
            what, problem = error.strerror, "cannot be read"
        if not isinstance(error, (ValueError, OSError, RuntimeError, ImportError)):
            what = f"{type(error).__name__}: {what}"
        what = what.rpartition("WeightsUnpickler error: ")[2]  # torch advises to load what may call anything
        what = what if len(what) <= 500 else f"{what[:500]} ..."
        raise kind(f"{source}: {problem} ({what})" + (f"; {remedy}" if remedy else "")) from error


def read_json(path: Path, remedy: str = "", kind: type[ValueError] = ReadError) -> dict[str, Any]:
    """The JSON object in a file; an error of that ``kind`` where it is missing or broken or holds something else."""
    with reading(path, remedy, kind):
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f"holds a {type(found).__name__}, not an object")
    return found


def end_with_parent() -> None:
    """In a forked child: get SIGTERM when the thread that forked it ends, SIGKILL of its process included."""
    if _PRCTL is not None:
        _PRCTL(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


_PRCTL = getattr(ctypes.CDLL(None), "prctl", None)
"""None where the system is not Linux."""


def _kinds(error: BaseException) -> set[tuple[str, str]]:
    return {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(error).__mro__}


def system_error(error: BaseException | None) -> OSError | None:
    """The failure of the system below ``error`` that has a remedy, such as a full disk."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _REMEDIES:
            return error
        # Libraries in Rust, such as safetensors, give the number in their text only.
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is not None and int(number[1]) in _REMEDIES:
            return OSError(int(number[1]), os.strerror(int(number[1])))
        error = error.__cause__ or error.__context__
    return None


def _missing(error: ImportError) -> str | None:
    """The library that is not installed; None where a module of this project is."""
    name = (error.name or "").partition(".")[0]
    return None if not name or name == __name__.partition(".")[0] else name


def _end(line: str, status: int) -> int:
    """Say ``line``. Neither output can fail later, when the interpreter flushes it."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:  # the process was started with it closed
            continue
        try:
            if line and stream is sys.stderr:
                print(line, file=stream)
            stream.flush()
        except OSError:
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return status


@contextmanager
def _signals_end_quietly() -> Iterator[None]:
    """SIGTERM unwinds the stack as Ctrl-C does, so that what was begun is cleaned up; neither is ever lost."""

    def end(_signal: int, _frame: FrameType | None) -> Any:
        raise SystemExit(TERMINATED)

    def unraisable(what: sys.UnraisableHookArgs) -> None:
        """A signal that came inside a finalizer, where Python drops all exceptions, comes again a moment later."""
        number = {SystemExit: signal.SIGTERM, KeyboardInterrupt: signal.SIGINT}.get(what.exc_type)
        if number is None:
            sys.__unraisablehook__(what)
        else:
            threading.Timer(0.01, os.kill, (os.getpid(), number)).start()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, hook = signal.signal(signal.SIGTERM, end), sys.unraisablehook
    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGTERM, before)
