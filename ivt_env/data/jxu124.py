"""RefCOCO, RefCOCO+ and RefCOCOg as the Hub data sets of jxu124: annotations only, all splits.

Under a root::

    jxu124/refcoco/data/train-00000-of-00001-94431d5f4bd5b93f.parquet   (also refcocoplus/, refcocog/)
    images/mscoco/images/train2014/COCO_train2014_000000581857.jpg
    (or the pictures in images/train2014/, train2014/ or coco/train2014/)

Boxes are the column ``bbox``: **xyxy**, floats in pixels of the picture as stored. The JSON in
``raw_anns`` holds the same box as **xywh**, and each row is compared with it: where the two
disagree by more than 1e-4 pixels, the whole file is refused, because then nobody can say in which
convention it is. (Public code exists that takes ``bbox`` for xywh.)

A row is an object with one or more sentences. A file's split is the beginning of its name:
``train``, ``validation`` (val), ``test`` (testA of RefCOCO and RefCOCO+, test of RefCOCOg) and
``testB``; a row that states another split is a bad row. Only splits whose files are there are
served. The files know the objects that somebody described, not the others of a picture, and
categories by COCO's number alone: ``siblings`` are empty and ``meta`` has ``category_id``.

The pieces that readers of such files share (``shards``, ``typed_rows``, ``coco_image_id``) are here too.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial as bound
from pathlib import Path
from typing import Any, TypeGuard

import pyarrow as pa

from ivt_env.data import refer
from ivt_env.data.checked import (
    BadRowError,
    BadRows,
    integer,
    picture_size,
    plain_file_name,
    relative_box,
    short,
    text,
)
from ivt_env.data.parquet_rows import parquet_rows, parquet_schema, require_columns
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

PICTURE_FOLDERS = (*refer.PICTURE_FOLDERS, "coco/train2014")
"""Where COCO's train2014 pictures may lie under the root."""

PICTURE_REMEDY = "unpack COCO's train2014.zip there (it holds 82,783 pictures)"

PUBLISHED = {
    "refcocog": refer.PUBLISHED_COUNTS["refcocog", "umd"],
    "refcoco": refer.PUBLISHED_COUNTS["refcoco", "unc"],
    "refcocoplus": refer.PUBLISHED_COUNTS["refcocoplus", "unc"],
}
"""Data set name -> split -> number of expressions."""

_TOLERANCE = 1e-4  # px, between a box and its other form: what float64 -> text -> float64 may lose, and more
_STATED = {"val": ("val", "validation"), "testA": ("testA", "test")}
"""Split -> what its rows may say, where that is not only the split itself."""

Columns = Mapping[str, tuple[str, Callable[[Any], bool]]]
"""Column -> what it holds, in words, and whether an Arrow type is that."""


def is_text(kind: Any) -> bool:
    """Whether an Arrow type is one of text."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def is_list_of(inner: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Test for Arrow types: a list, whose values pass ``inner``."""

    def test(kind: Any) -> bool:
        listed = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        return listed and inner(kind.value_type)

    return test


def _is_sentence(kind: Any) -> bool:
    fields = {field.name: field.type for field in kind} if pa.types.is_struct(kind) else {}
    return fields.keys() >= {"sent", "sent_id"} and is_text(fields["sent"]) and pa.types.is_integer(fields["sent_id"])


_INTEGER = ("whole numbers", pa.types.is_integer)
_TEXT = ("texts", is_text)
_COLUMNS: Columns = {
    "ref_id": _INTEGER,
    "ann_id": _INTEGER,
    "image_id": _INTEGER,
    "category_id": _INTEGER,
    "split": _TEXT,
    "sent_ids": ("lists of whole numbers", is_list_of(pa.types.is_integer)),
    "sentences": ("lists of structs with sent and sent_id", is_list_of(_is_sentence)),
    "bbox": ("lists of floating-point numbers", is_list_of(pa.types.is_floating)),
    "raw_anns": _TEXT,
    "raw_image_info": _TEXT,
}


def find(root: Path, name: str) -> Source | None:
    """The data set in this layout, if a file of it is under ``root`` (it may be broken); else None.

    ``sample_id`` is ``"<ref_id>-<sent_id>"`` and ``picture_id`` ``"coco-<image_id>"``, as in the
    REFER layout, so that the two can be compared sample for sample.
    """
    folder = root / "jxu124" / name
    found = shards(folder / "data") if name in SPLITS else {}
    files = {split: found[prefix] for split, prefix in SPLITS.get(name, {}).items() if prefix in found}
    if not files:
        return None
    remedy = f"download the Hub data set jxu124/{name} again (`ivt data fetch jxu124`)"
    return Source(
        name=name,
        layout="jxu124",
        folder=folder,
        files=[path for paths in files.values() for path in paths],
        splits=tuple(files),
        read=bound(_read, files, remedy),
        picture_folders=[root / below for below in PICTURE_FOLDERS],
        remedy=remedy,
        picture_remedy=PICTURE_REMEDY,
        published=PUBLISHED[name],
        boxes_proven=True,
    )


def _read(files: Mapping[str, Sequence[Path]], remedy: str, bad: BadRows, _folder: Path) -> Iterator[Row]:
    """One row per sentence."""
    for split, paths in files.items():
        bad.split = split
        check_shards(paths, remedy)
        for path in paths:
            for number, held in typed_rows(path, _COLUMNS, remedy):
                sentences = held["sentences"] or [None]
                here = f"{number} of {path.name}"
                _refuse_other_convention(held, f"{path}: row {number}", remedy)
                try:
                    row_of = _object(held, split)
                except BadRowError as error:
                    bad.add(here, error, len(sentences))
                    continue
                for sentence in sentences:
                    try:
                        sent_id, expression = integer(sentence, "sent_id"), text(sentence, "sent").strip()
                    except BadRowError as error:
                        bad.add(here, error)
                        continue
                    yield row_of(sample_id=f"{held['ref_id']}-{sent_id}", expression=expression)


