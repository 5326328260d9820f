"""The project's converted form: every data set, once read, becomes one memory-mapped table.

A reader turns its own layout into ``Row``s, one per expression. ``open_table`` checks them, writes
them into an index (an Arrow file with one record batch per split) beside the data or, where that
folder cannot be written, into the user's cache folder, and opens it. Later openings map the index
alone, until the size or time of a source file changes; worker processes that open it share its
memory. Images are files, decoded when asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import operator
import os
import re
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from ivt_env.data import cache_folder
from ivt_env.data.checked import BadRows, Box, looks_misdeclared
from ivt_env.data.images import read_image
from ivt_env.data.sample import DataError, ImageArray, Sample
from ivt_env.files import whole_file

_INDEX_VERSION = 4  # raise whenever the schema or the meaning of a column changes
_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("image_id", pa.string()),
        ("file_name", pa.string()),  # below one of the image folders
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("expression", pa.string()),
        ("box", pa.list_(pa.float64(), 4)),  # xyxy, relative to the image
        ("siblings", pa.list_(pa.float64())),  # 4 numbers per box, as above
        ("meta", pa.string()),  # JSON
    ]
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Row:
    """One expression, checked, as a reader gives it."""

    split: str
    sample_id: str
    image_id: str
    file_name: str
    """Of the image, below one of the image folders, with ``/``."""
    size: tuple[int, int]
    """(height, width) of the image in pixels."""
    expression: str
    box: Box
    """xyxy, relative to the image; so are the siblings, the other objects of the target's class in the image."""
    siblings: Sequence[Box] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    """JSON-able."""


Read = Callable[[BadRows, Path], Iterator[Row]]
"""Yields the rows of all splits; what it leaves out it adds to the BadRows. The folder is one that
the reader may write images into (``images/`` below it), for layouts that embed them."""


@dataclass(frozen=True)
class Source:
    """Where a data set lies and how it is read."""

    name: str
    """The label of its samples."""
    layout: str
    """The reader: ``refs-umd``, ``mdetr``, ... The index file is named after the data set and the reader."""
    folder: Path
    """The index lies in ``.ivt_index/`` below it."""
    files: Sequence[Path]
    """What is read. The index is built again when the size or time of one changes."""
    splits: Sequence[str]
    read: Read
    image_folders: Sequence[Path]
    """Where the images may lie; the first that holds the file counts."""
    remedy: str
    """What to do where the annotations are missing or broken: an imperative without a full stop, as
    it stands after a semicolon."""
    image_remedy: str
    """The same, where an image or the whole folder of them is missing; "there" is that place."""
    published: Mapping[str, int] | None = None
    """Split -> number of expressions, where it is known."""
    may_share_images: bool = False
    """Whether train and another split may hold the same image."""
    unions: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Further split -> the splits that it joins."""
    boxes_proven: bool = False
    """Whether the reader compares each box with its other form in the file, so that its convention is certain."""
    embedded: bool = False
    """Whether the files hold the images too; ``images/`` beside the index is then looked at."""
    packaged: bool = False
    """Whether it is part of this package. Its index goes into the user's cache folder if there is one."""


