"""RefCOCO, RefCOCO+ and RefCOCOg in the layout of the REFER tool (github.com/lichengunc/refer).

Under a root::

    refcocog/instances.json  refcocog/refs(umd).p      (also refcoco/, refcoco+/)
    images/mscoco/images/train2014/COCO_train2014_000000581857.jpg
    (or the pictures in images/train2014/ or train2014/)

The first opening reads both annotation files, checks every row and writes an index (one parquet
file, one row group per split) beside them or, where that folder cannot be written, into the user's
cache folder. Later openings read the index alone, until the size or time of a source file changes.

The ``.p`` files are pickles, and a pickle can run code: they are read with every callable refused,
so that a tampered file is an error and nothing more.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import operator
import os
import pickle
import reprlib
import uuid
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ivt_env.data import cache_folder
from ivt_env.data.pictures import read_picture
from ivt_env.data.sample import DataError, Picture, Sample

FOLDERS = {"refcocog": "refcocog", "refcoco": "refcoco", "refcocoplus": "refcoco+"}
"""Data set name -> its folder under the root."""

PARTITIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "refcocog": {"umd": ("train", "val", "test"), "google": ("train", "val")},
    "refcoco": {"unc": ("train", "val", "testA", "testB"), "google": ("train", "val", "test")},
    "refcocoplus": {"unc": ("train", "val", "testA", "testB")},
}
"""Data set name -> partition -> splits; the first partition is the default.

The google partitions divide objects, not pictures: their train and val share pictures. testA asks
for people, testB for other objects.
"""

PICTURE_FOLDERS = ("images/mscoco/images/train2014", "images/train2014", "train2014")
"""Where COCO's train2014 pictures may lie under the root."""

_PUBLISHED_COUNTS = {
    ("refcoco", "unc"): {"train": 120_624, "val": 10_834, "testA": 5_657, "testB": 5_095},
    ("refcocoplus", "unc"): {"train": 120_191, "val": 10_758, "testA": 5_726, "testB": 4_889},
    ("refcocog", "umd"): {"train": 80_512, "val": 4_896, "test": 9_602},
}
_REF_KEYS = frozenset(("sent_ids", "file_name", "ann_id", "ref_id", "image_id", "split", "sentences", "category_id"))
_SENTENCE_KEYS = frozenset(("tokens", "raw", "sent", "sent_id"))

BAD_ROWS_ALWAYS_ALLOWED = 10
BAD_ROWS_ALLOWED_SHARE = 0.01
"""More bad rows than both of these (of all rows of the file) mean a broken file, not a bad row."""
_ROWS_LOGGED = 20

