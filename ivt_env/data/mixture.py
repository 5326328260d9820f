"""The paper's mixture: RefCOCOg, Ref-Adv-s and Ref-L4 in equal parts (arXiv 2606.13156: 2,400 / 510 / 505).

The paper gives the three totals and the word *balanced*, not the ids, so the choice here is ours:
thirds, drawn with a seed, the remainder of 505 going to the first parts. No image is in two
splits, whichever data set it came through (the sets share COCO images): test is drawn first,
validation from what is left, training from what is left then. The ids are written to a file, and a
file that is there is used as it is, so that others can train and test on the same samples.

Beware: Ref-Adv-s is a test set, and the paper trains on two thirds of it. A score on this mixture
does not compare with the Ref-Adv-s leaderboard, nor does a model trained on it belong there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import operator
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ivt_env.data import cache_folder, find_source
from ivt_env.data.checked import read_json, short
from ivt_env.data.sample import DataError, ImageArray, Sample
from ivt_env.data.table import Table, open_table
from ivt_env.files import write_whole

PARTS: dict[str, tuple[tuple[str, str], ...]] = {
    "test": (("refcocog", "test"), ("refadv", "test"), ("refl4", "test")),
    "val": (("refcocog", "val"), ("refadv", "test"), ("refl4", "val")),
    "train": (("refcocog", "train"), ("refadv", "test"), ("refl4", "val")),
}
"""Split of the mixture, in the order of drawing -> (data set, its split) of each third."""

SIZES = {"test": 505, "val": 510, "train": 2400}
"""Samples in each split (arXiv 2606.13156)."""

IDS_FILE = "ids.json"

Ids = dict[str, list[tuple[str, str, str]]]
"""Split of the mixture -> (data set, its split, its sample id) of each sample, in order."""

_log = logging.getLogger(__name__)


class Mixture:
    """One split of the mixture.

    A sample keeps the label of the data set it came from (``sample.dataset``), so that scores can be
    given for each; its id is ``"<data set>/<id there>"``.
    """

    name = "mixed"

    def __init__(self, split: str, parts: Mapping[tuple[str, str], Table], ids: Ids, where: str) -> None:
        """Put the parts, (data set, its split) -> table, together; ``where`` is how an error names the ids."""
        self.split = split
        self._parts = dict(parts)
        row_of = {key: {sample_id: row for row, sample_id in enumerate(t.sample_ids())} for key, t in parts.items()}
        self._rows: list[tuple[tuple[str, str], int]] = []
        for part, part_split, sample_id in ids[split]:
            row = row_of.get((part, part_split), {}).get(sample_id)
            if row is None:
                raise DataError(
                    f"{where}: {split} names sample {sample_id!r} of {part} {part_split}, which is not there; the "
                    "ids belong to other files than these: get the same files, or delete the ids to draw anew"
                )
            self._rows.append(((part, part_split), row))

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        """The sample at ``index`` (0-based); IndexError outside the range."""
        if not 0 <= operator.index(index) < len(self):
            raise IndexError(f"mixed {self.split} has {len(self)} samples, there is no sample {index}")
        key, row = self._rows[index]
        sample = self._parts[key][row]
        return replace(sample, sample_id=f"{key[0]}/{sample.sample_id}", split=self.split)

    def image(self, sample: Sample) -> ImageArray:
        """The sample's image, uint8 (height, width, 3); shared and read-only."""
        for (part, _), table in self._parts.items():
            if part == sample.dataset or table.name == sample.dataset:
                return table.image(sample)
        raise DataError(f"mixed {self.split} holds nothing of {sample.dataset!r}; give one of its samples")


def draw(tables: Mapping[tuple[str, str], Table], seed: int, sizes: Mapping[str, int] = SIZES) -> Ids:
    """Choose the samples of all splits from ``tables``, which hold every (data set, split) that ``PARTS`` names.

    No two splits share an image, and each third is full; DataError where a data set has too few samples left for its
    third. ``seed`` decides the choice, together with the ids and their order in the files.
    """
    taken_images: set[str] = set()
    ids: Ids = {}
    for split, parts in PARTS.items():
        ids[split] = []
        images_here: set[str] = set()
        for number, key in enumerate(parts):
            wanted = sizes[split] // len(parts) + (number < sizes[split] % len(parts))
            samples_of: dict[str, list[str]] = defaultdict(list)
            for sample_id, image_id in zip(tables[key].sample_ids(), tables[key].image_ids(), strict=True):
                if image_id not in taken_images:
                    samples_of[image_id].append(sample_id)
            found = _fill(samples_of, wanted, random.Random(f"{seed}/{split}/{key[0]}"))
            if len(found) < wanted:
                raise DataError(
                    f"mixed: {split} needs {wanted} samples of {key[0]} {key[1]} on images of its own, and "
                    f"{len(found)} are left; is the data set whole? `ivt data check {key[0]}` tells"
                )
            ids[split] += [(*key, sample_id) for _, sample_id in found]
            images_here |= {image for image, _ in found}
        taken_images |= images_here
    return ids


