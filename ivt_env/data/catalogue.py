"""What can be fetched, as ``catalogue.toml`` lists it: files, where they belong under the data root, and licences.

Where no checksum is published, ``fetch`` records what it received, so that a second fetch can be compared.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import re
import tomllib
import urllib.parse
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from ivt_env.data.checked import closest, relative_path
from ivt_env.data.fetch import get_bytes
from ivt_env.data.sample import DataError
from ivt_env.failures import reading

_T = TypeVar("_T")
_ARCHIVED = re.compile(r"https?://web\.archive\.org/web/[^/]+/(?=https?://)")


def mirrored(url: str, mirror: str | None) -> str:
    """``url`` on another server: ``mirror``, which may have a path, takes the place of scheme and host.

    An address in the Internet Archive counts as the address that it archives.
    """
    if mirror is None:
        return url
    parts = None
    with contextlib.suppress(ValueError):  # half an IPv6 address
        parts = urllib.parse.urlsplit(mirror)
    if parts is None or parts.scheme not in ("http", "https") or not parts.netloc:
        raise DataError(f"--mirror {mirror!r} is not an address: give one such as https://example.org/datasets")
    original = urllib.parse.urlsplit(_ARCHIVED.sub("", url))
    return mirror.rstrip("/") + urllib.parse.urlunsplit(("", "", original.path, original.query, ""))


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file on a server, and what becomes of it."""

    url: str
    path: str
    """Where it ends up, relative to the data root, with ``/``; an archive waits there until it is unpacked."""
    bytes: int | None = None
    """Exact size, where published."""
    about_bytes: int | None = None
    """Rounded size, where only that is published: good for asking, not for checking."""
    sha256: str | None = None
    unpack_into: str | None = None
    """For an archive: folder relative to the data root (``.`` is the root itself)."""
    only: tuple[str, ...] = ()
    """Patterns (``fnmatch``, of the plain file name) of the members that are wanted; none means all."""
    below: str = ""
    """Folder inside the archive whose content is wanted; empty means all."""
    flatten: bool = False
    """Whether members lose their folders: for archives whose inner folder is not documented."""
    unpack_factor: float = 0.0
    """Estimate of the unpacked size divided by the archive's, for the check of the disk before a download."""
    must_exist: tuple[str, ...] = ()
    """What unpacking must leave, relative to the data root."""
    must_hold: tuple[str, int] | None = None
    """A folder that unpacking must fill, and with at least how many files; 1 where their number is not published."""


@dataclass(frozen=True, slots=True)
class HubFolder:
    """Files of a Hugging Face Hub data set whose names are asked of the Hub; it also gives size and checksum."""

    dataset: str
    into: str
    """Folder under the data root; files keep their path below ``folder``."""
    pattern: str = "*.parquet"
    """``fnmatch`` pattern of the plain file name."""
    folder: str = ""
    """Folder inside the Hub data set."""
    recursive: bool = False
    """Whether files in the folders below it are wanted too."""
    revision: str = "main"
    split_pattern: str | None = None
    """Pattern with ``{split}`` where a single split can be fetched alone."""


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Where the images come from when they are not inside the annotation files."""

    archive: RemoteFile
    folders: tuple[str, ...]
    """Where they may lie under the data root; the first is where they are put if none is there."""
    single_url: str | None = None
    """Address of one image, with ``{name}``; None where only the archive is served."""
    mean_bytes: int = 0
    """Of one image, to estimate a download."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A data set that can be fetched."""

    name: str
    title: str
    licence: str
    notice: str
    """What a user has to know besides: origin, terms of the images, limits of use."""
    homepage: str
    splits: tuple[str, ...]
    files: tuple[RemoteFile, ...] = ()
    hub: tuple[HubFolder, ...] = ()
    images: ImageSource | None = None


def entry(name: str) -> Entry:
    """The data set of that name; DataError for one that cannot be fetched."""
    if name in CATALOGUE:
        return CATALOGUE[name]
    if name in ("scenes", "photos", "screens"):
        raise DataError(f"{name!r} is part of this package: there is nothing to fetch")
    raise DataError(f"no data set {name!r} can be fetched{closest(name, CATALOGUE)}; there are {', '.join(CATALOGUE)}")


def hub_files(folder: HubFolder, split: str | None = None, mirror: str | None = None) -> list[RemoteFile]:
    """The files of a Hub folder (of a split, where that can be told), with the sizes and checksums of the Hub."""
    place = f"{folder.dataset}/tree/{folder.revision}" + (f"/{folder.folder}" if folder.folder else "")
    url: str | None = f"https://huggingface.co/api/datasets/{place}" + ("?recursive=true" if folder.recursive else "")
    listed: list[RemoteFile] = []
    while url is not None:
        url = mirrored(url, mirror)
        body, headers = get_bytes(url, f"the listing of {folder.dataset}")
        remedy = "if you gave a --mirror, it must serve the Hub's /api too"
        with reading(f"the listing of {folder.dataset}: {url}", remedy, DataError, "is not a list of files"):
            for row in json.loads(body):
                name = PurePosixPath(row["path"]).name
                if row["type"] == "file" and fnmatch.fnmatchcase(name, folder.pattern):
                    lfs = row.get("lfs") or {"size": row["size"]}  # a small file has no checksum: it is kept in git
                    source = f"https://huggingface.co/datasets/{folder.dataset}/resolve/{folder.revision}/{row['path']}"
                    below = PurePosixPath(relative_path(row["path"], "path")).relative_to(folder.folder)
                    listed.append(RemoteFile(source, f"{folder.into}/{below}", int(lfs["size"]), sha256=lfs.get("oid")))
        following = re.search(r'<([^>]+)>;\s*rel="next"', headers.get("Link") or "")
        url = following[1] if following else None
    if not listed:
        raise DataError(
            f"{folder.dataset}: its folder {folder.folder or '/'} at revision {folder.revision} holds no "
            f"{folder.pattern}; the data set has changed: see whether a newer version of this package knows it"
        )
    if split is None or folder.split_pattern is None:
        return listed
    pattern = folder.split_pattern.format(split=split)
    return [file for file in listed if fnmatch.fnmatchcase(PurePosixPath(file.path).name, pattern)]


def _made(kind: type[_T], values: dict[str, Any]) -> _T:
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def _entry(name: str, values: dict[str, Any]) -> Entry:
    files = [_made(RemoteFile, file) for file in values.get("files", ())]
    hub = [_made(HubFolder, folder) for folder in values.get("hub", ())]
    images = _IMAGES[values["images"]] if "images" in values else None
    return _made(Entry, {"name": name} | values | {"files": files, "hub": hub, "images": images})


_LISTED = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
_IMAGES = {
    name: _made(ImageSource, values | {"archive": _made(RemoteFile, values["archive"])})
    for name, values in _LISTED["images"].items()
}
CATALOGUE = {name: _entry(name, values) for name, values in _LISTED["sets"].items()}
"""Name -> data set."""
