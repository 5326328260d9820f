"""From other tools' files to a data set of one's own (``ivt_env.data.custom``).

``from_coco`` reads a COCO file (**xywh**, pixels of the picture as stored), ``from_label_studio`` a
Label Studio JSON export (x, y, width, height in **percent** of the picture as the browser shows
it), ``export`` any opened table. COCO's boxes are written as they are, percent divided by 100; what
they are is declared in the ``dataset.json`` that is written with them.

What cannot be used is left out, counted and logged; too much of it is an error. Nothing is
overwritten.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from ivt_env.data.checked import (
    BadRowError,
    BadRows,
    integer,
    picture_size,
    read_json,
    relative_box,
    relative_path,
    short,
    text,
)
from ivt_env.data.custom import Declared, boxed
from ivt_env.data.custom_writer import Converted, Splits, Writer, same_picture
from ivt_env.data.pictures import Header, read_header
from ivt_env.data.sample import DataError
from ivt_env.data.table import Table

CATEGORY_NAME = "category name"
"""As ``expression_key`` of ``from_coco``: the expression is the category's name."""

_LABEL_STUDIO_REMEDY = "export the project again, in the format JSON (not JSON-MIN)"
_UPLOADED = re.compile(r"(?:.*/)?data/upload/(?:\d+/)?")
_COCO_FILE = re.compile(r"(?:COCO_[a-z]+\d{4}_)?(\d{12})\.\w+")


def from_coco(
    annotations: str | os.PathLike[str],
    pictures: str | os.PathLike[str],
    out: str | os.PathLike[str],
    name: str,
    expression_key: str = "caption",
    split: Splits = "train",
    seed: int = 0,
    copy: bool = False,
) -> Converted:
    """Convert a COCO annotation file whose annotations have boxes and expressions.

    Every annotation with an expression becomes a line; the siblings are the other annotations of its
    category in its picture. An annotation without the key is an object that nobody asks for: it is a
    sibling only. Crowds (``iscrowd`` 1) are siblings only, too.

    Args:
        annotations: the JSON file with ``images``, ``annotations`` and ``categories``.
        pictures: the folder that the ``file_name`` of the images are in.
        out: the folder to write; it must not hold a data set.
        name: the label of the data set.
        expression_key: the key of an annotation that holds its expression (a text, or a list of
            several). ``CATEGORY_NAME``: the name of its category, for those objects only that are
            alone of their category in their picture, so that the name says which is meant.
        split: one split for all, or the share of the pictures in each.
        seed: of the drawing, where there are shares.
        copy: whether pictures are copied; else they are linked.

    Raises:
        DataError: for files that are missing or broken, too many unusable annotations, an ``out``
            that holds a data set, shares that do not work out, and pictures that cannot be written.
    """
    source, folder = Path(annotations), Path(pictures)
    remedy = "correct the file, or export it again"
    writer = Writer(Path(out), Declared(name, "xywh", "px"), copy)
    content = read_json(source, remedy)
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{source}: has no list {key!r}, so is no COCO annotation file; {remedy}")
    images = _coco_images(source, content["images"])
    categories = {entry["id"]: entry for entry in content["categories"] if isinstance(entry, dict) and "id" in entry}
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
    objects: dict[int, _CocoObject] = {}
    of_class: dict[tuple[int, int], list[int]] = defaultdict(list)
    headers: dict[str, Header | str] = {}
    for number, entry in enumerate(content["annotations"]):
        try:
            found = _coco_object(entry, images, categories, folder, headers, expression_key)
            if found.id in objects:
                raise BadRowError(f"the annotation id {found.id} occurs twice")
        except BadRowError as error:
            bad.add(f"annotations[{number}]", error)
            continue
        objects[found.id] = found
        of_class[found.image_id, found.category_id].append(found.id)
    for found in objects.values():
        others = [objects[other].bbox for other in of_class[found.image_id, found.category_id] if other != found.id]
        expressions = found.expressions
        if found.is_crowd:
            notes["crowds are no targets"] += 1
            continue
        if expression_key == CATEGORY_NAME and others:
            notes["objects that share their category with another in the picture are no targets"] += 1
            continue
        if not expressions:
            notes["objects without an expression are no targets"] += 1
            continue
        image = images[found.image_id]
        for i, expression in enumerate(expressions):
            line = {
                "id": str(found.id) if len(expressions) == 1 else f"{found.id}-{i}",
                "image": image["file_name"],
                "width": image["width"],
                "height": image["height"],
                "expression": expression,
                "bbox": found.bbox,
                "siblings": others,
                "category": found.category,
                "meta": {"image_id": found.image_id, "annotation_id": found.id},
            }
            coco = _COCO_FILE.fullmatch(PurePosixPath(image["file_name"]).name)
            if coco and int(coco[1]) == found.image_id:  # named as COCO names its own: leaks can be found
                line["picture_id"] = f"coco-{found.image_id}"
            writer.add(line, folder / image["file_name"])
    bad.check(len(content["annotations"]))
    return writer.write(split, seed, bad, notes)


