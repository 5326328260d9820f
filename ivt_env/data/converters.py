"""From other tools' files to a data set of one's own (``ivt_env.data.custom``).

``from_coco`` reads a COCO file (**xywh**, pixels of the image as stored), ``export`` any opened table
(``ivt_env.data.label_studio`` reads Label Studio's exports). COCO's boxes are written as they are; what they
are is declared in the ``dataset.json`` that is written with them.

What cannot be used is left out, counted and logged; too much of it is an error. Nothing is
overwritten.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial as bound
from pathlib import Path, PurePosixPath
from typing import Any

from ivt_env.data import checked
from ivt_env.data.checked import BadRowError, BadRows
from ivt_env.data.custom import Declared
from ivt_env.data.custom_writer import Converted, Splits, Writer, same_image
from ivt_env.data.images import Headers
from ivt_env.data.sample import DataError
from ivt_env.data.table import Table

CATEGORY_NAME = "category name"
"""As ``expression_key`` of ``from_coco``: the expression is the category's name."""

_COCO_FILE = re.compile(r"(?:COCO_[a-z]+\d{4}_)?(\d{12})\.\w+")


def from_coco(
    annotations: str | os.PathLike[str],
    image_folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    name: str,
    expression_key: str = "caption",
    split: Splits = "train",
    seed: int = 0,
    copy: bool = False,
) -> Converted:
    """Convert a COCO annotation file whose annotations have boxes and expressions.

    Every annotation with an expression becomes a line; the siblings are the other annotations of its
    category in its image. An annotation without the key is an object that nobody asks for: it is a
    sibling only. Crowds (``iscrowd`` 1) are siblings only, too.

    Args:
        annotations: the JSON file with ``images``, ``annotations`` and ``categories``.
        image_folder: the folder that the ``file_name`` of the images are in.
        out: the folder to write; it must not hold a data set.
        name: the label of the data set.
        expression_key: the key of an annotation that holds its expression (a text, or a list of
            several). ``CATEGORY_NAME``: the name of its category, for those objects only that are
            alone of their category in their image, so that the name says which is meant.
        split: one split for all, or the share of the images in each.
        seed: of the drawing, where there are shares.
        copy: whether images are copied; else they are linked.
    """
    source, folder = Path(annotations), Path(image_folder)
    remedy = "correct the file, or export it again"
    writer = Writer(Path(out), Declared(name, "xywh", "px"), copy)
    content = checked.read_json(source, remedy)
    if isinstance(content, list) and content and isinstance(content[0], dict) and "score" in content[0]:
        raise DataError(
            f"{source}: is a list of detections (results in COCO's form), which have no expressions; give an "
            "annotation file whose annotations have them"
        )
    checked.lists_in(content, source, ("images", "annotations", "categories"), remedy)
    images = _coco_images(source, content["images"])
    categories = checked.by_id(content["categories"])
    if expression_key != CATEGORY_NAME and not any(
        isinstance(entry, dict) and entry.get(expression_key) is not None for entry in content["annotations"]
    ):
        keys = sorted({key for entry in content["annotations"] if isinstance(entry, dict) for key in entry})
        raise DataError(
            f"{source}: no annotation has the key {expression_key!r} (they have {', '.join(keys) or 'none'}); name the "
            "key that holds the expression"
        )
    bad = BadRows(str(source), remedy)
    notes: dict[str, int] = defaultdict(int)
    headers = Headers([folder])
    objects: dict[int, _CocoObject] = {}
    of_class: dict[tuple[int, int], list[_CocoObject]] = defaultdict(list)
    check = bound(_coco_object, images, categories, headers, expression_key, objects)
    for found in checked.usable(bad, "the annotations", enumerate(content["annotations"]), check):
        objects[found.id] = found
        of_class[found.image_id, found.category_id].append(found)
    for found in objects.values():
        siblings = [other.bbox for other in of_class[found.image_id, found.category_id] if other is not found]
        if found.is_crowd:
            notes["crowds are not targets"] += 1
        elif expression_key == CATEGORY_NAME and siblings:
            notes["objects that share their category with another in the image are not targets"] += 1
        elif not found.expressions:
            notes["objects without an expression are not targets"] += 1
        else:
            image = images[found.image_id]["file_name"]
            coco = _COCO_FILE.fullmatch(PurePosixPath(image).name)
            # Named as COCO names its own: leaks can be found.
            image_id = f"coco-{found.image_id}" if coco and int(coco[1]) == found.image_id else None
            writer.add(
                str(found.id), found.expressions, image, folder / image, found.size, found.bbox, siblings=siblings,
                category=found.category, image_id=image_id,
                meta={"image_id": found.image_id, "annotation_id": found.id},
            )  # fmt: skip
    bad.remedy = headers.remedy() or bad.remedy
    bad.check(len(content["annotations"]))
    return writer.write(split, seed, bad, notes, remedy)


