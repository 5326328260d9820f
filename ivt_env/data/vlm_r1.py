"""RefCOCO, RefCOCO+ and RefCOCOg as prepared for VLM-R1: annotations only, train and val.

Boxes are **xyxy**, floats in pixels of the image as stored:

- ``.json``, a list of objects: ``solution``. Never ``bbox_list``, whose x2 and y2 are one pixel short.
- ``.jsonl``, one conversation a line: the answer's value, four numbers as a list or as its text. The expression is what
  stands between the fixed prompt and the full stop.

Where both files of a split are there, the ``.json`` is read: it states the size of the image and the object's
number. For ``.jsonl`` the size is read from the image's header, so the images must be there when the data set is
first opened. A row without its image is then a bad row, also later, until the index (``.ivt_index/``) is deleted.

COCO's number of the image is taken from its name, since ``image_id`` is a running number. A file knows neither the
other objects of an image nor the names of categories: ``siblings`` are empty.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial as bound
from pathlib import Path, PurePosixPath
from typing import Any

from ivt_env.data import checked
from ivt_env.data.checked import BadRowError, BadRows, short
from ivt_env.data.images import Headers
from ivt_env.data.refcoco import coco_image_id, source
from ivt_env.data.sample import DataError
from ivt_env.data.table import Row, Source
from ivt_env.failures import reading

LABELS = {"refcocog": "refcocog", "refcoco": "refcoco", "refcocoplus": "refcocop"}
"""Data set name -> how the names of its files begin."""

FOLDER = "vlm_r1/rec_jsons_processed"

PLACES: dict[str, tuple[str, ...]] = {
    name: (f"{FOLDER}/{label}_train.json[l]", f"{FOLDER}/{label}_val.json") for name, label in LABELS.items()
}
"""Data set name -> what is looked for under the root."""

IMAGE_FOLDERS = ("", "vlm_r1", "images/mscoco/images", "images", "coco")
"""Below which of the root's folders ``train2014/`` may lie."""

PROMPT = "Please provide the bounding box coordinate of the region this sentence describes: "

_DATASET_NAMES = {"refcoco": "refcoco", "refcoco+": "refcocoplus", "refcocop": "refcocoplus", "refcocog": "refcocog"}
"""``dataset_name`` of a row -> data set name."""
_REMEDY = "unpack rec_jsons_processed.zip of the Hub data set omlab/VLM-R1 again (`ivt data fetch vlm_r1`)"


def find(root: Path, name: str) -> Source | None:
    """The data set in this layout, if a file of it is under ``root`` (it may be broken); else None.

    ``image_id`` is ``"coco-<image_id>"`` with COCO's number. From ``.json``, ``sample_id`` is
    ``"<ann_id>-<running number>"`` as in MDETR's layout, from which these files were made, and
    ``meta`` holds ``ann_id``, ``image_id`` (COCO's) and ``category_id``. From ``.jsonl``,
    ``sample_id`` is the line's ``id`` and ``meta`` holds ``image_id`` alone.
    """
    if name not in LABELS:
        return None
    folder = root / FOLDER
    files: dict[str, list[Path]] = {}
    for split, ending in (("train", ".json"), ("train", ".jsonl"), ("val", ".json")):
        path = folder / f"{LABELS[name]}_{split}{ending}"
        if split not in files and path.is_file():
            files[split] = [path]
    image_folders = [root / below for below in IMAGE_FOLDERS]
    remedy = _REMEDY
    if any(path.suffix == ".jsonl" for paths in files.values() for path in paths):
        remedy += ", or, where images are missing, unpack COCO's train2014.zip"
    read = bound(_read, files, name, image_folders)
    return source(root, name, "vlm_r1", folder, files, read, remedy, image_folders=image_folders)


def _read(
    files: Mapping[str, Sequence[Path]], name: str, image_folders: Sequence[Path], bad: BadRows, _folder: Path
) -> Iterator[Row]:
    """One row per object of the list, or per line."""
    headers = Headers(image_folders)
    for split, (path,) in files.items():
        bad.split = split
        if path.suffix == ".jsonl":
            yield from checked.usable(bad, path.name, _lines(path), bound(_conversation, split=split, headers=headers))
            continue
        content = checked.read_json(path, _REMEDY)
        if not isinstance(content, list):
            raise DataError(f"{path}: holds {short(content)}, not a list of objects; {_REMEDY}")
        yield from checked.usable(bad, path.name, enumerate(content), bound(_record, split=split, name=name))


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The values of a JSONL file, numbered from 0; blank lines are counted and skipped."""
    with reading(path, _REMEDY, DataError, "not whole JSON"):
        for number, line in checked.json_lines(path):
            try:
                yield number - 1, checked.parsed(line or b"", f"row {number - 1}")
            except BadRowError as error:  # not one bad row of many: what follows a line that is cut off is missing
                raise DataError(f"{path}: {error}, perhaps the file is only half there; {_REMEDY}") from error


def _record(entry: dict[str, Any], split: str, name: str) -> Row:
    """A row of ``.json``."""
    ann_id, running = checked.integer(entry, "original_id"), checked.integer(entry, "image_id")
    stated = entry.get("dataset_name")
    if isinstance(stated, str) and _DATASET_NAMES.get(stated, name) != name:
        raise BadRowError(f"dataset_name is {stated!r} in a file of {name}")
    file_name, image_id = _image(entry)
    size = checked.image_size(entry)
    return Row(
        split=split,
        sample_id=f"{ann_id}-{running}",
        image_id=f"coco-{image_id}",
        file_name=file_name,
        size=size,
        expression=checked.text(entry, "normal_caption").strip(),
        box=checked.relative_box(entry.get("solution"), size, "xyxy", "solution"),
        meta={"ann_id": ann_id, "image_id": image_id, "category_id": checked.integer(entry, "category_id")},
    )


def _conversation(entry: dict[str, Any], split: str, headers: Headers) -> Row:
    """A row of ``.jsonl``."""
    row_id = entry.get("id")
    if not isinstance(row_id, str) or not row_id.strip():
        row_id = str(checked.integer(entry, "id"))
    file_name, image_id = _image(entry)
    turns: Any = entry.get("conversations")
    is_chat = isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)
    if not is_chat or [turn.get("from") for turn in turns] != ["human", "gpt"]:
        raise BadRowError(f"conversations is {short(turns)}, not one turn of human and one of gpt")
    asked = checked.text(turns[0], "value").strip()
    found = re.fullmatch(rf"(?:<image>)?\s*{re.escape(PROMPT)}(.*)\.", asked, re.DOTALL)
    if found is None:
        raise BadRowError(f"the human's value is {short(asked)}, not '<image>{PROMPT}...'")
    answer = turns[1].get("value")
    if isinstance(answer, str):
        answer = checked.parsed(answer, "the answer")
    size = headers.of(file_name)[1].stored
    return Row(
        split=split,
        sample_id=row_id,
        image_id=f"coco-{image_id}",
        file_name=file_name,
        size=size,
        expression=checked.text({"expression": found[1]}, "expression").strip(),
        box=checked.relative_box(answer, size, "xyxy", "the answer"),
        meta={"image_id": image_id},
    )


def _image(entry: dict[str, Any]) -> tuple[str, int]:
    """The path of the image below a folder of images, and COCO's number of it."""
    path = checked.relative_path(checked.text(entry, "image"))
    return path, coco_image_id(PurePosixPath(path).name)
