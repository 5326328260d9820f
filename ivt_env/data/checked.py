"""Checking what a file of annotations holds: numbers, texts, boxes; every reader uses these.

A value that cannot be used raises ``BadRowError`` with the value in the message. The reader counts
and logs the row and goes on; too many such rows make the file an error (``BadRows``).
"""

from __future__ import annotations

import json
import logging
import reprlib
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

from ivt_env.data.sample import DataError
from ivt_env.failures import reading

Box = tuple[float, float, float, float]
Convention = Literal["xyxy", "xywh"]

BAD_ROWS_ALWAYS_ALLOWED = 10
BAD_ROWS_ALLOWED_SHARE = 0.01
"""More bad rows than both of these (of all rows of the file) mean a broken file, not a bad row."""
_ROWS_LOGGED = 20

_log = logging.getLogger(__name__)
_REPR = reprlib.Repr()  # of anything that a file can hold, however deep or long
_REPR.maxstring = _REPR.maxother = 80
_CORNERS = {"xyxy": "x1, y1, x2, y2", "xywh": "x, y, width, height"}


class BadRowError(Exception):
    """Why one row cannot be used."""


class BadRows:
    """Counts the rows of a file that were left out, logs the first ones, and refuses too many."""

    def __init__(self, where: str, remedy: str) -> None:
        """Start at none.

        Args:
            where: the file, as an error names it.
            remedy: what to do where too many rows are bad, as an imperative without a full stop.
        """
        self.reasons: list[str] = []
        self._where, self._remedy = where, remedy

    def add(self, row: int | str, reason: object, count: int = 1) -> None:
        """Leave out ``count`` samples of one row: its number from 0, with the file where there are several."""
        text = f"row {row}: {reason}"
        if len(self.reasons) < _ROWS_LOGGED:
            _log.warning("%s: left out %s%s", self._where, text, f" ({count} samples)" if count > 1 else "")
        self.reasons += [text] * count

    def check(self, total: int) -> None:
        """Raise DataError where more than the allowed share of ``total`` samples was left out, or all."""
        if not self.reasons:
            return
        allowed = max(BAD_ROWS_ALWAYS_ALLOWED, BAD_ROWS_ALLOWED_SHARE * total)
        if len(self.reasons) > allowed or len(self.reasons) == total:
            raise DataError(
                f"{self._where}: {len(self.reasons)} of {total} rows are unusable (the limit is {int(allowed)}), "
                f"the first: {self.reasons[0]}; {self._remedy}"
            )


def relative_box(bbox: Any, size: tuple[int, int], convention: Convention, key: str = "bbox") -> Box:
    """A box in pixels of the original picture to xyxy relative to it.

    Up to one pixel outside the picture is taken for rounding and cut off. The arithmetic is that of
    ``boxes.clip(to_relative(...))``, without an array for each of 200,000 boxes.

    Args:
        bbox: what the file holds: four finite numbers, else it is refused.
        size: (height, width) of the picture in pixels.
        convention: ``xyxy`` (two corners) or ``xywh`` (corner, width, height); never guessed.
        key: how a message names the box.

    Raises:
        BadRowError: for anything but four finite numbers, a box without area or outside the
            picture. A box that is impossible as declared and possible under the other convention
            is said to be so.
    """
    if not isinstance(bbox, list | tuple) or len(bbox) != 4:
        raise BadRowError(f"{key} {short(bbox)} is not four numbers")
    if not all(type(value) in (int, float) and abs(value) < 1e9 for value in bbox):
        raise BadRowError(f"{key} {short(bbox)} is not four finite numbers")
    a, b, c, d = map(float, bbox)
    height, width = size
    shown = f"{key} {list(bbox)} ({_CORNERS[convention]})"
    if convention == "xywh":
        if c <= 0 or d <= 0:
            raise BadRowError(f"{shown} has no area")
        x1, y1, x2, y2 = a, b, a + c, b + d
        other = _inside((a, b, c, d), size) and c > a and d > b
    else:
        x1, y1, x2, y2 = a, b, c, d
        other = c > 0 and d > 0 and _inside((a, b, a + c, b + d), size)
        if x2 <= x1 or y2 <= y1:
            raise BadRowError(
                f"{shown} has its corners in the wrong order or no area" + (_probably("xywh") if other else "")
            )
    if not _inside((x1, y1, x2, y2), size):
        swapped = " (are width and height swapped?)" if _inside((x1, y1, x2, y2), (width, height)) else ""
        raise BadRowError(
            f"{shown} leaves the picture, which is {width} wide and {height} high{swapped}"
            + (_probably("xyxy") if convention == "xywh" and other and not swapped else "")
        )
    box = (
        min(max(x1 / width, 0.0), 1.0),
        min(max(y1 / height, 0.0), 1.0),
        min(max(x2 / width, 0.0), 1.0),
        min(max(y2 / height, 0.0), 1.0),
    )
    if box[2] <= box[0] or box[3] <= box[1]:
        raise BadRowError(f"{shown} has no area inside the picture")
    return box


