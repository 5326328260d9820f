"""RefCOCO, RefCOCO+ and RefCOCOg as others have prepared them; REFER's own files are read by ``ivt_env.data.refer``.

docs/data/layouts.md compares the layouts. Boxes are in pixels of the image as stored, and ``image_id`` is
``"coco-<COCO's number>"``, as everywhere.

- ``jxu124`` (Hub): an object a row. ``bbox`` is **xyxy**; the JSON in ``raw_anns`` holds the same box as **xywh**, and
  where the two disagree by more than 1e-4 pixels the whole file is refused, because nobody can say then in which
  convention it is. ``sample_id`` is ``"<ref_id>-<sent_id>"``.
- ``vlm_r1``: **xyxy**. ``.json`` is a list of objects whose box is ``solution`` (never ``bbox_list``, which is a pixel
  short); ``sample_id`` is ``"<ann_id>-<running number>"``. ``.jsonl``, read where there is no ``.json``, has one
  conversation a line, whose answer is four numbers as a list or as its text; ``sample_id`` is the line's ``id``. The
  size is read from the image's header: a row without its image is a bad row, also later, until the index is deleted.
- ``mdetr``: **xywh**, COCO's form with one image entry and one annotation for each *expression*. ``id`` and
  ``image_id`` are running numbers, COCO's own are ``original_id``; ``sample_id`` is ``"<ann_id>-<running number>"``.
- ``lmms`` (Hub, images inside, evaluation only): an object a row, its expressions the list ``answer``; ``sample_id`` is
  ``"<ann_id>-<number of the answer>"``. ``bbox`` is **xywh** as float32. Each number is taken as the shortest decimal
  that float32 stands for: the annotators' file says so, and the box is the same to the last bit as in the other
  layouts. Only ``LMMS_SPLITS`` are served: val of RefCOCO and of RefCOCOg mix in 5,000 rows of google, whose images are
  in the train splits of unc and umd, and nothing in the file tells which; test of RefCOCO is google's, too.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial as bound
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

import numpy as np

from ivt_env.data import checked, hub
from ivt_env.data.checked import BadRowError, BadRows, short
from ivt_env.data.images import Headers
from ivt_env.data.sample import DataError
from ivt_env.data.table import Read, Row, Source
from ivt_env.failures import reading

PUBLISHED = {
    "refcocog": {"train": 80_512, "val": 4_896, "test": 9_602},
    "refcoco": {"train": 120_624, "val": 10_834, "testA": 5_657, "testB": 5_095},
    "refcocoplus": {"train": 120_191, "val": 10_758, "testA": 5_726, "testB": 4_889},
}
"""Data set name -> split (of umd for RefCOCOg, of unc for the other two) -> number of expressions."""

IMAGE_FOLDERS = ("images/mscoco/images/train2014", "images/train2014", "train2014", "coco/train2014")
"""Where COCO's train2014 images may lie under the root."""
VLM_R1_IMAGE_FOLDERS = ("", "vlm_r1", "images/mscoco/images", "images", "coco")
"""Below which of the root's folders ``train2014/`` may lie, as VLM-R1 names the images."""
IMAGE_REMEDY = "unpack COCO's train2014.zip there (it holds 82,783 images)"

PREFIXES = {"train": "train", "val": "validation", "testA": "test", "test": "test", "testB": "testB"}
"""Split -> how the names of jxu124's files begin, and what their rows may say instead of the split."""
LMMS_FOLDERS = {"refcocog": "RefCOCOg", "refcoco": "RefCOCO", "refcocoplus": "RefCOCOplus"}
LMMS_SPLITS = {"refcocog": ("test",), "refcoco": ("testA", "testB"), "refcocoplus": ("val", "testA", "testB")}
MDETR_LABELS = {"refcocog": "refcocog", "refcoco": "refcoco", "refcocoplus": "refcoco+"}
VLM_R1_LABELS = {"refcocog": "refcocog", "refcoco": "refcoco", "refcocoplus": "refcocop"}
_VLM_R1_NAMES = {"refcoco": "refcoco", "refcoco+": "refcocoplus", "refcocop": "refcocoplus", "refcocog": "refcocog"}
"""``dataset_name`` of a row -> data set name."""
VLM_R1_FOLDER = "vlm_r1/rec_jsons_processed"
PLACES = {
    name: (
        f"jxu124/{name}/data/*.parquet",
        f"{VLM_R1_FOLDER}/{VLM_R1_LABELS[name]}_train.json[l]",
        f"{VLM_R1_FOLDER}/{VLM_R1_LABELS[name]}_val.json",
        f"mdetr/finetune_{MDETR_LABELS[name]}_*.json",
        *(f"lmms/{LMMS_FOLDERS[name]}/data/{split}-*.parquet" for split in LMMS_SPLITS[name]),
    )
    for name in PUBLISHED
}
"""Data set name -> what is looked for under the root."""

