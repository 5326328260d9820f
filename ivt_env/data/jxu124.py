"""RefCOCO, RefCOCO+ and RefCOCOg as the Hub data sets of jxu124: annotations only, all splits.

Boxes are the column ``bbox``: **xyxy**, floats in pixels of the image as stored. The JSON in ``raw_anns`` holds the
same box as **xywh**, and each row is compared with it: where the two disagree by more than 1e-4 pixels, the whole
file is refused, because then nobody can say in which convention it is. (Public code exists that takes ``bbox`` for
xywh.)

A row is an object with one or more sentences. A file's split is the beginning of its name (``SPLITS``); a row that
states another split is a bad row. The files know the objects that somebody described, not the others of an image,
and categories by COCO's number alone: ``siblings`` are empty and ``meta`` has ``category_id``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial as bound
from pathlib import Path
from typing import Any, TypeGuard

from ivt_env.data import checked, hub, refcoco
from ivt_env.data.checked import BadRowError, BadRows, short
from ivt_env.data.sample import DataError
from ivt_env.data.table import Row, Source

SPLITS = {
    "refcocog": {"train": "train", "val": "validation", "test": "test"},
    "refcoco": {"train": "train", "val": "validation", "testA": "test", "testB": "testB"},
    "refcocoplus": {"train": "train", "val": "validation", "testA": "test", "testB": "testB"},
}
"""Data set name (also its folder) -> split -> how the names of its files begin."""

PLACES: dict[str, tuple[str, ...]] = {name: (f"jxu124/{name}/data/*.parquet",) for name in SPLITS}
"""Data set name -> what is looked for under the root."""

_TOLERANCE = 1e-4  # px, between a box and its other form: what float64 -> text -> float64 may lose, and more
_STATED = {"val": ("val", "validation"), "testA": ("testA", "test")}
"""Split -> what its rows may say, where that is not only the split itself."""


_COLUMNS = (
    "ref_id", "ann_id", "image_id", "category_id", "split", "sent_ids", "sentences", "bbox", "raw_anns",
    "raw_image_info",
)  # fmt: skip


def find(root: Path, name: str) -> Source | None:
    """The data set in this layout, if a file of it is under ``root`` (it may be broken); else None.

    ``sample_id`` is ``"<ref_id>-<sent_id>"`` and ``image_id`` ``"coco-<image_id>"``, as in the
    REFER layout, so that the two can be compared sample for sample.
    """
    folder = root / "jxu124" / name
    found = hub.shards(folder / "data") if name in SPLITS else {}
    files = {split: found[prefix] for split, prefix in SPLITS.get(name, {}).items() if prefix in found}
    remedy = f"download the Hub data set jxu124/{name} again (`ivt data fetch jxu124`)"
    read = bound(_read, files, remedy)
    return refcoco.source(root, name, "jxu124", folder, files, read, remedy, boxes_proven=True)


def _read(files: Mapping[str, Sequence[Path]], remedy: str, bad: BadRows, _folder: Path) -> Iterator[Row]:
    for path, number, held in hub.split_rows(files, bad, _COLUMNS, remedy):
        _refuse_other_convention(held, f"{path}: row {number}", remedy)
        check = bound(_object, held, str(bad.split))
        yield from checked.per_sentence(bad, f"{number} of {path.name}", held["sentences"], check, bound(_said, held))


def _said(held: dict[str, Any], _number: int, sentence: Any) -> tuple[str, str]:
    return f"{held['ref_id']}-{checked.integer(sentence, 'sent_id')}", checked.text(sentence, "sent").strip()


def _object(held: dict[str, Any], split: str) -> Callable[..., Row]:
    """Check a row and the JSON in it; what its sentences share."""
    ids = {key: checked.integer(held, key) for key in ("ann_id", "ref_id", "image_id", "category_id")}
    here = f"ref_id {ids['ref_id']}"
    if held["split"] not in _STATED.get(split, (split,)):
        raise BadRowError(f"{here}: says split {short(held['split'])} in a file of {split}")
    if not isinstance(held["sentences"], list) or not held["sentences"]:
        raise BadRowError(f"{here}: has no sentences")
    stated = [checked.integer(sentence, "sent_id") for sentence in held["sentences"]]
    if held["sent_ids"] != stated:
        raise BadRowError(f"{here}: sent_ids {short(held['sent_ids'])}, but its sentences have {short(stated)}")
    annotation, image = _json(held, "raw_anns"), _json(held, "raw_image_info")
    for which, of, key, expected in (
        ("raw_anns", annotation, "id", ids["ann_id"]),
        ("raw_anns", annotation, "image_id", ids["image_id"]),
        ("raw_anns", annotation, "category_id", ids["category_id"]),
        ("raw_image_info", image, "id", ids["image_id"]),
    ):
        if checked.integer(of, key) != expected:
            raise BadRowError(f"{here}: {key} in {which} is {of[key]}, and {expected} in the row itself")
    if not _four_numbers(annotation.get("bbox")):  # the convention of the row's box is then unproved
        raise BadRowError(f"{here}: bbox in raw_anns is {short(annotation.get('bbox'))}, not four finite numbers")
    file_name = checked.plain_file_name(checked.text(image, "file_name"))
    refcoco.coco_image_id(file_name, ids["image_id"])
    size = checked.image_size(image)
    box = checked.relative_box(held["bbox"], size, "xyxy")
    return bound(
        Row, split=split, image_id=f"coco-{ids['image_id']}", file_name=file_name, size=size, box=box, meta=ids
    )


def _refuse_other_convention(held: dict[str, Any], where: str, remedy: str) -> None:
    """DataError where both forms of the box can be read and are not the same box."""
    try:
        xywh = _json(held, "raw_anns").get("bbox")
    except BadRowError:
        return  # _object says so
    bbox = held["bbox"]
    if not (_four_numbers(bbox) and _four_numbers(xywh)):
        return
    x, y, w, h = xywh
    if _differ(bbox, (x, y, x + w, y + h)):
        guess = "" if _differ(bbox, xywh) else ": bbox is probably xywh too, and this is another edition of the file"
        raise DataError(
            f"{where}: bbox {bbox} should be xyxy, but does not fit the bbox {xywh} (xywh) in its raw_anns{guess}. "
            f"None of the boxes of this file can be trusted; {remedy}"
        )


def _differ(a: Sequence[float], b: Sequence[float]) -> bool:
    return any(abs(one - other) > _TOLERANCE for one, other in zip(a, b, strict=True))


def _four_numbers(value: Any) -> TypeGuard[list[float]]:
    return (
        isinstance(value, list) and len(value) == 4 and all(type(v) in (int, float) and math.isfinite(v) for v in value)
    )


def _json(held: dict[str, Any], key: str) -> dict[str, Any]:
    found = checked.parsed(checked.text(held, key), key)
    if not isinstance(found, dict):
        raise BadRowError(f"{key} is {short(found)}, not a JSON object")
    return found