def picture_size(row: Any, height: str = "height", width: str = "width") -> tuple[int, int]:
    """(height, width) in pixels from two keys of a row; BadRowError where they are not a picture's."""
    h, w = integer(row, height), integer(row, width)
    if not (0 < h < 2**31 and 0 < w < 2**31):
        raise BadRowError(f"height {h} and width {w} are not a picture's")
    return h, w


def plain_file_name(name: str, key: str = "file_name") -> str:
    """``name``, if it names a file in a folder and nothing above or below it; else BadRowError."""
    plain = PurePosixPath(name).name == name == PureWindowsPath(name).name
    if not plain or "\0" in name or name in ("", ".", ".."):
        raise BadRowError(f"{key} {name!r} is not the plain name of a file")
    return name


def relative_path(name: str, key: str = "image") -> str:
    """``name``, if it is a path that stays in its folder, with ``/``; else BadRowError."""
    path = PurePosixPath(name)
    if "\\" in name:
        raise BadRowError(f"{key} {name!r} is not a path inside the folder of the pictures; its separator is /, not \\")
    if path.is_absolute() or not path.parts or ".." in path.parts or "\0" in name or PureWindowsPath(name).drive:
        raise BadRowError(f"{key} {name!r} is not a path inside the folder of the pictures")
    return name


def integer(row: Any, key: str) -> int:
    """A whole number from 0 (no bool); else BadRowError."""
    value = row.get(key) if isinstance(row, dict) else None
    if type(value) is not int or not 0 <= value < 2**63:  # bool is an int, and is no id
        raise BadRowError(f"{key} is {short(value)}, not a whole number from 0")
    return value


def text(row: Any, key: str) -> str:
    """A text that is not blank and is valid Unicode; else BadRowError."""
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise BadRowError(f"{key} is {short(value)}, not a text")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise BadRowError(f"{key} is {value!r}, which is not valid Unicode")
    return value


def short(value: Any) -> str:
    """``repr``, cut to a line."""
    try:
        return _REPR.repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return f"<{type(value).__name__} with thousands of digits>"


def read_json(path: Path, remedy: str) -> Any:
    """A whole JSON file; DataError with the file and the remedy where it is missing or broken."""
    with reading(path, remedy, DataError, "not whole JSON"):
        return json.loads(path.read_bytes())


def _inside(box: Box, size: tuple[int, int]) -> bool:
    """Whether xyxy (px) lies in a picture of (height, width), up to one pixel."""
    x1, y1, x2, y2 = box
    return x1 >= -1 and y1 >= -1 and x2 <= size[1] + 1 and y2 <= size[0] + 1


def _probably(convention: Convention) -> str:
    return f"; it would fit as {convention} ({_CORNERS[convention]}): is the declared convention wrong?"