def _object(held: dict[str, Any], split: str) -> Callable[..., Row]:
    """Check a row and the JSON in it; what its sentences share."""
    ref_id, ann_id = integer(held, "ref_id"), integer(held, "ann_id")
    image_id, category_id = integer(held, "image_id"), integer(held, "category_id")
    here = f"ref_id {ref_id}"
    if held["split"] not in _STATED.get(split, (split,)):
        raise BadRowError(f"{here}: says split {short(held['split'])} in a file of {split}")
    if not held["sentences"]:
        raise BadRowError(f"{here}: has no sentences")
    stated = [sentence["sent_id"] if sentence else None for sentence in held["sentences"]]
    if held["sent_ids"] != stated:
        raise BadRowError(f"{here}: sent_ids {short(held['sent_ids'])}, but its sentences have {short(stated)}")
    annotation, image = _json(held, "raw_anns"), _json(held, "raw_image_info")
    for key, of, expected in (
        ("id", annotation, ann_id),
        ("image_id", annotation, image_id),
        ("category_id", annotation, category_id),
        ("id", image, image_id),
    ):
        if integer(of, key) != expected:
            which = "raw_anns" if of is annotation else "raw_image_info"
            raise BadRowError(f"{here}: {key} in {which} is {of[key]}, and {expected} in the row itself")
    if not _four_numbers(annotation.get("bbox")):  # the convention of the row's box is then unproved
        raise BadRowError(f"{here}: bbox in raw_anns is {short(annotation.get('bbox'))}, not four finite numbers")
    file_name = plain_file_name(text(image, "file_name"))
    if coco_image_id(file_name) != image_id:
        raise BadRowError(f"{here}: its picture is called {file_name!r}, but its image_id is {image_id}")
    size = picture_size(image)
    return bound(
        Row,
        split=split,
        picture_id=f"coco-{image_id}",
        file_name=file_name,
        size=size,
        box=relative_box(held["bbox"], size, "xyxy"),
        meta={"ann_id": ann_id, "ref_id": ref_id, "image_id": image_id, "category_id": category_id},
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
    try:
        found = json.loads(text(held, key))
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"{key} is {short(held[key])}, not whole JSON ({error})") from error
    if not isinstance(found, dict):
        raise BadRowError(f"{key} is {short(found)}, not a JSON object")
    return found


# --- What readers of Hub files share ------------------------------------------------------------


def coco_image_id(file_name: str) -> int:
    """581857 of ``COCO_train2014_000000581857.jpg`` (or ``..._16.jpg``); else BadRowError."""
    found = re.fullmatch(r"COCO_train2014_([0-9]{12})(?:_[0-9]+)?\.jpg", file_name)
    if found is None:
        raise BadRowError(f"file name {file_name!r} is not that of a COCO train2014 picture")
    return int(found[1])


def shards(folder: Path) -> dict[str, list[Path]]:
    """The Parquet files of a folder by the word that their names begin with (the split)."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.glob("*.parquet")) if folder.is_dir() else ():
        # At once "train.parquet" and "train-00000-of-00001-<hash>.parquet"; not "._train..." (macOS).
        named = re.match(r"[A-Za-z]+", path.name)
        if named:
            found[named[0]].append(path)
    return dict(found)


def check_shards(paths: Sequence[Path], remedy: str) -> None:
    """DataError where a part of a split is missing or there twice, as the names (``-00000-of-00002``) tell."""
    numbered = [(path, re.search(r"-([0-9]{5})-of-([0-9]{5})", path.name)) for path in paths]
    if len(paths) == 1 and numbered[0][1] is None:
        return
    parts: dict[int, Path] = {}
    wanted = {int(found[2]) for _, found in numbered if found}
    for path, found in numbered:
        if found is None or len(wanted) != 1 or int(found[1]) in parts:
            raise DataError(
                f"{path}: a second edition of this split lies beside it ({', '.join(p.name for p in paths)}), and "
                f"its rows would be read twice; delete all of them and {remedy}"
            )
        parts[int(found[1])] = path
    missing = sorted(set(range(wanted.pop())) - parts.keys())
    if missing:
        raise DataError(f"{paths[0]}: of its split, part {missing[0]} (counted from 0) is not there; {remedy}")


def typed_rows(
    path: Path, columns: Columns, remedy: str, rows_at_once: int = 1024
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 0, row) of each row of a Parquet file, once its columns hold what they must.

    Args:
        path: the file.
        columns: which columns to read, and what they must hold.
        remedy: what to do where the file is broken, as an imperative without a full stop.
        rows_at_once: how many rows are in memory; few, where each holds a picture.

    Raises:
        DataError: for a file that is cut off or damaged, lacks a column, or holds another type in one.
    """
    schema = parquet_schema(path, remedy)
    require_columns(path, schema, list(columns), remedy)
    for name, (wanted, fits) in columns.items():
        if not fits(schema.field(name).type):
            raise DataError(f"{path}: column {name!r} is {schema.field(name).type}, not {wanted}; {remedy}")
    yield from parquet_rows(path, list(columns), remedy, rows_at_once)
