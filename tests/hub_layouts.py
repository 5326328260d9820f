"""Small valid sets in the layouts of jxu124, lmms, MDETR and VLM-R1, for tests to open or to break.

All are written from one list of objects, or from a REFER folder, so that the layouts can be compared.
"""

from __future__ import annotations

import functools
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from refer_layout import ReferFolder

from ivt_env.data import DataError, Sample, refcoco
from ivt_env.data.table import Source, Table, open_table

PROMPT = "Please provide the bounding box coordinate of the region this sentence describes: "
EXIF_ORIENTATION = 0x0112

# Columns and Arrow types as the Hub's files have them, without most of those that are not read.
_SENTENCE = pa.struct({"raw": pa.string(), "sent": pa.string(), "sent_id": pa.int64()})
JXU124_SCHEMA = pa.schema(
    {
        "sent_ids": pa.list_(pa.int64()), "file_name": pa.string(), "ann_id": pa.int64(), "ref_id": pa.int64(),
        "image_id": pa.int64(), "split": pa.string(), "sentences": pa.list_(_SENTENCE), "category_id": pa.int64(),
        "raw_anns": pa.string(), "raw_image_info": pa.string(), "bbox": pa.list_(pa.float64()),
    }
)  # fmt: skip
LMMS_SCHEMA = pa.schema(
    {
        "question_id": pa.string(), "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "question": pa.string(), "answer": pa.list_(pa.string()), "bbox": pa.list_(pa.float32()),
        "file_name": pa.string(),
    }
)  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """One object with its expressions, as the annotators have it."""

    split: str
    image_id: int
    ann_id: int
    ref_id: int
    xywh: tuple[float, float, float, float]
    size: tuple[int, int]
    """(height, width)."""
    sentences: tuple[tuple[int, str], ...]
    """(sent_id, expression)."""
    image: bytes
    category_id: int = 1
    category: str = "person"

    @property
    def file_name(self) -> str:
        return f"COCO_train2014_{self.image_id:012d}.jpg"

    @property
    def xyxy(self) -> list[float]:
        x, y, w, h = self.xywh
        return [x, y, x + w, y + h]

    @property
    def relative(self) -> tuple[float, ...]:
        """xyxy, relative to the image."""
        height, width = self.size
        return tuple(v / s for v, s in zip(self.xyxy, (width, height, width, height), strict=True))


def things_of(refer: ReferFolder) -> list[Thing]:
    """The objects of a REFER folder."""
    names = {entry["id"]: entry["name"] for entry in refer.instances["categories"]}
    found = []
    for ref in refer.refs:
        image = refer.annotated_image(ref)
        found.append(
            Thing(
                ref["split"], ref["image_id"], ref["ann_id"], ref["ref_id"],
                tuple(refer.annotation_of(ref)["bbox"]), (image["height"], image["width"]),
                tuple((s["sent_id"], s["sent"]) for s in ref["sentences"]), refer.image_of(ref).read_bytes(),
                ref["category_id"], names[ref["category_id"]],
            )
        )  # fmt: skip
    return found


@functools.cache
def image_bytes(
    width: int, height: int, mode: str = "RGB", kind: str = "JPEG", orientation: int = 1, shade: int = 128
) -> bytes:
    """A small image; ``orientation`` is an EXIF note."""
    if mode == "P":
        image = Image.new("P", (width, height), shade % 3)
        image.putpalette([200, 30, 30, 30, 200, 30, 30, 30, 200])
    else:
        bands = len(Image.new(mode, (1, 1)).getbands())
        image = Image.new(mode, (width, height), shade if bands == 1 else (shade, 90, 30, 0)[:bands])
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    buffer = io.BytesIO()
    image.save(buffer, kind, exif=exif)
    return buffer.getvalue()


RECORD_PIXELS = [103.93, 299.99, 238.15, 477.41]


def record(split: str = "train") -> Thing:
    """RefCOCO's first object, as published: xyxy 103.93, 299.99, 238.15, 477.41 in 427x640."""
    return Thing(
        split, 581857, 1719310, 0, (103.93, 299.99, 134.22, 177.42), (640, 427),
        ((0, "the lady with the blue shirt"), (1, "lady with back to us"), (2, "blue shirt")), image_bytes(427, 640),
    )  # fmt: skip


