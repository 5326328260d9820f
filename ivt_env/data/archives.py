"""Unpacking zip and tar archives from strangers: nothing leaves the folder, nothing fills the disk.

The whole table of contents is judged before the first file is written, so an archive is refused or unpacked. Files
are complete or absent, and skipped where they are there with the right size: an interrupted unpacking is resumed.
"""

from __future__ import annotations

import fnmatch
import stat
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ivt_env.data.fetch import Progress, check_space, readable
from ivt_env.data.sample import DataError
from ivt_env.failures import reading
from ivt_env.files import whole_file

RATIO_LIMIT = 50
"""Limit of the unpacked size, as a multiple of the archive's. JSON shrinks to a tenth, images not at all."""
_ALWAYS_ALLOWED_BYTES = 16 << 20
_HEADER_BYTES = 512
"""Each member counts with its tar header, so that the limit also bounds their number."""
_BROKEN = "delete this file and fetch the original again", DataError, "cannot be unpacked"


def unpack(
    archive: Path,
    folder: Path,
    *,
    only: Sequence[str] = (),
    below: str = "",
    flatten: bool = False,
    progress: Progress = lambda done, total: None,
) -> tuple[int, int]:
    """Unpack a zip, tar or tar.gz (told by its content) into a folder; gives how many files and bytes there are now.

    ``only``, ``below`` and ``flatten`` are those of ``RemoteFile``; ``progress`` is told of unpacked bytes. The user's
    own links inside the folder, which is made, are followed.

    Raises:
        DataError: for an archive that is missing or broken, that holds a member outside its folder, a link, a device or
            two members for one file, or that is too large for ``RATIO_LIMIT`` or the disk.
    """
    members: dict[Path, tuple[int, Any]] = {}
    judged = 0
    with reading(archive, *_BROKEN), _opened(archive) as opened:
        limit = RATIO_LIMIT * archive.stat().st_size + _ALWAYS_ALLOWED_BYTES
        for info in opened.infolist() if isinstance(opened, zipfile.ZipFile) else opened:
            name, size, is_folder = _judged(info)
            judged += size + _HEADER_BYTES
            if size < 0 or judged > limit:
                raise ValueError(
                    f"at its member {name!r} it has grown to {readable(judged)}, the limit is {limit} bytes"
                )
            path, within = PurePosixPath(name), PurePosixPath(below)
            if not path.is_relative_to(within) or path == within:
                continue
            parts = path.relative_to(within).parts
            target = folder.joinpath(*(parts[-1:] if flatten else parts))
            # __MACOSX is what the Finder adds about each file.
            if is_folder or parts[0] == "__MACOSX" or not any(fnmatch.fnmatchcase(parts[-1], p) for p in only or "*"):
                continue
            if target in members:
                raise ValueError(f"its member {name!r} and an earlier one would be the same file")
            members[target] = size, info
        if not members:
            wanted = (f" in {below}" if below else "") + (f" that match {', '.join(only)}" if only else "")
            raise ValueError(f"it holds no files{wanted}")
    total = sum(size for size, _ in members.values())
    absent = {t: held for t, held in members.items() if not t.is_file() or t.stat().st_size != held[0]}
    to_come = sum(size for size, _ in absent.values())
    if absent:
        check_space(folder, to_come, f"unpacking {archive.name}")
    with _opened(archive) as opened:
        for target, (size, info) in absent.items():
            with whole_file(target, sync=False) as file:  # after a power cut, one of another size is unpacked again
                for block in _blocks(archive, opened, info, size):
                    file.write(block)
            to_come -= size
            progress(total - to_come, total)
    return len(members), total


def _opened(archive: Path) -> zipfile.ZipFile | tarfile.TarFile:
    with archive.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    return zipfile.ZipFile(archive) if is_zip else tarfile.open(archive)


def _blocks(archive: Path, opened: Any, info: Any, size: int) -> Iterator[bytes]:
    """The content of a member; what is wrong with it becomes a DataError, what is wrong with the disk does not."""
    open_member = opened.open if isinstance(opened, zipfile.ZipFile) else opened.extractfile
    with reading(archive, *_BROKEN), open_member(info) as source:
        while block := source.read(1 << 20):
            size -= len(block)
            yield block
        if size:
            raise ValueError(f"{size} bytes of a member are missing")


def _judged(info: zipfile.ZipInfo | tarfile.TarInfo) -> tuple[str, int, bool]:
    """Name and size of a member, and whether it is a folder; ValueError for one that leaves its folder or is a link."""
    if isinstance(info, tarfile.TarInfo):
        name, size, is_plain, is_folder = info.name, info.size, info.isreg() or info.isdir(), info.isdir()
    else:
        name, size, is_folder = info.orig_filename, info.file_size, info.is_dir()
        is_plain = stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)
    if name.startswith("/") or ".." in PurePosixPath(name).parts or "\\" in name or "\0" in name:
        raise ValueError(f"its member {name!r} would leave the folder")
    if not is_plain:
        raise ValueError(f"its member {name!r} is a link or a device")
    return name, size, is_folder
