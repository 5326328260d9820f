"""Ref-Adv-s (arXiv 2602.23898; Hub: dddraxxx/ref-adv-s), a test set of 1,142 hard expressions.

Under a root::

    refadv/train-00000-of-00001.parquet     (or in refadv/data/)

The file calls its split ``train``; it is a test set, and is served as ``test`` and nothing else.

``solution`` is **xyxy**, floats in pixels of the picture as stored; one row is one expression. The
pictures are embedded: the bytes of each are written out once, as they are. ``distractors`` is a
count written as a string (objects of the target's class, 2 or more); the set has no boxes of them.
Rows share pictures and even boxes, so confidence intervals must be clustered by ``picture_id``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial as bound
from pathlib import Path
from typing import Any

from ivt_env.data.checked import (
    BadRowError,
    BadRows,
    flag,
    integer,
    picture_size,
    plain_file_name,
    relative_box,
    short,
    text,
)
from ivt_env.data.parquet_rows import parquet_rows, parquet_schema, require_columns
from ivt_env.data.pictures import Header, read_header
from ivt_env.data.sample import DataError
from ivt_env.data.table import Row, Source
from ivt_env.files import write_whole

PLACES = {"refadv": ("refadv/*.parquet", "refadv/data/*.parquet")}
"""Data set name -> what is looked for under the root."""

PUBLISHED_COUNTS = {"test": 1_142}
COLUMNS = (
    "image", "file_name", "normal_caption", "solution", "width", "height", "image_source", "human_authored",
    "use_negation", "distractors",
)  # fmt: skip
ROWS_IN_MEMORY = 16

_REMEDY = "fetch the Parquet file of dddraxxx/ref-adv-s again"
_COCO_FILE = re.compile(r"(?:COCO_val20\d\d_)?(\d{12})\.\w+")


def find(root: Path, name: str) -> Source | None:
    """The data set, if its folder is under ``root`` (it may be broken); else None.

    ``sample_id`` is the row's number from 0 (``row_idx`` where the file has that column),
    ``picture_id`` is ``coco-<number>`` for a picture of COCO and ``oi-<name>`` for one of Open
    Images, there are no siblings, and ``meta`` holds ``distractors`` (a whole number),
    ``use_negation``, ``human_authored`` and ``image_source``.

    Raises:
        DataError: where there are Parquet files in both places.
    """
    folder = root / "refadv"
    if name != "refadv" or not os.path.lexists(folder):
        return None
    here, below = (sorted(place.glob("*.parquet")) for place in (folder, folder / "data"))
    if here and below:
        raise DataError(
            f"{folder}: Parquet files here ({here[0].name}) and in data/ ({below[0].name}), so every expression "
            "may be there twice; keep one of the two"
        )
    paths = tuple(here or below) or (folder / "*.parquet",)  # the latter is then said to be missing
    return Source(
        name="refadv",
        layout="ref-adv",
        folder=folder,
        files=paths,
        splits=("test",),
        read=bound(_read, paths),
        picture_folders=(),
        remedy=_REMEDY,
        picture_remedy=f"it was written out of the Parquet file: delete the folder {folder / '.ivt_index'} and open "
        "the data set again",
        published=PUBLISHED_COUNTS,
        embedded=True,
    )


@dataclass(frozen=True, slots=True)
class _Written:
    file_name: str
    digest: bytes
    header: Header
    place: str


def _read(paths: Sequence[Path], bad: BadRows, folder: Path) -> Iterator[Row]:
    written: dict[str, _Written] = {}
    bad.split = "test"
    total = 0
    for path in paths:
        names = parquet_schema(path, _REMEDY).names
        require_columns(path, parquet_schema(path, _REMEDY), COLUMNS, _REMEDY)
        columns = COLUMNS + ("row_idx",) * ("row_idx" in names)
        for number, values in parquet_rows(path, columns, _REMEDY, ROWS_IN_MEMORY):
            try:
                sample_id = integer(values, "row_idx") if "row_idx" in values else total
                row = _row(values, str(sample_id), f"{path} row {number}", folder / "pictures", written)
            except BadRowError as error:
                bad.add(f"{number} of {path.name}", error)
            else:
                yield row
            total += 1


def _row(values: dict[str, Any], sample_id: str, place: str, pictures: Path, written: dict[str, _Written]) -> Row:
    file_name, source = plain_file_name(text(values, "file_name")), text(values, "image_source")
    size = picture_size(values)
    box = relative_box(values["solution"], size, "xyxy", "solution")
    expression = text(values, "normal_caption").strip()
    meta = {
        "distractors": _count(values["distractors"]),
        "use_negation": flag(values, "use_negation"),
        "human_authored": flag(values, "human_authored"),
        "image_source": source,
    }
    picture_id = _picture_id(file_name, source)
    header = _write_out(values["image"], file_name, picture_id, place, pictures, written)
    if not header.fits(size):
        raise BadRowError(
            f"{file_name} is {header.stored[1]} wide and {header.stored[0]} high, but the row says "
            f"{size[1]} wide and {size[0]} high, so the box would be wrong"
        )
    return Row("test", sample_id, picture_id, file_name, size, expression, box, (), meta)


def _picture_id(file_name: str, source: str) -> str:
    coco = _COCO_FILE.fullmatch(file_name) if source.startswith("coco") else None
    return f"coco-{int(coco[1])}" if coco else f"oi-{Path(file_name).stem}"


def _write_out(
    image: Any, file_name: str, picture_id: str, place: str, pictures: Path, written: dict[str, _Written]
) -> Header:
    """Write the row's picture unless that is done; its header."""
    content = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(content, bytes) or not content:
        raise BadRowError(
            f"image holds {short(content)}, not the bytes of a picture (a file that holds only paths is of no use)"
        )
    digest = hashlib.sha256(content).digest()
    known = written.get(picture_id)
    if known is None:
        header = read_header(content, f"image {file_name}")
        _write(pictures / file_name, content)
        known = written[picture_id] = _Written(file_name, digest, header, place)
    elif (known.file_name, known.digest) != (file_name, digest):
        # No telling which of the two a box belongs to, so this is no matter of one bad row.
        raise DataError(
            f"{place}: its picture {file_name!r} is another than that of {known.place} ({known.file_name!r}), and "
            f"both are {picture_id}; {_REMEDY}"
        )
    return known.header


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; one that is there with this content is left alone."""
    try:
        if path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content:
            return
        write_whole(path, content, sync=False)
    except OSError as error:
        raise DataError(
            f"{path}: the picture cannot be written ({error.strerror}); free some space (255 MB in all), or make the "
            "folder writable"
        ) from error


def _count(value: Any) -> int:
    """The number of distractors: a number, a list of them, or either of these as JSON in a string."""
    found = value
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except (ValueError, RecursionError) as error:
            raise BadRowError(f"distractors is {short(value)}, neither a number nor a list") from error
    if isinstance(found, list):
        return len(found)
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    if type(found) is not int or not 0 <= found < 10**6:
        raise BadRowError(f"distractors is {short(value)}, neither a number nor a list")
    return found
