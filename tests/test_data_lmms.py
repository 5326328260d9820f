"""The Hub files of lmms-lab give REFER's samples and their own images, or an error with a remedy.

Silent when false: the mixed val splits hold images of the train splits, so that a score on them is
too good; an image that is encoded again, turned by its EXIF note or taken from another row has
boxes that no longer fit; an image cut off in writing is served for ever after.
"""

from __future__ import annotations

import io
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_layouts import (
    boxes_in_images,
    image_bytes,
    is_the_record,
    many,
    odd_things,
    record,
    same_objects,
    thing_at,
    things_of,
    write_lmms,
)
from hypothesis import HealthCheck, given, settings
from PIL import Image
from refer_layout import write_refer_folder

import ivt_env.data as data
from ivt_env.data import DataError, lmms, refer
from ivt_env.data.table import open_table


@pytest.fixture(autouse=True)
def private_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))


@pytest.fixture
def hub(tmp_path):
    """refcoco with 40 objects in testA and in testB."""
    return write_lmms(tmp_path, "refcoco", many("testA") + many("testB"))


def written(hub):
    return hub.path_of("testA").parent.parent / ".ivt_index" / "images"


# --- What is read ---------------------------------------------------------------------------------


def test_published_record_is_reproduced(tmp_path):
    sample = write_lmms(tmp_path, "refcocoplus", [record("val")]).samples("val")[0]
    is_the_record(sample)
    # Not only to float32, as the file holds it, but to the digits of the annotators' file.
    assert sample.box == tuple(np.divide([103.93, 299.99, 103.93 + 134.22, 299.99 + 177.42], [427, 640] * 2))
    assert (sample.sample_id, sample.meta) == ("1719310-0", {"ann_id": 1719310, "image_id": 581857})


@pytest.mark.parametrize("name", ["refcocog", "refcoco", "refcocoplus"])
def test_samples_and_images_are_those_of_the_refer_layout(tmp_path, name):
    folder = write_refer_folder(tmp_path, name)
    hub = write_lmms(tmp_path, name, [t for t in things_of(folder) if t.split in lmms.SPLITS[name]])
    assert lmms.find(tmp_path, name).splits == lmms.SPLITS[name]
    for split in lmms.SPLITS[name]:
        original = open_table(refer.source(tmp_path, name), split)
        expected, found = [original[i] for i in range(len(original))], hub.samples(split)
        same_objects(found, expected, ("ann_id", "image_id"))
        table = hub.open(split)
        assert np.array_equal(table.image(table[0]), original.image(original[0]))
        # Byte for byte: a JPEG that is encoded again is another image.
        assert table.image_path(table[0]).read_bytes() == original.image_path(original[0]).read_bytes()


def test_odd_sizes_texts_and_images_round_trip_in_the_stored_frame(tmp_path):
    things = odd_things("val")
    table = write_lmms(tmp_path, "refcocoplus", things).open("val")
    for sample, thing in zip([table[i] for i in range(len(table))], things, strict=True):
        assert (sample.expression, sample.size) == (thing.sentences[0][1], thing.size)
        assert np.allclose(sample.box, thing.relative, rtol=0, atol=3e-7)  # a third of a pixel is no short decimal
        assert table.image_path(sample).read_bytes() == thing.image
        with Image.open(io.BytesIO(thing.image)) as image:  # no EXIF turn, also where the image is square
            assert np.array_equal(table.image(sample), np.asarray(image.convert("RGB")))


def test_plain_binary_images_are_read_too(tmp_path):
    hub = write_lmms(tmp_path, "refcoco", many("testA"))
    for row in hub.rows["testA"]:
        row["image"] = row["image"]["bytes"]
    hub.schema = hub.schema.set(1, pa.field("image", pa.binary()))
    hub.save()
    table = hub.open("testA")
    assert table.image(table[0]).shape == (80, 120, 3)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(boxes_in_images())
