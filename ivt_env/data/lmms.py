"""RefCOCO, RefCOCO+ and RefCOCOg as the Hub data sets of lmms-lab: images inside, evaluation only.

Boxes are the column ``bbox``: **xywh**, in pixels of the image as stored, held as float32. Each number is taken as the
shortest decimal that float32 stands for (103.93, not 103.93000030517578): that is what the annotators' file says, and
the box then is the same to the last bit as in the other layouts. A row is an object; its expressions are the list
``answer`` (``question`` only asks a model to describe the object).

Only the splits of ``SPLITS`` are served. val of RefCOCO and of RefCOCOg mix rows of unc and umd with 5,000 of google,
whose images are in the train splits of unc and umd, and nothing in the file tells which rows those are; test of RefCOCO
is google's, too.

The images are written out once, byte for byte, into ``images/`` beside the index, and the size is taken from their
headers (pixels as stored). The files know neither the other objects of an image nor categories.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial as bound
from pathlib import Path
from typing import Any

import numpy as np

from ivt_env.data import hub, refcoco
from ivt_env.data.checked import BadRowError, BadRows, per_sentence, plain_file_name, relative_box, text
from ivt_env.data.table import Row, Source

FOLDERS = {"refcocog": "RefCOCOg", "refcoco": "RefCOCO", "refcocoplus": "RefCOCOplus"}
"""Data set name -> its folder under ``lmms/``."""

SPLITS = {"refcocog": ("test",), "refcoco": ("testA", "testB"), "refcocoplus": ("val", "testA", "testB")}
"""Data set name -> the splits that are served; their files begin with the same word."""

PLACES: dict[str, tuple[str, ...]] = {
    name: tuple(f"lmms/{FOLDERS[name]}/data/{split}-*.parquet" for split in held) for name, held in SPLITS.items()
}
"""Data set name -> what is looked for under the root."""

_ROWS_AT_ONCE = 16  # of about 150 kB each
_COLUMNS = ("question_id", "image", "answer", "bbox", "file_name")


def find(root: Path, name: str) -> Source | None:
    """The data set in this layout, if a file of a served split is under ``root`` (it may be broken); else None.

    ``sample_id`` is ``"<ann_id>-<number of the answer>"``, ``image_id`` ``"coco-<image_id>"``,
    and ``meta`` holds ``ann_id`` and ``image_id``.
    """
    if name not in FOLDERS:
        return None
    folder = root / "lmms" / FOLDERS[name]
    found = hub.shards(folder / "data")
    files = {split: found[split] for split in SPLITS[name] if split in found}
    remedy = f"download the Hub data set lmms-lab-encoder/{FOLDERS[name]} again (`ivt data fetch lmms`)"
    image_remedy = f"delete {name}-lmms.arrow beside that folder and open the data set again, which writes it out"
    return refcoco.source(
        root, name, "lmms", folder, files, bound(_read, files, name, remedy), remedy,
        image_folders=(), image_remedy=image_remedy, embedded=True,
    )  # fmt: skip


def _read(files: Mapping[str, Sequence[Path]], name: str, remedy: str, bad: BadRows, folder: Path) -> Iterator[Row]:
    """One row per answer; the images of good rows are written out."""
    images = hub.EmbeddedImages(folder / "images")
    for path, number, held in hub.split_rows(files, bad, _COLUMNS, remedy, _ROWS_AT_ONCE):
        check = bound(_object, held, name, str(bad.split), images)
        yield from per_sentence(bad, f"{number} of {path.name}", held["answer"], check, bound(_said, held))


def _said(held: dict[str, Any], number: int, answer: Any) -> tuple[str, str]:
    return f"{int(held['question_id'])}-{number}", text({"answer": answer}, "answer").strip()


def _object(held: dict[str, Any], name: str, split: str, images: hub.EmbeddedImages) -> Callable[..., Row]:
    """Check a row and write its image out; what its expressions share."""
    question_id, file_name = text(held, "question_id"), plain_file_name(text(held, "file_name"))
    if not re.fullmatch("[0-9]{1,18}", question_id):
        raise BadRowError(f"question_id is {question_id!r}, not the number of an annotation")
    image_id = refcoco.coco_image_id(file_name)
    # RefCOCOg's names end in the annotation's number, those of the other two in a small running number.
    if name == "refcocog" and not file_name.endswith(f"_{question_id}.jpg"):
        raise BadRowError(f"question_id {question_id}: file_name {file_name!r} is of another annotation")
    named = f"coco-{image_id}", f"COCO_train2014_{image_id:012d}.jpg"
    size = images.put(held["image"], *named).stored
    bbox = held["bbox"]
    box = relative_box(list(map(_as_written, bbox)) if isinstance(bbox, list) else bbox, size, "xywh")
    meta = {"ann_id": int(question_id), "image_id": image_id}
    return bound(Row, split=split, image_id=named[0], file_name=named[1], size=size, box=box, meta=meta)


def _as_written(value: Any) -> Any:
    """The shortest decimal that the same float32 stands for; a value that is no float32 stays."""
    if not isinstance(value, float) or not abs(value) < 1e9:
        return value
    narrow = np.float32(value)
    return float(str(narrow)) if float(narrow) == value else value