_INDEX_VERSION = 1  # raise whenever the schema or the meaning of a column changes
_SCHEMA = pa.schema(
    [
        ("ref_id", pa.int64()),
        ("sent_id", pa.int64()),
        ("ann_id", pa.int64()),
        ("image_id", pa.int64()),
        ("file_name", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("category", pa.string()),
        ("expression", pa.string()),
        ("box", pa.list_(pa.float64(), 4)),  # xyxy, relative to the picture
        ("siblings", pa.list_(pa.float64())),  # 4 numbers per box, as above
    ]
)

_log = logging.getLogger(__name__)
_REPR = reprlib.Repr()  # of anything that a file can hold, however deep or long
_REPR.maxstring = _REPR.maxother = 80

Box = tuple[float, float, float, float]


class Refer:
    """One split of RefCOCO, RefCOCO+ or RefCOCOg; one sample per expression.

    ``sample_id`` is ``"<ref_id>-<sent_id>"``, ``picture_id`` ``"coco-<image_id>"`` (the same
    picture has the same id in all three sets), ``siblings`` are the other annotated objects of the
    target's category in the picture, and ``meta`` holds ``ann_id``, ``ref_id``, ``image_id`` and
    ``category``. Pictures are read when asked for, and the last few are kept.

    Attributes:
        name: the data set, with the partition where it is not the usual one (``refcocog-google``).
        split: the split.
        skipped: rows of the annotation file (all splits) that were unusable and left out.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        name: str = "refcocog",
        split: str = "train",
        partition: str | None = None,
        cached_pictures: int = 32,
    ) -> None:
        """Open a split, building the index where there is none that fits.

        Args:
            root: the folder that holds ``refcocog/`` (or ``refcoco/``, ``refcoco+/``) and the pictures.
            name: ``refcocog``, ``refcoco`` or ``refcocoplus``.
            split: one of ``PARTITIONS[name][partition]``.
            partition: who divided the set; None is umd for RefCOCOg and unc for the other two.
            cached_pictures: how many decoded pictures to keep (about 1 MB each).

        Raises:
            DataError: for an unknown name, partition or split, and for files that are missing,
                broken, unsafe, or hold too many bad rows. Names the file and the remedy.
        """
        if name not in PARTITIONS:
            raise DataError(f"no REFER data set {name!r}; there are {', '.join(PARTITIONS)}")
        partition = next(iter(PARTITIONS[name])) if partition is None else partition
        if partition not in PARTITIONS[name]:
            raise DataError(f"{name} has no partition {partition!r}; it has {', '.join(PARTITIONS[name])}")
        if split not in PARTITIONS[name][partition]:
            valid = ", ".join(PARTITIONS[name][partition])
            raise DataError(f"{name} ({partition}) has no split {split!r}; it has {valid}")
        self._root = Path(root).expanduser()
        self.name = name if partition == next(iter(PARTITIONS[name])) else f"{name}-{partition}"
        self.split = split
        self._picture_folders = [self._root / folder for folder in PICTURE_FOLDERS]
        if not any(folder.is_dir() for folder in self._picture_folders):
            raise DataError(
                f"{self._root}: {name} is here but its pictures are not: unpack COCO's train2014.zip into "
                f"{self._picture_folders[0]}"
            )
        table, self.skipped = _open_index(self._root, name, partition, split)
        if self.skipped:
            _log.warning(
                "%s: %d unusable rows of refs(%s).p were left out (all splits together)",
                self.name, self.skipped, partition,
            )  # fmt: skip
        # Columns, not objects: 80,000 samples are made one by one, when asked for.
        self._text = {key: table.column(key) for key in ("category", "expression", "file_name")}
        self._ids = {
            key: table.column(key).to_numpy() for key in ("ref_id", "sent_id", "ann_id", "image_id", "height", "width")
        }
        self._boxes = table.column("box").combine_chunks().flatten().to_numpy().reshape(-1, 4)
        self._siblings = table.column("siblings")
        self._row_of_image: dict[str, int] = {}
        self._cached_pictures = cached_pictures
        self._pictures: OrderedDict[str, Picture] = OrderedDict()

    def __len__(self) -> int:
        """Number of expressions."""
        return len(self._boxes)

    def __getitem__(self, index: int) -> Sample:
        """The sample at ``index`` (0-based); IndexError outside the range."""
        row = operator.index(index)
        if not 0 <= row < len(self):
            raise IndexError(f"{self.name} {self.split} has {len(self)} samples, there is no sample {index}")
        ids = {key: int(column[row]) for key, column in self._ids.items()}
        return Sample(
            sample_id=f"{ids['ref_id']}-{ids['sent_id']}",
            picture_id=f"coco-{ids['image_id']}",
            expression=self._text["expression"][row].as_py(),
            box=_as_box(self._boxes[row].tolist()),
            size=(ids["height"], ids["width"]),
            dataset=self.name,
            split=self.split,
            siblings=tuple(map(_as_box, np.reshape(self._siblings[row].as_py(), (-1, 4)).tolist())),
            meta={
                "ann_id": ids["ann_id"],
                "ref_id": ids["ref_id"],
                "image_id": ids["image_id"],
                "category": self._text["category"][row].as_py(),
            },
        )

    def picture(self, sample: Sample) -> Picture:
        """The sample's picture, uint8 (height, width, 3); shared and read-only, copy it to draw on it.

        Raises:
            DataError: where the file is missing, broken, or not of the annotated size, and for a
                sample of another data set or split.
        """
        cached = self._pictures.get(sample.picture_id)
        if cached is None:
            cached = self._read(sample.picture_id)
            cached.setflags(write=False)
            self._pictures[sample.picture_id] = cached
            while len(self._pictures) > self._cached_pictures:
                self._pictures.popitem(last=False)
        else:
            self._pictures.move_to_end(sample.picture_id)
        return cached

    def _read(self, picture_id: str) -> Picture:
        if not self._row_of_image:
            images, rows = np.unique(self._ids["image_id"], return_index=True)
            self._row_of_image = {f"coco-{image}": int(row) for image, row in zip(images, rows, strict=True)}
        row = self._row_of_image.get(picture_id)
        if row is None:
            raise DataError(f"{self.name} {self.split} has no picture {picture_id!r}; give one of its samples")
        file_name = self._text["file_name"][row].as_py()
        for folder in self._picture_folders:
            if (folder / file_name).is_file():
                size = int(self._ids["height"][row]), int(self._ids["width"][row])
                return read_picture(folder / file_name, str(folder / file_name), size)
        folder = next((f for f in self._picture_folders if f.is_dir()), self._picture_folders[0])
        raise DataError(
            f"{folder / file_name}: this picture of {self.name} is missing; unpack COCO's train2014.zip "
            "there again (it holds 82,783 pictures)"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without the decoded pictures: a worker process reads its own."""
        return self.__dict__ | {"_pictures": OrderedDict()}


def read_pickle(path: Path) -> Any:
    """Read a pickle of plain lists, dicts, strings and numbers; nothing in it can be called.

    Pickles written by Python 2 hold byte strings: these are read as UTF-8, and as Latin-1 where a
    file is not UTF-8.

    Raises:
        DataError: for a file that is missing, cut off, no pickle, or that asks for any class or
            function (which is how a pickle runs code). Nothing from the file has run then.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); unpack the data set again") from error
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
    except Exception as error:  # broken bytes make the unpickler raise nearly anything
        raise DataError(
            f"{path}: not a whole pickle ({type(error).__name__}: {error}); unpack the data set again"
        ) from error


class _CallableRefusedError(pickle.UnpicklingError):
    """A pickle asked for something that is no plain data."""


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise _CallableRefusedError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise _CallableRefusedError(f"the outside object {pid!r}")


# --- From the annotation files to columns ---------------------------------------------------------


class _BadRowError(Exception):
    """Why one row cannot be used."""


@dataclass(frozen=True, slots=True)
class _Image:
    file_name: str
    size: tuple[int, int]
    """(height, width) in pixels."""


@dataclass(frozen=True, slots=True)
class _Annotation:
    image_id: int
    category_id: int
    box: Box
    """xyxy, relative to the picture."""


class _Instances:
    """``instances.json``: every entry is checked; a bad one is kept as the reason why."""

    def __init__(self, path: Path) -> None:
        content = _read_json(path)
        for key in ("images", "annotations", "categories"):
            if not isinstance(content, dict) or not isinstance(content.get(key), list):
                raise DataError(f"{path}: has no list {key!r}, so is no COCO annotation file; unpack it again")
        self.images: dict[int, _Image | str] = {}
        self.annotations: dict[int, _Annotation | str] = {}
        self.categories: dict[int, str] = {}
        self._of_class: dict[tuple[int, int], list[tuple[int, Box]]] = defaultdict(list)
        for entry in content["categories"]:
            with contextlib.suppress(_BadRowError):
                self.categories[_integer(entry, "id")] = _text(entry, "name")
        unusable = sum(not _keep(self.images, entry, self._image) for entry in content["images"])
        unusable += sum(not _keep(self.annotations, entry, self._annotation) for entry in content["annotations"])
        for ann_id, found in self.annotations.items():
            if isinstance(found, _Annotation):
                self._of_class[found.image_id, found.category_id].append((ann_id, found.box))
        if unusable:
            _log.warning("%s: %d unusable images and annotations; refs to them are left out", path, unusable)

    @staticmethod
    def _image(entry: dict[str, Any]) -> _Image:
        file_name = _text(entry, "file_name")
        plain = PurePosixPath(file_name).name == file_name == PureWindowsPath(file_name).name
        if not plain or "\0" in file_name:
            raise _BadRowError(f"file_name {file_name!r} is not the plain name of a file")
        height, width = _integer(entry, "height"), _integer(entry, "width")
        if not (0 < height < 2**31 and 0 < width < 2**31):
            raise _BadRowError(f"height {height} and width {width} are not a picture's")
        return _Image(file_name, (height, width))

    def _annotation(self, entry: dict[str, Any]) -> _Annotation:
        image_id = _integer(entry, "image_id")
        image = self.images.get(image_id)
        if not isinstance(image, _Image):
            raise _BadRowError(f"image {image_id}: {image or 'not in instances.json'}")
        box = _relative_box(entry.get("bbox"), image.size)
        return _Annotation(image_id, _integer(entry, "category_id"), box)

    def siblings(self, ann_id: int, annotation: _Annotation) -> list[Box]:
        """Boxes of the other annotations of the same category in the same picture."""
        same = self._of_class[annotation.image_id, annotation.category_id]
        return [box for other, box in same if other != ann_id]


def _relative_box(bbox_xywh_px: Any, size: tuple[int, int]) -> Box:
    """COCO's (x, y, width, height) in pixels to xyxy relative to a picture of ``size`` (height, width).

    Up to one pixel outside the picture is taken for rounding and cut off. The arithmetic is that of
    ``boxes.clip(to_relative(xywh_to_xyxy(...)))``, without an array for each of 200,000 boxes.
    """
    if not isinstance(bbox_xywh_px, list) or len(bbox_xywh_px) != 4:
        raise _BadRowError(f"bbox {_short(bbox_xywh_px)} is not four numbers")
    if not all(type(value) in (int, float) and abs(value) < 1e9 for value in bbox_xywh_px):
        raise _BadRowError(f"bbox {_short(bbox_xywh_px)} is not four finite numbers")
    x, y, w, h = map(float, bbox_xywh_px)
    height, width = size
    if w <= 0 or h <= 0:
        raise _BadRowError(f"bbox {bbox_xywh_px} (x, y, width, height) has no area")
    if x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1:
        swapped = " (are width and height swapped?)" if x + w <= height + 1 and y + h <= width + 1 else ""
        raise _BadRowError(
            f"bbox {bbox_xywh_px} (x, y, width, height) leaves the picture, which is {width} wide and "
            f"{height} high{swapped}"
        )
    box = (
        min(max(x / width, 0.0), 1.0),
        min(max(y / height, 0.0), 1.0),
        min(max((x + w) / width, 0.0), 1.0),
        min(max((y + h) / height, 0.0), 1.0),
    )
    if box[2] <= box[0] or box[3] <= box[1]:
        raise _BadRowError(f"bbox {bbox_xywh_px} (x, y, width, height) has no area inside the picture")
    return box


def _convert(refs_path: Path, instances_path: Path, splits: tuple[str, ...]) -> tuple[dict[str, Any], int]:
    """Read both files into columns per split, and count the rows that had to be left out."""
    refs = read_pickle(refs_path)
    if not isinstance(refs, list) or not refs:
        raise DataError(f"{refs_path}: holds {_short(refs)}, not a list of refs; unpack the data set again")
    instances = _Instances(instances_path)
    columns: dict[str, dict[str, list[Any]]] = {s: {key: [] for key in _SCHEMA.names} for s in splits}
    seen: set[tuple[int, int]] = set()
    total, reasons = 0, []
    for number, ref in enumerate(refs):
        sentences = ref.get("sentences") if isinstance(ref, dict) else None
        sentences = sentences if isinstance(sentences, list) and sentences else [None]
        total += len(sentences)
        try:
            split, common = _ref_columns(ref, instances, splits)
        except _BadRowError as error:
            reasons += [f"row {number}: {error}"] * len(sentences)
            continue
        for sentence in sentences:
            try:
                sent_id, expression = _sentence(sentence)
                if (common["ref_id"], sent_id) in seen:
                    raise _BadRowError(f"ref_id {common['ref_id']} with sent_id {sent_id} occurs twice")
            except _BadRowError as error:
                reasons.append(f"row {number}: {error}")
                continue
            seen.add((common["ref_id"], sent_id))
            for key, value in (common | {"sent_id": sent_id, "expression": expression}).items():
                columns[split][key].append(value)
    for reason in reasons[:_ROWS_LOGGED]:
        _log.warning("%s: left out %s", refs_path, reason)
    allowed = max(BAD_ROWS_ALWAYS_ALLOWED, BAD_ROWS_ALLOWED_SHARE * total)
    if len(reasons) > allowed or len(reasons) == total:
        raise DataError(
            f"{refs_path}: {len(reasons)} of {total} rows are unusable (the limit is {allowed:.0f}), the "
            f"first: {reasons[0]}. Unpack the data set again; instances.json must be of the same set"
        )
    return columns, len(reasons)


def _ref_columns(ref: Any, instances: _Instances, splits: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """Check a ref and its joins; its split and the columns that all its sentences share."""
    _exact_keys(ref, _REF_KEYS, "ref")
    ref_id, ann_id = _integer(ref, "ref_id"), _integer(ref, "ann_id")
    image_id, category_id = _integer(ref, "image_id"), _integer(ref, "category_id")
    here = f"ref_id {ref_id}"
    if ref["split"] not in splits:
        raise _BadRowError(f"{here}: split {_short(ref['split'])} is none of {', '.join(splits)}")
    if not isinstance(ref["sentences"], list) or not ref["sentences"]:
        raise _BadRowError(f"{here}: sentences is {_short(ref['sentences'])}, not a list of sentences")
    stated = [_integer(sentence, "sent_id") for sentence in ref["sentences"]]
    if ref["sent_ids"] != stated:
        raise _BadRowError(f"{here}: sent_ids {_short(ref['sent_ids'])}, but its sentences have {stated}")
    annotation = instances.annotations.get(ann_id)
    if not isinstance(annotation, _Annotation):
        raise _BadRowError(f"{here}: annotation {ann_id}: {annotation or 'not in instances.json'}")
    if (annotation.image_id, annotation.category_id) != (image_id, category_id):
        raise _BadRowError(
            f"{here}: says image {image_id} and category {category_id}, but its annotation {ann_id} says "
            f"image {annotation.image_id} and category {annotation.category_id}"
        )
    if category_id not in instances.categories:
        raise _BadRowError(f"{here}: category {category_id} is not in instances.json")
    image = instances.images[image_id]
    assert isinstance(image, _Image)  # the annotation's box was computed from it
    return ref["split"], {
        "ref_id": ref_id,
        "ann_id": ann_id,
        "image_id": image_id,
        "file_name": image.file_name,
        "height": image.size[0],
        "width": image.size[1],
        "category": instances.categories[category_id],
        "box": annotation.box,
        "siblings": [value for box in instances.siblings(ann_id, annotation) for value in box],
    }


def _sentence(sentence: Any) -> tuple[int, str]:
    _exact_keys(sentence, _SENTENCE_KEYS, "sentence")
    return _integer(sentence, "sent_id"), _text(sentence, "sent").strip()


def _keep(into: dict[int, Any], entry: Any, check: Callable[[dict[str, Any]], Any]) -> bool:
    """Store ``check(entry)``, or the reason why not, under the entry's id; False for a bad entry."""
    try:
        number = _integer(entry, "id")
    except _BadRowError:
        return False
    try:
        into[number] = check(entry)
    except _BadRowError as error:
        into[number] = str(error)
        return False
    return True


def _exact_keys(row: Any, keys: frozenset[str], what: str) -> None:
    if not isinstance(row, dict):
        raise _BadRowError(f"a {what} is a dict, this is {_short(row)}")
    if row.keys() != keys:
        missing, unknown = sorted(keys - row.keys()), sorted(map(_short, row.keys() - keys))
        raise _BadRowError(f"{what} with keys missing: {missing}, unknown: {unknown}")


def _integer(row: Any, key: str) -> int:
    value = row.get(key) if isinstance(row, dict) else None
    if type(value) is not int or not 0 <= value < 2**63:  # bool is an int, and is no id
        raise _BadRowError(f"{key} is {_short(value)}, not a whole number from 0")
    return value


def _text(row: Any, key: str) -> str:
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise _BadRowError(f"{key} is {_short(value)}, not a text")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise _BadRowError(f"{key} is {value!r}, which is not valid Unicode")
    return value


def _short(value: Any) -> str:
    return _REPR.repr(value)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); unpack the data set again") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not whole JSON ({error}); unpack the data set again") from error


