"""From a Label Studio JSON export to a data set of one's own: x, y, width, height in **percent** of the image.

The image is taken as the browser shows it (upright). A region is all results of one id: its rectangle
(``rectanglelabels``, or ``rectangle`` with ``labels`` as in the OCR template) and its texts (``textarea``).
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from ivt_env.data.checked import BadRowError, BadRows, box_inside, image_size, read_json, relative_path, short, text
from ivt_env.data.custom import Declared, boxed
from ivt_env.data.custom_writer import Converted, Splits, Writer
from ivt_env.data.images import Header, Headers
from ivt_env.data.sample import DataError

_REMEDY = "export the project again, in the format JSON (not JSON-MIN)"
_NO_TEXT = (
    "write an expression to each rectangle (a TextArea with perRegion in the labelling interface), or name a field of "
    "the tasks with --expression-key data.FIELD"
)
_NO_EXPRESSION = "rectangles without an expression are not targets"
_UPLOADED = re.compile(r"(?:.*/)?data/upload/(?:\d+/)?")
_IMAGE = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?|avif)(\?|$)", re.IGNORECASE)
_RECTANGLE = ("x", "y", "width", "height")
_NO_BOX = re.compile("(polygon|ellipse|keypoint|brush|vector|bitmask)(labels)?")


def from_label_studio(
    export_file: str | os.PathLike[str],
    image_folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    name: str,
    expression_key: str | None = None,
    image_key: str = "image",
    split: Splits = "train",
    seed: int = 0,
    copy: bool = False,
) -> Converted:
    """Convert a Label Studio JSON export of a project with rectangles (with labels, or with the OCR template).

    Every rectangle with an expression becomes a line; the siblings are the other rectangles of its
    label in its task. What was cancelled, or rejected in a review, does not count; of several annotations
    of a task the one marked as ground truth, else the first. Polygons, key points and the like are no boxes:
    they are passed over and counted.

    Args:
        export_file: the JSON export (not JSON-MIN).
        image_folder: the folder that holds the images: the uploaded files, or what
            ``/data/local-files/?d=`` is relative to.
        out: the folder to write; it must not hold a data set.
        name: the label of the data set.
        expression_key: None: the text area of the region, a line for each text in it. ``data.<field>``:
            that field of the task, which must then have one rectangle.
        image_key: the field of the task's data that names its image; where there is none, its only field that
            names an image is taken (``ocr`` in the OCR template).
        split: one split for all, or the share of the images in each.
        seed: of the drawing, where there are shares.
        copy: whether images are copied; else they are linked.
    """
    source, folder = Path(export_file), Path(image_folder)
    if expression_key is not None and not expression_key.startswith("data."):
        raise DataError(f"expression_key {expression_key!r} is not 'data.<field>'; name a field of the task's data")
    writer = Writer(Path(out), Declared(name, "xywh", "relative"), copy)
    tasks = read_json(source, _REMEDY)
    if not isinstance(tasks, list) or not tasks:
        raise DataError(f"{source}: holds {short(tasks)}, not a list of tasks; {_REMEDY}")
    if not any(isinstance(task, dict) and "annotations" in task for task in tasks):
        raise DataError(f"{source}: no task has 'annotations'; {_REMEDY}")
    bad = BadRows(str(source), "correct these tasks in Label Studio and export again, in the format JSON")
    notes: dict[str, int] = defaultdict(int)
    headers = Headers([folder])
    elsewhere: list[str] = []
    total = 0
    for number, task in enumerate(tasks):
        here = f"task {task.get('id', number)}" if isinstance(task, dict) else f"task {number}"
        regions: list[_Region] | None = None
        try:
            annotation = _annotation(task, notes)
            image: str | BadRowError
            try:
                image = _image(task, image_key)
            except BadRowError as error:
                image = error
                elsewhere.append(f"{here}: {error}")
            if annotation is None:
                continue
            regions, count = _regions(annotation, here, bad, notes)
            total += count
            if expression_key is not None:
                if count != 1:
                    raise BadRowError(f"{count} regions and one expression, so it is unclear which is meant")
                for region in regions:
                    region.expressions = [text(task.get("data"), expression_key.removeprefix("data.")).strip()]
            if not any(region.expressions for region in regions):
                notes[_NO_EXPRESSION] += len(regions)
                continue
            if isinstance(image, BadRowError):
                raise image
            path, header = headers.of(image)
        except BadRowError as error:
            bad.add(here, error, 1 if regions is None else len(regions))
            total += regions is None
            continue
        usable = [region for region in regions if _is_usable(region, header, image, writer.declared, here, bad)]
        for region in usable:
            notes[_NO_EXPRESSION] += not region.expressions
            task_id = task.get("id", number)
            writer.add(
                f"{task_id}-{region.id}", region.expressions, image, path, region.size, region.bbox,
                siblings=[other.bbox for other in usable if other is not region and other.label == region.label],
                category=region.label, meta={"task": task_id, "region": region.id},
            )  # fmt: skip
    bad.remedy = headers.remedy() or bad.remedy
    bad.check(total)
    notes = {note: count for note, count in notes.items() if count}
    if elsewhere and not writer.lines:
        notes[f"images that cannot be named, the first of {elsewhere[0]}"] = len(elsewhere)
    return writer.write(split, seed, bad, notes, _NO_TEXT)


@dataclass(slots=True)
class _Region:
    id: str
    bbox: list[float]
    """xywh, relative to the image."""
    size: tuple[int, int]
    """(height, width) of the image when it was annotated."""
    label: str | None = None
    expressions: list[str] = field(default_factory=list)


def _annotation(task: Any, notes: dict[str, int]) -> dict[str, Any] | None:
    """The annotation of a task that counts; None where nobody has done it, or nobody was content with it."""
    annotations = task.get("annotations") if isinstance(task, dict) else None
    if not isinstance(annotations, list) or not all(isinstance(one, dict) for one in annotations):
        raise BadRowError(f"annotations is {short(annotations)}, not a list of annotations")
    done = [one for one in annotations if not one.get("was_cancelled")]
    valid = [one for one in done if not _was_rejected(one)]
    if not done:
        notes["tasks without an annotation that was not cancelled were passed over"] += 1
        return None
    if len(valid) < len(done):
        notes["annotations that a review rejected were passed over"] += len(done) - len(valid)
    if not valid:
        return None
    truth = [one for one in valid if one.get("ground_truth") is True]
    if len(valid) > 1:
        which = "the one marked as ground truth" if truth else "the first that was not cancelled"
        notes[f"of several annotations of a task {which} was taken"] += 1
    return (truth or valid)[0]


def _was_rejected(annotation: dict[str, Any]) -> bool:
    """Whether the last word on an annotation was a reviewer's no."""
    if isinstance(annotation.get("last_action"), str):
        return annotation["last_action"] == "rejected"
    reviews = annotation.get("reviews")
    reviews = [one for one in reviews if isinstance(one, dict)] if isinstance(reviews, list) else []
    return bool(reviews) and max(reviews, key=lambda one: str(one.get("created_at"))).get("accepted") is False


