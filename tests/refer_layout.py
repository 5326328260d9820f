"""A small valid REFER folder made from the five photographs, for tests to open or to break."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDERS = {"refcocog": "refcocog", "refcoco": "refcoco", "refcocoplus": "refcoco+"}
IMAGES = "images/mscoco/images/train2014"
PHOTOS = Path(__file__).resolve().parent.parent / "ivt_env" / "assets" / "photos"
EYES = ("the eye on the left", "the eye on the right")

# Every image lies in one split, as in the umd and unc partitions.
_SPLIT_OF = {
    "umd": {"rocket.jpg": "val", "camera.jpg": "test"},
    "google": {"rocket.jpg": "val"},
    "unc": {"rocket.jpg": "val", "camera.jpg": "testA", "coffee.jpg": "testB"},
}


@dataclass
class ReferFolder:
    """What was written; change ``refs`` or ``instances`` and ``save()`` to break something."""

    root: Path
    folder: Path
    refs_path: Path
    instances_path: Path
    images: Path
    refs: list[dict[str, Any]]
    instances: dict[str, Any]
    protocol: int = 2
    known: dict[str, dict[str, Any]] = field(default_factory=dict)
    """sample_id -> photograph, expression, split, the box as drawn (xyxy, px), (height, width)."""

    def save(self) -> None:
        """Write both annotation files as they are now."""
        self.refs_path.write_bytes(pickle.dumps(self.refs, protocol=self.protocol))
        self.instances_path.write_text(json.dumps(self.instances), encoding="utf-8")

    def annotation_of(self, ref: dict[str, Any]) -> dict[str, Any]:
        return next(a for a in self.instances["annotations"] if a["id"] == ref["ann_id"])

    def annotated_image(self, ref: dict[str, Any]) -> dict[str, Any]:
        return next(i for i in self.instances["images"] if i["id"] == ref["image_id"])

    def image_of(self, ref: dict[str, Any]) -> Path:
        return self.images / self.annotated_image(ref)["file_name"]

    def refs_of(self, split: str) -> list[dict[str, Any]]:
        return [ref for ref in self.refs if ref["split"] == split]


def write_refer_folder(
    root: str | Path, dataset: str = "refcocog", partition: str | None = None, protocol: int = 2, images: str = IMAGES
) -> ReferFolder:
    """Write ``<root>/<folder>/{instances.json, refs(<partition>).p}`` and the images.

    Each box of the photographs becomes an annotation and a ref of its own category (the cat's two
    eyes share one); every third ref has a second sentence.
    """
    root = Path(root)
    partition = partition or ("umd" if dataset == "refcocog" else "unc")
    folder, image_folder = root / FOLDERS[dataset], root / images
    folder.mkdir(parents=True, exist_ok=True)
    image_folder.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in (PHOTOS / "annotations.jsonl").read_text("utf-8").splitlines()]
    image_ids: dict[str, int] = {}
    categories: dict[str, int] = {}
    layout = ReferFolder(
        root, folder, folder / f"refs({partition}).p", folder / "instances.json", image_folder, [],
        {"info": {}, "images": [], "licenses": [], "annotations": [], "categories": []}, protocol,
    )  # fmt: skip
    sent_id = 0
    for number, row in enumerate(rows):
        photo = row["image"]
        if photo not in image_ids:
            image_ids[photo] = 581857 + len(image_ids)
            file_name = f"COCO_train2014_{image_ids[photo]:012d}.jpg"
            layout.instances["images"].append(
                {
                    "license": 1,
                    "file_name": file_name,
                    "coco_url": "",
                    "height": row["height"],
                    "width": row["width"],
                    "date_captured": "",
                    "flickr_url": "",
                    "id": image_ids[photo],
                }
            )
            shutil.copyfile(PHOTOS / photo, image_folder / file_name)
        category = "eye" if row["expression"] in EYES else row["expression"].split()[-1]
        category_id = categories.setdefault(category, len(categories) + 1)
        x1, y1, x2, y2 = row["bbox"]
        ref_id, ann_id, image_id = number, 1_719_310 + number, image_ids[photo]
        layout.instances["annotations"].append(
            {
                "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
                "image_id": image_id,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "category_id": category_id,
                "id": ann_id,
            }
        )
        sentences = []
        split = _SPLIT_OF[partition].get(photo, "train")
        for text in [row["expression"], f"{row['expression']} here"][: 2 if number % 3 == 0 else 1]:
            sentences.append({"tokens": text.split(), "raw": text.upper(), "sent_id": sent_id, "sent": text})
            layout.known[f"{ref_id}-{sent_id}"] = {
                "photo": photo,
                "expression": text,
                "split": split,
                "box_px": (x1, y1, x2, y2),
                "size": (row["height"], row["width"]),
                "category": category,
            }
            sent_id += 1
        layout.refs.append(
            {
                "sent_ids": [s["sent_id"] for s in sentences],
                "file_name": f"COCO_train2014_{image_id:012d}_{number}.jpg",  # the suffix REFER really has
                "ann_id": ann_id,
                "ref_id": ref_id,
                "image_id": image_id,
                "split": split,
                "sentences": sentences,
                "category_id": category_id,
            }
        )
    layout.instances["categories"] = [
        {"supercategory": "thing", "id": number, "name": name} for name, number in categories.items()
    ]
    layout.save()
    return layout


def python2_pickle(value: Any, encoding: str) -> bytes:
    """Protocol 2 bytes as Python 2 wrote them: ``str`` as byte strings in ``encoding``."""

    def body(item: Any) -> bytes:
        if isinstance(item, str):
            text = item.encode(encoding)
            return b"T" + struct.pack("<i", len(text)) + text  # BINSTRING
        if isinstance(item, int):
            return b"J" + struct.pack("<i", item)  # BININT
        if isinstance(item, list):
            return b"](" + b"".join(map(body, item)) + b"e"
        assert isinstance(item, dict), item
        return b"}(" + b"".join(body(k) + body(v) for k, v in item.items()) + b"u"

    return b"\x80\x02" + body(value) + b"."
