"""RefCOCO, RefCOCO+ and RefCOCOg in the layout of the REFER tool (github.com/lichengunc/refer).

Boxes are ``instances.json``'s **xywh**, floats in pixels of the image as stored; a row of the ``.p`` file is an object
with one or more sentences, and has no box of its own. The ``.p`` files are pickles, and a pickle can run code: they are
read with every callable refused, so that a tampered file is an error and nothing more.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial as bound
from pathlib import Path
from typing import Any, NoReturn

from ivt_env.data import checked
from ivt_env.data.checked import BadRowError, BadRows, short
from ivt_env.data.refcoco import IMAGE_FOLDERS, IMAGE_REMEDY, PUBLISHED, said
from ivt_env.data.sample import DataError
from ivt_env.data.table import Row, Source
from ivt_env.failures import reading

FOLDERS = {"refcocog": "refcocog", "refcoco": "refcoco", "refcocoplus": "refcoco+"}
"""Data set name -> its folder under the root."""

PLACES = {name: (f"{folder}/instances.json",) for name, folder in FOLDERS.items()}
"""Data set name -> what is looked for under the root."""

PARTITIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "refcocog": {"umd": ("train", "val", "test"), "google": ("train", "val")},
    "refcoco": {"unc": ("train", "val", "testA", "testB"), "google": ("train", "val", "test")},
    "refcocoplus": {"unc": ("train", "val", "testA", "testB")},
}
"""Data set name -> partition -> splits; the first partition is the default.

