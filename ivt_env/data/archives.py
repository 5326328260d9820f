"""Unpacking zip and tar archives from strangers: nothing leaves the folder, nothing fills the disk.

The whole table of contents is judged before the first file is written, so an archive is refused or unpacked. Files
are complete or absent, and skipped where they are there with the right size: an interrupted unpacking is resumed.
"""

from __future__ import annotations

import fnmatch
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from ivt_env.data.fetch import Progress, check_space, readable
from ivt_env.data.sample import DataError
from ivt_env.failures import reading
from ivt_env.files import whole_file

RATIO_LIMIT = 50
"""Limit of the unpacked size, as a multiple of the archive's. JSON shrinks to a tenth, images not at all."""
_ALWAYS_ALLOWED_BYTES = 16 << 20
_HEADER_BYTES = 512
"""Each member counts with its tar header, so that the limit also bounds their number."""


def unpack(
    archive: Path, folder: Path, *, only: Sequence[str] = (), flatten: bool = False, progress: Progress | None = None
) -> tuple[int, int]:
    """Unpack a zip, tar or tar.gz (told by its content) into a folder; gives how many files and bytes there are now.

    Args:
        archive: the file.
        folder: where members go; it is made. The user's own links inside it are followed.
        only: ``fnmatch`` patterns of the plain file names that are wanted. None means all.
        flatten: drop the members' folders.
        progress: told of unpacked bytes.

    Raises:
        DataError: for an archive that is missing or broken, that holds a member outside its folder, a link, a device or
            two members for one file, or that is too large for ``RATIO_LIMIT`` or the disk.
    """
    members: dict[Path, tuple[int, Any]] = {}
    judged = 0
    with _reading(archive), _opened(archive) as (infos, _):
        limit = RATIO_LIMIT * archive.stat().st_size + _ALWAYS_ALLOWED_BYTES
        for name, size, info in infos:
            parts = _safe_parts(name, info)
            judged += size + _HEADER_BYTES
            if size < 0 or judged > limit:
                raise ValueError(
                    f"at its member {name!r} it has grown to {readable(judged)}, the limit is {limit} bytes"
                )
            if name.endswith("/") or not parts or parts[0] == "__MACOSX":  # what the Finder adds about each file
                continue
            target = folder.joinpath(*(parts[-1:] if flatten else parts))
            if only and not any(fnmatch.fnmatchcase(target.name, pattern) for pattern in only):
                continue
            if target in members:
                raise ValueError(f"its member {name!r} and an earlier one would be the same file")
            members[target] = size, info
        if not members:
            raise ValueError("it holds no files" + (f" that match {', '.join(only)}" if only else ""))
    total = sum(size for size, _ in members.values())
    absent = [t for t, (size, _) in members.items() if not t.is_file() or t.stat().st_size != size]
    to_come = sum(members[target][0] for target in absent)
    if absent:
        check_space(folder, to_come, f"unpacking {archive.name}")
    with _opened(archive) as (_, opener):
        for target in absent:
            size, info = members[target]
            with whole_file(target, sync=False) as file:  # after a power cut, one of another size is unpacked again
                for block in _blocks(archive, opener, info, size):
                    file.write(block)
            to_come -= size
            if progress is not None:
                progress(total - to_come, total)
    return len(members), total


@contextmanager
def _opened(archive: Path) -> Iterator[tuple[Iterator[tuple[str, int, Any]], Callable[[Any], IO[bytes]]]]:
    """Name, size and handle of the members (a folder's name ends with a slash), and what opens one by its handle."""
    with archive.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    if is_zip:
        with zipfile.ZipFile(archive) as opened:
            yield ((info.orig_filename, info.file_size, info) for info in opened.infolist()), opened.open
    else:
        with tarfile.open(archive) as tar:
            members = ((info.name + "/" * info.isdir(), info.size, info) for info in tar)
            yield members, cast(Callable[[Any], IO[bytes]], tar.extractfile)


def _reading(archive: Path) -> AbstractContextManager[None]:
    return reading(archive, "delete this file and fetch the original again", DataError, "cannot be unpacked")


def _blocks(archive: Path, opener: Callable[[Any], IO[bytes]], info: Any, size: int) -> Iterator[bytes]:
    """The content of a member; what is wrong with it becomes a DataError, what is wrong with the disk does not."""
    with _reading(archive), opener(info) as source:
        while block := source.read(1 << 20):
            size -= len(block)
            yield block
        if size:
            raise ValueError(f"{size} bytes of a member are missing")


def _safe_parts(name: str, info: Any) -> tuple[str, ...]:
    """The parts of a member's path; ValueError for one that leaves its folder, and for all but files and folders."""
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise ValueError(f"its member {name!r} would leave the folder")
    if isinstance(info, tarfile.TarInfo):
        is_plain = info.isreg() or info.isdir()
    else:
        is_plain = stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)
    if not is_plain:
        raise ValueError(f"its member {name!r} is a link or a device")
    return parts
