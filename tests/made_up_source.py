"""A small data set in a layout of its own, for tests to open, to change or to break."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ivt_env.data.checked import BadRows, relative_box
from ivt_env.data.sample import Sample
from ivt_env.data.table import Row, Source, Table

SPLIT_OF = {"p0.png": "train", "p1.png": "train", "p2.png": "train", "p3.png": "val", "p4.png": "test"}
SIZE = (20, 30)
REMEDY = "make the set again"
IMAGE_REMEDY = "copy the images there"


@dataclass
class MadeUp:
    """What was written; change ``rows`` or ``texts`` and ``save()`` to break something."""

    root: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    """``split``, ``id``, ``image``, ``box`` (xyxy, px); ``bad`` makes a row one to be left out."""
    texts: dict[str, str] = field(default_factory=dict)
    """id -> expression."""
    reads: int = 0
    """How often the files were read."""

    @property
    def folder(self) -> Path:
        return self.root / "set"

    @property
    def rows_path(self) -> Path:
        return self.folder / "rows.json"

    @property
    def texts_path(self) -> Path:
        return self.folder / "texts.json"

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def index(self) -> Path:
        return self.folder / ".ivt_index" / "made-up-layout.arrow"

    def save(self) -> None:
        """Write both files as they are now."""
        self.rows_path.write_text(json.dumps(self.rows), encoding="utf-8")
        self.texts_path.write_text(json.dumps(self.texts), encoding="utf-8")

    def many(self, count: int) -> None:
        """``count`` further rows on one image."""
        for number in range(count):
            self.rows.append({"split": "train", "id": f"m{number}", "image": "p0.png", "box": [1, 2, 11, 12]})
            self.texts[f"m{number}"] = f"thing {number}"

    def source(self, **changes: Any) -> Source:
        """Where it lies and how it is read."""
        usual: dict[str, Any] = {
            "name": "made-up", "layout": "layout", "folder": self.folder, "files": (self.rows_path, self.texts_path),
            "splits": ("train", "val", "test"), "read": self._read, "image_folders": [self.images],
            "remedy": REMEDY, "image_remedy": IMAGE_REMEDY,
        }  # fmt: skip
        return Source(**usual | changes)

    def _read(self, bad: BadRows, folder: Path) -> Iterator[Row]:
        self.reads += 1
        texts = json.loads(self.texts_path.read_text(encoding="utf-8"))
        for number, row in enumerate(json.loads(self.rows_path.read_text(encoding="utf-8"))):
            if "bad" in row:
                bad.add(number, row["bad"])
                continue
            size = tuple(row.get("size", SIZE))
            yield Row(
                split=row["split"],
                sample_id=row["id"],
                image_id=row["image"],
                file_name=row["image"],
                size=size,
                expression=texts[row["id"]],
                box=relative_box(row["box"], size, "xyxy"),
                siblings=[relative_box(box, size, "xyxy") for box in row.get("siblings", ())],
                meta={"number": number, "ä": [None, 0.5]},
            )


def write_made_up(root: Path) -> MadeUp:
    """Five images (train, train, train, val, test), three expressions each."""
    made = MadeUp(root)
    made.folder.mkdir(parents=True)
    made.images.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, split in SPLIT_OF.items():
        Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(made.images / name)
        for number in range(3):
            key = f"{name[:2]}-{number}"
            box = [number, 2.5, number + 10, 18.25]
            siblings = [[n, 2.5, n + 10, 18.25] for n in range(number)]
            made.rows.append({"split": split, "id": key, "image": name, "box": box, "siblings": siblings})
            made.texts[key] = f"thing {number} of {name} — Größe"
    made.save()
    return made


def refuse_writing(monkeypatch: Any, *folders: Path) -> None:
    """Make folders read-only, also for an administrator, whom file modes do not stop."""
    mkdir = Path.mkdir

    def guarded(self: Path, *args: Any, **kwargs: Any) -> None:
        if any(self.is_relative_to(folder) for folder in folders):
            raise PermissionError(13, "Permission denied", str(self))
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", guarded)


def read_in_another_process(table: Table) -> tuple[list[Sample], list[int]]:
    """The samples, and the sum of each one's image."""
    samples = list(table)
    return samples, [int(table.image(sample).sum()) for sample in samples]