def _fill(samples_of: Mapping[str, Sequence[str]], wanted: int, rng: random.Random) -> list[tuple[str, str]]:
    """Whole images, in random order, as long as they fit: (image, sample) of up to ``wanted`` samples.

    Ref-Adv-s has four samples more than the mixture takes, so none may be lost to an image whose
    expressions are divided between splits.
    """
    images = sorted(samples_of)
    rng.shuffle(images)
    found: list[tuple[str, str]] = []
    for image in images:
        if len(found) + len(samples_of[image]) <= wanted:
            found += [(image, sample) for sample in samples_of[image]]
    return found


def open_mixture(root: Path, split: str, seed: int = 0) -> Mixture:
    """Open a split; draws the ids with ``seed`` where there is no file of ids yet, and writes it.

    The file is ``mixed/ids.json`` under ``root`` or, where that cannot be written, in the user's cache.
    """
    held = held_ids(root)
    try:
        held = held or redraw(root, seed)
    except OSError as error:
        _log.warning("the ids of the mixture cannot be written, and are drawn anew at each opening: %s", error)
    ids = read_ids(held) if held else draw(_opened(root), seed)
    return Mixture(split, _opened(root, split), ids, str(held or "mixed"))


def held_ids(root: Path) -> Path | None:
    """The file of ids that counts for ``root``; None where there is none yet."""
    return next((path for path in _places(root) if path.exists()), None)


def redraw(root: Path, seed: int) -> Path:
    """Draw the ids, in the place of those that there are; gives the file.

    Raises:
        DataError: where a part is absent, broken or too small.
        OSError: where no file can be written. What there was is kept.
    """
    ids = draw(_opened(root), seed)
    held = held_ids(root)  # another one would not count
    places = _places(root) if held is None else [held]
    for path in places:
        try:
            write_whole(path, json.dumps({"seed": seed, "splits": ids}, indent=0, ensure_ascii=False))
            return path
        except OSError as error:
            _log.warning("%s: the ids are not written there (%s)", path, error)
            failed = error
    raise failed


def _places(root: Path) -> list[Path]:
    """Where the ids may lie; the first that is there counts."""
    places = [root / "mixed" / IDS_FILE]
    with contextlib.suppress(DataError):  # a user without a home folder
        places.append(cache_folder() / "mixed" / IDS_FILE)
    return places


def read_ids(path: Path) -> Ids:
    """Read a file of ids; DataError for one that is broken or of another shape."""
    remedy = "delete it to draw the mixture anew"
    content = read_json(path, remedy)
    splits = content.get("splits") if isinstance(content, dict) else None
    if not isinstance(splits, dict) or splits.keys() != PARTS.keys():
        raise DataError(f"{path}: holds no 'splits' with {', '.join(PARTS)}; {remedy}")
    for split, rows in splits.items():
        for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
            known = isinstance(row, list) and len(row) == 3 and all(isinstance(value, str) for value in row)
            if not known or (row[0], row[1]) not in PARTS[split]:
                raise DataError(
                    f"{path}: {split} row {number} is {short(row)}, not [data set, split, sample id] with one of "
                    f"{', '.join(map(' '.join, PARTS[split]))}; {remedy}"
                )
    return {split: [(row[0], row[1], row[2]) for row in rows] for split, rows in splits.items()}


def _opened(root: Path, *wanted: str) -> dict[tuple[str, str], Table]:
    """The tables that splits of the mixture are made of; those of all, where none is named."""
    opened = {}
    for name, split in dict.fromkeys(part for each in wanted or PARTS for part in PARTS[each]):
        source = find_source(name, split, root)
        if source is None:
            raise DataError(f"mixed: {name} {split} is not in {root}; get it with `ivt data fetch {name}`")
        opened[name, split] = open_table(source, split)
    return opened