def _image(task: dict[str, Any], image_key: str) -> str:
    """The path of the image below the folder of images."""
    held = task.get("data")
    if isinstance(held, dict) and image_key not in held:
        named = [key for key, value in held.items() if isinstance(value, str) and _IMAGE.search(value)]
        if len(named) != 1:
            raise BadRowError(
                f"data has no field {image_key!r}, and {len(named)} of its fields name an image "
                f"({short(sorted(map(str, held)))}); export it with the image as {image_key!r}"
            )
        image_key = named[0]
    given = text(held, image_key)
    try:
        parts = urlsplit(given)
    except ValueError as error:
        raise BadRowError(f"data.{image_key} {short(given)} is no path ({error})") from error
    if parts.path.endswith("/data/local-files/") and "d" in parse_qs(parts.query):
        path = parse_qs(parts.query)["d"][0]
    elif _UPLOADED.match(parts.path):
        path = unquote(_UPLOADED.sub("", parts.path, count=1))
    elif parts.scheme and len(parts.scheme) > 1:
        raise BadRowError(
            f"data.{image_key} {short(given)} lies elsewhere; fetch the images and name them by their path in the "
            "folder"
        )
    else:
        path = given
    return str(PurePosixPath(relative_path(path.removeprefix("/"), f"data.{image_key}")))


