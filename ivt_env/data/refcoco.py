"""What the layouts of RefCOCO, RefCOCO+ and RefCOCOg share: counts, COCO's images, and how a source is put together."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ivt_env.data.checked import BadRowError
from ivt_env.data.table import Read, Source

PUBLISHED = {
    "refcocog": {"train": 80_512, "val": 4_896, "test": 9_602},
    "refcoco": {"train": 120_624, "val": 10_834, "testA": 5_657, "testB": 5_095},
    "refcocoplus": {"train": 120_191, "val": 10_758, "testA": 5_726, "testB": 4_889},
}
"""Data set name -> split (of umd for RefCOCOg, of unc for the other two) -> number of expressions."""

IMAGE_FOLDERS = ("images/mscoco/images/train2014", "images/train2014", "train2014", "coco/train2014")
"""Where COCO's train2014 images may lie under the root."""

IMAGE_REMEDY = "unpack COCO's train2014.zip there (it holds 82,783 images)"


def source(
    root: Path, name: str, layout: str, folder: Path, files: Mapping[str, Sequence[Path]], read: Read, remedy: str,
    **more: Any,
) -> Source | None:  # fmt: skip
    """The source of the splits whose files are there; None where none is. ``more`` are other fields of ``Source``."""
    if not files:
        return None
    fields: dict[str, Any] = {
        "image_folders": [root / below for below in IMAGE_FOLDERS],
        "image_remedy": IMAGE_REMEDY,
        "published": PUBLISHED[name],
    }
    paths = [path for of_split in files.values() for path in of_split]
    return Source(name, layout, folder, paths, tuple(files), read, remedy=remedy, **(fields | more))


def coco_image_id(file_name: str, stated: int | None = None) -> int:
    """581857 of ``COCO_train2014_000000581857.jpg`` (or ``..._16.jpg``); BadRowError for another name or number."""
    found = re.fullmatch(r"COCO_train2014_([0-9]{12})(?:_[0-9]+)?\.jpg", file_name)
    if found is None:
        raise BadRowError(f"file name {file_name!r} is not that of a COCO train2014 image")
    if stated not in (None, int(found[1])):
        raise BadRowError(f"its image is called {file_name!r}, but its id is {stated}")
    return int(found[1])
