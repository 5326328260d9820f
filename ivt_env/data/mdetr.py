"""RefCOCO, RefCOCO+ and RefCOCOg as prepared for MDETR: annotations only, all splits.

Boxes are ``annotations[].bbox``: **xywh**, floats in pixels of the image as stored.

The files have COCO's form but one image entry and one annotation for each *expression*: ``id`` of an image and
``image_id`` of an annotation are running numbers, ``original_id`` of an image is COCO's number of the image and
``original_id`` of an annotation COCO's number of the object. A file knows the objects that somebody described, not the
others of an image: ``siblings`` are empty.

(MDETR scores a box as right at GIoU >= 0.5. That is not the IoU >= 0.5 of everybody else.)
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial as bound
from pathlib import Path
from typing import Any

from ivt_env.data import checked
from ivt_env.data.checked import BadRowError, BadRows, short
from ivt_env.data.refcoco import PUBLISHED, coco_image_id, source
from ivt_env.data.table import Row, Source

LABELS = {"refcocog": "refcocog", "refcoco": "refcoco", "refcocoplus": "refcoco+"}
"""Data set name -> what the files call it."""

PLACES: dict[str, tuple[str, ...]] = {name: (f"mdetr/finetune_{label}_*.json",) for name, label in LABELS.items()}
"""Data set name -> what is looked for under the root."""

_REMEDY = (
    "unpack mdetr_annotations.tar.gz (zenodo.org/record/4729015) again, and download it anew if that does not "
    "help (`ivt data fetch mdetr`)"
)


def find(root: Path, name: str) -> Source | None:
    """The data set in this layout, if a file of it is under ``root`` (it may be broken); else None.

    ``sample_id`` is ``"<ann_id>-<running number>"``, ``image_id`` ``"coco-<image_id>"`` with
    COCO's number, and ``meta`` holds ``ann_id`` and ``image_id`` (COCO's), ``category_id`` and
    ``category`` where the file names it.
    """
    if name not in LABELS:
        return None
    folder = root / "mdetr"
    named = {split: folder / f"finetune_{LABELS[name]}_{split}.json" for split in PUBLISHED[name]}
    files = {split: [path] for split, path in named.items() if path.is_file()}
    return source(root, name, "mdetr", folder, files, bound(_read, files, LABELS[name]), _REMEDY)


def _read(files: Mapping[str, Sequence[Path]], label: str, bad: BadRows, _folder: Path) -> Iterator[Row]:
    """One row per image entry."""
    for split, (path,) in files.items():
        bad.split = split
        content = checked.read_json(path, _REMEDY)
        checked.lists_in(content, path, ("images", "annotations"), _REMEDY)
        listed = content.get("categories")
        categories = checked.by_id(listed if isinstance(listed, list) else ())
        annotations: dict[int, list[dict[str, Any]]] = defaultdict(list)
        entries = enumerate(content["annotations"])
        for image_id, entry in checked.usable(bad, f"the annotations of {path.name}", entries, _with_image_id):
            annotations[image_id].append(entry)
        check = bound(_expression, annotations=annotations, categories=categories, label=label, split=split)
        yield from checked.usable(bad, f"the images of {path.name}", enumerate(content["images"]), check)
        held = {image["id"] for image in content["images"] if isinstance(image, dict) and type(image.get("id")) is int}
        for image_id in annotations.keys() - held:
            bad.add(f"of the annotations of {path.name}", f"there is no image with their image_id {image_id}")


def _with_image_id(annotation: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    return checked.integer(annotation, "image_id"), annotation


def _expression(
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
    image_id, ann_id = checked.integer(image, "original_id"), checked.integer(own[0], "original_id")
    category_id = checked.integer(own[0], "category_id")
    file_name = checked.plain_file_name(checked.text(image, "file_name"))
    coco_image_id(file_name, image_id)
    size = checked.image_size(image)
    meta: dict[str, Any] = {"ann_id": ann_id, "image_id": image_id, "category_id": category_id}
    with contextlib.suppress(BadRowError):  # a missing category name does no harm
        meta["category"] = checked.text(categories.get(category_id), "name")
    return Row(
        split=split,
        sample_id=f"{ann_id}-{running}",
        image_id=f"coco-{image_id}",
        file_name=file_name,
        size=size,
        expression=checked.text(image, "caption").strip(),
        box=checked.relative_box(own[0].get("bbox"), size, "xywh"),
        meta=meta,
    )
