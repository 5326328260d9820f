"""Targets that reach beyond their images are kept as they are, in every benchmark's layout.

Silent when false: a clipped target turns a miss of the official evaluator into a hit, and a dropped row changes
the denominator, so scores cannot be compared with published ones.
"""

from __future__ import annotations

import json
import logging

import gymnasium as gym
import numpy as np
import pyarrow as pa
import pytest
from eval_layouts import opened, write_ref_adv, write_ref_l4
from geometry import xywh_to_xyxy
from hub_layouts import many, put_images, write_jxu124, write_lmms, write_mdetr, write_vlm_r1
from refer_layout import write_refer_folder

import ivt_env  # noqa: F401  registers the environments
from ivt_agents.cli import main
from ivt_env import boxes
from ivt_env.data import DataError, load_dataset, ref_adv, ref_l4, refer
from ivt_env.data.converters import export
from ivt_env.data.table import open_table

BEYOND = [(-0.75, -0.5, 20.0, 20.0), (-1.0, 3.0, 9.5, 9.0), (-30.0, -7.25, 60.0, 40.0), (100.0, 70.0, 90.0, 90.0)]
"""xywh in an image of 120 x 80: a little, by a pixel, and far outside."""


pytestmark = pytest.mark.usefixtures("private_machine")


@pytest.fixture
def ref_l4_beyond(tmp_path):
    """Ref-L4 whose first four targets of val reach beyond their images."""
    layout = write_ref_l4(tmp_path / "root")
    for row, (x, y, w, h) in zip(layout.all_rows, BEYOND, strict=False):
        row.update(bbox=[x, y, w, h], bbox_area=w * h)
    layout.save()
    return layout


@pytest.mark.parametrize("write", [write_jxu124, write_lmms, write_mdetr, write_vlm_r1])
def test_nothing_is_clipped_or_dropped_in_any_layout_of_the_refcoco_family(tmp_path, write):
    split = "testA" if write is write_lmms else "train"
    things = many(split)
    for number, xywh in enumerate(BEYOND):
        object.__setattr__(things[number], "xywh", xywh)
    hub = write(tmp_path, "refcoco", things)
    put_images(tmp_path / "train2014", things)
    table = hub.open(split)
    assert (len(table), table.skipped) == (len(things), 0)
    for index, thing in enumerate(things):
        assert np.allclose(table[index].box, thing.relative, rtol=0, atol=1e-7)


def test_nothing_is_clipped_or_dropped_in_the_refer_layout(tmp_path):
    layout = write_refer_folder(tmp_path, "refcocog")
    ref = layout.refs_of("train")[-1]
    height, width = layout.annotated_image(ref)["height"], layout.annotated_image(ref)["width"]
    for bbox in ([-1, -0.5, width + 2, height + 1.5], [-40.5, 3, 60, 20], [width - 5, height - 9, 30, 30]):
        layout.annotation_of(ref)["bbox"] = bbox
        layout.save()
        table = open_table(refer.source(tmp_path, "refcocog"), "train")
        assert table.skipped == 0
        expected = tuple(boxes.to_relative(xywh_to_xyxy(bbox), (height, width)).tolist())
        assert table[len(table) - 1].box == expected


def test_one_target_beyond_is_kept_in_ref_adv_and_a_file_of_them_refused_as_of_another_frame(tmp_path):
    layout = write_ref_adv(tmp_path)
    row = layout.all_rows[2]
    row["solution"] = [-12.5, 4.0, row["width"] + 40.0, 90.0]
    layout.save()
    table = opened(ref_adv.find, tmp_path, "refadv", "test")
    assert (len(table), table.skipped) == (len(layout.all_rows), 0)
    assert table[2].box == (-12.5 / row["width"], 4 / row["height"], 1 + 40 / row["width"], 90 / row["height"])
    for row in layout.all_rows:
        row["solution"] = [900.0, 900.0, 5000.0, 5000.0]
    layout.save()
    with pytest.raises(DataError, match=r"boxes do not fit their images .* first: test 0: xyxy \[900"):
        opened(ref_adv.find, tmp_path, "refadv", "test")


# --- Ref-L4 ---------------------------------------------------------------------------------------


