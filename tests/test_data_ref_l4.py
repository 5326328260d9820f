"""Ref-L4 is read as published: xywh, ids of predictions, image ids that show leaks; else it is refused.

Silent when false: xyxy taken for xywh scores a good model near zero; ids of another revision match
no prediction; an image id that differs from RefCOCO's hides that a model was trained on the test.
"""

from __future__ import annotations

import json
import logging

import numpy as np
import pyarrow.parquet as pq
import pytest
from eval_layouts import EXPRESSIONS, failure, opened, photo_rows, write_ref_l4

from ivt_env.data import DataError, load_dataset
from ivt_env.data import ref_l4 as module

pytestmark = pytest.mark.usefixtures("private_machine")


@pytest.fixture
def layout(tmp_path):
    return write_ref_l4(tmp_path / "root")


def table(layout, split="val"):
    return opened(module.find, layout.root, "refl4", split)


def refusal(layout, split="val"):
    return failure(module.find, layout.root, "refl4", split)


@pytest.mark.parametrize("below", ["", "ref_l4_images"])
def test_every_expression_is_served_with_its_box_ids_and_image(tmp_path, below):
    layout = write_ref_l4(tmp_path, below)
    photos = photo_rows()
    seen = 0
    for split in ("val", "test"):
        served = load_dataset("refl4", split, data_root=tmp_path, strict=True)
        for sample in (served[i] for i in range(len(served))):
            photo = photos[int(sample.sample_id)]
            row = layout.all_rows[int(sample.sample_id)]
            height, width = sample.size
            assert (sample.dataset, sample.split, sample.expression) == ("refl4", split, row["caption"])
            assert sample.box == tuple(np.array(photo["bbox"], float) / [width, height, width, height])
            assert sample.image_id == row["image_id"].replace("_", "-")
            assert json.loads(json.dumps(sample.meta)) == {
                "id": row["id"], "category": row["ori_category_id"], "bbox_id": row["bbox_id"],
                "is_rewrite": row["is_rewrite"], "source": row["image_id"][:4],
            }  # fmt: skip
            assert served.image(sample).shape == (photo["height"], photo["width"], 3)
            seen += 1
    assert seen == len(photos) and "coco-128974" in load_dataset("refl4", "val", tmp_path).image_ids()
    with pytest.raises(DataError, match="refl4 has no split 'train'; it has val, test"):
        load_dataset("refl4", "train", data_root=tmp_path)
    assert EXPRESSIONS[0] in {row["caption"] for row in layout.all_rows}


# --- Broken input ---------------------------------------------------------------------------------


def test_old_revision_is_refused_and_named(layout):
    path = next(iter(layout.rows))
    held = pq.read_table(path)
    pq.write_table(held.rename_columns(["ann_id", *held.column_names[1:]]), path)
    message = refusal(layout)
    assert "ref-l4-val.parquet: has no column 'id' (it has ann_id" in message and "an old one has ann_id" in message
    assert "fetch the Parquet files of JierunChen/Ref-L4 again" in message


def test_id_in_both_files_is_left_out_and_named(layout, caplog):
    layout.all_rows[-1]["id"] = 0
    layout.save()
    with caplog.at_level(logging.WARNING):
        assert table(layout, "test").skipped == 1
    assert "of ref-l4-test.parquet: id 0 is also that of ref-l4-val.parquet row 0" in caplog.text


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"bbox": [float("nan"), 1, 2, 3]}, "is not four finite numbers"),
        ({"image_id": "128974"}, "image_id is '128974', not like 'coco_128974'"),
        ({"image_id": "coco_5"}, "name different images"),
        ({"file_name": "../../000000128974.jpg"}, "is not the plain name of a file"),
        ({"split": "train"}, "split is 'train' in the file of val"),
        ({"caption": "  "}, "caption is '  ', not a text"),
        ({"is_rewrite": None}, "is_rewrite is None"),
        ({"id": None}, "id is None, not a whole number"),
        ({"height": 9999}, "in a row before"),
    ],
)
def test_bad_row_is_left_out_with_its_reason(layout, caplog, values, said):
    layout.all_rows[1].update(values)
    layout.save()
    with caplog.at_level(logging.WARNING):
        served = table(layout)
    assert served.skipped == 1
    assert "row 1 of ref-l4-val.parquet" in caplog.text and said in caplog.text


def test_images_not_unpacked_is_said_with_the_archive(layout):
    layout.images.rename(layout.root / "elsewhere")
    message = refusal(layout)
    assert "its images are not" in message and "unpack Ref-L4's images.tar.gz" in message
    list(layout.rows)[1].unlink()
    (layout.root / "elsewhere").rename(layout.images)
    assert "ref-l4-test.parquet: missing" in refusal(layout)
