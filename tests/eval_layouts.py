"""Small valid Ref-L4, Ref-Adv-s and custom folders, with the columns and arrow types of the originals."""

from __future__ import annotations

import io
import json
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ivt_env.data.sample import DataError
from ivt_env.data.table import Table, open_table

PHOTOS = Path(__file__).resolve().parent.parent / "ivt_env" / "assets" / "photos"
EXPRESSIONS = ("the ‘näive’ café 猫 🐈", "الكرسي على اليسار", "the red mug, left of the plate")

REF_L4 = pa.schema(
    {
        "id": pa.int64(), "caption": pa.string(), "bbox": pa.list_(pa.float64()), "bbox_area": pa.float64(),
        "bbox_id": pa.string(), "ori_category_id": pa.string(), "image_id": pa.string(), "height": pa.int64(),
        "width": pa.int64(), "file_name": pa.string(), "is_rewrite": pa.bool_(), "split": pa.string(),
    }
)  # fmt: skip
REF_ADV = pa.schema(
    {
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "file_name": pa.string(),
        "normal_caption": pa.string(), "solution": pa.list_(pa.float64()), "width": pa.int64(), "height": pa.int64(),
        "image_source": pa.string(), "human_authored": pa.bool_(), "use_negation": pa.bool_(),
        "distractors": pa.string(),
    }
)  # fmt: skip


def photo_rows() -> list[dict[str, Any]]:
    """The photographs' annotations: image, expression, bbox (xyxy, px), height, width."""
    return [json.loads(line) for line in (PHOTOS / "annotations.jsonl").read_text("utf-8").splitlines()]


def image_bytes(size: tuple[int, int], mode: str = "RGB", orientation: int = 1) -> bytes:
    """A whole image of (height, width) as stored: a gradient, so that turning it shows."""
    height, width = size
    ramp = np.linspace(0, 255, height * width).reshape(height, width).astype(np.uint8)
    image = Image.fromarray(ramp).convert("RGB" if mode == "P" else mode)
    image = image.quantize(16) if mode == "P" else image
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(file, "PNG" if mode in ("P", "RGBA") else "JPEG", **({"exif": exif} if orientation != 1 else {}))
    return file.getvalue()


def bomb_bytes(width: int = 60_000, height: int = 60_000) -> bytes:
    """A PNG that says it is 3.6 gigapixels large, in some bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@dataclass
class Folder:
    """What was written; change ``rows`` (by file) and ``save()`` to break something."""

    root: Path
    images: Path
    rows: dict[Path, list[dict[str, Any]]]
    schema: pa.Schema
    row_group_size: int = 1000

    def save(self) -> None:
        for path, rows in self.rows.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows, self.schema), path, row_group_size=self.row_group_size)

    @property
    def all_rows(self) -> list[dict[str, Any]]:
        return [row for rows in self.rows.values() for row in rows]


def write_ref_l4(root: Path, below: str = "") -> Folder:
    """Val: three photographs, as COCO's; test: the other two, as Objects365's."""
    images = root / "refl4" / "images" / below
    images.mkdir(parents=True, exist_ok=True)
    val, test = (root / "refl4" / f"ref-l4-{split}.parquet" for split in ("val", "test"))
    folder = Folder(root, images, {val: [], test: []}, REF_L4)
    numbers: dict[str, int] = {}
    for number, row in enumerate(photo_rows()):
        image = numbers.setdefault(row["image"], 128974 + len(numbers))
        coco = len(numbers) <= 3
        file_name = f"COCO_train2014_{image:012d}.jpg" if coco else f"objects365_v2_{image:08d}.jpg"
        (images / file_name).write_bytes((PHOTOS / row["image"]).read_bytes())
        x1, y1, x2, y2 = row["bbox"]
        folder.rows[val if coco else test].append(
            {
                "id": number,
                "caption": row["expression"] if number else EXPRESSIONS[0],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "bbox_area": float((x2 - x1) * (y2 - y1)),
                "bbox_id": f"{'coco' if coco else 'o365'}_{500000 + number}",
                "ori_category_id": "refcoco_1" if coco else "o365_64",
                "image_id": f"{'coco' if coco else 'o365'}_{image}",
                "height": row["height"],
                "width": row["width"],
                "file_name": file_name,
                "is_rewrite": number % 2 == 0,
                "split": "val" if coco else "test",
            }
        )
    folder.save()
    return folder


def write_ref_adv(root: Path, below: str = "") -> Folder:
    """The photographs; the first three as COCO's, the others as Open Images'."""
    path = root / "refadv" / below / "train-00000-of-00001.parquet"
    folder = Folder(root, root / "refadv" / ".ivt_index" / "images", {path: []}, REF_ADV, row_group_size=5)
    numbers: dict[str, int] = {}
    for number, row in enumerate(photo_rows()):
        image = numbers.setdefault(row["image"], 547144 + len(numbers))
        coco = len(numbers) <= 3
        folder.rows[path].append(
            {
                "image": {"bytes": (PHOTOS / row["image"]).read_bytes(), "path": None},
                "file_name": f"{image:012d}.jpg" if coco else f"{image:016x}.jpg",
                "normal_caption": row["expression"] if number else EXPRESSIONS[1],
                "solution": [float(value) for value in row["bbox"]],
                "width": row["width"],
                "height": row["height"],
                "image_source": "coco_val2017" if coco else "openimages",
                "human_authored": coco,
                "use_negation": number % 3 == 0,
                "distractors": str(2 + number % 6),
            }
        )
    folder.save()
    return folder


def in_frame(corners: list[float], size: tuple[int, int], box: str, frame: str) -> list[float]:
    """xyxy in pixels as a file of this convention and frame writes it."""
    height, width = size
    unit = {"relative": 1, "thousandths": 1000}.get(frame)
    x1, y1, x2, y2 = corners
    if unit:
        x1, y1, x2, y2 = x1 * unit / width, y1 * unit / height, x2 * unit / width, y2 * unit / height
    return [x1, y1, x2 - x1, y2 - y1] if box == "xywh" else [x1, y1, x2, y2]


def write_custom(
    root: Path, lines: list[dict[str, Any]], split: str = "train", box: str = "xyxy", frame: str = "px"
) -> Path:
    """``dataset.json`` and one split; images are the caller's. Gives the file of lines."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps({"name": "my-set", "box": box, "frame": frame}), "utf-8")
    path = root / f"{split}.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    return path


def opened(find: Any, root: Path, name: str, split: str) -> Table:
    """The split through a reader module's ``find``."""
    source = find(root, name)
    assert source is not None
    return open_table(source, split)


def failure(find: Any, root: Path, name: str, split: str) -> str:
    """What opening says; it must fail."""
    try:
        opened(find, root, name, split)
    except DataError as error:
        return str(error)
    raise AssertionError(f"{name} {split} opened, and should not have")