PROMPT = "Please provide the bounding box coordinate of the region this sentence describes: "

_TOLERANCE = 1e-4  # px, between a box and its other form: what float64 -> text -> float64 may lose, and more
_JXU124_COLUMNS = (
    "ref_id", "ann_id", "image_id", "category_id", "split", "sent_ids", "sentences", "bbox", "raw_anns",
    "raw_image_info",
)  # fmt: skip
LMMS_COLUMNS = ("question_id", "image", "answer", "bbox", "file_name")
LMMS_ROWS_AT_ONCE = 16  # of about 150 kB each
_MDETR_REMEDY = (
    "unpack mdetr_annotations.tar.gz (zenodo.org/record/4729015) again, and download it anew if that does not "
    "help (`ivt data fetch mdetr`)"
)
_VLM_R1_REMEDY = "unpack rec_jsons_processed.zip of the Hub data set omlab/VLM-R1 again (`ivt data fetch vlm_r1`)"

Files = Mapping[str, Sequence[Path]]
"""Split -> its files."""


def jxu124(root: Path, name: str) -> Source | None:
    """The data set in this layout, if a file of it is under ``root`` (it may be broken); else None."""
    folder = root / "jxu124" / name
    found = hub.shards(folder / "data")
    files = {split: found[PREFIXES[split]] for split in PUBLISHED.get(name, ()) if PREFIXES[split] in found}
    remedy = f"download the Hub data set jxu124/{name} again (`ivt data fetch jxu124`)"
    return _source(root, name, "jxu124", folder, files, bound(_read_jxu124, files, remedy), remedy, boxes_proven=True)


def vlm_r1(root: Path, name: str) -> Source | None:
    """As ``jxu124``, with the splits train and val."""
    files: dict[str, list[Path]] = {}
    for split, ending in (("train", ".json"), ("train", ".jsonl"), ("val", ".json")):
        path = root / VLM_R1_FOLDER / f"{VLM_R1_LABELS.get(name)}_{split}{ending}"
        if split not in files and path.is_file():
            files[split] = [path]
    folders = [root / below for below in VLM_R1_IMAGE_FOLDERS]
    remedy = _VLM_R1_REMEDY
    if any(path.suffix == ".jsonl" for paths in files.values() for path in paths):
        remedy += ", or, where images are missing, unpack COCO's train2014.zip"
    read = bound(_read_vlm_r1, files, name, folders)
    return _source(root, name, "vlm_r1", root / VLM_R1_FOLDER, files, read, remedy, image_folders=folders)


def mdetr(root: Path, name: str) -> Source | None:
    """As ``jxu124``."""
    folder, label = root / "mdetr", MDETR_LABELS.get(name, "")
    named = {split: folder / f"finetune_{label}_{split}.json" for split in PUBLISHED.get(name, ())}
    files = {split: [path] for split, path in named.items() if path.is_file()}
    return _source(root, name, "mdetr", folder, files, bound(_read_mdetr, files, label), _MDETR_REMEDY)


def lmms(root: Path, name: str) -> Source | None:
    """As ``jxu124``, with ``LMMS_SPLITS``."""
    label = LMMS_FOLDERS.get(name, "")
    folder = root / "lmms" / label
    found = hub.shards(folder / "data")
    files = {split: found[split] for split in LMMS_SPLITS.get(name, ()) if split in found}
    remedy = f"download the Hub data set lmms-lab-encoder/{label} again (`ivt data fetch lmms`)"
    image_remedy = f"delete {name}-lmms.arrow beside that folder and open the data set again, which writes it out"
    return _source(
        root, name, "lmms", folder, files, bound(_read_lmms, files, name, remedy), remedy,
        image_folders=(), image_remedy=image_remedy, embedded=True,
    )  # fmt: skip


