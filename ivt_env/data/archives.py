"""Unpacking zip and tar archives from strangers: nothing leaves the folder, nothing fills the disk.

The whole table of contents is judged before the first file is written, so an archive is refused or
unpacked and never half of each. Files are streamed, appear whole or not at all, and are skipped where
they are there already with the right size: an interrupted unpacking goes on where it stopped.
"""

from __future__ import annotations

import fnmatch
import gzip
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

from ivt_env.data.fetch import Progress, check_space, disk_error, readable
from ivt_env.data.sample import DataError
from ivt_env.files import whole_file

RATIO_LIMIT = 50
"""Default limit of the unpacked size, as a multiple of the archive's. JSON shrinks to a tenth, images not at all."""
_ALWAYS_ALLOWED_BYTES = 16 << 20
_MAX_MEMBERS = 1_000_000
_LARGEST_HEADER = 1 << 20
"""A tar header is read in one piece; a hostile one states any size."""
_CHUNK = 1 << 20
_BROKEN = (
    zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError,
    UnicodeError, ValueError, OverflowError, IndexError, KeyError, RuntimeError,
)  # fmt: skip
"""All that the readers of archives raise when given broken bytes."""


@dataclass(frozen=True, slots=True)
class Unpacked:
    """What an archive held (of what was wanted), and what of it had to be written."""

    files: int
    bytes: int
    written: int
    """Files; the others were there already."""


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    size: int
    target: Path
    handle: Any
    """zipfile.ZipInfo or tarfile.TarInfo."""


class _ArchiveError(Exception):
    """What is wrong with the archive, without its name."""


def unpack(
    archive: Path,
    folder: Path,
    *,
    only: Sequence[str] = (),
    flatten: bool = False,
    limit_bytes: int | None = None,
    progress: Progress | None = None,
) -> Unpacked:
    """Unpack a zip, tar or tar.gz (told by its content) into a folder.

    Args:
        archive: the file.
        folder: where members go; it is made. What the user's own links inside it point to is used.
        only: ``fnmatch`` patterns of the plain file name; members that match none are left out. They
            are judged all the same. None means all.
        flatten: drop the members' folders.
        limit_bytes: refuse more unpacked bytes than that; the default is ``RATIO_LIMIT`` times the
            size of the archive, and 16 MiB.
        progress: told of unpacked bytes.

    Returns:
        What there is now.

    Raises:
        DataError: for an archive that is missing, cut off or broken; that holds a member which is
            absolute, climbs out of the folder, has a drive letter, a backslash or a NUL in its name,
            is a link or a device, is encrypted, or would be written twice; that is too large for the
            limit or the disk; and where the folder cannot be written. Names archive, member, remedy.
    """
    try:
        size = archive.stat().st_size
    except OSError as error:
        raise DataError(f"{archive}: cannot be read ({error.strerror}); fetch it again") from error
    limit = limit_bytes if limit_bytes is not None else RATIO_LIMIT * size + _ALWAYS_ALLOWED_BYTES
    try:
        with _opened(archive) as opened:
            wanted, total = _judge(_members(opened, folder, flatten), only, limit)
            absent = [m for m in wanted if not _is_there(m)]
            if absent:
                check_space(folder, sum(m.size for m in absent), f"unpacking {archive.name}")
            folder.mkdir(parents=True, exist_ok=True)
            done = total - sum(m.size for m in absent)
            for member in absent:
                _write(opened, member)
                done += member.size
                if progress is not None:
                    progress(done, total)
    except _ArchiveError as error:
        raise DataError(f"{archive}: {error}") from error.__cause__
    except OSError as error:
        if isinstance(error, gzip.BadGzipFile):
            raise _broken(archive, error) from error
        raise disk_error(error, Path(error.filename or folder)) from error
    except DataError:
        raise
    except _BROKEN as error:
        raise _broken(archive, error) from error
    return Unpacked(len(wanted), total, len(absent))


def _broken(archive: Path, error: Exception) -> DataError:
    return DataError(
        f"{archive}: not a whole archive ({type(error).__name__}: {error}); the download was cut off or is something "
        "else: delete this file and fetch it again"
    )


@contextmanager
def _opened(archive: Path) -> Iterator[zipfile.ZipFile | tarfile.TarFile]:
    with archive.open("rb") as file:
        start = file.read(4)
    if start.startswith(b"PK"):
        with zipfile.ZipFile(archive) as opened_zip:
            yield opened_zip
    elif start.startswith(b"\x1f\x8b"):
        with _GuardedGzip(archive) as content, tarfile.open(fileobj=content, mode="r:") as opened_tar:
            yield opened_tar
    elif start and tarfile.is_tarfile(archive):
        with archive.open("rb") as plain, tarfile.open(fileobj=plain, mode="r:") as opened_tar:
            yield opened_tar
    else:
        raise _ArchiveError(
            f"neither a zip nor a tar archive (its first bytes are {start!r}); a server may have sent an error page "
            "instead: delete this file and fetch it again"
        )


