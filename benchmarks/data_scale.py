"""A data set of RefCOCOg's size: how long it takes to open, what it holds in memory, what a sample costs.

    python benchmarks/data_scale.py

Writes 80,512 expressions on 20,000 images in the REFER layout (each image is a link to one of a
few real JPEG files, so the disk is spared), converts them, and measures in fresh processes. Times are
given beside another way of doing the same in the same run: the JPEG decode alone, and the reading of
the annotations without the converted form.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

EXPRESSIONS, IMAGES, SIZE = 80_512, 20_000, (480, 640)


@dataclass
class Args:
    """Options."""

    folder: Path | None = None
    """Where to write the set; None: a temporary folder that is removed afterwards."""
    samples: int = 2000
    """Samples read at random, image included."""
    workers: int = 4
    """Processes that open the set at once."""
    json: bool = False
    """Print JSON and nothing else."""


def write_set(root: Path) -> None:
    """80,512 expressions in the REFER layout; images are hard links to 50 JPEG files of 640 x 480."""
    rng = np.random.default_rng(0)
    folder = root / "images" / "mscoco" / "images" / "train2014"
    folder.mkdir(parents=True)
    (root / "refcocog").mkdir()
    originals = []
    for number in range(50):
        # Smooth noise: it compresses about as a photograph does (some 80 KB).
        noise = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        detail = rng.normal(0, 12, (*SIZE, 3))
        pixels = np.asarray(Image.fromarray(noise).resize(SIZE[::-1], Image.Resampling.BICUBIC)) + detail
        path = root / f"original{number}.jpg"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=85)
        originals.append(path)
    images, annotations, refs = [], [], []
    objects = EXPRESSIONS // 2
    for image in range(IMAGES + 2):  # the last two are val and test
        name = f"COCO_train2014_{image + 1:012d}.jpg"
        os.link(originals[image % len(originals)], folder / name)
        images.append({"id": image + 1, "file_name": name, "height": SIZE[0], "width": SIZE[1]})
    for number in range(objects + 2):
        image = number % IMAGES + 1 if number < objects else IMAGES + 1 + number - objects
        box = [float(v) for v in (*rng.uniform(0, 300, 2).round(2), *rng.uniform(20, 180, 2).round(2))]
        annotations.append({"id": number + 1, "image_id": image, "category_id": 1 + number % 80, "bbox": box})
        split = "train" if image <= IMAGES else ("val" if image == IMAGES + 1 else "test")
        texts = [f"the thing of kind {number % 80} number {number} {k}" for k in range(2)]
        sentences = [{"tokens": [], "raw": t, "sent": t, "sent_id": 2 * number + k} for k, t in enumerate(texts)]
        refs.append(
            {
                "sent_ids": [s["sent_id"] for s in sentences],
                "file_name": "",
                "ann_id": number + 1,
                "ref_id": number,
                "image_id": image,
                "split": split,
                "sentences": sentences,
                "category_id": 1 + number % 80,
            }  # fmt: skip
        )
    categories = [{"id": number + 1, "name": f"kind {number}"} for number in range(80)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "refcocog" / "instances.json").write_text(json.dumps(content), encoding="utf-8")
    (root / "refcocog" / "refs(umd).p").write_bytes(pickle.dumps(refs, protocol=2))


def measured(task: str, root: Path, samples: int = 0) -> dict[str, float]:
    """Run a task in a fresh process; its seconds and the memory that it added, in MB."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_TASKS[task], (root, samples))


def _open(root: Path, samples: int) -> dict[str, float]:
    from ivt_env.data import load_dataset

    before, start = _memory(), time.perf_counter()
    dataset = load_dataset("refcocog", "train", root, strict=True)
    sample = dataset[len(dataset) // 2]
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "mb": _memory() - before,
        "whole_mb": _memory(),
        "samples": len(dataset),
        "box": sample.box[0],
    }


def _read(root: Path, samples: int) -> dict[str, float]:
    """Random samples with their images, and the same files decoded by Pillow alone, in turns."""
    from ivt_env.data import load_dataset

    dataset = load_dataset("refcocog", "train", root, strict=True)
    rng = np.random.default_rng(1)
    chosen = rng.choice(len(dataset), samples, replace=False).tolist()
    ours = alone = index = 0.0
    for number in chosen:
        start = time.perf_counter()
        sample = dataset[number]
        index += time.perf_counter() - start
        dataset.image(sample)
        ours += time.perf_counter() - start
        path = dataset.image_path(sample)
        start = time.perf_counter()
        with Image.open(path) as image:
            np.asarray(image.convert("RGB"))
        alone += time.perf_counter() - start
    return {"ms": ours / samples * 1e3, "decode_ms": alone / samples * 1e3, "index_ms": index / samples * 1e3}


def _private(root: Path, samples: int) -> float:
    """Memory in MB that this process has for itself alone after opening and walking over all samples."""
    from ivt_env.data import load_dataset

    def private() -> float:
        fields = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
        return (int(fields["Private_Dirty"].split()[0]) + int(fields["Private_Clean"].split()[0])) / 1024

    before = private()
    dataset = load_dataset("refcocog", "train", root, strict=True)
    for number in range(len(dataset)):
        _ = dataset[number].expression
    return private() - before


def _memory() -> float:
    """Resident memory of this process in MB."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024


_TASKS = {"open": _open, "read": _read}


def main(args: Args) -> None:
    """Write the set, measure and print."""
    with tempfile.TemporaryDirectory() as temporary:
        root = args.folder or Path(temporary)
        if not (root / "refcocog").exists():
            write_set(root)
        first = measured("open", root)
        later = measured("open", root)
        read = measured("read", root, args.samples)
        with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
            private = pool.starmap(_private, [(root, 0)] * args.workers, chunksize=1)
        index = sum(path.stat().st_size for path in (root / "refcocog" / ".ivt_index").iterdir()) / 2**20
    result = {
        "expressions": int(later["samples"]),
        "first_opening_s": first["seconds"],
        "later_opening_s": later["seconds"],
        "first_over_later": first["seconds"] / later["seconds"],
        "later_opening_added_mb": later["mb"],
        "later_opening_process_mb": later["whole_mb"],
        "sample_and_image_ms": read["ms"],
        "decode_alone_ms": read["decode_ms"],
        "sample_over_decode": read["ms"] / read["decode_ms"],
        "sample_alone_ms": read["index_ms"],
        "index_mb": index,
        "private_mb_of_each_worker": private,
    }
    if args.json:
        json.dump(result, sys.stdout, indent=1)
        return
    for key, value in result.items():
        shown = ", ".join(f"{v:.1f}" for v in value) if isinstance(value, list) else f"{value:.4g}"
        print(f"{key:28s} {shown}")


if __name__ == "__main__":
    main(tyro.cli(Args))
