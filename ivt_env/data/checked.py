"""Checking what a file of annotations holds: numbers, texts, boxes; every reader uses these.

A value that cannot be used raises ``BadRowError`` with the value in the message. The reader counts
and logs the row and goes on; too many such rows make the file an error (``BadRows``).
"""

from __future__ import annotations

import difflib
import json
import logging
import reprlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, TypeGuard, TypeVar

from ivt_env.data.sample import DataError
from ivt_env.failures import reading

Box = tuple[float, float, float, float]
Convention = Literal["xyxy", "xywh"]

BAD_ROWS_ALWAYS_ALLOWED = 10
BAD_ROWS_ALLOWED_SHARE = 0.01
"""More bad rows than both of these (of all rows of the file) mean a broken file, not a bad row."""
MAX_LINE_BYTES = 1 << 24
"""Of a line of JSON; a longer one is no row, and would fill the memory."""
_ROWS_LOGGED = 20

_T = TypeVar("_T")
_log = logging.getLogger(__name__)
_REPR = reprlib.Repr()  # of anything that a file can hold, however deep or long
_REPR.maxstring = _REPR.maxother = 80
_CORNERS = {"xyxy": "x1, y1, x2, y2", "xywh": "x, y, width, height"}


class BadRowError(Exception):
    """Why one row cannot be used."""


class BadRows:
    """Counts the rows of a file that were left out, logs the first ones, and refuses too many."""

    def __init__(self, where: str, remedy: str) -> None:
        """Start at none; ``where`` is the file, ``remedy`` an imperative without a full stop."""
        self.reasons: list[str] = []
        self.split: str | None = None
        """Of the rows that are being read; None where that is not known."""
        self.splits: list[str | None] = []
        """Of each reason."""
        self.suspicions: list[str] = []
        """Of rows that are kept, and whose boxes do not agree with the rest of the row as they are read."""
        self._where, self.remedy = where, remedy

    def add(self, row: int | str, reason: object, count: int = 1, split: str | None = None) -> None:
        """Leave out ``count`` samples of one row: its number from 0, with the file where there are several."""
        text = f"row {row}: {reason}"
        if len(self.reasons) < _ROWS_LOGGED:
            _log.warning("%s: left out %s%s", self._where, text, f" ({count} samples)" if count > 1 else "")
        self.reasons += [text] * count
        self.splits += [split or self.split] * count

    def check(self, total: int) -> None:
        """Raise DataError where more than the allowed share of ``total`` samples was left out or is suspect, or all."""
        allowed = max(BAD_ROWS_ALWAYS_ALLOWED, BAD_ROWS_ALLOWED_SHARE * total)
        suspect, unusable = len(self.suspicions), len(self.reasons)
        if suspect > allowed or (suspect > 1 and suspect + unusable == total):
            raise DataError(
                f"{self._where}: {suspect} of {total} boxes do not fit their images as they are read (the limit is "
                f"{int(allowed)}), the first: {self.suspicions[0]}; {self.remedy}"
            )
        if unusable > allowed or 0 < unusable == total:
            raise DataError(
                f"{self._where}: {unusable} of {total} rows are unusable (the limit is {int(allowed)}), "
                f"the first: {self.reasons[0]}; {self.remedy}"
            )


def usable(
    bad: BadRows, where: str, entries: Iterable[tuple[int, Any]], check: Callable[[dict[str, Any]], _T]
) -> Iterator[_T]:
    """``check`` of each entry (an object) of a file; one that is a BadRowError is left out, counted and named."""
    for number, entry in entries:
        try:
            if not isinstance(entry, dict):
                raise BadRowError(f"is {short(entry)}, not an object")
            row = check(entry)
        except BadRowError as error:
            bad.add(f"{number} of {where}", error)
        else:
            yield row


def per_sentence(
    bad: BadRows,
    here: str,
    sentences: Any,
    check: Callable[[], Callable[..., _T]],
    spoken: Callable[[int, Any], tuple[str, str]],
) -> Iterator[_T]:
    """One row per sentence of an object; an object that cannot be used counts once for each of its sentences.

    ``check`` gives what makes a row of ``sample_id`` and ``expression``, and ``spoken`` both of these, from the number
    of a sentence and the sentence. Either may raise BadRowError.
    """
    sentences = sentences if isinstance(sentences, list) and sentences else [None]
    try:
        row_of = check()
    except BadRowError as error:
        bad.add(here, error, len(sentences))
        return
    for number, sentence in enumerate(sentences):
        try:
            sample_id, expression = spoken(number, sentence)
        except BadRowError as error:
            bad.add(here, error)
        else:
            yield row_of(sample_id=sample_id, expression=expression)


