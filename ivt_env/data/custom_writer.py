"""Writes a data set of one's own: lines, images and ``dataset.json`` (``ivt_env.data.custom`` reads it).

Every file appears whole or not at all, ``dataset.json`` last, and nothing is overwritten.
"""

from __future__ import annotations

import filecmp
import json
import logging
import os
import random
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ivt_env.data.checked import BadRows, short
from ivt_env.data.custom import SPLITS, Declared, check_name, read_declared
from ivt_env.data.sample import DataError
from ivt_env.files import whole_file, write_whole

Splits = str | Mapping[str, float]
"""A split for everything, or split -> share of the images; the shares add up to 1."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Converted:
    """What was written."""

    folder: Path
    counts: Mapping[str, int]
    """Split -> expressions."""
    images: int
    left_out: Sequence[str]
    """Why, for each thing that could not be used."""
    notes: Mapping[str, int]
    """What else was passed over or decided, and how often."""


class Writer:
    """Collects lines, then writes images, lines and ``dataset.json``, in this order."""

    def __init__(self, out: Path, declared: Declared, copy: bool, add_split: str | None = None) -> None:
        """Refuse what is there already.

        ``add_split`` is the only split to write, into a folder that may hold others; None: into a new one.
        """
        check_name(declared.name)
        self.declared = declared
        self._out, self._copy = out, copy
        self.lines: list[dict[str, Any]] = []
        self._source_of: dict[str, Path] = {}
        if add_split is not None and add_split not in SPLITS:
            raise DataError(f"a data set of one's own has no split {add_split!r}; give split=, {', '.join(SPLITS)}")
        for split in SPLITS if add_split is None else (add_split,):
            if os.path.lexists(out / f"{split}.jsonl"):
                raise DataError(f"{out / f'{split}.jsonl'}: is there already; choose another folder, or delete it")
        if os.path.lexists(out / "dataset.json"):
            there = read_declared(out / "dataset.json")
            if add_split is None or there != declared:
                raise DataError(
                    f"{out / 'dataset.json'}: is there already, of {there.name!r} ({there.box}, {there.frame}); choose "
                    "another folder, or delete it"
                )

    def add(
        self, name: str, expressions: Sequence[str], image: str, path: Path, size: tuple[int, int],
        bbox: Sequence[float], **more: Any,
    ) -> None:  # fmt: skip
        """A line for each expression of an object; its image, of (height, width), will be ``images/<image>``.

        ``more`` are other keys of a line; what is None is left out.
        """
        more = {key: value for key, value in more.items() if value is not None}
        for number, expression in enumerate(expressions):
            line_id = f"{name}-{number}" if len(expressions) > 1 else name
            line = {"id": line_id, "image": image, "width": size[1], "height": size[0]}
            self.lines.append(line | {"expression": expression, "bbox": list(bbox)} | more)
            self._source_of[image] = path

    def write(self, split: Splits, seed: int, bad: BadRows, notes: Mapping[str, int], remedy: str) -> Converted:
        """Write what was added; DataError (with the remedy) where that is nothing, or where it cannot be written."""
        if not self.lines:
            said = "; ".join(f"{note}: {count}" for note, count in notes.items())
            raise DataError(
                f"{self._out}: nothing to write, as no object has an expression{said and f' ({said})'}; {remedy}"
            )
        split_of = _split_of(self.lines, split, seed)
        lines: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for line in self.lines:
            lines[split_of[line["image"]]].append(line)
        for image, source in self._source_of.items():
            _place(source, self._out / "images" / image, self._copy)
        for each, held in lines.items():
            written = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in held)
            write_whole(self._out / f"{each}.jsonl", written)
        declared = {key: value for key, value in asdict(self.declared).items() if key != "overhang" or value}
        write_whole(self._out / "dataset.json", json.dumps(declared) + "\n")
        for note, count in notes.items():
            _log.warning("%s: %s (%d)", self._out, note, count)
        counts = {each: len(lines[each]) for each in SPLITS if each in lines}
        return Converted(self._out, counts, len(self._source_of), tuple(bad.reasons), dict(notes))


def _split_of(lines: Sequence[Mapping[str, Any]], split: Splits, seed: int) -> dict[str, str]:
    """Image -> split; all expressions of an image go into one."""
    images = sorted({line["image"] for line in lines})
    shares = {split: 1.0} if isinstance(split, str) else dict(split)
    unknown = sorted(set(shares) - set(SPLITS))
    if unknown or not shares:
        raise DataError(f"split {short(split)}: {short(unknown)} is none of {', '.join(SPLITS)}")
    if not all(share > 0 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-6:
        raise DataError(f"split {short(split)}: the shares must be above 0 and add up to 1")
    random.Random(seed).shuffle(images)
    found: dict[str, str] = {}
    start, reached = 0, 0.0
    for each, share in shares.items():
        reached += share
        end = round(reached * len(images))
        if end <= start:
            raise DataError(
                f"split {short(split)}: of {len(images)} images none is left for {each}; give it a larger share, or "
                "leave it out"
            )
        found |= dict.fromkeys(images[start:end], each)
        start = end
    return found


def same_image(a: Path, b: Path) -> bool:
    """Whether two files are one, or hold the same bytes; False where one cannot be read."""
    try:
        return os.path.samefile(a, b) or filecmp.cmp(a, b, shallow=False)
    except OSError:
        return False


def _place(source: Path, target: Path, copy: bool) -> None:
    """Copy or link an image; one that is there with the same content is left alone."""
    if os.path.lexists(target):
        if same_image(source, target):
            return
        raise DataError(f"{target}: another image is there already; choose another folder, or delete it")
    if copy:
        with source.open("rb") as read, whole_file(target) as file:
            shutil.copyfileobj(read, file)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:  # from the real folder to the real file: a relative link counts from where it really lies
        target.symlink_to(os.path.relpath(source.resolve(), target.parent.resolve()))
    except OSError as error:
        raise DataError(f"{target}: cannot be linked from {source} ({error.strerror}); copy it (--copy)") from error