@dataclass(frozen=True, slots=True)
class _CocoObject:
    id: int
    image_id: int
    category_id: int
    category: str
    bbox: list[float]
    """As the file has it: xywh, pixels."""
    is_crowd: bool
    expressions: list[str]


def _coco_images(source: Path, entries: list[Any]) -> dict[int, Any]:
    """Images by id. A bad one is kept: it is said where an annotation refers to it."""
    images = {entry["id"]: entry for entry in entries if isinstance(entry, dict) and type(entry.get("id")) is int}
    first: dict[str, int] = {}
    for image_id, entry in images.items():
        name = entry.get("file_name")
        if isinstance(name, str) and first.setdefault(str(PurePosixPath(name)), image_id) != image_id:
            raise DataError(
                f"{source}: images {first[str(PurePosixPath(name))]} and {image_id} are both {name!r}, so siblings "
                "would be missed (MDETR's files are so, and have a reader of their own); give each picture one entry"
            )
    return images


def _coco_object(
    entry: Any,
    images: dict[int, Any],
    categories: dict[int, Any],
    folder: Path,
    headers: dict[str, Header | str],
    expression_key: str,
) -> _CocoObject:
    number, image_id, category_id = integer(entry, "id"), integer(entry, "image_id"), integer(entry, "category_id")
    try:
        if image_id not in images:
            raise BadRowError(f"image_id {image_id} is not in 'images'")
        image = images[image_id]
        size = picture_size(image)
        header = _header(folder, relative_path(text(image, "file_name"), "file_name"), headers)
        if not header.fits(size):
            raise BadRowError(
                f"{folder / image['file_name']}: is {header.stored[1]} wide and {header.stored[0]} high, image "
                f"{image_id} says {size[1]} wide and {size[0]} high, so the box would be wrong; put the original there"
            )
        relative_box(entry.get("bbox"), size, "xywh")
        if category_id not in categories:
            raise BadRowError(f"category_id {category_id} is not in 'categories'")
        category = text(categories[category_id], "name")
        if expression_key == CATEGORY_NAME:
            expressions = [category]
        else:
            held = entry.get(expression_key)
            held = [] if held is None else held if isinstance(held, list) else [held]
            expressions = [text({expression_key: one}, expression_key).strip() for one in held]
    except BadRowError as error:
        raise BadRowError(f"annotation {number}: {error}") from error
    crowd = entry.get("iscrowd", 0) in (1, True)
    return _CocoObject(number, image_id, category_id, category, entry["bbox"], crowd, expressions)


def _header(folder: Path, image: str, headers: dict[str, Header | str]) -> Header:
    """The header of a picture, read once; BadRowError each time where that fails."""
    if image not in headers:
        try:
            headers[image] = read_header(folder / image, str(folder / image))
        except BadRowError as error:
            headers[image] = str(error)
    found = headers[image]
    if isinstance(found, str):
        raise BadRowError(found)
    return found


