"""Test sets of grounding on screens, each in the layout in which it is published; ``docs/data/gui.md`` shows them.

All have one split, ``test``. ``LAYOUTS`` says where a set lies under the data root and which keys its rows have;
one reader reads the JSON files and one ScreenSpot's Parquet file. Nothing about a box is guessed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial as bound
from pathlib import Path, PurePosixPath
from typing import Any

from ivt_env.data import checked, hub
from ivt_env.data.checked import BadRowError, BadRows, Box, Convention, short
from ivt_env.data.images import Headers
from ivt_env.data.sample import DataError
from ivt_env.data.table import Row, Source

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a set lies, and what a row holds."""

    files: str
    """Pattern of the annotation files, below the set's folder."""
    images: str = "images"
    """Folder of the images, below the set's folder."""
    image: str = "image_path"
    expression: tuple[str, ...] = ("instruction",)
    """Keys whose texts, joined by ``: ``, name the target."""
    box: str = "bbox"
    convention: Convention = "xyxy"
    relative: bool = False
    """Whether boxes are shares of the image's sides; else pixels."""
    size: str | None = "image_size"
    """Key of [width, height]; None: the image file says."""
    id: str | None = None
    """Key of the row's id; None: file and number."""
    below: str | None = None
    """Key of a folder below ``images`` that holds the image; a path may name it already."""
    kept: tuple[str, ...] = ()
    """Keys that become ``meta``."""
    rows: int | None = None
    """Published, of those that can be read."""
    folder: str | None = None
    """Below the data root, where sets share one; None: the set's name."""


LAYOUTS = {
    "screenspot": Layout("**/*.parquet", image="file_name", relative=True, size=None,
                         kept=("data_type", "data_source"), rows=1272),
    "screenspotv2": Layout("screenspot_*_v2.json", "screenspotv2_image", "img_filename",
                           convention="xywh", size=None, kept=("data_type", "data_source"), rows=1272),
    "screenspotpro": Layout("annotations/*.json", image="img_filename", size="img_size",
                            id="id", kept=("ui_type", "group", "application", "platform"), rows=1581),
    "uivision": Layout("annotations/element_grounding/element_grounding_*.json",
                       expression=("prompt_to_evaluate",), kept=("element_type", "platform"), rows=5479,
                       folder="uivision"),
    "uivisionlayout": Layout("annotations/layout_grounding/layout_grounding.json",
                             expression=("name", "explanation"), kept=("platform",), folder="uivision"),
    "mmbenchgui": Layout("L2_annotations.json", "offline_images", relative=True,
                         below="platform", kept=("index", "platform", "app_name", "data_type", "grounding_type")),
    "osworldg": Layout("OSWorld-G.json", box="box_coordinates", convention="xywh", id="id",
                       kept=("GUI_types", "box_type"), rows=510),
}  # fmt: skip
PLACES = {name: (f"{layout.folder or name}/{layout.files}",) for name, layout in LAYOUTS.items()}
"""Data set name -> what is looked for under the root."""

_COLUMNS = ("image", "file_name", "bbox", "instruction")


def find(root: Path, name: str) -> Source | None:
    """The data set, if its folder is under ``root`` (it may be broken); else None.

    ``image_id`` is the path of the image below its folder. ``meta`` holds the layout's ``kept`` keys, and ``part``,
    the annotation file without its ending.
    """
    layout = LAYOUTS.get(name)
    if layout is None:
        return None
    folder = root / (layout.folder or name)
    if not os.path.lexists(folder if layout.folder is None else (folder / layout.files).parent):
        return None
    paths = tuple(sorted(folder.glob(layout.files))) or (folder / layout.files,)  # is then said to be missing
    images, embedded = folder / layout.images, name == "screenspot"
    where = f"`ivt data fetch {name}` gets it (docs/data/gui.md)"
    return Source(
        name=name,
        layout="gui",
        folder=folder,
        files=paths,
        splits=("test",),
        read=bound(_read_parquet if embedded else _read_json, paths, layout, where),
        image_folders=() if embedded else (images,),
        remedy=where,
        image_remedy=where,
        published=None if layout.rows is None else {"test": layout.rows},
        embedded=embedded,
    )


