"""What the readers of Parquet files from the Hub share: rows of some columns, shards, images inside."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ivt_env.data.checked import BadRowError, BadRows, short
from ivt_env.data.images import Header, read_header
from ivt_env.data.sample import DataError
from ivt_env.failures import reading
from ivt_env.files import write_whole

_BUFFER = 2**20  # bytes per column


def shards(folder: Path) -> dict[str, list[Path]]:
    """The Parquet files of a folder by the word that their names begin with (the split)."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.glob("*.parquet")) if folder.is_dir() else ():
        # At once "train.parquet" and "train-00000-of-00001-<hash>.parquet"; not "._train..." (macOS).
        named = re.match(r"[A-Za-z]+", path.name)
        if named:
            found[named[0]].append(path)
    return dict(found)


def split_rows(
    files: Mapping[str, Sequence[Path]], bad: BadRows, columns: Collection[str], remedy: str, rows_at_once: int = 1024
) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """(file, number from 0, row) of each row of all splits; ``bad.split`` is that of the row.

    Raises:
        DataError: as ``parquet_rows``, and where a part of a split is missing or there twice, as the names tell.
    """
    for split, paths in files.items():
        bad.split = split
        _check_parts(paths, remedy)
        for path in paths:
            for number, row in parquet_rows(path, columns, remedy, rows_at_once):
                yield path, number, row


def _check_parts(paths: Sequence[Path], remedy: str) -> None:
    """Whether the parts of a split (``-00000-of-00002``) are there, each once."""
    found = [re.search(r"-([0-9]{5})-of-([0-9]{5})", path.name) for path in paths]
    parts = [(int(part[1]), int(part[2])) for part in found if part]
    if len(paths) == 1 and not parts:
        return
    numbers, counts = {number for number, _ in parts}, {count for _, count in parts}
    if len(numbers) != len(paths) or len(counts) != 1:
        raise DataError(
            f"{paths[0]}: a second edition of this split lies beside it ({', '.join(p.name for p in paths)}), and "
            f"its rows would be read twice; delete all of them and {remedy}"
        )
    missing = sorted(set(range(counts.pop())) - numbers)
    if missing:
        raise DataError(f"{paths[0]}: of its split, part {missing[0]} (counted from 0) is not there; {remedy}")


def parquet_rows(
    path: Path, columns: Collection[str], remedy: str, rows_at_once: int = 1024, optional: Collection[str] = ()
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 0, row) of each row of a Parquet file, as plain Python values; ``rows_at_once`` are in memory.

    ``optional`` columns are read where the file has them. A file that is cut off or damaged, or lacks a column, is a
    DataError with the remedy. A column may hold anything: the reader checks each value.
    """
    # Pre-buffering, and reading without a buffer, would hold all images of a row group at once.
    broken = reading(path, remedy, DataError, "not a whole Parquet file")
    with broken, pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER) as file:
        held = file.schema_arrow.names
        missing = [name for name in columns if name not in held]
        if missing:
            raise DataError(
                f"{path}: has no column {', '.join(map(repr, missing))} (it has {', '.join(held)[:500]}); {remedy}"
            )
        names = [*columns, *(name for name in optional if name in held)]
        batches = file.iter_batches(rows_at_once, columns=names, use_threads=False)
        yield from enumerate(row for batch in batches for row in batch.to_pylist())


class EmbeddedImages:
    """The images inside Parquet files: each is written out once, byte for byte."""

    def __init__(self, folder: Path) -> None:
        """``folder``: where they go; made with the first."""
        self._folder = folder
        self._known: dict[str, tuple[str, bytes, Header]] = {}

    def put(self, image: Any, image_id: str, file_name: str) -> Header:
        """Write a row's image unless that is done; its header.

        BadRowError for a row without an image, with one that cannot be read, or with another than an earlier row.
        """
        content = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(content, bytes) or not content:
            raise BadRowError(f"the image is not in the file (image is {short(image)})")
        digest = hashlib.sha256(content).digest()
        known = self._known.get(image_id)
        if known is None:
            header = read_header(content, f"image {file_name}")
            path = self._folder / file_name
            try:
                if not (path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content):
                    write_whole(path, content, sync=False)
            except OSError as error:
                raise DataError(
                    f"{path}: the image cannot be written ({error.strerror}); make room on that disk, or make the "
                    "folder writable, and open the data set again"
                ) from error
            known = self._known[image_id] = file_name, digest, header
        elif known[:2] != (file_name, digest):
            raise BadRowError(f"holds another image than an earlier row with {image_id}")
        return known[2]
