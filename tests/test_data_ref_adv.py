"""Ref-Adv-s is read as published, its embedded images are written out byte for byte, and it stays a test set.

Silent when false: an image of another row under a box makes that row wrong for ever after; a
count of distractors that is misread moves rows between the bins of the published table; a test set
served as train is trained on.
"""

from __future__ import annotations

import json
import logging

import numpy as np
import pyarrow as pa
import pytest
from eval_layouts import PHOTOS, REF_ADV, bomb_bytes, failure, opened, photo_rows, write_ref_adv

from ivt_env.data import DataError, load_dataset
from ivt_env.data import ref_adv as module
from ivt_env.data.checked import BadRowError
from ivt_env.data.images import read_image

pytestmark = pytest.mark.usefixtures("private_machine")


@pytest.fixture
def layout(tmp_path):
    return write_ref_adv(tmp_path / "root")


def table(layout):
    return opened(module.find, layout.root, "refadv", "test")


@pytest.mark.parametrize("below", ["", "data"])
def test_every_expression_is_served_with_its_box_and_image(tmp_path, below):
    layout = write_ref_adv(tmp_path, below)
    served = load_dataset("refadv", "test", data_root=tmp_path, strict=True)
    photos = photo_rows()
    assert len(served) == len(photos)
    for number, (photo, row) in enumerate(zip(photos, layout.all_rows, strict=True)):
        sample = served[number]
        height, width = sample.size
        assert (sample.dataset, sample.split, sample.sample_id) == ("refadv", "test", str(number))
        assert sample.expression == row["normal_caption"]
        assert sample.box == tuple(np.array(photo["bbox"], float) / [width, height, width, height])
        assert json.loads(json.dumps(sample.meta)) == {
            "distractors": 2 + number % 6, "use_negation": number % 3 == 0,
            "human_authored": row["human_authored"], "image_source": row["image_source"],
        }  # fmt: skip
        path = PHOTOS / photo["image"]
        assert np.array_equal(served.image(sample), read_image(path, str(path)))
    ids = list(dict.fromkeys(served.image_ids()))
    assert ids == ["coco-547144", "coco-547145", "coco-547146", "oi-000000000008594b", "oi-000000000008594c"]
    with pytest.raises(DataError, match="refadv has no split 'train'; it has test"):
        load_dataset("refadv", "train", data_root=tmp_path)


def test_no_file_and_files_in_both_places_are_refused(layout):
    write_ref_adv(layout.root, "data")
    assert "keep one of the two" in failure(module.find, layout.root, "refadv", "test")
    for path in layout.root.rglob("*.parquet"):
        path.unlink()
    assert "*.parquet: missing" in failure(module.find, layout.root, "refadv", "test")


def test_images_are_written_once_as_they_are_and_damaged_ones_replaced(layout):
    table(layout)
    written = {path.name: path.read_bytes() for path in layout.images.iterdir()}
    assert written == {row["file_name"]: row["image"]["bytes"] for row in layout.all_rows} and len(written) == 5
    kept, damaged = sorted(layout.images.iterdir())[:2]
    before = kept.stat().st_mtime_ns
    damaged.write_bytes(written[damaged.name][:-1] + b"?")
    (layout.root / "refadv" / ".ivt_index" / "refadv-ref-adv.arrow").unlink()
    table(layout)
    assert kept.stat().st_mtime_ns == before
    assert damaged.read_bytes() == written[damaged.name]


def test_distractors_are_counted_in_every_form_and_what_says_no_number_is_refused():
    counts = [("5", 5), (" 7 ", 7), (3, 3), (4.0, 4), (["a", "b"], 2), ('["a", "b", "c"]', 3), ([], 0), ("2.0", 2)]
    for value, count in counts:
        assert module._count(value) == count
    for value in (None, "", "many", True, -1, 2.5, {"a": 1}, '{"a": 1}', "-3", float("nan"), "NaN"):
        with pytest.raises(BadRowError, match="neither a number nor a list"):
            module._count(value)


def test_columns_of_other_types_are_read_too_and_row_idx_is_the_id_where_it_is_there(layout):
    for number, row in enumerate(layout.all_rows):
        row |= {"image": row["image"]["bytes"], "distractors": ["cup", "cup"], "row_idx": 1000 - number}
    kinds = {"image": pa.binary(), "distractors": pa.list_(pa.string()), "row_idx": pa.int64()}
    plain = [field for field in REF_ADV if field.name not in kinds]
    layout.schema = pa.schema([*plain, *kinds.items()])
    layout.save()
    served = table(layout)
    assert (served.skipped, served[3].sample_id, served[3].meta["distractors"]) == (0, "997", 2)


# --- Broken input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"solution": [float("nan"), 1.0, 2.0, 3.0]}, "is not four finite numbers"),
        ({"solution": [200.0, 150.0, 100.0, 100.0]}, "it would fit as xywh"),
        ({"width": 10_000}, "wide and"),
        ({"file_name": "../x.jpg"}, "is not the plain name of a file"),
        ({"distractors": "many"}, "distractors is 'many'"),
        ({"use_negation": None}, "use_negation is None"),
        ({"image": {"bytes": None, "path": "a.jpg"}}, "the image is not in the file (image is {"),
        ({"image": {"bytes": b"no image", "path": None}, "file_name": "x.jpg"}, "not a whole image that can be read"),
        ({"image": {"bytes": (PHOTOS / "rocket.jpg").read_bytes(), "path": None}}, "another image than an earlier row"),
        ({"image": {"bytes": bomb_bytes(), "path": None}, "file_name": "x.png"}, "too large"),
    ],
)
def test_bad_row_is_left_out_with_its_reason(layout, caplog, values, said):
    layout.all_rows[2].update(values)
    layout.save()
    with caplog.at_level(logging.WARNING):
        served = table(layout)
    assert served.skipped == 1
    assert f"row 2 of {next(iter(layout.rows)).name}: " in caplog.text and said in caplog.text
    assert "x.jpg" not in {path.name for path in layout.images.iterdir()}


def test_written_image_that_was_deleted_is_said_with_a_remedy(layout):
    served = table(layout)
    served.image_path(served[0]).unlink()
    with pytest.raises(DataError, match=r"is missing; it was written out of the Parquet file: delete the folder"):
        served.image(served[0])
