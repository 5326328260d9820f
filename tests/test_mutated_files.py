"""Whatever is in a file, opening it ends in samples or in one error that names it: no traceback, crash or full memory.

Run with ``IVT_MUTATIONS=1000`` for as many of each family; the test makes a few of each.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from eval_layouts import write_ref_adv, write_ref_l4
from hub_layouts import many, put_images, write_jxu124, write_lmms, write_mdetr, write_vlm_r1, write_vlm_r1_jsonl
from mutations import Mutate, of_bytes, of_json, of_value, written
from PIL import Image
from refer_layout import write_refer_folder

from ivt_env.data import DataError, load_dataset
from ivt_env.data.converters import from_coco
from ivt_env.data.label_studio import from_label_studio
from ivt_env.metrics.benchmarks import BenchmarkError, score
from ivt_env.metrics.predictions import PredictionError, match, read_predictions

EACH = int(os.environ.get("IVT_MUTATIONS", "24"))
AT_ONCE = 60
"""Files that one process opens."""
EXPECTED = (DataError, PredictionError, BenchmarkError)
MOST_KILOBYTES = 1_700_000
"""That opening a file may add to what the process held before: 2 GB with the 0.3 GB of a fresh one."""

Case = tuple[Path, Mutate, Callable[[], Any]]
"""The file that is broken, how, and what opens it."""


def opens(root: Path, name: str, split: str) -> Callable[[], Any]:
    def run() -> None:
        dataset = load_dataset(name, split, root, strict=True)
        for index in range(min(3, len(dataset))):
            dataset.image(dataset[index])

    return run


def parquet(rows: list[dict[str, Any]], schema: pa.Schema) -> Mutate:
    """Mutations of a Parquet file: of its bytes, of values, and of the types of its columns."""
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), file, row_group_size=5)

    def mutate(rng: random.Random) -> bytes:
        if rng.random() < 0.6:
            return of_bytes(file.getvalue(), rng)
        column = rng.choice(schema.names)
        changed = of_value([[row[column] for row in rows]], rng)
        values = changed[0] if changed and isinstance(changed[0], list) else rows
        text = written(values)
        if any(opening * 90 in text for opening in (b"[", b'{"a":')):
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

    return mutate


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
    yield own / "train.jsonl", of_json(lines, lines=True), opens(own, "custom", "train")
    yield own / "dataset.json", of_json(declared), opens(own, "custom", "train")
    things = many("train", 6)
    for write, name in ((write_mdetr, "m"), (write_vlm_r1, "v"), (write_vlm_r1_jsonl, "j")):
        hub = write(root / name, "refcoco", things)
        put_images(root / name / "train2014", things)
        path = hub.path_of("train")
        mutate = of_json(hub.rows["train"], lines=path.suffix == ".jsonl")
        yield path, mutate, opens(root / name, "refcoco", "train")
    refer = write_refer_folder(root / "refer", "refcocog")
    yield refer.instances_path, of_json(refer.instances), opens(root / "refer", "refcocog", "train")

    def refs(rng: random.Random) -> bytes:
        whole = pickle.dumps(refer.refs, protocol=2)
        if rng.random() < 0.6:
            return of_bytes(whole, rng)
        try:
            return pickle.dumps(of_value(refer.refs, rng), protocol=2)
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
    yield root / "a.jsonl", of_json([header, *rows], lines=True), reads(root / "a.jsonl")
    yield root / "b.json", of_json(rows), reads(root / "b.json", box_format="xywh", frame="px")
    of_l4 = [{"id": s.sample_id, "pred_bbox": [1, 2, 30, 40], "format": "xyxy"} for s in samples]
    yield root / "c.json", of_json(of_l4), reads(root / "c.json", layout="refl4")
    resized = [row | {"frame": "resized", "input_size": [480, 640]} for row in rows]
    yield root / "d.jsonl", of_json(resized, lines=True), reads(root / "d.jsonl", box_format="xyxy", frame="resized")


@pytest.mark.parametrize("family", [exports, parquets, predictions])
def test_mutated_file_gives_samples_or_one_error(tmp_path, monkeypatch, family):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cases = list(family(tmp_path / "files"))
    faults: list[str] = []
    outcomes = {"read": 0, "refused": 0}
    most = 0
    for start in range(0, EACH, AT_ONCE):
        report = tmp_path / "report.jsonl"
        report.write_text("")
        # A process of its own: a crash or a full memory must not end the test.
        child = os.fork()
        if child == 0:
            _open_some(cases, range(start, min(EACH, start + AT_ONCE)), report)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        lines = [json.loads(line) for line in report.read_text().splitlines()]
        for line in lines:
            most = max(most, line.get("kilobytes", 0))
            if "outcome" in line:
                outcomes[line["outcome"]] += 1
            elif "fault" in line:
                faults.append(f"{line['number']}: {line['fault']}")
        if status:
            faults.append(f"{lines[-1] if lines else start}: the process ended with {status}")
    print(family.__name__, outcomes, f"{most / 1e6:.2f} GB", f"{len(faults)} faults")
    assert not faults, "\n".join(faults[:20])
    assert most < MOST_KILOBYTES
    assert outcomes["refused"] > EACH / 5, "the mutations break nothing"


def _open_some(cases: list[Case], numbers: range, report: Path) -> None:
    """In the child: never returns."""
    sys.stdout = sys.stderr = open(os.devnull, "w")
    before = _peak_kilobytes()  # of the process that runs the tests
    with report.open("a") as out:
        for number in numbers:
            rng = random.Random(number)
            path, mutate, run = cases[number % len(cases)]
            original = path.read_bytes() if path.exists() else None
            path.write_bytes(mutate(rng))
            print(json.dumps({"number": number, "file": str(path)}), file=out, flush=True)
            line: dict[str, Any] = {"number": number}
            try:
                run()
                line["outcome"] = "read"
            except EXPECTED as error:
                text = str(error)
                line |= {"outcome": "refused"} if len(text) < 2500 else {"fault": f"{len(text)} letters: {text[:300]}"}
            except BaseException:
                line["fault"] = traceback.format_exc()[-1500:]
            line["kilobytes"] = _peak_kilobytes() - before
            print(json.dumps(line), file=out, flush=True)
            if original is not None:
                path.write_bytes(original)
    os._exit(0)


def _peak_kilobytes() -> int:
    status = Path("/proc/self/status")
    if not status.exists():  # another system
        return 0
    return int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")))