def sentence_ids(row: dict[str, Any], here: str) -> None:
    """BadRowError unless an object has sentences, and in ``sent_ids`` their ids."""
    sentences = row.get("sentences")
    if not isinstance(sentences, list) or not sentences:
        raise BadRowError(f"{here}: has no sentences (sentences is {short(sentences)})")
    stated = [integer(sentence, "sent_id") for sentence in sentences]
    if row.get("sent_ids") != stated:
        raise BadRowError(f"{here}: sent_ids {short(row.get('sent_ids'))}, but its sentences have {short(stated)}")


def lists_in(content: Any, path: Path, keys: Iterable[str], remedy: str) -> None:
    """DataError unless a JSON file is an object that holds these lists."""
    for key in keys:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{path}: has no list {key!r}, so it has not the form of COCO's annotations; {remedy}")


def by_id(entries: Iterable[Any]) -> dict[int, dict[str, Any]]:
    """Entries of such a list by their id; one without is left out, which is said where another refers to it."""
    return {entry["id"]: entry for entry in entries if isinstance(entry, dict) and type(entry.get("id")) is int}


def are_numbers(bbox: Any) -> TypeGuard[list[float]]:
    """Whether something is a list of four numbers, which need not be finite."""
    return isinstance(bbox, list | tuple) and len(bbox) == 4 and all(type(value) in (int, float) for value in bbox)


def relative_box(bbox: Any, size: tuple[int, int], convention: Convention, key: str = "bbox") -> Box:
    """A box in pixels of the original image to xyxy relative to it, neither clipped nor rounded.

    A box may reach beyond its image: benchmarks hold such targets and score them as they are. BadRowError for anything
    but four finite numbers with an area; it says where the box is possible under the other convention. ``size`` is
    (height, width), the convention is never guessed, and ``key`` is how a message names the box.
    """
    if not are_numbers(bbox) or not all(abs(value) < 1e9 for value in bbox):
        raise BadRowError(f"{key} {short(bbox)} is not four finite numbers")
    x1, y1, c, d = map(float, bbox)
    x2, y2 = (x1 + c, y1 + d) if convention == "xywh" else (c, d)
    height, width = size
    box = x1 / width, y1 / height, x2 / width, y2 / height
    if box[2] <= box[0] or box[3] <= box[1]:  # the division may round a sliver away
        shown = f"{key} {list(bbox)} ({_CORNERS[convention]})"
        if convention == "xywh":
            raise BadRowError(f"{shown} has no area")
        other = c > 0 and d > 0 and _inside((x1, y1, x1 + c, y1 + d), size)
        raise BadRowError(
            f"{shown} has its corners in the wrong order or no area" + (_probably("xywh") if other else "")
        )
    return box


def box_inside(
    bbox: Any, size: tuple[int, int], convention: Convention, key: str = "bbox", slack: tuple[float, float] = (1.0, 1.0)
) -> Box:
    """``relative_box`` of a file of one's own, where a box that leaves its image is a BadRowError, too.

    ``slack`` is how far outside is taken for rounding, down and to the right.
    """
    box = relative_box(bbox, size, convention, key)
    shown = f"{key} {list(bbox)} ({_CORNERS[convention]})"
    if why := _leaves(box, size, slack):
        raise BadRowError(f"{shown} {why}")
    if max(box[0], 0) >= min(box[2], 1) or max(box[1], 0) >= min(box[3], 1):
        raise BadRowError(f"{shown} has no area inside the image")
    return box


def looks_misdeclared(box: Box, size: tuple[int, int]) -> str | None:
    """What is odd about a relative xyxy box that leaves its image by more than a pixel; None for another.

    A few such boxes are targets that reach beyond their images; many mean a file in another convention or frame.
    """
    why = _leaves(box, size, (1.0, 1.0))
    return why and f"xyxy {[round(value, 2) for value in _in_pixels(box, size)]} {why}"


