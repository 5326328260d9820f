"""Data sets by name.

``load_dataset`` finds a data set on this machine. Where a real one is absent it either says so as
an error (``strict=True``) or serves the embedded scenes in its place after one loud warning;
whatever is served carries its own name, so no result can be labelled with data that was not read.
"""

from __future__ import annotations

import difflib
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from ivt_env.data.sample import DataError, DataMissingError, Dataset, Picture, Sample

__all__ = [
    "NAMES",
    "DataError",
    "DataMissingError",
    "Dataset",
    "DatasetFallbackWarning",
    "Picture",
    "Sample",
    "cache_folder",
    "data_folder",
    "load_dataset",
    "splits",
]

NAMES = ("scenes", "photos", "refcocog", "refcoco", "refcocoplus", "refl4", "refadv", "mixed")
"""Every data set name that ``load_dataset`` takes."""

_WITHOUT_READER = {
    "refl4": ("val", "test"),
    "refadv": ("test",),
    "mixed": ("train", "val", "test"),
}

_ARCHIVES = "https://web.archive.org/web/{}/https://bvisionweb1.cs.unc.edu/licheng/referit/data/{}"
_ARCHIVE_OF = {
    "refcocog": ("refcocog.zip", _ARCHIVES.format("20220413012904", "refcocog.zip")),
    "refcoco": ("refcoco.zip", _ARCHIVES.format("20220413011718", "refcoco.zip")),
    "refcocoplus": ("refcoco+.zip", _ARCHIVES.format("20220413011656", "refcoco+.zip")),
}
_PICTURES_URL = "http://images.cocodataset.org/zips/train2014.zip"

_warned: set[str] = set()


class DatasetFallbackWarning(UserWarning):
    """A real data set is not on this machine and the embedded scenes are served in its place."""


def cache_folder() -> Path:
    r"""The folder for this package's own files in the user's cache; it need not exist yet.

    ``$XDG_CACHE_HOME/ivt_env`` where that variable holds an absolute path, else
    ``%LOCALAPPDATA%\ivt_env`` on Windows and ``~/.cache/ivt_env`` elsewhere.
    """
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(chosen) and sys.platform == "win32":
        chosen = os.environ.get("LOCALAPPDATA", "")
    base = Path(chosen) if os.path.isabs(chosen) else Path.home() / ".cache"
    return base / "ivt_env"


def data_folder(data_root: str | os.PathLike[str] | None = None) -> Path:
    """Where real data sets are looked for; one folder, which need not exist.

    Args:
        data_root: the folder itself. None: the variable ``IVT_DATA``, else ``data`` in ``cache_folder()``.
    """
    chosen = data_root or os.environ.get("IVT_DATA")
    return Path(chosen).expanduser() if chosen else cache_folder() / "data"


def splits(name: str) -> tuple[str, ...]:
    """The splits of a data set; it need not be on this machine.

    Raises:
        DataError: for an unknown name.
    """
    if name in _WITHOUT_READER:
        return _WITHOUT_READER[name]
    # Each imported only when asked for: this package must import fast.
    if name == "scenes":
        from ivt_env.data.scenes import LENGTHS

        return tuple(LENGTHS)
    if name == "photos":
        from ivt_env.data import photos

        return photos.SPLITS
    if name in NAMES:
        from ivt_env.data import refer

        return next(iter(refer.PARTITIONS[name].values()))
    raise DataError(f"no data set {name!r}{_closest(name, NAMES)}; there are {', '.join(NAMES)}")


def load_dataset(
    name: str, split: str = "train", data_root: str | os.PathLike[str] | None = None, strict: bool = False
) -> Dataset:
    """Open a split of a data set.

    Args:
        name: one of ``NAMES``.
        split: one of ``splits(name)``.
        data_root: the folder that holds the real data sets (see ``data_folder``); the embedded
            ones need none.
        strict: whether an absent real data set is an error. Otherwise the embedded scenes are
            served in its place, with one ``DatasetFallbackWarning`` per process and name. Use
            True for everything whose result will be reported.

    Returns:
        The data set. Its ``name``, and that of every sample, says what is really served.

    Raises:
        DataMissingError: with ``strict``, where the data set is not in the folder.
        DataError: for an unknown name or split, and for data that are there but broken (with or
            without ``strict``: broken data never fall back).
    """
    valid = splits(name)
    if split not in valid:
        raise DataError(f"{name} has no split {split!r}{_closest(split, valid)}; it has {', '.join(valid)}")
    if name == "scenes":
        return _scenes(split)
    if name == "photos":
        from ivt_env.data.photos import Photos

        return Photos(split)
    root = data_folder(data_root)
    if name not in _WITHOUT_READER:
        from ivt_env.data import refer

        folder = root / refer.FOLDERS[name]
        if os.path.lexists(folder):
            return refer.Refer(root, name, split)
    if strict:
        raise DataMissingError(_absence(name, root))
    served = "test" if split.startswith("test") else split
    if name not in _warned:
        _warned.add(name)
        message = (
            f"\n  The data set {name!r} is not being used: EMBEDDED SCENES ARE SERVED INSTEAD "
            f"({name} {split} -> scenes {served}).\n"
            f"  Scenes are drawn shapes, so what you measure on them says nothing about {name}; every sample "
            "and result is labelled 'scenes'.\n"
            f"  {_absence(name, root)}\n"
            "  strict=True makes this an error."
        )
        warnings.warn(message, DatasetFallbackWarning, stacklevel=2)
    return _scenes(served)


def _scenes(split: str) -> Dataset:
    from ivt_env.data.scenes import Scenes

    return Scenes(split)


def _absence(name: str, root: Path) -> str:
    """Why a data set cannot be served, where it was looked for, and how to get it."""
    if name in _WITHOUT_READER:
        return (
            f"{name}: this version has no reader for it yet, so having the files would not help (nothing was "
            f"looked for in {root})."
        )
    from ivt_env.data.refer import FOLDERS, PICTURE_FOLDERS

    archive, url = _ARCHIVE_OF[name]
    folder = root / FOLDERS[name]
    return (
        f"{name}: not on this machine; looked for the folder {folder}. To get it: (1) download {archive} "
        f"({url}) and unpack it, so that {folder / 'instances.json'} exists; (2) download train2014.zip "
        f"(13.5 GB, {_PICTURES_URL}) and unpack its pictures into {root / PICTURE_FOLDERS[0]}. If you have "
        f"them elsewhere, pass data_root=... or set the variable IVT_DATA to the folder that holds "
        f"{FOLDERS[name]}/ and images/."
    )


def _closest(word: str, valid: Sequence[str]) -> str:
    found = difflib.get_close_matches(str(word).lower(), valid, n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""
