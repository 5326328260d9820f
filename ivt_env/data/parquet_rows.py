"""Rows of a Parquet file, a few at a time, or an error that names the file and the remedy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ivt_env.data.sample import DataError

_BUFFER = 2**20  # bytes per column


def parquet_schema(path: Path, remedy: str) -> pa.Schema:
    """The columns of a Parquet file; DataError where it is missing, cut off or no Parquet file."""
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error, remedy) from error


def require_columns(path: Path, schema: pa.Schema, columns: Sequence[str], remedy: str) -> None:
    """Raise DataError where a column is missing."""
    missing = [column for column in columns if column not in schema.names]
    if missing:
        raise DataError(
            f"{path}: has no column {', '.join(map(repr, missing))} (it has {', '.join(schema.names)}); {remedy}"
        )


def parquet_rows(
    path: Path, columns: Sequence[str], remedy: str, batch_size: int = 1024
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 0, row) of each row, as plain Python values.

    Args:
        path: the file.
        columns: what is read; the file must have them.
        remedy: what to do where the file is broken, as an imperative without a full stop.
        batch_size: rows in memory at once; few where a row holds a picture.

    Raises:
        DataError: for a file that is missing, cut off or damaged, also in the middle.
    """
    number = 0
    try:
        # Pre-buffering, and reading without a buffer, would hold all pictures of a row group at once.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER) as file:
            for batch in file.iter_batches(batch_size, columns=list(columns), use_threads=False):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise _unreadable(path, error, remedy, f" after row {number - 1}" if number else "") from error


def _unreadable(path: Path, error: Exception, remedy: str, place: str = "") -> DataError:
    return DataError(f"{path}: not a whole Parquet file{place} ({str(error).splitlines()[0]}); {remedy}")