def is_the_record(sample: Sample) -> None:
    """Assert that a sample is the published record's first sentence."""
    assert sample.expression == "the lady with the blue shirt"
    assert (sample.size, sample.image_id, sample.meta["image_id"]) == ((640, 427), "coco-581857", 581857)
    pixels = np.multiply(sample.box, [427, 640, 427, 640])
    assert np.allclose(pixels, RECORD_PIXELS, rtol=0, atol=1e-9)
    # What VLM-R1's files state as its box from 0 to 1000.
    assert np.floor(np.multiply(sample.box, 1000)).tolist() == [243, 468, 557, 745]


def odd_things(split: str) -> list[Thing]:
    """Odd sizes, expressions beyond ASCII, and images of every kind; each image has one object."""
    images = [
        ("el niño à gauche", (333, 77), image_bytes(333, 77)),
        ("左边的猫 🐈", (31, 501), image_bytes(31, 501, "L")),
        ("der größte Bär", (64, 48), image_bytes(64, 48, "P", "PNG")),
        ("кот", (97, 101), image_bytes(97, 101, "CMYK")),
        # A quarter turn: as a viewer shows it, the image is 50 wide and 120 high.
        ('the "red" one', (120, 50), image_bytes(120, 50, orientation=6)),
        # Half a turn and square: no size tells the frames apart, only that boxes are in the stored one.
        ("a\tb \\ c", (88, 88), image_bytes(88, 88, orientation=3)),
        ("l'été", (640, 427), image_bytes(640, 427, "L", "PNG")),
    ]
    return [
        Thing(
            split, 100 + number, 7000 + number, 500 + number,
            (1.25, 2.5 + number, (width - 3.75) / 2, (height - 12.5) / 3), (height, width),
            ((900 + number, expression),), image,
        )
        for number, (expression, (width, height), image) in enumerate(images)
    ]  # fmt: skip


def many(split: str, objects: int = 40) -> list[Thing]:
    """Objects with one expression each, in one image per split; enough to break some."""
    image_id = 1000 + sum(map(ord, split))
    return [
        Thing(
            split, image_id, 10 * image_id + n, image_id + n, (1.5 + n, 2.25, 30.75, 20.5), (80, 120),
            ((10 * image_id + n, f"thing {n} of {split}"),), image_bytes(120, 80, shade=len(split)),
        )
        for n in range(objects)
    ]  # fmt: skip


@dataclass
class Hub:
    """What was written; change ``rows`` and ``save()`` to break something."""

    layout: str
    find: Callable[[Path, str], Source | None]
    root: Path
    name: str
    rows: dict[str, Any]
    """Split -> rows (for MDETR, the whole content)."""
    write: Callable[[Hub], None]
    path_of: Callable[[str], Path]
    schema: Any = None
    """Of the Parquet files."""

    def __post_init__(self) -> None:
        self.save()

    def save(self) -> None:
        """Write every file as it is now."""
        self.write(self)

    def open(self, split: str) -> Table:
        source = self.find(self.root, self.name)
        assert source is not None
        return open_table(source, split, need_images=False)

    def samples(self, split: str) -> list[Sample]:
        table = self.open(split)
        return [table[index] for index in range(len(table))]

    def error(self, split: str) -> str:
        """The message with which opening fails."""
        try:
            self.open(split)
        except DataError as error:
            return str(error)
        raise AssertionError("opened without an error")

    def left_out(self, split: str, log: Any, count: int = 1) -> str:
        """What the log says of the only bad rows; the other rows must be served."""
        total = sum(len(self.expressions(s)) for s in self.rows)
        table = self.open(split)
        assert table.skipped == count
        assert sum(len(self.open(s)) for s in self.rows) == total - count
        return "\n".join(log.messages)

    def expressions(self, split: str) -> list[Any]:
        """One entry per expression in the rows as they are."""
        rows = self.rows[split]["images"] if self.layout == "mdetr" else self.rows[split]
        key = {"jxu124": "sentences", "lmms": "answer"}.get(self.layout)
        return [None for row in rows for _ in (row[key] or [None] if key else [None])]