class _GuardedGzip(gzip.GzipFile):
    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= max(_LARGEST_HEADER, _CHUNK):
            raise _ArchiveError(f"refused: a header in it claims {size} bytes; get the original archive")
        return super().read(size)


def _members(opened: zipfile.ZipFile | tarfile.TarFile, folder: Path, flatten: bool) -> Iterator[_Member]:
    """The files in it, each judged; anything but files and folders is an error."""
    infos: Iterable[Any] = opened.infolist() if isinstance(opened, zipfile.ZipFile) else opened
    for number, info in enumerate(infos):
        if number >= _MAX_MEMBERS:
            raise _ArchiveError(f"refused: it holds more than {_MAX_MEMBERS} members; get the original archive")
        if isinstance(info, zipfile.ZipInfo):
            name, kind, is_folder = info.orig_filename, _zip_kind(info), info.is_dir()
            size = info.file_size
        else:
            name, kind, is_folder = info.name, _tar_kind(info), info.isdir()
            size = info.size
        parts = _safe_parts(name)
        if kind is not None:
            raise _ArchiveError(
                f"refused, because its member {name!r} is {kind}, and only files and folders are unpacked; nothing of "
                "it was unpacked: get the original archive"
            )
        if size < 0:  # a tar header can say so
            raise _ArchiveError(f"refused: its member {name!r} claims {size} bytes; get the original archive")
        if is_folder or not parts or parts[0] == "__MACOSX":  # what the Finder adds about each file
            continue
        yield _Member(name, size, folder.joinpath(*(parts[-1:] if flatten else parts)), info)


def _judge(members: Iterable[_Member], only: Sequence[str], limit_bytes: int) -> tuple[list[_Member], int]:
    """The members that are wanted and their size together."""
    wanted: dict[Path, _Member] = {}
    total = 0
    for member in members:
        if only and not any(fnmatch.fnmatchcase(member.target.name, pattern) for pattern in only):
            continue
        if member.target in wanted:
            raise _ArchiveError(
                f"refused, because its members {wanted[member.target].name!r} and {member.name!r} would be the same "
                "file; nothing of it was unpacked: get the original archive"
            )
        wanted[member.target] = member
        total += member.size
        if total > limit_bytes:
            raise _ArchiveError(
                f"refused, because at its member {member.name!r} it has unpacked to {readable(total)}, and at most "
                f"{readable(limit_bytes)} are expected; nothing of it was unpacked: get the original archive"
            )
    if not wanted:
        asked = f" that match {', '.join(only)}" if only else ""
        raise _ArchiveError(f"holds no files{asked}; it is another archive than expected: delete it and fetch it again")
    return list(wanted.values()), total


def _safe_parts(name: str) -> tuple[str, ...]:
    """The parts of a member's path, if it stays inside its folder on every system."""
    windows, parts = PureWindowsPath(name), PurePosixPath(name).parts
    reason = None
    if "\0" in name:
        reason = "has a NUL in its name"
    elif name.startswith(("/", "\\")):
        reason = "has an absolute path"
    elif windows.drive or any(PureWindowsPath(part).drive for part in parts):
        reason = "names a drive"
    elif ".." in parts or ".." in windows.parts:
        reason = "climbs out of its folder"
    elif "\\" in name:
        reason = "has a backslash in its name, which is a folder on one system and a letter on another"
    if reason is not None:
        raise _ArchiveError(
            f"refused, because its member {name!r} {reason}; nothing of it was unpacked: get the original archive"
        )
    return parts


def _zip_kind(info: zipfile.ZipInfo) -> str | None:
    """What a member is, if it is no file or folder that can be read."""
    if info.flag_bits & 0x1:
        return "encrypted"
    mode = info.external_attr >> 16
    if stat.S_ISLNK(mode):
        return "a link"
    return None if stat.S_IFMT(mode) in (0, stat.S_IFREG, stat.S_IFDIR) else "a device or another special file"


def _tar_kind(info: tarfile.TarInfo) -> str | None:
    if info.issym() or info.islnk():
        return "a link"
    return None if info.isreg() or info.isdir() else "a device or another special file"


def _is_there(member: _Member) -> bool:
    try:
        found = member.target.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == member.size


def _write(opened: zipfile.ZipFile | tarfile.TarFile, member: _Member) -> None:
    """One file: it has its name when it is whole."""
    source: IO[bytes] | None
    if isinstance(opened, zipfile.ZipFile):
        source = opened.open(member.handle)
    else:
        source = opened.extractfile(member.handle)
    assert source is not None  # only links and folders have none, and they were refused
    written = 0
    try:
        # Not safe from a power cut: a member of another size is unpacked again.
        with source, whole_file(member.target, sync=False) as file:
            while block := source.read(_CHUNK):
                file.write(block)
                written += len(block)
            if written != member.size:
                raise _ArchiveError(
                    f"its member {member.name!r} ends after {written} of {member.size} bytes: delete the archive and "
                    "fetch it again"
                )
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise _ArchiveError(
            f"its member {member.name!r} is damaged ({error}): delete the archive and fetch it again"
        ) from error