# --- The index ------------------------------------------------------------------------------------


def _open_index(root: Path, name: str, partition: str, split: str) -> tuple[pa.Table, int]:
    """The rows of a split (never none) and the number of rows left out of the whole file."""
    folder = root / FOLDERS[name]
    refs_path, instances_path = folder / f"refs({partition}).p", folder / "instances.json"
    sources = {path.name: _fingerprint(path) for path in (refs_path, instances_path)}
    file_name = f"refs-{partition}.parquet"
    place = hashlib.sha256(str(folder.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    places = (folder / ".ivt_index" / file_name, cache_folder() / "index" / f"{name}-{place}" / file_name)
    for path in places:
        found = _read_index(path, sources, split)
        if found is not None:
            return found
    _log.info("%s: reading the annotations for the first time (up to a minute)", folder)
    splits = PARTITIONS[name][partition]
    columns, skipped = _convert(refs_path, instances_path, splits)
    tables = {s: pa.table(columns[s], schema=_SCHEMA) for s in splits}
    counts = {s: table.num_rows for s, table in tables.items()}
    if not counts[split]:
        held = ", ".join(f"{s}: {count}" for s, count in counts.items())
        raise DataError(f"{refs_path}: holds no expression of split {split!r} ({held}); unpack it again")
    published = _PUBLISHED_COUNTS.get((name, partition), counts)
    if counts != published:
        _log.warning("%s: expressions per split %s, published are %s", refs_path, counts, published)
    if partition != "google":
        _refuse_shared_pictures(tables, refs_path)
    facts = {"version": _INDEX_VERSION, "sources": sources, "counts": counts, "skipped": skipped}
    for path in places:
        try:
            _write_index(path, tables, facts)
        except OSError as error:
            _log.info("%s: index not written (%s)", path, error)
        else:
            break
    else:
        _log.warning("no index can be written to %s or %s: slow at each opening", *(p.parent for p in places))
    return tables[split], skipped


def _refuse_shared_pictures(tables: dict[str, pa.Table], refs_path: Path) -> None:
    images = {split: set(table.column("image_id").to_pylist()) for split, table in tables.items()}
    for split in images.keys() - {"train"}:
        shared = images["train"] & images[split]
        if shared:
            raise DataError(
                f"{refs_path}: train and {split} share {len(shared)} pictures (image {min(shared)} is one), "
                "and scores would be too good; the original shares none: unpack the data set again"
            )


def _fingerprint(path: Path) -> list[int]:
    """Size in bytes and time of change in nanoseconds."""
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(
            f"{path}: missing ({error.strerror}); unpack the data set again so that this file is there"
        ) from error
    return [stat.st_size, stat.st_mtime_ns]


def _read_index(path: Path, sources: dict[str, list[int]], split: str) -> tuple[pa.Table, int] | None:
    """The split's table from an index made of exactly these sources, else None (build it again)."""
    try:
        with pq.ParquetFile(path) as file:
            facts = json.loads((file.schema_arrow.metadata or {}).get(b"ivt_env", b"{}"))
            if facts.get("version") != _INDEX_VERSION or facts.get("sources") != sources:
                return None
            groups = [s for s, count in facts["counts"].items() if count]
            if split not in groups:
                return None
            table = file.read_row_group(groups.index(split))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, pa.ArrowException) as error:
        _log.warning("%s: index unreadable (%s), building it again", path, error)
        return None
    if not table.schema.equals(_SCHEMA) or table.num_rows != facts["counts"][split]:
        _log.warning("%s: not an index of this version, building it again", path)
        return None
    return table, int(facts["skipped"])


def _write_index(path: Path, tables: dict[str, pa.Table], facts: dict[str, Any]) -> None:
    """Write one row group per non-empty split; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own for each process: several may build the same index at once.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        schema = _SCHEMA.with_metadata({b"ivt_env": json.dumps(facts).encode()})
        with pq.ParquetWriter(partial, schema) as writer:
            for table in tables.values():
                if table.num_rows:
                    writer.write_table(table, row_group_size=table.num_rows)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _as_box(values: list[float]) -> Box:
    x1, y1, x2, y2 = values
    return x1, y1, x2, y2