def from_label_studio(
    export_file: str | os.PathLike[str],
    pictures: str | os.PathLike[str],
    out: str | os.PathLike[str],
    name: str,
    expression_key: str | None = None,
    image_key: str = "image",
    split: Splits = "train",
    seed: int = 0,
    copy: bool = False,
) -> Converted:
    """Convert a Label Studio JSON export of a project with rectangle labels.

    Every rectangle with an expression becomes a line; the siblings are the other rectangles of its
    label in its task. Of several annotations of a task the first that was not cancelled counts.

    Args:
        export_file: the JSON export (not JSON-MIN).
        pictures: the folder that holds the pictures: the uploaded files, or what
            ``/data/local-files/?d=`` is relative to.
        out: the folder to write; it must not hold a data set.
        name: the label of the data set.
        expression_key: None: the text area of the region, a line for each text in it. ``data.<field>``:
            that field of the task, which must then have one rectangle.
        image_key: the field of the task's data that names its picture.
        split: one split for all, or the share of the pictures in each.
        seed: of the drawing, where there are shares.
        copy: whether pictures are copied; else they are linked.

    Raises:
        DataError: as ``from_coco``.
    """
    source, folder = Path(export_file), Path(pictures)
    if expression_key is not None and not expression_key.startswith("data."):
        raise DataError(f"expression_key {expression_key!r} is not 'data.<field>'; name a field of the task's data")
    writer = Writer(Path(out), Declared(name, "xywh", "relative"), copy)
    tasks = read_json(source, _LABEL_STUDIO_REMEDY)
    if not isinstance(tasks, list) or not tasks:
        raise DataError(f"{source}: holds {short(tasks)}, not a list of tasks; {_LABEL_STUDIO_REMEDY}")
    if not any(isinstance(task, dict) and "annotations" in task for task in tasks):
        raise DataError(f"{source}: no task has 'annotations'; {_LABEL_STUDIO_REMEDY}")
    bad = BadRows(str(source), "correct these tasks in Label Studio and export again, in the format JSON")
    notes: dict[str, int] = defaultdict(int)
    headers: dict[str, Header | str] = {}
    total = 0
    for number, task in enumerate(tasks):
        here = f"task {task.get('id', number)}" if isinstance(task, dict) else f"task {number}"
        try:
            annotation = _label_studio_annotation(task, notes)
            if annotation is None:
                continue
            image = _label_studio_image(task, image_key)
            header = _header(folder, image, headers)
        except BadRowError as error:
            bad.add(here, error)
            total += 1
            continue
        regions, unusable, count = _label_studio_regions(annotation, header, image, writer.declared)
        for reason in unusable:
            bad.add(here, reason)
        total += count
        if expression_key is not None:
            try:
                _expression_of_task(task, expression_key, regions, count)
            except BadRowError as error:
                bad.add(here, error, len(regions))
                continue
        for region in regions:
            if not region.expressions:
                notes["rectangles without an expression are no targets"] += 1
            for i, expression in enumerate(region.expressions):
                line = {
                    "id": f"{task.get('id', number)}-{region.id}" + (f"-{i}" if len(region.expressions) > 1 else ""),
                    "image": image,
                    "width": region.size[1],
                    "height": region.size[0],
                    "expression": expression,
                    "bbox": region.bbox,
                    "siblings": [o.bbox for o in regions if o is not region and o.label == region.label],
                    "meta": {"task": task.get("id", number), "region": region.id},
                }
                if region.label is not None:
                    line["category"] = region.label
                writer.add(line, folder / image)
    bad.check(total)
    return writer.write(split, seed, bad, notes)


@dataclass(slots=True)
class _Region:
    id: str
    label: str | None
    bbox: list[float]
    """xywh, relative to the picture."""
    size: tuple[int, int]
    expressions: list[str]


def _label_studio_annotation(task: Any, notes: dict[str, int]) -> dict[str, Any] | None:
    """The annotation of a task that counts; None where nobody has done it."""
    annotations = task.get("annotations") if isinstance(task, dict) else None
    if not isinstance(annotations, list) or not all(isinstance(one, dict) for one in annotations):
        raise BadRowError(f"annotations is {short(annotations)}, not a list of annotations")
    valid = [one for one in annotations if not one.get("was_cancelled")]
    if not valid:
        notes["tasks without an annotation that was not cancelled were passed over"] += 1
        return None
    if len(valid) > 1:
        notes["of several annotations of a task the first that was not cancelled was taken"] += 1
    return valid[0]


def _label_studio_image(task: dict[str, Any], image_key: str) -> str:
    """The path of the picture below the folder of pictures."""
    given = text(task.get("data"), image_key)
    parts = urlsplit(given)
    if parts.path.endswith("/data/local-files/") and "d" in parse_qs(parts.query):
        path = parse_qs(parts.query)["d"][0]
    elif _UPLOADED.match(parts.path):
        path = unquote(_UPLOADED.sub("", parts.path, count=1))
    elif parts.scheme and len(parts.scheme) > 1:
        raise BadRowError(
            f"data.{image_key} {given!r} lies elsewhere; fetch the pictures and name them by their path in the folder"
        )
    else:
        path = given
    return str(PurePosixPath(relative_path(path.removeprefix("/") if path != given else path, f"data.{image_key}")))


def _label_studio_regions(
    annotation: dict[str, Any], header: Header, image: str, declared: Declared
) -> tuple[list[_Region], list[str], int]:
    """Usable rectangles with their texts, why others are not, and how many regions there are."""
    results = annotation.get("result")
    if not isinstance(results, list) or not all(isinstance(one, dict) for one in results):
        return [], [f"result is {short(results)}, not a list of regions"], 1
    texts: dict[Any, list[Any]] = defaultdict(list)
    for one in results:
        value = one.get("value")
        if one.get("type") == "textarea" and isinstance(value, dict):
            held = value.get("text")
            texts[one.get("id")] += held if isinstance(held, list) else [held]
    # What has no place in the picture (choices, ratings, texts) is no region.
    shapes = [
        one
        for one in results
        if one.get("type") != "textarea" and isinstance(one.get("value"), dict) and _has_place(one)
    ]
    regions: dict[str, _Region] = {}
    unusable: list[str] = []
    for one in shapes:
        try:
            region = _label_studio_region(one, header, image, declared, texts)
            if region.id in regions:
                raise BadRowError(f"region {region.id}: occurs twice")
            regions[region.id] = region
        except BadRowError as error:
            unusable.append(str(error))
    return list(regions.values()), unusable, len(shapes)


