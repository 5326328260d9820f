"""What the readers of Parquet files from the Hub share: columns by specification, shards, images inside.

A reader states its columns (``Columns``): which there must be, and what they hold. A file is refused by name where
it lacks one or holds another type; ``typed_rows`` then gives plain Python values, a few rows at a time.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ivt_env.data.checked import BadRowError, BadRows, short
from ivt_env.data.images import Header, read_header
from ivt_env.data.sample import DataError
from ivt_env.files import write_whole

Columns = Mapping[str, tuple[str, Callable[[Any], bool]]]
"""Column -> what it holds, in words, and whether an Arrow type is that."""


def is_text(kind: Any) -> bool:
    """Whether an Arrow type is one of text, also where each text is written once and numbered."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def is_list_of(inner: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Test for Arrow types: a list, whose values pass ``inner``."""

    def test(kind: Any) -> bool:
        listed = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        return listed and inner(kind.value_type)

    return test


def _is_binary(kind: Any) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_image(kind: Any) -> bool:
    return _is_binary(kind) or (
        pa.types.is_struct(kind) and any(field.name == "bytes" and _is_binary(field.type) for field in kind)
    )


def _is_number(kind: Any) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind)


INTEGER = ("whole numbers", pa.types.is_integer)
TEXT = ("texts", is_text)
NUMBER = ("numbers", _is_number)
FLAG = ("true and false (or 1 and 0)", lambda kind: pa.types.is_boolean(kind) or _is_number(kind))
NUMBERS = ("lists of numbers", is_list_of(_is_number))
BOX = ("lists of floating-point numbers", is_list_of(pa.types.is_floating))
IMAGE = ("images (binary, or a struct with binary bytes)", _is_image)

_BUFFER = 2**20  # bytes per column


def shards(folder: Path) -> dict[str, list[Path]]:
    """The Parquet files of a folder by the word that their names begin with (the split)."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.glob("*.parquet")) if folder.is_dir() else ():
        # At once "train.parquet" and "train-00000-of-00001-<hash>.parquet"; not "._train..." (macOS).
        named = re.match(r"[A-Za-z]+", path.name)
        if named:
            found[named[0]].append(path)
    return dict(found)


def split_rows(
    files: Mapping[str, Sequence[Path]], bad: BadRows, columns: Columns, remedy: str, rows_at_once: int = 1024
) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """(file, number from 0, row) of each row of all splits; ``bad.split`` is that of the row.

    Raises:
        DataError: as ``typed_rows``, and where a part of a split is missing or there twice, as the names tell.
    """
    for split, paths in files.items():
        bad.split = split
        _check_parts(paths, remedy)
        for path in paths:
            for number, row in typed_rows(path, columns, remedy, rows_at_once):
                yield path, number, row


def _check_parts(paths: Sequence[Path], remedy: str) -> None:
    """Whether the parts of a split (``-00000-of-00002``) are there, each once."""
    found = [re.search(r"-([0-9]{5})-of-([0-9]{5})", path.name) for path in paths]
    parts = [(int(part[1]), int(part[2])) for part in found if part]
    if len(paths) == 1 and not parts:
        return
    numbers, counts = {number for number, _ in parts}, {count for _, count in parts}
    if len(numbers) != len(paths) or len(counts) != 1:
        raise DataError(
            f"{paths[0]}: a second edition of this split lies beside it ({', '.join(p.name for p in paths)}), and "
            f"its rows would be read twice; delete all of them and {remedy}"
        )
    missing = sorted(set(range(counts.pop())) - numbers)
    if missing:
        raise DataError(f"{paths[0]}: of its split, part {missing[0]} (counted from 0) is not there; {remedy}")


def typed_rows(
    path: Path, columns: Columns, remedy: str, rows_at_once: int = 1024, optional: Columns | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 0, row) of each row of a Parquet file, as plain Python values; ``rows_at_once`` are in memory.

    ``optional`` columns are read where the file has them. A file that is cut off or damaged, lacks a column, or holds
    another type in one is a DataError with the remedy.
    """
    names = check_columns(path, columns, remedy, optional)
    number = 0
    try:
        # Pre-buffering, and reading without a buffer, would hold all images of a row group at once.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER) as file:
            for batch in file.iter_batches(rows_at_once, columns=names, use_threads=False):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise _unreadable(path, error, remedy, f" after row {number - 1}" if number else "") from error


def check_columns(path: Path, columns: Columns, remedy: str, optional: Columns | None = None) -> list[str]:
    """The names of the columns to read; DataError as ``typed_rows`` raises it."""
    try:
        schema = pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error, remedy) from error
    missing = [name for name in columns if name not in schema.names]
    if missing:
        raise DataError(
            f"{path}: has no column {', '.join(map(repr, missing))} (it has {', '.join(schema.names)[:500]}); {remedy}"
        )
    wanted = {**columns, **{name: held for name, held in (optional or {}).items() if name in schema.names}}
    for name, (what, fits) in wanted.items():
        if not fits(schema.field(name).type):
            raise DataError(f"{path}: column {name!r} is {str(schema.field(name).type)[:200]}, not {what}; {remedy}")
    return list(wanted)


def _unreadable(path: Path, error: Exception, remedy: str, place: str = "") -> DataError:
    return DataError(f"{path}: not a whole Parquet file{place} ({str(error).splitlines()[0]}); {remedy}")


class EmbeddedImages:
    """The images inside Parquet files: each is written out once, byte for byte."""

    def __init__(self, folder: Path) -> None:
        """``folder``: where they go; made with the first."""
        self._folder = folder
        self._known: dict[str, tuple[str, bytes, Header]] = {}

    def put(self, image: Any, image_id: str, file_name: str) -> Header:
        """Write a row's image unless that is done; its header.

        BadRowError for a row without an image, with one that cannot be read, or with another than an earlier row.
        """
        content = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(content, bytes) or not content:
            raise BadRowError(f"the image is not in the file (image is {short(image)})")
        digest = hashlib.sha256(content).digest()
        known = self._known.get(image_id)
        if known is None:
            header = read_header(content, f"image {file_name}")
            path = self._folder / file_name
            try:
                if not (path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content):
                    write_whole(path, content, sync=False)
            except OSError as error:
                raise DataError(
                    f"{path}: the image cannot be written ({error.strerror}); make room on that disk, or make the "
                    "folder writable, and open the data set again"
                ) from error
            known = self._known[image_id] = file_name, digest, header
        elif known[:2] != (file_name, digest):
            raise BadRowError(f"holds another image than an earlier row with {image_id}")
        return known[2]
