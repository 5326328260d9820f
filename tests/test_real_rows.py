"""Rows of public data sets, as their publishers give them, are read and scored as they stand.

The rows are not part of the project: these tests run where a folder ``shared/real`` lies above the checkout.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from ivt_agents.cli import main
from ivt_env.data import DataError, refcoco, refer
from ivt_env.data.converters import from_coco
from ivt_env.data.label_studio import from_label_studio
from ivt_env.data.table import Table, open_table

PLACES = [folder / "shared" / "real" for folder in Path(__file__).resolve().parents]
REAL = next((place for place in PLACES if (place / "README.md").is_file()), None)

pytestmark = pytest.mark.skipif(REAL is None, reason="no folder shared/real above this checkout: the rows are not here")


@pytest.fixture
def real(tmp_path, monkeypatch):
    """A copy: readers write an index beside the data."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    shutil.copytree(REAL, tmp_path / "real")
    for path in (tmp_path / "real").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (tmp_path / "real").chmod(0o755)
    return tmp_path / "real"


def table(find, root, split, name="refcoco", need_images=True) -> Table:
    return open_table(find(root, name), split, need_images=need_images)


def pixels(sample) -> np.ndarray:
    height, width = sample.size
    return np.multiply(sample.box, [width, height, width, height])


def test_lmms_rows_are_read_though_refcocos_file_names_end_in_a_running_number(real):
    testa = table(refcoco.lmms, real, "testA")
    assert (len(testa), testa.skipped) == (14, 0)
    first = testa[0]
    assert (first.image_id, first.meta["ann_id"]) == ("coco-580957", 1537681)
    assert np.allclose(pixels(first), [468.3, 0.91, 468.3 + 171.7, 0.91 + 116.12], rtol=0, atol=1e-9)
    assert first.expression == "bowl behind the others can only see part"
    of_g = table(refcoco.lmms, real, "test", "refcocog")
    assert (len(of_g), of_g.skipped) == (4, 0)
    assert {s.meta["ann_id"] for s in of_g} == {298801, 453172}
    assert all(testa.image(sample).shape[2] == 3 for sample in testa)


def test_four_layouts_agree_on_ids_boxes_and_expressions(real):
    root = real / "refer"
    truth = {}
    for split, count in (("train", 3), ("testA", 26)):
        held = {find: table(find, root, split) for find in (refer.find, refcoco.jxu124)}
        assert {len(one) for one in held.values()} == {count}
        for a, b in zip(*held.values(), strict=True):
            assert (a.sample_id, a.image_id, a.expression, a.size) == (b.sample_id, b.image_id, b.expression, b.size)
            assert np.allclose(a.box, b.box, rtol=0, atol=1e-9) and a.meta["ann_id"] == b.meta["ann_id"]
        truth |= {(s.image_id, s.expression, s.size): pixels(s) for s in held[refer.find]}
        assert len(table(refcoco.mdetr, root, split)) == count
    of_vlm_r1 = table(refcoco.vlm_r1, root, "train")  # all 29 are in its one file
    assert len(of_vlm_r1) == 29
    for other in (table(refcoco.mdetr, root, "train"), table(refcoco.mdetr, root, "testA"), of_vlm_r1):
        for sample in other:
            expected = truth[sample.image_id, sample.expression, sample.size]
            assert np.allclose(pixels(sample), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "accuracies", "miou"),
    [("pred_oracle", (0.8077, 0.6923, 0.3462), 0.7081), ("pred_first", (0.0, 0.0, 0.0), 0.0432)],
)
def test_predictions_score_as_published(real, capsys, name, accuracies, miou):
    command = [str(real / "refer" / f"{name}.jsonl"), "--dataset", "refcoco", "--split", "testA", "--format", "xywh"]
    assert main(["score", *command, "--frame", "px", "--data-root", str(real / "refer"), "--json"]) == 0
    rows = {row["metric"]: row["value"] for row in json.loads(capsys.readouterr().out)["rules"]["common"]["rows"]}
    assert [round(rows[f"Acc@{t}"], 4) for t in (0.5, 0.75, 0.9)] == list(accuracies)
    assert round(rows["mIoU"], 4) == miou


def test_mdetr_row(real):
    (sample,) = table(refcoco.mdetr, real / "mdetr", "val")
    assert (sample.image_id, sample.size) == ("coco-580957", (428, 640))
    assert np.allclose(pixels(sample), [468.3, 0.91, 468.3 + 171.7, 0.91 + 116.12], rtol=0, atol=1e-9)


def test_vlm_r1_row_and_its_log_is_refused_with_what_is_wanted(real, capsys):
    (sample,) = table(refcoco.vlm_r1, real, "train", need_images=False)
    assert sample.sample_id == "1719310-0"
    assert np.allclose(pixels(sample), [103.93, 299.99, 238.15, 477.41], rtol=0, atol=1e-9)
    command = [str(real / "vlm_r1" / "vlmr1_log.json"), "--dataset", "refcoco", "--split", "testA", "--format", "xyxy"]
    assert main(["score", *command, "--frame", "px", "--data-root", str(real / "refer")]) == 2
    said = capsys.readouterr().err
    assert (
        "one JSON object over several lines" in said and "JSON lines, one prediction a line, or one JSON array" in said
    )
    assert "'results' is a list of 1 objects; write that list to a file of its own" in said


def test_label_studio_exports(real, tmp_path):
    def convert(name):
        folder = real / "label_studio"
        return from_label_studio(folder / f"{name}.json", folder / "pics", tmp_path / name, "my-set")

    convert("ocr_region_text")
    lines = [json.loads(line) for line in (tmp_path / "ocr_region_text" / "train.jsonl").read_text().splitlines()]
    assert [line["expression"] for line in lines] == ["KENAPA", "HARUS", "PUNYA"]
    for name, said in (
        ("export_yolo", "no object has an expression .*TextArea"),
        ("export_obb", "rotation is 328.* a turned rectangle is no box"),
        ("csv_test", "a review rejected.*lies elsewhere; fetch the images"),
        ("export_coco", r"no rectangles \(polygonlabels\).*no rectangles \(keypointlabels\).*expression.*: 1"),
    ):
        with pytest.raises(DataError, match=said):
            convert(name)
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("combined_coco", "no annotation has the key 'caption'"),
        ("terrain1_coco", "no annotation has the key 'caption'"),
        ("sahi_result_list", "a list of detections"),
        ("fakebbox", "a list of detections"),
    ],
)
def test_coco_files_without_expressions_are_refused(real, tmp_path, name, said):
    with pytest.raises(DataError, match=said):
        from_coco(real / "coco" / f"{name}.json", real / "coco", tmp_path / "out", "my-set")