def _has_place(result: dict[str, Any]) -> bool:
    return bool({"x", "points", "rle", "vertices", "radiusX"} & result["value"].keys())


def _label_studio_region(
    one: dict[str, Any], header: Header, image: str, declared: Declared, texts: dict[Any, list[Any]]
) -> _Region:
    value, number = one["value"], text(one, "id")
    try:
        if one.get("type") != "rectanglelabels":
            raise BadRowError(f"type {short(one.get('type'))} is not 'rectanglelabels'; draw rectangles with labels")
        for place, turned in (("rotation", value.get("rotation")), ("image_rotation", one.get("image_rotation"))):
            if turned not in (None, 0):
                raise BadRowError(
                    f"{place} is {short(turned)}, and a turned rectangle is no box; draw it again without turning"
                )
        size = picture_size(one, "original_height", "original_width")
        if not header.fits(size):
            raise BadRowError(
                f"{image} is {header.stored[1]} wide and {header.stored[0]} high, but was {size[1]} wide and {size[0]} "
                "high when it was annotated; put the original there"
            )
        if header.frame_is_unclear:  # the browser has shown it upright, its size would be read as stored
            raise BadRowError(
                f"{image}: its EXIF note says to show it turned or mirrored (orientation {header.orientation}) with "
                "the same height and width, which the lines cannot say; turn the pixels themselves (for example with "
                "ImageMagick's `mogrify -auto-orient`)"
            )
        percent = [value.get(key) for key in ("x", "y", "width", "height")]
        relative_box(percent, (100, 100), "xywh", "x, y, width, height in percent")
        bbox = [each / 100 for each in percent]
        boxed(bbox, size, declared)
        labels = value.get("rectanglelabels") or []
        label = text({"rectanglelabels": labels[0]}, "rectanglelabels") if labels else None
        expressions = [text({"text": held}, "text").strip() for held in texts.get(one["id"], [])]
    except BadRowError as error:
        raise BadRowError(f"region {number}: {error}") from error
    return _Region(number, label, bbox, size, expressions)


def _expression_of_task(task: dict[str, Any], expression_key: str, regions: list[_Region], count: int) -> None:
    """Give the task's expression to its only rectangle."""
    if count != 1:
        raise BadRowError(f"{count} regions and one expression, so it is unclear which is meant")
    for region in regions:
        field_name = expression_key.removeprefix("data.")
        region.expressions = [text(task.get("data"), field_name).strip()]


def export(
    table: Table, out: str | os.PathLike[str], name: str, split: str | None = None, copy: bool = True
) -> Converted:
    """Write an opened table as a data set of one's own; call it once for each split.

    Boxes are written relative to the picture (xyxy), to the last bit. Ids of samples and pictures,
    siblings and ``meta`` are kept.

    Args:
        table: what ``load_dataset`` or ``open_table`` gave.
        out: the folder to write; it may hold other splits of the same export.
        name: the label of the data set; not that of a known one, even if it is a copy of that.
        split: ``train``, ``val`` or ``test``; None is that of the table.
        copy: whether pictures are copied; else they are linked, by a relative path.

    Raises:
        DataError: where that split is there already, the table's split needs another name, or a
            picture is missing.
    """
    split = table.split if split is None else split
    folder = Path(out)
    writer = Writer(folder, Declared(name, "xyxy", "relative"), copy, add_split=split)
    file_of: dict[str, str] = {}
    taken: set[str] = set()
    for index in range(len(table)):
        sample = table[index]
        path = table.picture_path(sample)
        if sample.picture_id not in file_of:
            file_of[sample.picture_id] = _free_name(path, folder / "images", taken)
        writer.add(
            {
                "id": sample.sample_id,
                "image": file_of[sample.picture_id],
                "picture_id": sample.picture_id,
                "width": sample.size[1],
                "height": sample.size[0],
                "expression": sample.expression,
                "bbox": list(sample.box),
                "siblings": [list(box) for box in sample.siblings],
                "meta": dict(sample.meta),
            },
            path,
        )
    return writer.write(split, 0, BadRows(str(folder), ""), {})


def _free_name(path: Path, images: Path, taken: set[str]) -> str:
    """The picture's own name, or numbered where another picture has it."""
    for number in range(1, 10**6):
        name = path.name if number == 1 else f"{path.stem}-{number}{path.suffix}"
        there = images / name
        if name not in taken and (not os.path.lexists(there) or same_picture(path, there)):
            taken.add(name)
            return name
    raise DataError(f"{images}: no free name for {path}")