@dataclass(frozen=True, slots=True)
class _CocoObject:
    id: int
    image_id: int
    category_id: int
    category: str
    bbox: list[float]
    """As the file has it: xywh, pixels."""
    size: tuple[int, int]
    is_crowd: bool
    expressions: list[str]


def _coco_images(source: Path, entries: list[Any]) -> dict[int, Any]:
    images = checked.by_id(entries)
    first: dict[str, int] = {}
    for image_id, entry in images.items():
        name = entry.get("file_name")
        if isinstance(name, str) and first.setdefault(str(PurePosixPath(name)), image_id) != image_id:
            raise DataError(
                f"{source}: images {first[str(PurePosixPath(name))]} and {image_id} are both {name!r}, so siblings "
                "would be missed (MDETR's files are so, and have a reader of their own); give each image one entry"
            )
    return images


def _coco_object(
    images: dict[int, Any], categories: dict[int, Any], headers: Headers, expression_key: str,
    known: Collection[int], entry: dict[str, Any],
) -> _CocoObject:  # fmt: skip
    number, image_id, category_id = (checked.integer(entry, key) for key in ("id", "image_id", "category_id"))
    if number in known:
        raise BadRowError(f"the annotation id {number} occurs twice")
    if image_id not in images:
        raise BadRowError(f"image_id {image_id} is not in 'images'")
    image = images[image_id]
    size = checked.image_size(image)
    path, header = headers.of(checked.relative_path(checked.text(image, "file_name"), "file_name"))
    if why := header.misfit(size):
        raise BadRowError(f"{path}: {why}")
    checked.box_inside(entry.get("bbox"), size, "xywh")
    if category_id not in categories:
        raise BadRowError(f"category_id {category_id} is not in 'categories'")
    category = checked.text(categories[category_id], "name")
    said = category if expression_key == CATEGORY_NAME else entry.get(expression_key)
    said = [] if said is None else said if isinstance(said, list) else [said]
    expressions = [checked.text({expression_key: one}, expression_key).strip() for one in said]
    crowd = entry.get("iscrowd", 0) in (1, True)
    return _CocoObject(number, image_id, category_id, category, entry["bbox"], size, crowd, expressions)


def export(
    table: Table, out: str | os.PathLike[str], name: str, split: str | None = None, copy: bool = True
) -> Converted:
    """Write an opened table as a data set of one's own; call it once for each split.

    Boxes are written relative to the image (xyxy), to the last bit, also where they reach beyond it. Ids of
    samples and images, siblings and ``meta`` are kept.

    Args:
        table: what ``load_dataset`` or ``open_table`` gave.
        out: the folder to write; it may hold other splits of the same export.
        name: the label of the data set; not that of a known one, even if it is a copy of that.
        split: ``train``, ``val`` or ``test``; None is that of the table.
        copy: whether images are copied; else they are linked, by a relative path.
    """
    split = table.split if split is None else split
    folder = Path(out)
    writer = Writer(folder, Declared(name, "xyxy", "relative", overhang=True), copy, add_split=split)
    file_of: dict[str, str] = {}
    taken: set[str] = set()
    for index in range(len(table)):
        sample = table[index]
        path = table.image_path(sample)
        if sample.image_id not in file_of:
            file_of[sample.image_id] = _free_name(path, folder / "images", taken)
        writer.add(
            sample.sample_id, [sample.expression], file_of[sample.image_id], path, sample.size, sample.box,
            image_id=sample.image_id, siblings=[list(box) for box in sample.siblings], meta=dict(sample.meta),
        )  # fmt: skip
    return writer.write(split, 0, BadRows(str(folder), ""), {}, "open a split that holds some")


def _free_name(path: Path, images: Path, taken: set[str]) -> str:
    """The image's own name, or numbered where another image has it."""
    for number in range(1, 10**6):
        name = path.name if number == 1 else f"{path.stem}-{number}{path.suffix}"
        there = images / name
        if name not in taken and (not os.path.lexists(there) or same_image(path, there)):
            taken.add(name)
            return name
    raise DataError(f"{images}: no free name for {path}")