def put_images(folder: Path, things: list[Thing]) -> None:
    """Write the objects' images under COCO's names."""
    folder.mkdir(parents=True, exist_ok=True)
    for thing in things:
        (folder / thing.file_name).write_bytes(thing.image)


def _by_split(things: list[Thing]) -> dict[str, list[Thing]]:
    return {split: [t for t in things if t.split == split] for split in dict.fromkeys(t.split for t in things)}


def _expressions(things: list[Thing]) -> list[tuple[Thing, str]]:
    return [(thing, sentence) for thing in things for _, sentence in thing.sentences]


def _write_parquet(hub: Hub) -> None:
    for split, rows in hub.rows.items():
        path = hub.path_of(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        names = [n for n in hub.schema.names if not rows or n in rows[0]]
        schema = pa.schema([hub.schema.field(n) for n in names])
        pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=10)


def write_jxu124(root: Path, name: str, things: list[Thing]) -> Hub:
    """``jxu124/<name>/data/<split>-00000-of-00001-<hash>.parquet``; one row per object."""
    rows = {}
    for split, held in _by_split(things).items():
        rows[split] = [
            {
                "sent_ids": [number for number, _ in t.sentences],
                "file_name": f"COCO_train2014_{t.image_id:012d}_{t.ref_id}.jpg",
                "ann_id": t.ann_id,
                "ref_id": t.ref_id,
                "image_id": t.image_id,
                "split": split,
                "sentences": [{"raw": s.upper(), "sent": s, "sent_id": number} for number, s in t.sentences],
                "category_id": t.category_id,
                "raw_anns": json.dumps(
                    {"image_id": t.image_id, "bbox": list(t.xywh), "category_id": t.category_id, "id": t.ann_id}
                ),
                "raw_image_info": json.dumps(
                    {"file_name": t.file_name, "height": t.size[0], "width": t.size[1], "id": t.image_id}
                ),
                "bbox": t.xyxy,
            }
            for t in held
        ]  # fmt: skip
    folder = root / "jxu124" / name / "data"
    prefixes = refcoco.PREFIXES
    return Hub(
        "jxu124", refcoco.jxu124, root, name, rows, _write_parquet,
        lambda split: folder / f"{prefixes[split]}-00000-of-00001-94431d5f4bd5b93f.parquet", JXU124_SCHEMA,
    )  # fmt: skip


def write_lmms(root: Path, name: str, things: list[Thing]) -> Hub:
    """``lmms/<Name>/data/<split>-00000-of-00001.parquet``, images inside; one row per object."""
    rows = {
        split: [
            {
                "question_id": str(t.ann_id),
                "image": {"bytes": t.image, "path": t.file_name},
                "question": "Please carefully observe the area circled in the image and come up with a caption.",
                "answer": [s for _, s in t.sentences],
                "bbox": list(t.xywh),
                # The end is the annotation in RefCOCOg, and a small running number in the other two.
                "file_name": f"COCO_train2014_{t.image_id:012d}_{t.ann_id if name == 'refcocog' else running}.jpg",
            }
            for running, t in enumerate(held)
        ]
        for split, held in _by_split(things).items()
    }
    folder = root / "lmms" / refcoco.LMMS_FOLDERS[name] / "data"
    return Hub(
        "lmms", refcoco.lmms, root, name, rows, _write_parquet,
        lambda split: folder / f"{split}-00000-of-00001.parquet", LMMS_SCHEMA,
    )  # fmt: skip