def test_any_box_in_any_image_comes_back(tmp_path, drawn):
    thing = thing_at(*drawn, "testA")
    (tmp_path / "written" / "images" / thing.file_name).unlink(missing_ok=True)
    (box,) = write_lmms(tmp_path, "refcoco", [thing]).boxes()
    assert np.allclose(box, thing.relative, rtol=0, atol=1e-9)
    assert 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1


def test_float32_that_is_no_short_decimal_stays_within_its_own_rounding():
    rng = np.random.default_rng(0)
    for value in rng.uniform(0, 2000, 300).astype(np.float32):
        assert np.float32(lmms._as_written(float(value))) == value
    assert lmms._as_written(1 / 3) == 1 / 3  # a float64 is not touched
    assert np.isnan(lmms._as_written(float("nan"))) and lmms._as_written(None) is None


def test_every_answer_is_a_sample_of_its_own(tmp_path):
    samples = write_lmms(tmp_path, "refcoco", [record("testB")]).samples("testB")
    assert [s.sample_id for s in samples] == ["1719310-0", "1719310-1", "1719310-2"]
    assert [s.expression for s in samples] == [text for _, text in record().sentences]
    assert len({(s.box, s.image_id) for s in samples}) == 1


# --- Splits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "refused"),
    [("refcoco", ("train", "val", "test")), ("refcocog", ("train", "val")), ("refcocoplus", ("train",))],
)
def test_mixed_and_absent_splits_are_never_served(tmp_path, name, refused):
    things = [t for split in (*refused, *lmms.SPLITS[name]) for t in many(split, 3)]
    hub = write_lmms(tmp_path, name, things)
    source = lmms.find(tmp_path, name)
    assert source.splits == lmms.SPLITS[name]
    for split in refused:
        assert hub.path_of(split) not in source.files
        with pytest.raises(DataError, match=rf"{name} \(lmms\) has no split '{split}'; it has {source.splits[0]}"):
            open_table(source, split)
        assert data.find_source(name, split, tmp_path) is None
    assert {s.split for split in source.splits for s in hub.samples(split)} == set(source.splits)


def test_folder_with_refused_splits_alone_is_no_source(tmp_path):
    write_lmms(tmp_path, "refcoco", many("val", 3) + many("test", 3))
    assert lmms.find(tmp_path, "refcoco") is lmms.find(tmp_path, "refcocog") is lmms.find(tmp_path, "photos") is None


# --- Images -------------------------------------------------------------------------------------


def test_image_of_several_rows_is_written_once_and_then_left_alone(hub, tmp_path):
    hub.open("testA")
    files = {path: path.stat().st_mtime_ns for path in written(hub).iterdir()}
    assert sorted(path.name for path in files) == sorted(
        {f"COCO_train2014_{1000 + sum(map(ord, split)):012d}.jpg" for split in ("testA", "testB")}
    )
    for path in files:
        os.utime(path, ns=(5, 5))
    (written(hub).parent / "refcoco-lmms.arrow").unlink()
    hub.open("testB")
    assert {path.stat().st_mtime_ns for path in written(hub).iterdir()} == {5}


@pytest.mark.parametrize("damage", ["cut off", "other bytes", "gone"])
def test_damaged_image_is_written_again_with_the_index(hub, damage):
    table = hub.open("testA")
    path = table.image_path(table[0])
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[:100] if damage == "cut off" else bytes(len(content)))
    with pytest.raises(DataError, match=r"refcoco-lmms.arrow|not a whole image"):
        table.image(table[0])
    (written(hub).parent / "refcoco-lmms.arrow").unlink()
    table = hub.open("testA")
    assert table.image(table[0]).shape == (80, 120, 3)
    assert path.read_bytes() == content


