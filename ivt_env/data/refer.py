"""RefCOCO, RefCOCO+ and RefCOCOg in the layout of the REFER tool (github.com/lichengunc/refer).

Boxes are ``instances.json``'s **xywh**, floats in pixels of the image as stored; a row of the ``.p`` file is an object
with one or more sentences, and has no box of its own. The ``.p`` files are pickles, and a pickle can run code: they are
read with every callable refused, so that a tampered file is an error and nothing more.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial as bound
from pathlib import Path
from typing import Any

from ivt_env.data import checked
from ivt_env.data.checked import BadRowError, BadRows, Box, short
from ivt_env.data.pickles import read_pickle
from ivt_env.data.refcoco import IMAGE_FOLDERS, IMAGE_REMEDY, PUBLISHED
from ivt_env.data.sample import DataError
from ivt_env.data.table import Row, Source

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

_REF_KEYS = frozenset(("sent_ids", "file_name", "ann_id", "ref_id", "image_id", "split", "sentences", "category_id"))
_SENTENCE_KEYS = frozenset(("tokens", "raw", "sent", "sent_id"))
_REMEDY = "unpack the data set again"

_log = logging.getLogger(__name__)


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


_Image = tuple[str, tuple[int, int]]
"""File name, and (height, width) in pixels."""
_Annotation = tuple[int, int, Box]
"""Image, category, and box: xyxy, relative to the image."""


class _Instances:
    """``instances.json``: every entry is checked; a bad one is kept as the reason why."""

    def __init__(self, path: Path) -> None:
        content = checked.read_json(path, _REMEDY)
        checked.lists_in(content, path, ("images", "annotations", "categories"), _REMEDY)
        self.images: dict[int, _Image | str] = {}
        self.annotations: dict[int, _Annotation | str] = {}
        self.categories: dict[int, str] = {}
        self._of_class: dict[tuple[int, int], list[tuple[int, Box]]] = defaultdict(list)
        for entry in content["categories"]:
            with contextlib.suppress(BadRowError):
                self.categories[checked.integer(entry, "id")] = checked.text(entry, "name")
        unusable = sum(not _keep(self.images, entry, self._image) for entry in content["images"])
        unusable += sum(not _keep(self.annotations, entry, self._annotation) for entry in content["annotations"])
        for ann_id, found in self.annotations.items():
            if not isinstance(found, str):
                self._of_class[found[:2]].append((ann_id, found[2]))
        if unusable:
            _log.warning("%s: %d unusable images and annotations; refs to them are left out", path, unusable)

    @staticmethod
    def _image(entry: dict[str, Any]) -> _Image:
        return checked.plain_file_name(checked.text(entry, "file_name")), checked.image_size(entry)

    def _annotation(self, entry: dict[str, Any]) -> _Annotation:
        image_id = checked.integer(entry, "image_id")
        image = self.images.get(image_id)
        if image is None or isinstance(image, str):
            raise BadRowError(f"image {image_id}: {image or 'not in instances.json'}")
        box = checked.relative_box(entry.get("bbox"), image[1], "xywh")
        return image_id, checked.integer(entry, "category_id"), box

    def siblings(self, ann_id: int, annotation: _Annotation) -> list[Box]:
        """Boxes of the other annotations of the same category in the same image."""
        return [box for other, box in self._of_class[annotation[:2]] if other != ann_id]


def _read(refs_path: Path, instances_path: Path, splits: tuple[str, ...], bad: BadRows, _folder: Path) -> Iterator[Row]:
    """Join both files; one row per sentence."""
    refs = read_pickle(refs_path)
    if not isinstance(refs, list) or not refs:
        raise DataError(f"{refs_path}: holds {short(refs)}, not a list of refs; {_REMEDY}")
    instances = _Instances(instances_path)
    for number, ref in enumerate(refs):
        held = ref if isinstance(ref, dict) else {}
        bad.split = stated if isinstance(stated := held.get("split"), str) and stated in splits else None
        yield from checked.per_sentence(
            bad, f"{number} of {refs_path.name}", held.get("sentences"), bound(_object, ref, instances, splits),
            bound(_sentence, held),
        )  # fmt: skip


def _object(ref: Any, instances: _Instances, splits: tuple[str, ...]) -> Callable[..., Row]:
    """Check a ref and its joins; what its sentences share."""
    _exact_keys(ref, _REF_KEYS, "ref")
    ref_id, ann_id = checked.integer(ref, "ref_id"), checked.integer(ref, "ann_id")
    image_id, category_id = checked.integer(ref, "image_id"), checked.integer(ref, "category_id")
    here = f"ref_id {ref_id}"
    if ref["split"] not in splits:
        raise BadRowError(f"{here}: split {short(ref['split'])} is none of {', '.join(splits)}")
    if not isinstance(ref["sentences"], list) or not ref["sentences"]:
        raise BadRowError(f"{here}: sentences is {short(ref['sentences'])}, not a list of sentences")
    stated = [checked.integer(sentence, "sent_id") for sentence in ref["sentences"]]
    if ref["sent_ids"] != stated:
        raise BadRowError(f"{here}: sent_ids {short(ref['sent_ids'])}, but its sentences have {stated}")
    annotation = instances.annotations.get(ann_id)
    if annotation is None or isinstance(annotation, str):
        raise BadRowError(f"{here}: annotation {ann_id}: {annotation or 'not in instances.json'}")
    if annotation[:2] != (image_id, category_id):
        raise BadRowError(
            f"{here}: says image {image_id} and category {category_id}, but its annotation {ann_id} says "
            f"image {annotation[0]} and category {annotation[1]}"
        )
    if category_id not in instances.categories:
        raise BadRowError(f"{here}: category {category_id} is not in instances.json")
    image = instances.images[image_id]
    assert not isinstance(image, str)  # the annotation's box was computed from it
    return bound(
        Row,
        split=ref["split"],
        image_id=f"coco-{image_id}",
        file_name=image[0],
        size=image[1],
        box=annotation[2],
        siblings=instances.siblings(ann_id, annotation),
        meta={"ann_id": ann_id, "ref_id": ref_id, "image_id": image_id, "category": instances.categories[category_id]},
    )


def _sentence(ref: dict[str, Any], _number: int, sentence: Any) -> tuple[str, str]:
    _exact_keys(sentence, _SENTENCE_KEYS, "sentence")
    return f"{ref['ref_id']}-{checked.integer(sentence, 'sent_id')}", checked.text(sentence, "sent").strip()


def _keep(into: dict[int, Any], entry: Any, check: Callable[[dict[str, Any]], Any]) -> bool:
    """Store ``check(entry)``, or the reason why not, under the entry's id; False for a bad entry."""
    try:
        number = checked.integer(entry, "id")
    except BadRowError:
        return False
    try:
        into[number] = check(entry)
    except BadRowError as error:
        into[number] = str(error)
        return False
    return True


def _exact_keys(row: Any, keys: frozenset[str], what: str) -> None:
    if not isinstance(row, dict):
        raise BadRowError(f"a {what} is a dict, this is {short(row)}")
    if row.keys() != keys:
        missing, unknown = sorted(keys - row.keys()), sorted(map(short, row.keys() - keys))
        raise BadRowError(f"{what} with keys missing: {missing}, unknown: {unknown}")