def test_score_is_the_official_evaluators_and_not_that_of_a_clipped_target(tmp_path, capsys):
    layout = write_ref_l4(tmp_path)
    for row in layout.all_rows:
        row.update(bbox=[-1.0, -1.0, 20.0, 20.0], bbox_area=400.0)
    layout.save()
    rows = [{"id": row["id"], "pred_bbox": [0, 0, 14, 14], "format": "xyxy"} for row in layout.all_rows]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    command = [str(tmp_path / "p.json"), "--dataset", "refl4", "--layout", "refl4", "--data-root", str(tmp_path)]
    assert main(["score", *command, "--split", "all", "--resamples", "0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == len(rows)
    by_metric = {row["metric"]: row["value"] for row in found["rules"]["common"]["rows"]}
    assert by_metric["mIoU"] == pytest.approx(196 / 400)  # of the clipped target: 196 / 361, a hit
    assert by_metric["Acc@0.5"] == 0


def test_all_is_val_and_test_together(tmp_path, capsys):
    write_ref_l4(tmp_path)
    val, test, both = (load_dataset("refl4", split, tmp_path, strict=True) for split in ("val", "test", "all"))
    assert both.sample_ids() == val.sample_ids() + test.sample_ids()
    assert both[len(val)].box == test[0].box and both[len(val)].split == "all"
    assert np.array_equal(both.image(both[len(val)]), test.image(test[0]))
    env = gym.make("IVT-RefL4-v0", split="all", data_root=str(tmp_path))
    env.reset(options={"index": len(both) - 1})


def test_area_that_disagrees_is_kept_in_one_row_and_refused_in_many(tmp_path, caplog):
    layout = write_ref_l4(tmp_path)
    layout.all_rows[0]["bbox_area"] = 7.0
    layout.save()
    assert opened(ref_l4.find, tmp_path, "refl4", "val").skipped == 0
    for row in layout.all_rows:
        row.update(bbox=[10.0, 10.0, 40.0, 60.0], bbox_area=1500.0)
    layout.save()
    with pytest.raises(DataError, match=r"bbox_area is 1500.0, .* it would fit as x1, y1, x2, y2"):
        opened(ref_l4.find, tmp_path, "refl4", "val")


@pytest.mark.parametrize("kind", [pa.int64(), pa.float64()])
def test_a_flag_may_be_written_as_a_number(tmp_path, kind):
    layout = write_ref_l4(tmp_path)
    index = layout.schema.get_field_index("is_rewrite")
    layout.schema = layout.schema.set(index, layout.schema.field(index).with_type(kind))
    for row in layout.all_rows:
        row["is_rewrite"] = int(row["is_rewrite"])
    layout.save()
    table = opened(ref_l4.find, tmp_path, "refl4", "val")
    assert table.skipped == 0 and [s.meta["is_rewrite"] for s in table][:2] == [True, False]


# --- Who uses such a target -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "box", [(-0.1, 0.2, 0.5, 1.4), (-0.5, -0.5, -0.1, -0.2), (1.1, 0.2, 1.5, 0.6), (0.2, 0.3, 1, 1)]
)
def test_visible_part_is_a_usable_proposal_and_the_best_there_is(box):
    found = boxes.visible_part(box)
    assert boxes.invalid_reason(found) is None
    if boxes.area(boxes.clip(box)) > 0:
        assert found == tuple(boxes.clip(box).tolist())


def test_environment_plays_scores_and_draws_a_target_that_reaches_beyond(ref_l4_beyond):
    env = gym.make("IVT-RefL4-v0", split="val", data_root=str(ref_l4_beyond.root), render_mode="rgb_array")
    for index in range(len(BEYOND)):
        observation, info = env.reset(options={"index": index})
        assert observation in env.observation_space
        visible = boxes.visible_part(info["target"].tolist())
        _, reward, *_, info = env.step({"box": np.array(visible, np.float32), "stop": 0})
        assert reward == pytest.approx(float(boxes.iou(visible, info["target"])), abs=1e-5) and 0 < reward <= 1
        assert (env.render() == (0, 220, 90)).all(-1).any(), "the target's outline is not drawn"


def test_export_keeps_such_targets_and_its_copy_is_read_back_to_the_bit(ref_l4_beyond, tmp_path, caplog):
    table = opened(ref_l4.find, ref_l4_beyond.root, "refl4", "val")
    assert table.skipped == 0
    for sample, (x, y, w, h) in zip(table, BEYOND, strict=False):
        height, width = sample.size
        assert np.allclose(np.multiply(sample.box, [width, height] * 2), [x, y, x + w, y + h], rtol=0, atol=1e-9)
    with caplog.at_level(logging.WARNING):
        export(table, tmp_path / "out", "my-copy")
        copy = load_dataset("custom", "val", tmp_path / "out", strict=True)
    assert [copy[i].box for i in range(len(copy))] == [table[i].box for i in range(len(table))]
    assert "left out" not in caplog.text
