"""Whatever is in a file, opening it ends in samples or in one error that names it: no traceback, crash or full memory.

Run with ``IVT_MUTATIONS=3000`` for as many of each family; the test makes a few of each, each opened in a child.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from changes import changed, forked, mutate, number, written
from eval_layouts import write_ref_adv, write_ref_l4
from hub_layouts import many, put_images, write_jxu124, write_lmms, write_mdetr, write_vlm_r1, write_vlm_r1_jsonl
from PIL import Image
from refer_layout import write_refer_folder

from ivt_env.data import DataError, load_dataset
from ivt_env.data.converters import from_coco
from ivt_env.data.label_studio import from_label_studio
from ivt_env.metrics.benchmarks import BenchmarkError, score
from ivt_env.metrics.predictions import PredictionError, match, read_predictions

EXPECTED = (DataError, PredictionError, BenchmarkError)
Mutate = Callable[[random.Random], bytes]
Case = tuple[Path, Mutate, Callable[[], Any]]
"""The file that is broken, how, and what opens it."""


def opens(root: Path, name: str, split: str) -> Callable[[], Any]:
    def run() -> None:
        dataset = load_dataset(name, split, root, strict=True)
        for index in range(min(3, len(dataset))):
            dataset.image(dataset[index])

    return run


def of_json(value: Any, kind: str = "json") -> Mutate:
    """Mutations of a JSON file, or of JSON lines: of its bytes or of its values."""
    raw = b"\n".join(map(written, value)) if kind == "jsonl" else written(value)
    return lambda rng: mutate(raw, rng, kind)[1]


def parquet(rows: list[dict[str, Any]], schema: pa.Schema) -> Mutate:
    """Mutations of a Parquet file: of its bytes, of values, and of the types of its columns."""
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), file, row_group_size=5)

    def some(rng: random.Random) -> bytes:
        if rng.random() < 0.6:
            return mutate(file.getvalue(), rng)[1]
        column = rng.choice(schema.names)
        _, values = changed([row[column] for row in rows], rng)
        values = values if isinstance(values, list) else rows
        text = written(values)
        if any(opening * 90 in text for opening in (b"[", b'{"a": ')):
            values = ["x"] * len(rows)  # Arrow takes gigabytes to write what it does not read again
        table = pa.Table.from_pylist(rows, schema)
        try:
            field = pa.array(list(values)[: len(rows)] + [None] * max(0, len(rows) - len(values)))
        except (pa.ArrowException, TypeError, ValueError, OverflowError):  # no column can be made of these
            field = pa.array(["x"] * len(rows))
        table = table.set_column(schema.get_field_index(column), column, field)
        out = io.BytesIO()
        pq.write_table(table, out)
        return out.getvalue()

    return some


def exports(root: Path) -> Iterator[Case]:
    folder = root / "images"
    folder.mkdir(parents=True)
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (40, 30), (9, 99, 200)).save(folder / name)

    def converts(convert: Callable[..., Any], file: Path) -> Callable[[], Any]:
        def run() -> None:
            shutil.rmtree(root / "out", ignore_errors=True)
            convert(file, folder, root / "out", "my-set")
            opens(root / "out", "custom", "train")()

        return run

    images = [{"id": n, "file_name": name, "height": 30, "width": 40} for n, name in enumerate(("a.jpg", "b.jpg"))]
    annotations = [{"id": n, "image_id": n % 2, "category_id": 1, "iscrowd": 0, "bbox": [1, 2, 20, 9.5], "caption": "x"}
                   for n in range(6)]  # fmt: skip
    coco = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cat"}]}
    yield root / "coco.json", of_json(coco), converts(from_coco, root / "coco.json")
    base = {"id": "r", "original_width": 40, "original_height": 30, "image_rotation": 0}
    value = {"x": 1.0, "y": 2, "width": 50, "height": 40, "rotation": 0}
    results = [base | {"type": "rectanglelabels", "value": value | {"rectanglelabels": ["cat"]}},
               base | {"type": "textarea", "value": value | {"text": ["the cat"]}},
               base | {"id": "s", "type": "rectangle", "value": value},
               base | {"id": "s", "type": "labels", "value": value | {"labels": ["dog"]}},
               base | {"id": "s", "type": "textarea", "value": value | {"text": ["the dog"]}},
               base | {"id": "p", "type": "polygon", "value": {"points": [[1, 2], [3, 4], [5, 6]]}}]  # fmt: skip
    tasks = [{"id": n, "data": {"image": f"/data/upload/1/{name}"}, "annotations": [
        {"id": 1, "was_cancelled": False, "ground_truth": False, "last_action": None, "result": results,
         "reviews": [{"created_at": "2022", "accepted": True}]}]}
        for n, name in enumerate(("a.jpg", "b.jpg"))]  # fmt: skip
    yield root / "studio.json", of_json(tasks), converts(from_label_studio, root / "studio.json")
    own = root / "own"
    shutil.copytree(folder, own / "images")
    lines = [{"image": "a.jpg", "expression": f"thing {n}", "bbox": [1, 2, 20, 9.5], "siblings": [[1, 1, 9, 9]],
              "id": n, "category": "cat", "meta": {"a": [1]}} for n in range(6)]  # fmt: skip
    declared = {"name": "own", "box": "xyxy", "frame": "px"}
    (own / "dataset.json").write_text(json.dumps(declared))
    (own / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    yield own / "train.jsonl", of_json(lines, "jsonl"), opens(own, "custom", "train")
    yield own / "dataset.json", of_json(declared), opens(own, "custom", "train")
    things = many("train", 6)
    for write, name in ((write_mdetr, "m"), (write_vlm_r1, "v"), (write_vlm_r1_jsonl, "j")):
        hub = write(root / name, "refcoco", things)
        put_images(root / name / "train2014", things)
        path = hub.path_of("train")
        yield path, of_json(hub.rows["train"], path.suffix[1:]), opens(root / name, "refcoco", "train")
    refer = write_refer_folder(root / "refer", "refcocog")
    yield refer.instances_path, of_json(refer.instances), opens(root / "refer", "refcocog", "train")

    def refs(rng: random.Random) -> bytes:
        whole = pickle.dumps(refer.refs, protocol=2)
        if rng.random() < 0.6:
            return mutate(whole, rng)[1]
        try:
            return pickle.dumps(changed(refer.refs, rng)[1], protocol=2)
        except RecursionError:
            return b"(" * 100_000

    yield root / "refer" / "refcocog" / "refs(umd).p", refs, opens(root / "refer", "refcocog", "train")


def parquets(root: Path) -> Iterator[Case]:
    things = many("testA", 12)
    for write, name in ((write_lmms, "l"), (write_jxu124, "j")):
        hub = write(root / name, "refcoco", things)
        put_images(root / name / "train2014", things)
        yield hub.path_of("testA"), parquet(hub.rows["testA"], hub.schema), opens(root / name, "refcoco", "testA")
    for write, name, split in ((write_ref_l4, "refl4", "val"), (write_ref_adv, "refadv", "test")):
        layout = write(root / name)
        path, rows = next(iter(layout.rows.items()))
        yield path, parquet(rows, layout.schema), opens(root / name, name, split)


def predictions(root: Path) -> Iterator[Case]:
    photos = load_dataset("photos", "test", strict=True)
    samples = [photos[index] for index in range(len(photos))]

    def reads(file: Path, **options: Any) -> Callable[[], Any]:
        def run() -> None:
            found = match(read_predictions(file, **options), samples, missing="miss", extra="ignore")
            for rule in ("common", "refcoco", "mdetr", "vlmr1"):
                score(rule, found.boxes_px, samples, resamples=10)

        return run

    root.mkdir(parents=True)
    rows = [{"sample_id": s.sample_id, "box": [10, 20.5, 100, 150], "frame": "px", "text": "it"} for s in samples]
    header = {"format": "xyxy", "frame": "px"}
    yield root / "a.jsonl", of_json([header, *rows], "jsonl"), reads(root / "a.jsonl")
    yield root / "b.json", of_json(rows), reads(root / "b.json", box_format="xywh", frame="px")
    of_l4 = [{"id": s.sample_id, "pred_bbox": [1, 2, 30, 40], "format": "xyxy"} for s in samples]
    yield root / "c.json", of_json(of_l4), reads(root / "c.json", layout="refl4")
    resized = [row | {"frame": "resized", "input_size": [480, 640]} for row in rows]
    yield root / "d.jsonl", of_json(resized, "jsonl"), reads(root / "d.jsonl", box_format="xyxy", frame="resized")


@pytest.mark.parametrize("family", [exports, parquets, predictions])
def test_mutated_file_gives_samples_or_one_error(tmp_path, monkeypatch, family):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cases = list(family(tmp_path / "files"))
    faults, statuses, peak, each = [], Counter(), 0, number(24)
    for seed in range(each):
        path, mutate_it, run = cases[seed % len(cases)]
        original = path.read_bytes() if path.exists() else None

        def opened(path=path, mutate_it=mutate_it, run=run, seed=seed) -> int:
            path.write_bytes(mutate_it(random.Random(seed)))
            try:
                run()
            except EXPECTED as error:
                print(f"error: {error if len(str(error)) < 2500 else 1 / 0}", file=sys.stderr)
                return 2
            return 0

        ended = forked(opened)
        statuses[ended.status] += 1
        peak = max(peak, ended.peak_bytes)
        if not ended.promised:
            faults.append(f"{family.__name__} {seed}: {path}: {ended.status} {ended.killed_by} {ended.errors[-1500:]}")
        if original is not None:
            path.write_bytes(original)
    print(family.__name__, dict(statuses), f"peak {peak / 1e6:.0f} MB, {len(faults)} faults")
    assert not faults, "\n".join(faults[:20])
    assert statuses[2] > each / 5, "the mutations break nothing"
