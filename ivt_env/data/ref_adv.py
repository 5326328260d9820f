"""Ref-Adv-s (arXiv 2602.23898; Hub: dddraxxx/ref-adv-s), a test set of 1,142 hard expressions.

The file calls its split ``train``; it is a test set, and is served as ``test`` and nothing else.

``solution`` is **xyxy**, floats in pixels of the image as stored; one row is one expression. The images are embedded:
the bytes of each are written out once, as they are. ``distractors`` is a count written as a string (objects of the
target's class, 2 or more); the set has no boxes of them. Rows share images and even boxes, so confidence intervals must
be clustered by ``image_id``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from functools import partial as bound
from itertools import count
from pathlib import Path
from typing import Any

from ivt_env.data import checked, hub
from ivt_env.data.checked import BadRowError, BadRows, short
from ivt_env.data.sample import DataError
from ivt_env.data.table import Row, Source

PLACES = {"refadv": ("refadv/*.parquet", "refadv/data/*.parquet")}
"""Data set name -> what is looked for under the root."""

PUBLISHED_COUNTS = {"test": 1_142}
COLUMNS = (
    "image", "file_name", "normal_caption", "solution", "width", "height", "image_source", "human_authored",
    "use_negation", "distractors",
)  # fmt: skip

_REMEDY = "fetch the Parquet file of dddraxxx/ref-adv-s again"
_COCO_FILE = re.compile(r"(?:COCO_val20\d\d_)?(\d{12})\.\w+")


def find(root: Path, name: str) -> Source | None:
    """The data set, if its folder is under ``root`` (it may be broken); else None.

    ``sample_id`` is the row's number from 0 (``row_idx`` where the file has that column),
    ``image_id`` is ``coco-<number>`` for an image of COCO and ``oi-<name>`` for one of Open
    Images, there are no siblings, and ``meta`` holds ``distractors`` (a whole number),
    ``use_negation``, ``human_authored`` and ``image_source``.
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
        image_folders=(),
        remedy=_REMEDY,
        image_remedy=f"it was written out of the Parquet file: delete the folder {folder / '.ivt_index'} and open "
        "the data set again",
        published=PUBLISHED_COUNTS,
        embedded=True,
    )


def _read(paths: Sequence[Path], bad: BadRows, folder: Path) -> Iterator[Row]:
    images = hub.EmbeddedImages(folder / "images")
    bad.split = "test"
    running = count()
    for path in paths:
        rows = hub.parquet_rows(path, COLUMNS, _REMEDY, 16, ["row_idx"])
        numbered = ((number, {"row_idx": next(running)} | values) for number, values in rows)
        yield from checked.usable(bad, path.name, numbered, bound(_row, images=images))


def _row(values: dict[str, Any], images: hub.EmbeddedImages) -> Row:
    sample_id = str(checked.integer(values, "row_idx"))
    file_name, source = checked.plain_file_name(checked.text(values, "file_name")), checked.text(values, "image_source")
    size = checked.image_size(values)
    box = checked.relative_box(values["solution"], size, "xyxy", "solution")
    expression = checked.text(values, "normal_caption").strip()
    meta = {
        "distractors": _count(values["distractors"]),
        "use_negation": checked.flag(values, "use_negation"),
        "human_authored": checked.flag(values, "human_authored"),
        "image_source": source,
    }
    coco = _COCO_FILE.fullmatch(file_name) if source.startswith("coco") else None
    image_id = f"coco-{int(coco[1])}" if coco else f"oi-{Path(file_name).stem}"
    header = images.put(values["image"], image_id, file_name)
    if why := header.misfit(size):
        raise BadRowError(f"{file_name}: {why}")
    return Row("test", sample_id, image_id, file_name, size, expression, box, (), meta)


def _count(value: Any) -> int:
    """The number of distractors: a number, a list of them, or either of these as JSON in a string."""
    found = value
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(value)
    if isinstance(found, list):
        return len(found)
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    if type(found) is not int or not 0 <= found < 10**6:
        raise BadRowError(f"distractors is {short(value)}, neither a number nor a list")
    return found