class Table:
    """One split of a data set on disk; one sample per expression.

    Samples are made when asked for and images decoded when asked for; the last few images are kept. An opened table can
    be sent to a worker process, which maps the same file. ``layout`` is the reader that it came through, ``left_out``
    the split (None: not known) and the fault of each row of the annotation files (all splits) that was unusable, and
    ``skipped`` their number.
    """

    def __init__(
        self, source: Source, split: str, cached_bytes: int, batch: pa.RecordBatch, facts: dict[str, Any],
        path: Path | None, images: Path,
    ) -> None:  # fmt: skip
        """Called by ``open_table``; ``path`` is that of the index, None where it could be written nowhere."""
        self.name, self.split, self.layout = source.name, split, source.layout
        self.left_out: list[tuple[str | None, str]] = [(of, reason) for of, reason in facts["left_out"]]
        self.skipped = len(self.left_out)
        self._batch, self._facts, self._path = batch, facts, path
        self._image_folders = [*source.image_folders, *([images] if source.embedded else [])]
        self._image_remedy = source.image_remedy
        self._cached_bytes = cached_bytes
        self._images: OrderedDict[str, ImageArray] = OrderedDict()
        self._row_of_image: dict[str, int] = {}

    @cached_property
    def _columns(self) -> dict[str, pa.Array]:
        return {key: self._batch.column(key) for key in _SCHEMA.names}

    def __len__(self) -> int:
        """Number of expressions."""
        return int(self._batch.num_rows)

    def __getitem__(self, index: int) -> Sample:
        """The sample at ``index`` (0-based); IndexError outside the range."""
        row = operator.index(index)
        if not 0 <= row < len(self):
            raise IndexError(f"{self.name} {self.split} has {len(self)} samples, there is no sample {index}")
        held = {key: column[row].as_py() for key, column in self._columns.items()}
        x1, y1, x2, y2 = (held["siblings"][side::4] for side in range(4))
        return Sample(
            sample_id=held["sample_id"],
            image_id=held["image_id"],
            expression=held["expression"],
            box=tuple(held["box"]),
            size=(held["height"], held["width"]),
            dataset=self.name,
            split=self.split,
            siblings=tuple(zip(x1, y1, x2, y2, strict=True)),
            meta=json.loads(held["meta"]),
        )

    def image(self, sample: Sample) -> ImageArray:
        """The sample's image, uint8 (height, width, 3); shared and read-only, copy it to draw on it."""
        cached = self._images.get(sample.image_id)
        if cached is None:
            path, size = self._file(sample.image_id)
            cached = read_image(path, str(path), size)
            cached.setflags(write=False)
            self._images[sample.image_id] = cached
            while len(self._images) > 1 and sum(image.nbytes for image in self._images.values()) > self._cached_bytes:
                self._images.popitem(last=False)
        else:
            self._images.move_to_end(sample.image_id)
        return cached

    def image_path(self, sample: Sample) -> Path:
        """The file of the sample's image; DataError where it is missing."""
        return self._file(sample.image_id)[0]

    def sample_ids(self) -> list[str]:
        """The ids of all samples, in order; much faster than making the samples."""
        return self._columns["sample_id"].to_pylist()

    def image_ids(self) -> list[str]:
        """The image id of each sample, in order."""
        return self._columns["image_id"].to_pylist()

    def file_names(self) -> list[str]:
        """The image files of this split, each once, in order of first use."""
        return list(dict.fromkeys(self._columns["file_name"].to_pylist()))

    def _file(self, image_id: str) -> tuple[Path, tuple[int, int]]:
        """The file of an image, and its annotated (height, width)."""
        if not self._row_of_image:
            for row, held in enumerate(self.image_ids()):
                self._row_of_image.setdefault(held, row)
        found = self._row_of_image.get(image_id)
        if found is None:
            raise DataError(f"{self.name} {self.split} has no image {image_id!r}; give one of its samples")
        file_name, height, width = (self._columns[key][found].as_py() for key in ("file_name", "height", "width"))
        for folder in self._image_folders:
            if (folder / file_name).is_file():
                return folder / file_name, (height, width)
        folder = next((f for f in self._image_folders if f.is_dir()), self._image_folders[0])
        raise DataError(f"{folder / file_name}: this image of {self.name} is missing; {self._image_remedy}")

    def __getstate__(self) -> dict[str, Any]:
        """Without what a worker process reads for itself: the decoded images and, if on disk, the index."""
        state = self.__dict__ | {"_images": OrderedDict(), "_row_of_image": {}}
        state.pop("_columns", None)
        return state if self._path is None else state | {"_batch": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Maps the index again; DataError where it is gone, or was since built from other files."""
        self.__dict__.update(state)
        if self._batch is None:
            assert self._path is not None
            try:
                reader, facts = _mapped(self._path)
            except (OSError, ValueError, pa.ArrowException) as error:
                raise DataError(
                    f"{self._path}: the index of {self.name}, opened before, cannot be read any more ({error}); "
                    "open the data set again"
                ) from error
            if facts != self._facts:
                raise DataError(
                    f"{self._path}: the index of {self.name} was built again, from other files, since the data set "
                    "was opened; open it again"
                )
            self._batch = reader.get_batch(facts["splits"].index(self.split))


_Index = tuple[pa.RecordBatch, dict[str, Any], Path | None, Path]
"""The batch of a split, what the index was built from and what was left out, its file, and the folder of images."""


def open_table(source: Source, split: str, cached_bytes: int = 96 << 20, need_images: bool = True) -> Table:
    """Open a split, building the index where there is none that fits.

    Args:
        source: the data set.
        split: one of ``source.splits``.
        cached_bytes: of decoded images to keep; the last one is kept in any case.
        need_images: whether a missing folder of images is an error on opening. A single missing image is an error
            only when it is requested.

    Raises:
        DataError: for an unknown or empty split, files that are missing, broken, or hold too many bad rows, and images
            shared by train and another split, unless the source allows it.
    """
    held = (*source.splits, *source.unions)
    if split not in held:
        raise DataError(f"{source.name} ({source.layout}) has no split {split!r}; it has {', '.join(held)}")
    if need_images and not source.embedded and not any(folder.is_dir() for folder in source.image_folders):
        raise DataError(
            f"{source.folder}: {source.name} is here but its images are not: there is no folder "
            f"{' or '.join(map(str, source.image_folders))}; {source.image_remedy}"
        )
    identity = {
        "version": _INDEX_VERSION, "name": source.name,
        # Relative to the folder, so that a moved folder keeps its index.
        "sources": {
            Path(os.path.relpath(path, source.folder)).as_posix(): _fingerprint(path, source) for path in source.files
        },
    }  # fmt: skip
    place = hashlib.sha256(str(source.folder.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    places = [source.folder / ".ivt_index"]
    with contextlib.suppress(DataError):  # the user may have no home folder, and then no cache
        places.append(cache_folder() / "index" / f"{source.name}-{place}")
        places = places[source.packaged :]
    held_index = (_read_index(folder / _index_name(source), identity, split) for folder in places)
    found = next(filter(None, held_index), None) or _build(source, identity, split, places)
    table = Table(source, split, cached_bytes, *found)
    if table.skipped:
        _log.warning(
            "%s: %d unusable rows of the %s files were left out (all splits together)",
            source.name, table.skipped, source.layout,
        )  # fmt: skip
    return table


def _build(source: Source, identity: dict[str, Any], split: str, places: Sequence[Path]) -> _Index:
    _log.info("%s: reading the annotations of %s (up to a minute)", source.folder, source.name)
    target = next(filter(_can_write, places), None) if source.embedded else places[0]
    where = ", ".join(str(path) for path in source.files[:3]) + (", ..." if len(source.files) > 3 else "")
    if target is None:
        raise DataError(
            f"{where}: holds images, which must be written out, and nothing can be written to "
            f"{' or '.join(map(str, places))}; make one of these folders writable"
        )
    bad = BadRows(where, source.remedy)
    batches = _batches(source, bad, target, where)
    counts = {s: batch.num_rows for s, batch in batches.items()}
    if not counts[split]:
        held = ", ".join(f"{s}: {count}" for s, count in counts.items())
        raise DataError(f"{where}: holds no expression of split {split!r} ({held}); {source.remedy}")
    published = {s: count for s, count in (source.published or {}).items() if s in counts}
    if any(counts[s] != count for s, count in published.items()):
        _log.warning("%s: expressions per split: found %s, published %s", where, counts, published)
    if not source.may_share_images:
        _refuse_shared_images(batches, where, source)
    left_out = [list(one) for one in zip(bad.splits, bad.reasons, strict=True)]
    facts = identity | {"splits": list(batches), "counts": counts, "left_out": left_out}
    # Embedded images were written out beside the first place, so the index may lie nowhere else.
    for folder in [target] if source.embedded else places:
        path = folder / _index_name(source)
        try:
            _write_index(path, batches, facts)
            reader, facts = _mapped(path)
        except (OSError, ValueError) as error:
            _log.info("%s: index not written (%s)", path, error)
        else:
            return reader.get_batch(facts["splits"].index(split)), facts, path, folder / "images"
    where_not = " or ".join(map(str, places))
    _log.warning("cannot write an index of %s to %s; opening it will be slow every time", source.name, where_not)
    return batches[split], facts, None, target / "images"


def _batches(source: Source, bad: BadRows, folder: Path, where: str) -> dict[str, pa.RecordBatch]:
    columns: dict[str, dict[str, list[Any]]] = {s: {key: [] for key in _SCHEMA.names} for s in source.splits}
    seen: set[tuple[str, str]] = set()
    total = 0
    for row in source.read(bad, folder):
        total += 1
        if (row.split, row.sample_id) in seen:
            bad.add(row.sample_id, f"the id {row.sample_id} occurs twice in {row.split}", split=row.split)
            continue
        seen.add((row.split, row.sample_id))
        if not source.boxes_proven and (why := looks_misdeclared(row.box, row.size)):
            bad.suspicions.append(f"{row.split} {row.sample_id}: {why}")
        held = {key: getattr(row, key) for key in ("sample_id", "image_id", "file_name", "expression", "box")}
        held |= {"height": row.size[0], "width": row.size[1], "meta": json.dumps(row.meta, ensure_ascii=False)}
        held["siblings"] = [value for box in row.siblings for value in box]
        for key, value in held.items():
            columns[row.split][key].append(value)
    left_out_in_reading = len(bad.reasons) - (total - len(seen))
    if not total and not left_out_in_reading:
        raise DataError(f"{where}: holds no rows; {source.remedy}")
    bad.check(total + left_out_in_reading)
    for union, parts in source.unions.items():
        columns[union] = {key: [value for part in parts for value in columns[part][key]] for key in _SCHEMA.names}
    return {s: pa.RecordBatch.from_pydict(held, _SCHEMA) for s, held in columns.items()}


def _refuse_shared_images(batches: dict[str, pa.RecordBatch], where: str, source: Source) -> None:
    images = {split: set(batch.column("image_id").to_pylist()) for split, batch in batches.items()}
    for split in images.keys() - {"train"}:
        shared = images.get("train", set()) & images[split]
        if shared:
            raise DataError(
                f"{where}: train and {split} share {len(shared)} images ({min(shared)} is one), so scores on "
                f"{split} would be too good; every image belongs in one split: {source.remedy}"
            )


def _index_name(source: Source) -> str:
    """With the data set: one folder may hold several in one layout. Without what Windows forbids."""
    return re.sub(r"[^\w.+-]", "_", f"{source.name}-{source.layout}") + ".arrow"


def _fingerprint(path: Path, source: Source) -> list[int]:
    """Size in bytes and time of change in nanoseconds."""
    try:
        stat = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{path}: missing; {source.remedy}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {source.remedy}") from error
    return [stat.st_size, stat.st_mtime_ns]


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        _log.info("%s: no index can be written there (%s)", folder, error)
        return False
    return True


def _mapped(path: Path) -> tuple[pa.RecordBatchFileReader, dict[str, Any]]:
    """The index, mapped into memory, and its facts; ValueError for one that is not as it was written.

    Arrow trusts what it maps: a file that is cut off or has a flipped bit can end the process. So the file ends in a
    checksum of all before it, which is compared first.
    """
    content = pa.memory_map(str(path)).read_buffer()
    size = max(0, content.size - hashlib.sha256().digest_size)
    if hashlib.sha256(content.slice(0, size)).digest() != content.slice(size).to_pybytes():
        raise ValueError("cut off or damaged")
    reader = pa.ipc.open_file(pa.BufferReader(content.slice(0, size)))
    return reader, json.loads((reader.schema.metadata or {}).get(b"ivt_env", b"{}"))


def _read_index(path: Path, identity: dict[str, Any], split: str) -> _Index | None:
    """The split from an index made of exactly these sources, else None (build it again)."""
    try:
        reader, facts = _mapped(path)
        if any(facts.get(key) != value for key, value in identity.items()) or not facts["counts"].get(split):
            return None
        batch = reader.get_batch(facts["splits"].index(split))
        batch.validate(full=True)
        if not batch.schema.equals(_SCHEMA) or batch.num_rows != facts["counts"][split]:
            raise ValueError("not an index of this version")
        return batch, facts, path, path.parent / "images"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, pa.ArrowException) as error:
        _log.warning("%s: index unreadable (%s), building it again", path, error)
        return None


def _write_index(path: Path, batches: dict[str, pa.RecordBatch], facts: dict[str, Any]) -> None:
    """Write one record batch per split, and a checksum; the file appears whole or not at all."""
    schema = _SCHEMA.with_metadata({b"ivt_env": json.dumps(facts).encode()})
    with pa.BufferOutputStream() as sink:
        with pa.ipc.new_file(sink, schema) as writer:
            for batch in batches.values():
                writer.write_batch(batch.replace_schema_metadata(schema.metadata))
        content = memoryview(sink.getvalue())
    with whole_file(path) as file:
        file.write(content)
        file.write(hashlib.sha256(content).digest())