def test_rows_with_one_number_and_two_images_are_not_mixed_up(hub, caplog):
    hub.rows["testA"][5]["image"] = {"bytes": image_bytes(120, 80, shade=9), "path": None}
    hub.save()
    log = hub.left_out("testA", caplog)
    assert "row 5 of testA-00000-of-00001.parquet: holds another image than an earlier row with coco-" in log


def test_few_images_are_in_memory_at_once(tmp_path):
    rng = np.random.default_rng(0)
    row = write_lmms(tmp_path, "refcoco", many("testA", 1)).rows["testA"][0]
    rows = [row | {"image": {"bytes": rng.bytes(100_000), "path": "x"}} for _ in range(200)]
    path = tmp_path / "big.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=10)
    del rows
    before, most = pa.total_allocated_bytes(), 0
    for _ in lmms.hub.typed_rows(path, lmms._COLUMNS, "fetch it again", lmms._ROWS_AT_ONCE):
        most = max(most, pa.total_allocated_bytes() - before)
    assert 0 < most < path.stat().st_size / 2


# --- Bad rows -------------------------------------------------------------------------------------

BAD_ROWS = {
    "NaN": ({"bbox": [1.0, float("nan"), 3.0, 4.0]}, "is not four finite numbers"),
    "null": ({"bbox": None}, "bbox None is not four numbers"),
    "five numbers": ({"bbox": [1.0, 2.0, 3.0, 4.0, 5.0]}, "is not four numbers"),
    "zero area": ({"bbox": [5.0, 6.0, 0.0, 9.0]}, "bbox [5.0, 6.0, 0.0, 9.0] (x, y, width, height) has no area"),
    "no number": ({"question_id": "12a"}, "question_id is '12a', not the number of an annotation"),
    "null id": ({"question_id": None}, "question_id is None"),
    "no COCO name": ({"file_name": "17.jpg"}, "file name '17.jpg' is not that of a COCO train2014 image"),
    "path": ({"file_name": "../x.jpg"}, "file_name '../x.jpg' is not the plain name of a file"),
    "no answer": ({"answer": []}, "answer is None, not a text"),
    "null answers": ({"answer": None}, "answer is None, not a text"),
    "blank answer": ({"answer": [" "]}, "answer is ' ', not a text"),
    "no image": ({"image": None}, "the image is not in the file (image is None)"),
    "image elsewhere": ({"image": {"bytes": None, "path": "x.jpg"}}, "the image is not in the file (image is {"),
    "broken image": ({"image": {"bytes": b"no image", "path": "x"}}, "holds another image than an earlier row with"),
}


@pytest.mark.parametrize("what", BAD_ROWS)
def test_bad_row_is_named_and_left_out_and_the_rest_is_served(hub, caplog, what):
    changes, reason = BAD_ROWS[what]
    hub.rows["testA"][3].update(changes)
    hub.save()
    log = hub.left_out("testA", caplog)
    assert "row 3 of testA-00000-of-00001.parquet: " in log and reason in log


def test_file_name_must_end_in_the_annotation_in_refcocog_alone(tmp_path, caplog):
    for name, split, skipped in (("refcocog", "test", 1), ("refcoco", "testA", 0), ("refcocoplus", "testB", 0)):
        hub = write_lmms(tmp_path, name, many(split))
        hub.rows[split][3]["question_id"] = "5"
        hub.save()
        assert hub.open(split).skipped == skipped, name
    assert "is of another annotation" in caplog.text


def test_file_of_xyxy_boxes_is_refused_and_said_to_be_so(hub):
    for row in hub.rows["testB"]:
        x, y, w, h = row["bbox"]
        row["bbox"] = [x + 45, y + 40, x + 45 + w, y + 40 + h]
    hub.save()
    message = hub.error("testA")
    assert (
        "boxes do not fit their images as they are read (the limit is 10)" in message and "would fit as xyxy" in message
    )
    assert "lmms-lab-encoder/RefCOCO again" in message and str(hub.path_of("testB")) in message


# --- Broken files ---------------------------------------------------------------------------------