def _source(
    root: Path, name: str, layout: str, folder: Path, files: Files, read: Read, remedy: str, **more: Any
) -> Source | None:
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


def _coco_image_id(file_name: str, stated: int | None = None) -> int:
    """581857 of ``COCO_train2014_000000581857.jpg`` (or ``..._16.jpg``); BadRowError for another name or number."""
    found = re.fullmatch(r"COCO_train2014_([0-9]{12})(?:_[0-9]+)?\.jpg", file_name)
    if found is None:
        raise BadRowError(f"file name {file_name!r} is not that of a COCO train2014 image")
    if stated not in (None, int(found[1])):
        raise BadRowError(f"its image is called {file_name!r}, but its id is {stated}")
    return int(found[1])


# --- jxu124 ---------------------------------------------------------------------------------------


def _read_jxu124(files: Files, remedy: str, bad: BadRows, _folder: Path) -> Iterator[Row]:
    for path, number, held in hub.split_rows(files, bad, _JXU124_COLUMNS, remedy):
        check = bound(_jxu124_object, held, str(bad.split), f"{path}: row {number}", remedy)
        yield from checked.per_sentence(bad, f"{number} of {path.name}", held["sentences"], check, bound(said, held))


def said(held: dict[str, Any], _number: int, sentence: Any) -> tuple[str, str]:
    """``sample_id`` and expression of a sentence of jxu124's, and of REFER's, which they were made from."""
    return f"{held['ref_id']}-{checked.integer(sentence, 'sent_id')}", checked.text(sentence, "sent").strip()


def _jxu124_object(held: dict[str, Any], split: str, where: str, remedy: str) -> Callable[..., Row]:
    """Check a row and the JSON in it; what its sentences share."""
    annotation, image = _json(held, "raw_anns"), _json(held, "raw_image_info")
    bbox, xywh = held["bbox"], annotation.get("bbox")
    if not _four_numbers(xywh):  # the convention of the row's box is then unproved
        raise BadRowError(f"bbox in raw_anns is {short(xywh)}, not four finite numbers")
    if _four_numbers(bbox) and _differ(bbox, (*xywh[:2], xywh[0] + xywh[2], xywh[1] + xywh[3])):
        guess = "" if _differ(bbox, xywh) else ": bbox is probably xywh too, and this is another edition of the file"
        raise DataError(
            f"{where}: bbox {bbox} should be xyxy, but does not fit the bbox {xywh} (xywh) in its raw_anns{guess}. "
            f"None of the boxes of this file can be trusted; {remedy}"
        )
    ids = {key: checked.integer(held, key) for key in ("ann_id", "ref_id", "image_id", "category_id")}
    here = f"ref_id {ids['ref_id']}"
    if held["split"] not in (split, PREFIXES[split]):
        raise BadRowError(f"{here}: says split {short(held['split'])} in a file of {split}")
    checked.sentence_ids(held, here)
    for which, of, key, expected in (
        ("raw_anns", annotation, "id", ids["ann_id"]),
        ("raw_anns", annotation, "image_id", ids["image_id"]),
        ("raw_anns", annotation, "category_id", ids["category_id"]),
        ("raw_image_info", image, "id", ids["image_id"]),
    ):
        if checked.integer(of, key) != expected:
            raise BadRowError(f"{here}: {key} in {which} is {of[key]}, and {expected} in the row itself")
    file_name = checked.plain_file_name(checked.text(image, "file_name"))
    image_id, size = f"coco-{_coco_image_id(file_name, ids['image_id'])}", checked.image_size(image)
    box = checked.relative_box(bbox, size, "xyxy")
    return bound(Row, split=split, image_id=image_id, file_name=file_name, size=size, box=box, meta=ids)


def _differ(a: Sequence[float], b: Sequence[float]) -> bool:
    return any(abs(one - other) > _TOLERANCE for one, other in zip(a, b, strict=True))


