"""A data set of one's own: plain JSON lines (docs/data/custom.md shows a whole one).

How boxes are written is declared in ``dataset.json`` and never guessed: ``box`` is **xyxy** (two corners) or
**xywh** (corner, width, height); ``frame`` is ``px`` (pixels of the image), ``relative`` (0 to 1), ``thousandths``
(0 to 1000) or any other whole number (999: 0 to 999), all but the first of the image's width and height.

Where a line states ``width`` and ``height``, its boxes refer to the image of that size: as stored if that has it,
else upright. Without them they refer to the upright image, as a viewer shows it; an image where that would be
unclear (turned by half, mirrored, or square and turned by a quarter) is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial as bound
from pathlib import Path, PurePosixPath
from typing import Any, get_args

from ivt_env.boxes import FRAMES, frame_unit
from ivt_env.data import NAMES, checked
from ivt_env.data.checked import BadRowError, BadRows, Box, Convention, short
from ivt_env.data.images import Headers
from ivt_env.data.sample import DataError
from ivt_env.data.table import Row, Source
from ivt_env.failures import reading

SPLITS = ("train", "val", "test")
EMBEDDED = Path(__file__).resolve().parent.parent / "assets"
"""``screens/`` in it is a data set in this form, and is served under its own name."""
PLACES = {"custom": ("dataset.json",)}
"""Data set name -> what is looked for under the root."""

KEYS = frozenset(
    ("image", "expression", "bbox", "id", "image_id", "width", "height", "siblings", "category", "meta")
)  # fmt: skip
"""What a line may hold; the first three it must."""

_CONVENTIONS = get_args(Convention)
_REMEDY = "correct it as docs/data/custom.md shows"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Declared:
    """What ``dataset.json`` says."""

    name: str
    box: Convention
    frame: str
    overhang: bool = False
    """Whether boxes may reach beyond their images, as some of benchmarks do: what ``export`` writes."""


def find(root: Path, name: str) -> Source | None:
    """The data set in the folder ``root``, if there is one (it may be broken); else None. ``screens`` is always there.

    Its label is the name in ``dataset.json``; it has the splits whose file is there. ``sample_id``
    is the line's ``id``, else the number of the line from 1; ``image_id`` the line's, else the
    path of the image; ``meta`` the line's, with ``category`` in it.
    """
    remedy, image_remedy = _REMEDY, "put it there, or correct 'image' in the lines that name it"
    if name == "screens":
        root, remedy, image_remedy = EMBEDDED / name, "install ivt-env again", "install ivt-env again"
    elif name != "custom":
        return None
    paths = {split: root / f"{split}.jsonl" for split in SPLITS if os.path.lexists(root / f"{split}.jsonl")}
    declaration = root / "dataset.json"
    if not paths and not os.path.lexists(declaration) and name == "custom":
        return None
    declared = read_declared(declaration)
    folders = (root / "images", root)
    return Source(
        name=declared.name if name == "custom" else name,
        layout="custom",
        folder=root,
        files=(declaration, *paths.values()),
        splits=tuple(paths),
        read=bound(_read, paths, declared, folders),
        image_folders=folders,
        remedy=remedy,
        image_remedy=image_remedy,
        packaged=name == "screens",
    )


def read_declared(path: Path) -> Declared:
    """Name and box convention of a data set from its ``dataset.json``; DataError where they are not clear."""
    example = (
        'it must hold {"name": "my-set", "box": "xyxy" or "xywh", "frame": "px", "relative" or "thousandths", or a '
        "whole number such as 999}"
    )
    content = checked.read_json(path, example)
    if not isinstance(content, dict) or not {"name", "box", "frame"} <= content.keys():
        raise DataError(f"{path}: holds {short(content)}; {example}")
    unknown = sorted(content.keys() - {"name", "box", "frame", "overhang", "description"})
    if unknown:
        raise DataError(f"{path}: unknown key {unknown[0]!r}; {example}, and may hold 'overhang' and a 'description'")
    overhang = content.get("overhang", False)
    if type(overhang) is not bool:
        raise DataError(f"{path}: overhang is {short(overhang)}, not true or false (may boxes leave their images?)")
    if content["box"] not in _CONVENTIONS:
        raise DataError(f"{path}: box is {short(content['box'])}, which is none of {', '.join(_CONVENTIONS)}")
    try:
        frame_unit(content["frame"])
    except ValueError as error:
        raise DataError(f"{path}: frame is {short(content['frame'])}; {error}") from error
    try:
        name = check_name(content["name"])
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return Declared(name, content["box"], str(content["frame"]), overhang)


def check_name(name: Any) -> str:
    """``name``, if it can label a data set of one's own; DataError for that of a known one."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise DataError(
            f"the name {short(name)} is not 1 to 64 of the characters A-Z, a-z, 0-9, '.', '_' and '-', the first a "
            "letter or digit; choose such a name"
        )
    plain = _plain(name)
    for known in (*NAMES, "ref-adv-s", "refclef", "scenes-v0"):
        partitions = ("", "unc", "umd", "google") if known.startswith("refcoco") else ("",)
        if plain in {_plain(known) + partition for partition in partitions}:
            raise DataError(
                f"the name {name!r} is that of a known data set ({known}), and results would be taken for results on "
                "it; choose another name"
            )
    return name


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("+", "plus"))