The google partitions divide objects, not images: their train and val share images. testA asks
for people, testB for other objects.
"""

_REMEDY = "unpack the data set again"


def source(root: str | os.PathLike[str], name: str = "refcocog", partition: str | None = None) -> Source:
    """A data set in this layout; ``partition`` is who divided it (None: umd for RefCOCOg, unc for the other two).

    ``sample_id`` is ``"<ref_id>-<sent_id>"``, ``image_id`` ``"coco-<image_id>"`` (the same
    image has the same id in all three sets), ``siblings`` are the other annotated objects of the
    target's category in the image, and ``meta`` holds ``ann_id``, ``ref_id``, ``image_id`` and
    ``category``. The label is ``name``, with the partition where it is not the usual one
    (``refcocog-google``). An unknown name or partition is a DataError.
    """
    if name not in PARTITIONS:
        raise DataError(f"no REFER data set {name!r}; there are {', '.join(PARTITIONS)}")
    usual = next(iter(PARTITIONS[name]))
    partition = usual if partition is None else partition
    if partition not in PARTITIONS[name]:
        raise DataError(f"{name} has no partition {partition!r}; it has {', '.join(PARTITIONS[name])}")
    base = Path(root).expanduser()
    folder = base / FOLDERS[name]
    refs_path, instances_path = folder / f"refs({partition}).p", folder / "instances.json"
    return Source(
        name=name if partition == usual else f"{name}-{partition}",
        layout=f"refs-{partition}",
        folder=folder,
        files=(refs_path, instances_path),
        splits=PARTITIONS[name][partition],
        read=bound(_read, refs_path, instances_path, PARTITIONS[name][partition]),
        image_folders=[base / below for below in IMAGE_FOLDERS],
        remedy=f"{_REMEDY}, with instances.json from the same archive",
        image_remedy=IMAGE_REMEDY,
        published=PUBLISHED[name] if partition == usual else None,
        may_share_images=partition == "google",
    )


def find(root: Path, name: str) -> Source | None:
    """The data set in this layout, if its folder is under ``root`` (it may be broken); else None."""
    return source(root, name) if name in FOLDERS and os.path.lexists(root / FOLDERS[name]) else None


def _read(refs_path: Path, instances_path: Path, splits: tuple[str, ...], bad: BadRows, _folder: Path) -> Iterator[Row]:
    """Join both files; one row per sentence."""
    refs = read_pickle(refs_path)
    if not isinstance(refs, list) or not refs:
        raise DataError(f"{refs_path}: holds {short(refs)}, not a list of refs; {_REMEDY}")
    content, lists = checked.read_json(instances_path, _REMEDY), ("images", "annotations", "categories")
    checked.lists_in(content, instances_path, lists, _REMEDY)
    # An entry is checked where a ref is about it.
    instances = {key: checked.by_id(content[key]) for key in lists}
    of_class: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for entry in instances["annotations"].values():
        with contextlib.suppress(BadRowError):
            of_class[checked.integer(entry, "image_id"), checked.integer(entry, "category_id")].append(entry)
    for number, ref in enumerate(refs):
        held = ref if isinstance(ref, dict) else {}
        bad.split = stated if isinstance(stated := held.get("split"), str) and stated in splits else None
        yield from checked.per_sentence(
            bad, f"{number} of {refs_path.name}", held.get("sentences"),
            bound(_object, ref, instances, of_class, splits), bound(said, held),
        )  # fmt: skip


def _object(
    ref: Any, instances: dict[str, dict[int, dict[str, Any]]],
    of_class: dict[tuple[int, int], list[dict[str, Any]]], splits: tuple[str, ...],
) -> Callable[..., Row]:  # fmt: skip
    """Check a ref and its joins; what its sentences share."""
    ref_id, ann_id = checked.integer(ref, "ref_id"), checked.integer(ref, "ann_id")
    image_id, category_id = checked.integer(ref, "image_id"), checked.integer(ref, "category_id")
    here = f"ref_id {ref_id}"
    if ref.get("split") not in splits:
        raise BadRowError(f"{here}: split {short(ref.get('split'))} is none of {', '.join(splits)}")
    checked.sentence_ids(ref, here)
    for (key, entries), number in zip(instances.items(), (image_id, ann_id, category_id), strict=True):
        if number not in entries:
            raise BadRowError(f"{here}: instances.json has no {number} in its {key}")
    annotation, image = instances["annotations"][ann_id], instances["images"][image_id]
    try:
        stated = checked.integer(annotation, "image_id"), checked.integer(annotation, "category_id")
        file_name, size = checked.plain_file_name(checked.text(image, "file_name")), checked.image_size(image)
        box = checked.relative_box(annotation.get("bbox"), size, "xywh")
        category = checked.text(instances["categories"][category_id], "name")
    except BadRowError as error:
        raise BadRowError(f"{here}: annotation {ann_id} of image {image_id}: {error}") from error
    if stated != (image_id, category_id):
        raise BadRowError(
            f"{here}: says image {image_id} and category {category_id}, but its annotation {ann_id} says "
            f"image {stated[0]} and category {stated[1]}"
        )
    siblings = []
    for other in of_class[stated]:
        with contextlib.suppress(BadRowError):
            if other is not annotation:
                siblings.append(checked.relative_box(other.get("bbox"), size, "xywh"))
    return bound(
        Row,
        split=ref["split"],
        image_id=f"coco-{image_id}",
        file_name=file_name,
        size=size,
        box=box,
        siblings=siblings,
        meta={"ann_id": ann_id, "ref_id": ref_id, "image_id": image_id, "category": category},
    )


def read_pickle(path: Path) -> Any:
    """Read a pickle of plain lists, dicts, strings and numbers; one that asks for a class or function is refused.

    Pickles written by Python 2 hold byte strings: these are read as UTF-8, and as Latin-1 where a file is not UTF-8.
    """
    with reading(path, _REMEDY, DataError, "not a whole pickle"):
        content = path.read_bytes()
        try:
            try:
                return _PlainUnpickler(io.BytesIO(content), encoding="utf-8").load()
            except UnicodeDecodeError:
                return _PlainUnpickler(io.BytesIO(content), encoding="latin1").load()
        except _CallableRefusedError as error:
            raise DataError(
                f"{path}: refused, because it asks for {error}, and a pickle that asks for a class or function "
                "can run code. Nothing was run. Get the original file; if you made this one (with numpy numbers, "
                "say), save it again as plain lists, dicts, strings and numbers"
            ) from None


class _CallableRefusedError(pickle.UnpicklingError):
    """A pickle asked for something other than plain data."""


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise _CallableRefusedError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise _CallableRefusedError(f"the outside object {pid!r}")