def _regions(annotation: dict[str, Any], here: str, bad: BadRows, notes: dict[str, int]) -> tuple[list[_Region], int]:
    """Usable rectangles with their texts, and how many regions there are; the others go into ``bad`` and ``notes``."""
    results = annotation.get("result")
    if not isinstance(results, list) or not all(isinstance(one, dict) for one in results):
        raise BadRowError(f"result is {short(results)}, not a list of regions")
    of_id: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for one in results:
        if isinstance(one.get("value"), dict):
            of_id[str(one.get("id"))].append(one)
    regions: list[_Region] = []
    count = 0
    for number, held in of_id.items():
        others = sorted({one["type"] for one in held if _NO_BOX.fullmatch(str(one.get("type")))})
        rectangles = [
            one for one in held if all(key in one["value"] for key in _RECTANGLE) and one.get("type") not in others
        ]
        # What has no place in the image (choices and ratings of the whole task) is no region.
        count += bool(rectangles or others)
        if others:
            notes[f"regions that are no rectangles ({', '.join(others)}) were passed over"] += 1
        elif rectangles:
            try:
                regions.append(_region(number, held, rectangles))
            except BadRowError as error:
                bad.add(here, f"region {number}: {error}")
    return regions, count


def _region(number: str, held: list[dict[str, Any]], rectangles: list[dict[str, Any]]) -> _Region:
    first = next((one for one in rectangles if "rectangle" in str(one.get("type"))), rectangles[0])
    text(first, "id")
    for one in rectangles:
        turns = (("rotation", one["value"].get("rotation")), ("image_rotation", one.get("image_rotation")))
        for place, turned in turns:
            if turned not in (None, 0):
                raise BadRowError(
                    f"{place} is {short(turned)}, and a turned rectangle is no box; draw it again without turning"
                )
        if any(repr(one["value"][key]) != repr(first["value"][key]) for key in _RECTANGLE):
            raise BadRowError("its rectangle occurs twice, in different places; delete one of them")
    percent = [first["value"][key] for key in _RECTANGLE]
    box_inside(percent, (100, 100), "xywh", "x, y, width, height in percent")
    size = image_size(first, "original_height", "original_width")
    region = _Region(number, [value / 100 for value in percent], size)
    for one in held:
        value = one["value"]
        if one.get("type") == "textarea":
            texts = value.get("text")
            region.expressions += [
                text({"text": each}, "text").strip() for each in (texts if isinstance(texts, list) else [texts])
            ]
        labels = value.get("rectanglelabels") or value.get("labels")
        if isinstance(labels, list) and labels and region.label is None:
            region.label = text({"labels": labels[0]}, "labels")
    return region


def _is_usable(region: _Region, header: Header, image: str, declared: Declared, here: str, bad: BadRows) -> bool:
    """Whether a region goes with its image; if not, it is added to ``bad``."""
    try:
        # The browser has shown it upright, its size would be read as stored.
        if why := header.misfit(region.size) or header.unclear:
            raise BadRowError(f"{image}: {why}")
        boxed(region.bbox, region.size, declared)
    except BadRowError as error:
        bad.add(here, f"region {region.id}: {error}")
        return False
    return True