def _four_numbers(value: Any) -> TypeGuard[list[float]]:
    return checked.are_numbers(value) and all(map(math.isfinite, value))


def _json(held: dict[str, Any], key: str) -> dict[str, Any]:
    found = checked.parsed(checked.text(held, key), key)
    if not isinstance(found, dict):
        raise BadRowError(f"{key} is {short(found)}, not a JSON object")
    return found


# --- lmms -----------------------------------------------------------------------------------------


def _read_lmms(files: Files, name: str, remedy: str, bad: BadRows, folder: Path) -> Iterator[Row]:
    """One row per answer; the images of good rows are written out."""
    images = hub.EmbeddedImages(folder / "images")
    for path, number, held in hub.split_rows(files, bad, LMMS_COLUMNS, remedy, LMMS_ROWS_AT_ONCE):
        check = bound(_lmms_object, held, name, str(bad.split), images)
        here, answers = f"{number} of {path.name}", held["answer"]
        yield from checked.per_sentence(bad, here, answers, check, bound(_answered, held))


def _answered(held: dict[str, Any], number: int, answer: Any) -> tuple[str, str]:
    return f"{int(held['question_id'])}-{number}", checked.text({"answer": answer}, "answer").strip()


def _lmms_object(held: dict[str, Any], name: str, split: str, images: hub.EmbeddedImages) -> Callable[..., Row]:
    """Check a row and write its image out; what its expressions share."""
    question_id = checked.text(held, "question_id")
    file_name = checked.plain_file_name(checked.text(held, "file_name"))
    if not re.fullmatch("[0-9]{1,18}", question_id):
        raise BadRowError(f"question_id is {question_id!r}, not the number of an annotation")
    image_id = _coco_image_id(file_name)
    # RefCOCOg's names end in the annotation's number, those of the other two in a small running number.
    if name == "refcocog" and not file_name.endswith(f"_{question_id}.jpg"):
        raise BadRowError(f"question_id {question_id}: file_name {file_name!r} is of another annotation")
    named = f"coco-{image_id}", f"COCO_train2014_{image_id:012d}.jpg"
    size = images.put(held["image"], *named).stored
    bbox = held["bbox"]
    box = checked.relative_box(list(map(_as_written, bbox)) if isinstance(bbox, list) else bbox, size, "xywh")
    meta = {"ann_id": int(question_id), "image_id": image_id}
    return bound(Row, split=split, image_id=named[0], file_name=named[1], size=size, box=box, meta=meta)


def _as_written(value: Any) -> Any:
    """The shortest decimal that the same float32 stands for; a value that is no float32 stays."""
    if not isinstance(value, float) or not abs(value) < 1e9:
        return value
    narrow = np.float32(value)
    return float(str(narrow)) if float(narrow) == value else value


# --- MDETR ----------------------------------------------------------------------------------------


def _read_mdetr(files: Files, label: str, bad: BadRows, _folder: Path) -> Iterator[Row]:
    """One row per image entry."""
    for split, (path,) in files.items():
        bad.split = split
        content = checked.read_json(path, _MDETR_REMEDY)
        checked.lists_in(content, path, ("images", "annotations"), _MDETR_REMEDY)
        listed = content.get("categories")
        categories = checked.by_id(listed if isinstance(listed, list) else ())
        annotations: dict[int, list[dict[str, Any]]] = defaultdict(list)
        entries = enumerate(content["annotations"])
        for image_id, entry in checked.usable(bad, f"the annotations of {path.name}", entries, _with_image_id):
            annotations[image_id].append(entry)
        check = bound(_mdetr_expression, annotations=annotations, categories=categories, label=label, split=split)
        yield from checked.usable(bad, f"the images of {path.name}", enumerate(content["images"]), check)
        held = {image["id"] for image in content["images"] if isinstance(image, dict) and type(image.get("id")) is int}
        for image_id in annotations.keys() - held:
            bad.add(f"of the annotations of {path.name}", f"there is no image with their image_id {image_id}")


