"""Data sets by name.

``load_dataset`` finds a data set on this machine. Where a real one is absent it either says so as
an error (``strict=True``) or serves the embedded scenes in its place after one loud warning;
whatever is served carries its own name, so no result can be labelled with data that was not read.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ivt_env.data.checked import closest
from ivt_env.data.sample import DataError, DataMissingError, Dataset, ImageArray, Sample

if TYPE_CHECKING:
    from ivt_env.data.table import Source

__all__ = [
    "NAMES",
    "DataError",
    "DataMissingError",
    "Dataset",
    "DatasetFallbackWarning",
    "ImageArray",
    "Sample",
    "cache_folder",
    "data_folder",
    "find_source",
    "load_dataset",
    "splits",
]

GUI = ("screenspot", "screenspotv2", "screenspotpro", "uivision", "uivisionlayout", "mmbenchgui", "osworldg")
"""Public test sets of screens (``ivt_env.data.gui``)."""

_LAYOUTS = {
    **dict.fromkeys(
        ("refcocog", "refcoco", "refcocoplus"),
        ("refer.find", "refcoco.jxu124", "refcoco.vlm_r1", "refcoco.mdetr", "refcoco.lmms"),
    ),
    "refl4": ("ref_l4.find",),
    "refadv": ("ref_adv.find",),
    "screens": ("custom.find",),
    **dict.fromkeys(GUI, ("gui.find",)),
    "custom": ("custom.find",),
}
"""Real data sets and what finds each of their layouts; the first that is on disk and has the split is served."""

_SPLITS = {
    "photos": ("train", "val", "test", "all"),
    "screens": ("train", "val", "test"),
    "refcocog": ("train", "val", "test"),
    "refcoco": ("train", "val", "testA", "testB"),
    "refcocoplus": ("train", "val", "testA", "testB"),
    "refl4": ("val", "test", "all"),
    "refadv": ("test",),
    "mixed": ("train", "val", "test"),
    **dict.fromkeys(GUI, ("test",)),
    "custom": ("train", "val", "test"),
}
NAMES = ("scenes", *_SPLITS)
"""Every data set name that ``load_dataset`` takes."""

_warned: set[str] = set()


class DatasetFallbackWarning(UserWarning):
    """A real data set is not on this machine and the embedded scenes are served in its place."""


def cache_folder() -> Path:
    """This package's own folder in the user's cache; it need not exist yet.

    ``$XDG_CACHE_HOME/ivt_env`` where that is an absolute path, else ``~/.cache/ivt_env``; DataError where the user has
    no home folder.
    """
    if os.path.isabs(chosen := os.environ.get("XDG_CACHE_HOME", "")):
        return Path(chosen) / "ivt_env"
    try:
        return Path.home() / ".cache" / "ivt_env"
    except RuntimeError as error:
        raise DataError(
            "this user has no home folder; set the variable IVT_DATA to the folder that holds the data sets, or "
            "XDG_CACHE_HOME to one that can be written"
        ) from error


def data_folder(data_root: str | os.PathLike[str] | None = None) -> Path:
    """Where real data sets are looked for: ``data_root``, else the variable ``IVT_DATA``, else the cache."""
    chosen = data_root or os.environ.get("IVT_DATA")
    if not chosen:
        return cache_folder() / "data"
    try:
        return Path(chosen).expanduser()
    except RuntimeError as error:
        raise DataError(f"{chosen}: there is no such home folder; write the whole path of the data folder") from error


def splits(name: str) -> tuple[str, ...]:
    """The splits of a data set, which need not be on this machine; DataError for an unknown name."""
    if name in _SPLITS:
        return _SPLITS[name]
    if name == "scenes":
        from ivt_env.data.scenes import SPLITS  # only when asked for: this package must import fast

        return tuple(SPLITS)
    raise DataError(f"no data set {name!r}{closest(name, NAMES)}; there are {', '.join(NAMES)}")


def load_dataset(
    name: str, split: str = "train", data_root: str | os.PathLike[str] | None = None, strict: bool = False
) -> Dataset:
    """Open a split of a data set; ``name`` and ``split`` of the result and of its samples say what is really served.

    Args:
        name: one of ``NAMES``.
        split: one of ``splits(name)``.
        data_root: the folder that holds the real data sets (see ``data_folder``).
        strict: whether an absent real data set is an error (``DataMissingError``). Otherwise the embedded scenes are
            served, with one ``DatasetFallbackWarning`` per process and name. Use True for all that will be reported.

    Raises:
        DataError: for an unknown name or split, and for data that are there but broken, which never fall back.
    """
    if name == "scenes":  # whose splits have more names than can be listed
        from ivt_env.data.scenes import Scenes

        return Scenes(split)
    valid = splits(name)
    if split not in valid:
        raise DataError(f"{name} has no split {split!r}{closest(split, valid)}; it has {', '.join(valid)}")
    if name == "photos":
        from ivt_env.data.photos import Photos

        return Photos(split)
    root = data_folder(data_root)
    if name == "mixed":
        from ivt_env.data.mixture import PARTS, open_mixture

        # All of them, whatever the split: the ids of all splits are drawn together.
        if all(find_source(*part, root) for parts in PARTS.values() for part in parts):
            return open_mixture(root, split)
    elif (found := find_source(name, split, root)) is not None:
        from ivt_env.data.table import open_table

        return open_table(found, split)
    if strict or name == "custom":  # nothing can take the place of one's own data
        raise DataMissingError(_absence(name, root))
    served = "test" if split.startswith("test") or split == "all" else split
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
    return load_dataset("scenes", served)


def find_source(name: str, split: str, root: Path) -> Source | None:
    """Where a real data set lies under ``root`` in a layout that has this split; None: nowhere."""
    return next((found for found in _found(name, root) if split in found.splits or split in found.unions), None)


def _found(name: str, root: Path) -> Iterator[Source]:
    """A real data set in each layout in which it lies under ``root``."""
    for layout in _LAYOUTS[name]:
        module, _, function = layout.partition(".")
        found = getattr(importlib.import_module(f"ivt_env.data.{module}"), function)(root, name)
        if found is not None:
            yield found


def _absence(name: str, root: Path) -> str:
    """Why a data set cannot be served, where it was looked for, and how to get it."""
    if name == "custom":
        return (
            f"custom: {root} holds no data set of your own with this split; it needs dataset.json and SPLIT.jsonl "
            "(docs/data/custom.md shows both)"
        )
    if name == "mixed":
        from ivt_env.data.mixture import PARTS

        needed = dict.fromkeys(part for parts in PARTS.values() for part in parts)
        absent = [part for part in needed if find_source(*part, root) is None]
        return (
            f"mixed: made of {', '.join(dict.fromkeys(name for name, _ in needed))}; not in {root}: "
            f"{', '.join(' '.join(part) for part in absent)}. To get them: "
            f"{', '.join(dict.fromkeys(f'`ivt data fetch {name}`' for name, _ in absent))}."
        )
    modules = dict.fromkeys(layout.partition(".")[0] for layout in _LAYOUTS[name])
    places = [str(root / place) for m in modules for place in importlib.import_module(f"ivt_env.data.{m}").PLACES[name]]
    also = "".join(
        f" What is in {found.folder} ({found.layout}) serves only {', '.join(found.splits)}."
        for found in _found(name, root)
    )
    return (
        f"{name}: not on this machine; looked for {', '.join(places)}.{also} To get it: `ivt data fetch {name}`. If "
        "you have it elsewhere, pass data_root=... or set the variable IVT_DATA to the folder that holds it."
    )