def _write_text(hub: Hub) -> None:
    """JSON, or JSON lines."""
    for split, content in hub.rows.items():
        path = hub.path_of(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jsonl":
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        else:
            text = json.dumps(content)
        path.write_text(text, encoding="utf-8")


def write_mdetr(root: Path, name: str, things: list[Thing]) -> Hub:
    """``mdetr/finetune_<set>_<split>.json``; one image entry and one annotation per expression."""
    rows: dict[str, Any] = {}
    names = {t.category_id: t.category for t in things}
    categories = [{"id": number, "name": label} for number, label in names.items()]
    for split, held in _by_split(things).items():
        content: dict[str, Any] = {"images": [], "annotations": []}
        for running, (t, sentence) in enumerate(_expressions(held)):
            content["images"].append(
                {
                    "file_name": t.file_name, "height": t.size[0], "width": t.size[1], "id": running,
                    "original_id": t.image_id, "caption": sentence, "dataset_name": refcoco.MDETR_LABELS[name],
                }
            )  # fmt: skip
            content["annotations"].append(
                {
                    "image_id": running, "category_id": t.category_id, "id": running, "bbox": list(t.xywh),
                    "original_id": t.ann_id,
                }
            )  # fmt: skip
        rows[split] = content | {"categories": categories}
    return Hub(
        "mdetr", refcoco.mdetr, root, name, rows, _write_text,
        lambda split: root / "mdetr" / f"finetune_{refcoco.MDETR_LABELS[name]}_{split}.json",
    )  # fmt: skip


def write_vlm_r1(root: Path, name: str, things: list[Thing]) -> Hub:
    """``vlm_r1/rec_jsons_processed/<set>_<split>.json``; one object per expression."""
    rows: dict[str, Any] = {}
    for split, held in _by_split(things).items():
        rows[split] = []
        for running, (t, sentence) in enumerate(_expressions(held)):
            x1, y1, x2, y2 = t.xyxy
            rows[split].append(
                {
                    "height": t.size[0], "width": t.size[1], "original_id": t.ann_id, "image_id": running,
                    "dataset_name": refcoco.MDETR_LABELS[name], "category_id": t.category_id,
                    "bbox_list": [[x1, y1, x2 - 1, y2 - 1]], "image": f"train2014/{t.file_name}",
                    "normal_caption": sentence, "solution": [x1, y1, x2, y2],
                    "normalized_solution": [math.floor(1000 * v) for v in t.relative],
                }
            )  # fmt: skip
    folder = root / "vlm_r1" / "rec_jsons_processed"
    return Hub(
        "vlm_r1", refcoco.vlm_r1, root, name, rows, _write_text,
        lambda split: folder / f"{refcoco.VLM_R1_LABELS[name]}_{split}.json",
    )  # fmt: skip


def write_vlm_r1_jsonl(root: Path, name: str, things: list[Thing], as_text: bool = False) -> Hub:
    """``vlm_r1/rec_jsons_processed/<set>_train.jsonl`` and the images, below ``vlm_r1/``."""
    things = [replace(t, split="train") for t in things]
    put_images(root / "vlm_r1" / "train2014", things)
    rows = [
        {
            "id": running,
            "image": f"train2014/{t.file_name}",
            "conversations": [
                {"from": "human", "value": f"<image>{PROMPT}{sentence}."},
                {"from": "gpt", "value": str(t.xyxy) if as_text else t.xyxy},
            ],
        }
        for running, (t, sentence) in enumerate(_expressions(things))
    ]
    folder = root / "vlm_r1" / "rec_jsons_processed"
    return Hub(
        "vlm_r1", refcoco.vlm_r1, root, name, {"train": rows}, _write_text,
        lambda split: folder / f"{refcoco.VLM_R1_LABELS[name]}_{split}.jsonl",
    )  # fmt: skip


def same_objects(found: list[Sample], expected: list[Sample], shared_meta: tuple[str, ...]) -> None:
    """Assert that two layouts give the same samples, but for their ids, siblings and the rest of ``meta``.

    Box, size, image, expression and label must be equal to the last bit.
    """

    def plain(samples: list[Sample]) -> list[tuple[Any, ...]]:
        return sorted(
            (s.image_id, s.expression, s.box, s.size, s.dataset, s.split, *(s.meta[key] for key in shared_meta))
            for s in samples
        )

    assert len(expected) > 0
    assert plain(found) == plain(expected)
    assert all(s.siblings == () for s in found)