def boxed(bbox: Any, size: tuple[int, int], declared: Declared, key: str = "bbox") -> Box:
    """A box as declared to xyxy relative to the image of (height, width) ``size``; BadRowError as ``box_inside``.

    Up to one pixel (one unit) outside the image is taken for rounding; nothing is cut off. Of a box that fits only in
    another frame it says which.
    """
    unit = frame_unit(declared.frame)
    frame = (unit, unit) if unit else size
    if declared.overhang:
        return checked.relative_box(bbox, frame, declared.box, key)
    is_numbers = checked.are_numbers(bbox)
    # What lies within one unit of the corner fits nearly everywhere and tells nothing.
    is_small = is_numbers and all(abs(value) <= 1 for value in bbox)
    if declared.frame != "relative" and is_small:
        raise BadRowError(
            f"{key} {short(bbox)} lies within one {'pixel' if declared.frame == 'px' else 'unit'} of the corner; "
            "it would fit as 'relative': is the declared frame wrong?"
        )
    slack = (1 / size[0], 1 / size[1]) if declared.frame == "relative" else (1.0, 1.0)  # one unit is a whole image
    try:
        return checked.box_inside(bbox, frame, declared.box, key, slack)
    except BadRowError as error:
        why = f"{error} (the frame is {declared.frame!r}: the image is {unit} x {unit})" if unit else str(error)
        for other in FRAMES:
            unit = frame_unit(other)
            if is_numbers and other != declared.frame and (other == "relative") == is_small:
                with contextlib.suppress(BadRowError):
                    checked.box_inside(bbox, (unit, unit) if unit else size, declared.box)
                    why += f"; it would fit as {other!r}: is the declared frame wrong?"
                    break
        raise BadRowError(why) from error


def _read(
    paths: dict[str, Path], declared: Declared, folders: tuple[Path, ...], bad: BadRows, _f: Path
) -> Iterator[Row]:
    images = _Images(folders)
    for split, path in paths.items():
        bad.split = split
        with reading(path, _REMEDY, DataError):
            for number, line in checked.json_lines(path):
                try:
                    row = _row(line, split, number, declared, images)
                except BadRowError as error:
                    bad.add(f"{path.name} line {number}", error)
                else:
                    yield row


def _row(line: bytes | None, split: str, number: int, declared: Declared, images: _Images) -> Row:
    values = _parsed(line)
    # "./a.jpg" and "a.jpg" are one image.
    image = str(PurePosixPath(checked.relative_path(checked.text(values, "image"))))
    stated = checked.image_size(values) if {"width", "height"} & values.keys() else None
    size = images.size(image, stated)
    image_id = _name(values, "image_id", image)
    images.check_identity(image_id, image, size)
    siblings = values.get("siblings", [])
    if not isinstance(siblings, list):
        raise BadRowError(f"siblings is {short(siblings)}, not a list of boxes")
    return Row(
        split=split,
        sample_id=_name(values, "id", str(number)),
        image_id=image_id,
        file_name=image,
        size=size,
        expression=checked.text(values, "expression").strip(),
        box=boxed(values.get("bbox"), size, declared),
        siblings=[boxed(box, size, declared, f"siblings[{i}]") for i, box in enumerate(siblings)],
        meta=_meta(values),
    )


def _parsed(line: bytes | None) -> dict[str, Any]:
    if line is None:
        raise BadRowError(f"a line is longer than {checked.MAX_LINE_BYTES >> 20} MB")
    try:
        values = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise BadRowError(f"not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"not a whole JSON object ({error}): {short(line.decode('utf-8'))}") from error
    if not isinstance(values, dict):
        raise BadRowError(f"a line is a JSON object, this is {short(values)}")
    for key in sorted(values.keys() - KEYS):
        raise BadRowError(f"unknown key {short(key)}{checked.closest(key, KEYS)}; what is your own goes into 'meta'")
    return values


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def _name(values: dict[str, Any], key: str, default: str) -> str:
    """An id: a text, or a whole number; ``default`` where the line has none."""
    if key not in values:
        return default
    return str(values[key]) if type(values[key]) is int else checked.text(values, key)


def _meta(values: dict[str, Any]) -> dict[str, Any]:
    meta = values.get("meta", {})
    if not isinstance(meta, dict):
        raise BadRowError(f"meta is {short(meta)}, not a JSON object")
    if "category" in values:
        category = checked.text(values, "category")
        if meta.get("category", category) != category:
            raise BadRowError(f"category is {short(category)}, but in meta it is {short(meta['category'])}")
        meta = meta | {"category": category}
    try:
        json.dumps(meta, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise BadRowError(f"meta {short(meta)} holds a text that is not valid Unicode") from error
    except ValueError as error:  # 1e999 is JSON, and infinite in Python
        raise BadRowError(f"meta {short(meta)} holds a number that is too large") from error
    return meta


class _Images:
    """Sizes of images, and whether images and their ids go together."""

    def __init__(self, folders: tuple[Path, ...]) -> None:
        self._headers = Headers(folders)
        self._of_id: dict[str, tuple[str, tuple[int, int]]] = {}
        self._id_of: dict[str, str] = {}

    def size(self, image: str, stated: tuple[int, int] | None) -> tuple[int, int]:
        """(height, width): as stated, else of the upright image."""
        if stated is not None:
            return stated
        path, header = self._headers.of(image)
        if header.unclear:
            raise BadRowError(f"{path}: {header.unclear} or, where they refer to the pixels as stored, state the size")
        return header.upright

    def check_identity(self, image_id: str, image: str, size: tuple[int, int]) -> None:
        """One id, one image, one size: a leak between splits is found by the id."""
        file, known_size = self._of_id.setdefault(image_id, (image, size))
        if file != image:
            raise BadRowError(f"image_id {image_id!r} is that of {file!r} in a line before, here of {image!r}")
        if known_size != size:
            raise BadRowError(f"{image!r} has (height, width) {size} here and {known_size} in a line before")
        known_id = self._id_of.setdefault(image, image_id)
        if known_id != image_id:
            raise BadRowError(f"{image!r} has the image_id {known_id!r} in a line before, here {image_id!r}")