def _read_json(paths: Sequence[Path], layout: Layout, remedy: str, bad: BadRows, _: Path) -> Iterator[Row]:
    bad.split = "test"
    refusals = 0
    for path in paths:
        headers = Headers([path.parents[len(PurePosixPath(layout.files).parts) - 1] / layout.images])
        content = checked.read_json(path, remedy)
        if not isinstance(content, list):
            raise DataError(f"{path}: is {short(content)}, not a list of rows; {remedy}")
        # A refusal has no target: there is nothing to find.
        held = [(n, r) for n, r in enumerate(content) if not isinstance(r, dict) or r.get("box_type") != "refusal"]
        refusals += len(content) - len(held)
        numbered = ((n, row | {"": n} if isinstance(row, dict) else row) for n, row in held)
        yield from checked.usable(bad, path.name, numbered, bound(_row, layout, path.stem, headers))
    if refusals:
        _log.warning("%s: %d expressions that name nothing (refusals) are left out", paths[0], refusals)


def _read_parquet(paths: Sequence[Path], layout: Layout, remedy: str, bad: BadRows, folder: Path) -> Iterator[Row]:
    bad.split = "test"
    images = hub.EmbeddedImages(folder / "images")

    def row(values: dict[str, Any]) -> Row:
        name = checked.plain_file_name(checked.text(values, "file_name"))
        header = images.put(values["image"], name, name)
        box = checked.relative_box(values["bbox"], (1, 1), layout.convention)
        values |= {key: checked.text(values, key) for key in layout.kept if key in values}
        return _made(layout, path.stem, values, name, header.stored, box)

    for path in paths:
        rows = hub.parquet_rows(path, _COLUMNS, remedy, 16, layout.kept)
        yield from checked.usable(bad, path.name, ((n, values | {"": n}) for n, values in rows), row)


def _row(layout: Layout, part: str, headers: Headers, values: dict[str, Any]) -> Row:
    name = checked.relative_path(checked.text(values, layout.image), layout.image)
    if layout.below is not None:
        below = checked.plain_file_name(checked.text(values, layout.below), layout.below)
        name = name if name.startswith(f"{below}/") else f"{below}/{name}"
    size = headers.of(name)[1].stored if layout.size is None else _size(values.get(layout.size), layout.size)
    box = _box(layout, values, (1, 1) if layout.relative else size)
    return _made(layout, part, values, name, size, box)


def _made(layout: Layout, part: str, values: dict[str, Any], image: str, size: tuple[int, int], box: Box) -> Row:
    sample_id = f"{part}-{values['']}" if layout.id is None else checked.text(values, layout.id)
    meta = {"part": part} | {key: values[key] for key in layout.kept if key in values}
    expression = ": ".join(checked.text(values, key).strip() for key in layout.expression)
    return Row("test", sample_id, image, image, size, expression, box, (), meta)


def _box(layout: Layout, values: dict[str, Any], size: tuple[int, int]) -> Box:
    numbers, kind = values.get(layout.box), values.get("box_type", "bbox")
    if kind == "polygon":
        corners = numbers if isinstance(numbers, list) and len(numbers) >= 6 and len(numbers) % 2 == 0 else None
        if corners is None or not all(type(value) in (int, float) for value in corners):
            raise BadRowError(f"{layout.box} {short(numbers)} is not a polygon of three or more corners")
        # What encloses it is served; a click beside the polygon in this box counts as a hit here.
        sides = [min(corners[::2]), min(corners[1::2]), max(corners[::2]), max(corners[1::2])]
        return checked.relative_box(sides, size, "xyxy", layout.box)
    if kind != "bbox":
        raise BadRowError(f"box_type is {short(kind)}, not bbox, polygon or refusal")
    if layout.convention == "xyxy" and checked.are_numbers(numbers):  # UI-Vision has corners in any order
        a, b, c, d = numbers
        numbers = [min(a, c), min(b, d), max(a, c), max(b, d)]
    return checked.relative_box(numbers, size, layout.convention, layout.box)


def _size(value: Any, key: str) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise BadRowError(f"{key} is {short(value)}, not [width, height]")
    return checked.image_size({"height": value[1], "width": value[0]})
