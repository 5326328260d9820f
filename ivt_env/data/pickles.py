"""Reading pickles of strangers: plain data only, nothing in the file can be called."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, NoReturn

from ivt_env.data.sample import DataError


def read_pickle(path: Path) -> Any:
    """Read a pickle of plain lists, dicts, strings and numbers; one that asks for a class or function is refused.

    Pickles written by Python 2 hold byte strings: these are read as UTF-8, and as Latin-1 where a file is not UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); unpack the data set again") from error
    try:
        try:
            return _PlainUnpickler(io.BytesIO(content), encoding="utf-8").load()
        except UnicodeDecodeError:
            return _PlainUnpickler(io.BytesIO(content), encoding="latin1").load()
    except _CallableRefusedError as error:
        raise DataError(
            f"{path}: refused, because it asks for {error}, and a pickle that asks for a class or function "
            "can run code. Nothing was run. Get the original file; if you made this one (with numpy numbers, "
            "say), save it again as plain lists, dicts, strings and numbers"
        ) from None
    except Exception as error:  # broken bytes make the unpickler raise nearly anything
        raise DataError(
            f"{path}: not a whole pickle ({type(error).__name__}: {error}); unpack the data set again"
        ) from error


class _CallableRefusedError(pickle.UnpicklingError):
    """A pickle asked for something that is no plain data."""


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise _CallableRefusedError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise _CallableRefusedError(f"the outside object {pid!r}")
