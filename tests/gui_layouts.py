"""Small test sets of screens in the exact layouts in which they are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

WIDTH, HEIGHT = 320, 200
BOX = (32, 20, 96, 60)
"""xyxy in pixels, of every row."""
XYWH = [32, 20, 64, 40]
RELATIVE = [0.1, 0.1, 0.3, 0.3]


def _rows() -> dict[str, tuple[str, list[dict[str, Any]], str]]:
    """Data set -> annotation file, rows, and where the images of them lie."""
    size = [WIDTH, HEIGHT]
    v2 = {"instruction": "close", "bbox": XYWH, "data_type": "icon", "data_source": "windows"}
    pro = {"instruction": "close", "bbox": list(BOX), "img_size": size, "ui_type": "icon", "group": "CAD",
           "application": "blender", "platform": "windows", "instruction_cn": "x", "language": "en"}  # fmt: skip
    vision = {"prompt_to_evaluate": "close", "image_size": size, "element_type": "icon", "platform": "gimp"}
    bench = {"instruction": "close", "bbox": RELATIVE, "image_size": size, "platform": "os_web", "app_name": "a",
             "data_type": "basic"}  # fmt: skip
    world = {"image_path": "a.png", "image_size": size, "instruction": "close", "GUI_types": ["Icon"]}
    polygon = [32, 20, 96, 20, 64, 60]
    return {
        "screenspotv2": ("screenspot_web_v2.json", [v2 | {"img_filename": f"{k}.png"} for k in "aab"], ""),
        "screenspotpro": (
            "annotations/blender_windows.json",
            [pro | {"img_filename": f"blender/{k}.png", "id": f"blender_{n}"} for n, k in enumerate("aab")],
            "blender",
        ),
        "uivision": (
            "annotations/element_grounding/element_grounding_basic.json",
            [
                vision | {"bbox": list(BOX), "image_path": "element_grounding/a.png"},
                vision | {"bbox": [96, 60, 32, 20], "image_path": "element_grounding/b.png"},
            ],
            "element_grounding",
        ),
        "uivisionlayout": (
            "annotations/layout_grounding/layout_grounding.json",
            [
                {
                    "name": "tools",
                    "explanation": f"holds tool {k}",
                    "bbox": list(BOX),
                    "image_size": size,
                    "platform": "gimp",
                    "image_path": f"layout_grounding/{k}.png",
                }
                for k in "ab"
            ],
            "layout_grounding",
        ),
        "mmbenchgui": (
            "L2_annotations.json",
            # the second path names its folder, as the example on the set's page does
            [bench | {"index": n, "image_path": path} for n, path in enumerate(("a.png", "os_web/b.png"))],
            "os_web",
        ),
        "osworldg": (
            "OSWorld-G.json",
            [
                world | {"id": "a-0", "box_type": "bbox", "box_coordinates": XYWH},
                world | {"id": "a-1", "box_type": "polygon", "box_coordinates": polygon, "image_path": "b.png"},
                world | {"id": "a-2", "box_type": "refusal", "box_coordinates": [-1, -1, -1, -1]},
            ],
            "",
        ),
    }


FOLDERS = {"uivisionlayout": "uivision"}
IMAGES = {"screenspotv2": "screenspotv2_image", "mmbenchgui": "offline_images"}


def plain_image(shade: int) -> Image.Image:
    pixels = np.full((HEIGHT, WIDTH, 3), shade, np.uint8)
    pixels[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 255 - shade
    return Image.fromarray(pixels)


def write_gui(root: Path) -> None:
    """All seven below ``root``."""
    for name, (file, rows, below) in _rows().items():
        folder = root / FOLDERS.get(name, name)
        path = folder / file
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(rows), encoding="utf-8")
        images = folder / IMAGES.get(name, "images") / below
        images.mkdir(parents=True)
        for shade, letter in enumerate("ab"):
            plain_image(50 + shade).save(images / f"{letter}.png")
    held = root / "screenspot" / "data"
    held.mkdir(parents=True)
    for letter, shade in (("a", 50), ("b", 51)):
        plain_image(shade).save(held / f"{letter}.png")
    rows = [
        {"file_name": f"{k}.png", "bbox": RELATIVE, "instruction": "close", "data_type": "icon", "data_source": "ios",
         "image": {"bytes": (held / f"{k}.png").read_bytes(), "path": f"{k}.png"}}
        for k in "aab"
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), held / "test-00000-of-00001.parquet")