def image_size(row: Any, height: str = "height", width: str = "width") -> tuple[int, int]:
    """(height, width) in pixels from two keys of a row; BadRowError where they are not an image's."""
    h, w = integer(row, height), integer(row, width)
    if not (0 < h < 2**31 and 0 < w < 2**31):
        raise BadRowError(f"height {h} and width {w} are not an image's")
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
        raise BadRowError(f"{key} {name!r} is not a path inside the folder of the images; its separator is /, not \\")
    if path.is_absolute() or not path.parts or ".." in path.parts or "\0" in name or PureWindowsPath(name).drive:
        raise BadRowError(f"{key} {name!r} is not a path inside the folder of the images")
    return name


def integer(row: Any, key: str) -> int:
    """A whole number from 0 (no bool); else BadRowError."""
    value = row.get(key) if isinstance(row, dict) else None
    if type(value) is not int or not 0 <= value < 2**63:  # bool is an int, and is no id
        raise BadRowError(f"{key} is {short(value)}, not a whole number from 0")
    return value


def flag(row: Any, key: str) -> bool:
    """True or false, also written as 1 or 0 (as whole numbers or as floats); else BadRowError."""
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, int | float) or value not in (0, 1):
        raise BadRowError(f"{key} is {short(value)}, not true or false (1 or 0)")
    return bool(value)


def text(row: Any, key: str) -> str:
    """A text that is not blank and is valid Unicode; else BadRowError."""
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise BadRowError(f"{key} is {short(value)}, not a text")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise BadRowError(f"{key} is {value!r}, which is not valid Unicode")
    return value


def parsed(value: str | bytes, key: str) -> Any:
    """The value of a JSON text; else BadRowError."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"{key} is {short(value)}, not whole JSON ({error})") from error


def short(value: Any) -> str:
    """``repr``, cut to a line."""
    try:
        return _REPR.repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return f"<{type(value).__name__} with thousands of digits>"


def closest(word: Any, valid: Iterable[str]) -> str:
    """`` (did you mean ...?)`` for a word that is nearly a valid one; else nothing."""
    # What is long is no slip of the pen, and comparing it would take memory of many times its size.
    found = difflib.get_close_matches(str(word)[:100].lower(), valid, n=1) if len(str(word)) <= 100 else []
    return f" (did you mean {found[0]!r}?)" if found else ""


def json_lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """(number from 1, line) of each line that is not blank, without a byte order mark; None for one that is too long.

    Raises:
        OSError: for a file that cannot be read.
    """
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(1 << 20)
                yield number, None
            elif line := (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip():
                yield number, line


def read_json(path: Path, remedy: str) -> Any:
    """A whole JSON file; DataError with the file and the remedy where it is missing or broken."""
    with reading(path, remedy, DataError, "not whole JSON"):
        return json.loads(path.read_bytes())


def _inside(box: Box, size: tuple[int, int], slack: tuple[float, float] = (1.0, 1.0)) -> bool:
    """Whether xyxy (px) lies in an image of (height, width), up to the slack."""
    (x1, y1, x2, y2), (height, width), (down, right) = box, size, slack
    return x1 >= -right and y1 >= -down and x2 <= width + right and y2 <= height + down


def _in_pixels(box: Box, size: tuple[int, int]) -> Box:
    height, width = size
    return box[0] * width, box[1] * height, box[2] * width, box[3] * height


def _leaves(box: Box, size: tuple[int, int], slack: tuple[float, float]) -> str | None:
    """That a box leaves its image, and how it would not: with sides swapped, or its width and height as a corner."""
    x1, y1, x2, y2 = _in_pixels(box, size)
    if _inside((x1, y1, x2, y2), size, slack):
        return None
    why = f"leaves the image, which is {size[1]} wide and {size[0]} high"
    if _inside((x1, y1, x2, y2), (size[1], size[0]), slack):
        return f"{why} (are width and height swapped?)"
    fits = _inside((x1, y1, x2 - x1, y2 - y1), size, slack) and x2 - x1 > x1 and y2 - y1 > y1
    return why + (_probably("xyxy") if fits else "")


def _probably(convention: Convention) -> str:
    return f"; it would fit as {convention} ({_CORNERS[convention]}): is the declared convention wrong?"