def _with_image_id(annotation: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    return checked.integer(annotation, "image_id"), annotation


def _mdetr_expression(
    image: Any, annotations: Mapping[int, list[dict[str, Any]]], categories: Mapping[int, Any], label: str, split: str
) -> Row:
    """Check an image entry and its annotation."""
    running = checked.integer(image, "id")
    here = f"image id {running}"
    own = annotations.get(running, [])
    if len(own) != 1:
        raise BadRowError(f"{here}: has {len(own)} annotations, not one")
    if image.get("dataset_name") != label:
        raise BadRowError(f"{here}: dataset_name is {short(image.get('dataset_name'))}, not {label!r}")
    meta: dict[str, Any] = {"ann_id": checked.integer(own[0], "original_id")}
    meta |= {"image_id": checked.integer(image, "original_id"), "category_id": checked.integer(own[0], "category_id")}
    with contextlib.suppress(BadRowError):  # a missing category name does no harm
        meta["category"] = checked.text(categories.get(meta["category_id"]), "name")
    file_name = checked.plain_file_name(checked.text(image, "file_name"))
    image_id, size = _coco_image_id(file_name, meta["image_id"]), checked.image_size(image)
    expression = checked.text(image, "caption").strip()
    box = checked.relative_box(own[0].get("bbox"), size, "xywh")
    return Row(split, f"{meta['ann_id']}-{running}", f"coco-{image_id}", file_name, size, expression, box, meta=meta)


# --- VLM-R1 ---------------------------------------------------------------------------------------


def _read_vlm_r1(files: Files, name: str, folders: Sequence[Path], bad: BadRows, _folder: Path) -> Iterator[Row]:
    """One row per object of the list, or per line."""
    headers = Headers(folders)
    for split, (path,) in files.items():
        bad.split = split
        if path.suffix == ".jsonl":
            yield from checked.usable(bad, path.name, _lines(path), bound(_conversation, split=split, headers=headers))
            continue
        content = checked.read_json(path, _VLM_R1_REMEDY)
        if not isinstance(content, list):
            raise DataError(f"{path}: holds {short(content)}, not a list of objects; {_VLM_R1_REMEDY}")
        yield from checked.usable(bad, path.name, enumerate(content), bound(_record, split=split, name=name))


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The values of a JSONL file, numbered from 0; blank lines are counted and skipped."""
    with reading(path, _VLM_R1_REMEDY, DataError, "not whole JSON"):
        for number, line in checked.json_lines(path):
            try:
                yield number - 1, checked.parsed(line or b"", f"row {number - 1}")
            except BadRowError as error:  # not one bad row of many: what follows a line that is cut off is missing
                raise DataError(f"{path}: {error}, perhaps the file is only half there; {_VLM_R1_REMEDY}") from error


def _record(entry: dict[str, Any], split: str, name: str) -> Row:
    """A row of ``.json``."""
    stated = entry.get("dataset_name")
    if isinstance(stated, str) and _VLM_R1_NAMES.get(stated, name) != name:
        raise BadRowError(f"dataset_name is {stated!r} in a file of {name}")
    file_name = checked.relative_path(checked.text(entry, "image"))
    ann_id, image_id = checked.integer(entry, "original_id"), _coco_image_id(PurePosixPath(file_name).name)
    meta = {"ann_id": ann_id, "image_id": image_id, "category_id": checked.integer(entry, "category_id")}
    sample_id, size = f"{ann_id}-{checked.integer(entry, 'image_id')}", checked.image_size(entry)
    expression = checked.text(entry, "normal_caption").strip()
    box = checked.relative_box(entry.get("solution"), size, "xyxy", "solution")
    return Row(split, sample_id, f"coco-{image_id}", file_name, size, expression, box, meta=meta)


def _conversation(entry: dict[str, Any], split: str, headers: Headers) -> Row:
    """A row of ``.jsonl``; its expression stands between the fixed prompt and the full stop."""
    row_id = entry.get("id")
    if not isinstance(row_id, str) or not row_id.strip():
        row_id = str(checked.integer(entry, "id"))
    file_name = checked.relative_path(checked.text(entry, "image"))
    image_id = _coco_image_id(PurePosixPath(file_name).name)
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
    box = checked.relative_box(answer, size, "xyxy", "the answer")
    expression = checked.text({"expression": found[1]}, "expression").strip()
    return Row(split, row_id, f"coco-{image_id}", file_name, size, expression, box, meta={"image_id": image_id})
