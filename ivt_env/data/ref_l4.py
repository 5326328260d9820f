"""Ref-L4 (arXiv 2406.16866; Hub: JierunChen/Ref-L4), a benchmark: there is no train split.

``bbox`` is **xywh**, float64 in pixels of the image as stored; one row is one expression. Nothing is clipped and
nothing dropped: some targets begin outside their images, and the benchmark's evaluator scores them as they are.
``bbox_area`` is compared with width times height, which tells xywh from xyxy: where more than a hundredth of the
rows disagree, the files are refused. ``all`` is val and test together, on which the benchmark's published numbers
are.

About half of the images are those of the RefCOCO sets' val and test. Their ``image_id`` is the same here and there
(``coco-128974``), so that such leaks can be found before training.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import partial as bound
from pathlib import Path
from typing import Any

from ivt_env.data import checked, hub
from ivt_env.data.checked import BadRowError, BadRows, short
from ivt_env.data.table import Row, Source

SPLITS = ("val", "test")
FILES = tuple(f"ref-l4-{split}.parquet" for split in SPLITS)
PLACES = {"refl4": tuple(f"refl4/{file}" for file in FILES)}
"""Data set name -> what is looked for under the root."""

PUBLISHED_COUNTS = {"val": 13_420, "test": 31_921}
COLUMNS = (
    "id", "caption", "bbox", "bbox_area", "bbox_id", "ori_category_id", "image_id", "height", "width", "file_name",
    "is_rewrite", "split",
)  # fmt: skip
AREA_TOLERANCE = 0.01
"""By what share ``bbox_area`` may differ from width times height (or by 2 square pixels)."""

_REMEDY = (
    "fetch the Parquet files of JierunChen/Ref-L4 again, at the newest revision (an old one has ann_id in the place of "
    "id, and no published prediction agrees with it)"
)
_IMAGE_ID = re.compile(r"(coco|o365)_(\d+)")
_LAST_NUMBER = re.compile(r"(\d+)\.[^.]+$")


def find(root: Path, name: str) -> Source | None:
    """The data set, if its folder is under ``root`` (it may be broken); else None.

    ``sample_id`` is the file's ``id``, ``image_id`` is ``coco-<number>`` or ``o365-<number>``,
    there are no siblings, and ``meta`` holds ``id``, ``category`` (``ori_category_id``),
    ``bbox_id``, ``is_rewrite`` and ``source`` (``coco`` or ``o365``).
    """
    folder = root / "refl4"
    if name != "refl4" or not os.path.lexists(folder):
        return None
    images = folder / "images"
    paths = {split: folder / file for split, file in zip(SPLITS, FILES, strict=True)}
    return Source(
        name="refl4",
        layout="ref-l4",
        folder=folder,
        files=tuple(paths.values()),
        splits=SPLITS,
        unions={"all": SPLITS},
        read=bound(_read, paths),
        # Those below it, too, where an archive with a prefix puts its files.
        image_folders=[images, *sorted(path for path in images.glob("*") if path.is_dir())],
        remedy=_REMEDY,
        image_remedy="unpack Ref-L4's images.tar.gz there",
        published=PUBLISHED_COUNTS,
        may_share_images=True,  # there is no train split to leak into
        boxes_proven=True,
    )


def _read(paths: dict[str, Path], bad: BadRows, _folder: Path) -> Iterator[Row]:
    seen: dict[Any, Any] = {}
    for split, path in paths.items():
        bad.split = split
        rows = ((n, values | {"": f"{path.name} row {n}"}) for n, values in hub.parquet_rows(path, COLUMNS, _REMEDY))
        yield from checked.usable(bad, path.name, rows, bound(_row, split, seen, bad))


def _row(split: str, seen: dict[Any, Any], bad: BadRows, values: dict[str, Any]) -> Row:
    """Check a row; ``seen`` holds the place of each id, and the file and size of each image."""
    sample_id, place = checked.integer(values, "id"), values[""]
    if values["split"] != split:
        raise BadRowError(f"id {sample_id}: split is {short(values['split'])} in the file of {split}")
    source, number = _image_of(values)
    size, file_name = checked.image_size(values), checked.plain_file_name(checked.text(values, "file_name"))
    box, image_id = checked.relative_box(values["bbox"], size, "xywh"), f"{source}-{number}"
    expression = checked.text(values, "caption").strip()
    meta = {
        "id": sample_id,
        "category": checked.text(values, "ori_category_id"),
        "bbox_id": checked.text(values, "bbox_id"),
        "is_rewrite": checked.flag(values, "is_rewrite"),
        "source": source,
    }
    if (first := seen.setdefault(sample_id, place)) != place:
        raise BadRowError(f"id {sample_id} is also that of {first}")
    if (image := seen.setdefault(image_id, (file_name, size))) != (file_name, size):
        raise BadRowError(f"id {sample_id}: image {(file_name, size)} is {image} in a row before")
    if why := _area_misfit(values):
        bad.suspicions.append(f"{place}: id {sample_id}: {why}")
    return Row(split, str(sample_id), image_id, file_name, size, expression, box, meta=meta)


def _image_of(values: dict[str, Any]) -> tuple[str, int]:
    """``coco`` or ``o365``, and the image's number there; both names of the image must agree."""
    image_id, file_name = checked.text(values, "image_id"), checked.text(values, "file_name")
    found = _IMAGE_ID.fullmatch(image_id)
    if found is None:
        raise BadRowError(f"image_id is {short(image_id)}, not like 'coco_128974' or 'o365_922765'")
    number = _LAST_NUMBER.search(file_name)
    if number is None or int(number[1]) != int(found[2]):
        raise BadRowError(f"image_id {image_id!r} and file_name {file_name!r} name different images")
    return found[1], int(found[2])


def _area_misfit(values: dict[str, Any]) -> str | None:
    """Corners taken for xywh often give a valid box too, but not its area."""
    stated, bbox = values["bbox_area"], values["bbox"]
    area = bbox[2] * bbox[3]
    if isinstance(stated, int | float) and abs(stated - area) <= max(2.0, AREA_TOLERANCE * area):
        return None
    corners = max(bbox[2] - bbox[0], 0) * max(bbox[3] - bbox[1], 0)
    other = isinstance(stated, int | float) and abs(stated - corners) <= max(2.0, AREA_TOLERANCE * corners)
    return f"bbox_area is {short(stated)}, but bbox {bbox} (x, y, width, height) has {area:g}" + (
        "; it would fit as x1, y1, x2, y2: is the file of another revision?" if other else ""
    )
