"""The Hub files of jxu124 give REFER's samples, or an error that names the file, the row and a remedy.

Silent when false: the same box lies in these files as xyxy and as xywh, and code in public takes one
for the other; a model trained on such boxes is merely weak. A part of a split that was not
downloaded makes a score on fewer objects than the published one.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from hub_layouts import is_the_record, many, odd_things, put_images, record, same_objects, things_of, write_jxu124
from PIL import Image
from refer_layout import PHOTOS, write_refer_folder

from ivt_env.data import DataError, jxu124, refer
from ivt_env.data.table import open_table


@pytest.fixture(autouse=True)
def private_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))


@pytest.fixture
def hub(tmp_path):
    """refcoco with 40 objects in train and in testA."""
    return write_jxu124(tmp_path, "refcoco", many("train") + many("testA"))


def set_box(row, xywh, xyxy=None):
    """Both forms of a row's box, so that they agree."""
    x, y, w, h = xywh
    row["bbox"] = [x, y, x + w, y + h] if xyxy is None else xyxy
    row["raw_anns"] = json.dumps(json.loads(row["raw_anns"]) | {"bbox": xywh})


def set_json(row, key, **changes):
    row[key] = json.dumps(json.loads(row[key]) | changes)


# --- What is read ---------------------------------------------------------------------------------


def test_published_record_is_reproduced(tmp_path):
    sample = write_jxu124(tmp_path, "refcoco", [record()]).samples("train")[0]
    is_the_record(sample)
    assert sample.sample_id == "0-0"
    assert sample.meta == {"ann_id": 1719310, "ref_id": 0, "image_id": 581857, "category_id": 1}


@pytest.mark.parametrize("name", ["refcocog", "refcoco", "refcocoplus"])
def test_samples_are_those_of_the_refer_layout(tmp_path, name):
    folder = write_refer_folder(tmp_path, name)
    hub = write_jxu124(tmp_path, name, things_of(folder))
    splits = next(iter(refer.PARTITIONS[name].values()))
    assert jxu124.find(tmp_path, name).splits == splits
    for split in splits:
        original = open_table(refer.source(tmp_path, name), split)
        expected, found = [original[i] for i in range(len(original))], hub.samples(split)
        same_objects(found, expected, ("ann_id", "ref_id", "image_id"))
        assert [s.sample_id for s in found] == [s.sample_id for s in expected]
        table = hub.open(split)
        assert np.array_equal(table.image(table[0]), original.image(original[0]))


def test_odd_sizes_texts_and_images_round_trip(tmp_path):
    things = odd_things("val")
    put_images(tmp_path / "train2014", things)
    table = write_jxu124(tmp_path, "refcoco", things).open("val")
    for sample, thing in zip([table[i] for i in range(len(table))], things, strict=True):
        assert (sample.expression, sample.size) == (thing.sentences[0][1], thing.size)
        assert np.allclose(sample.box, thing.relative, rtol=0, atol=1e-15)
        assert table.image(sample).shape == (*thing.size, 3)


@pytest.mark.parametrize("place", jxu124.IMAGE_FOLDERS)
def test_images_are_found_in_every_documented_place(tmp_path, place):
    things = things_of(write_refer_folder(tmp_path / "elsewhere"))
    put_images(tmp_path / place, things)
    write_jxu124(tmp_path, "refcocog", things)
    table = open_table(jxu124.find(tmp_path, "refcocog"), "train")
    with Image.open(PHOTOS / "astronaut.jpg") as image:
        assert np.array_equal(table.image(table[0]), np.asarray(image))


def test_only_splits_on_disk_are_offered(tmp_path, hub):
    source = jxu124.find(tmp_path, "refcoco")
    assert (source.name, source.layout, source.splits) == ("refcoco", "jxu124", ("train", "testA"))
    # Both of its files begin with "test"; testB is not there.
    assert [path.name[:4] for path in source.files] == ["trai", "test"]
    assert jxu124.find(tmp_path, "refcocog") is jxu124.find(tmp_path, "photos") is None
    with pytest.raises(DataError, match=r"refcoco \(jxu124\) has no split 'testB'; it has train, testA"):
        open_table(source, "testB")


# --- The convention of the box --------------------------------------------------------------------


def test_xywh_in_the_column_is_refused_and_said_to_be_so(hub):
    hub.rows["train"][7]["bbox"] = [8.5, 2.25, 30.75, 20.5]
    hub.save()
    message = hub.error("train")
    assert f"{hub.path_of('train')}: row 7: bbox [8.5, 2.25, 30.75, 20.5] should be xyxy" in message
    assert "probably xywh" in message and "`ivt data fetch jxu124`" in message


@pytest.mark.parametrize("corner", range(4))
def test_one_disagreement_of_more_than_the_tolerance_refuses_the_file(hub, corner):
    row = hub.rows["train"][39]
    exact = list(row["bbox"])
    row["bbox"][corner] = exact[corner] + 5e-5
    hub.save()
    assert len(hub.open("train")) == 40
    row["bbox"][corner] = exact[corner] + 2e-4
    hub.save()
    message = hub.error("train")
    assert "row 39: bbox" in message and "can be trusted" in message and "probably" not in message


# --- Bad rows -------------------------------------------------------------------------------------

BAD_ROWS = {
    "NaN": (lambda row: row["bbox"].__setitem__(2, float("nan")), "is not four finite numbers"),
    "infinite": (lambda row: row["bbox"].__setitem__(0, float("-inf")), "is not four finite numbers"),
    "null": (lambda row: row.update(bbox=None), "bbox None is not four numbers"),
    "three numbers": (lambda row: row["bbox"].pop(), "is not four numbers"),
    "zero area": (lambda row: set_box(row, [5.0, 6.0, 0.0, 9.0]), "bbox [5.0, 6.0, 5.0, 15.0] (x1, y1, x2, y2) has"),
    "xywh unreadable": (lambda row: set_json(row, "raw_anns", bbox=None), "bbox in raw_anns is None"),
    "other object": (lambda row: set_json(row, "raw_anns", id=5), "id in raw_anns is 5, and"),
    "other image": (lambda row: set_json(row, "raw_image_info", id=5), "id in raw_image_info is 5, and"),
    "file of another image": (
        lambda row: set_json(row, "raw_image_info", file_name="COCO_train2014_000000000005.jpg"),
        "its image is called 'COCO_train2014_000000000005.jpg', but its image_id is",
    ),
    "path": (lambda row: set_json(row, "raw_image_info", file_name="../x.jpg"), "'../x.jpg' is not the plain name"),
    "no size": (lambda row: set_json(row, "raw_image_info", height=0), "height 0 and width 120 are not an image's"),
    "cut JSON": (lambda row: row.update(raw_anns=row["raw_anns"][:30]), "not whole JSON"),
    "JSON list": (lambda row: row.update(raw_image_info="[1]"), "raw_image_info is [1], not a JSON object"),
    "other split": (lambda row: row.update(split="testB"), "says split 'testB' in a file of train"),
    "no sentences": (lambda row: row.update(sentences=[], sent_ids=[]), "has no sentences"),
    "null sentence": (lambda row: row.update(sentences=[None]), "sent_ids"),
    "other sent_ids": (lambda row: row.update(sent_ids=[1, 2]), "sent_ids [1, 2], but its sentences have"),
    "blank": (lambda row: row["sentences"][0].update(sent="  "), "sent is '  ', not a text"),
    "negative id": (lambda row: row.update(ann_id=-1), "ann_id is -1, not a whole number from 0"),
    "null id": (lambda row: row.update(ref_id=None), "ref_id is None"),
}


@pytest.mark.parametrize("what", BAD_ROWS)
def test_bad_row_is_named_and_left_out_and_the_rest_is_served(hub, caplog, what):
    damage, reason = BAD_ROWS[what]
    damage(hub.rows["train"][3])
    hub.save()
    log = hub.left_out("train", caplog)
    assert f"row 3 of {hub.path_of('train').name}: " in log and reason in log


@pytest.mark.parametrize("stated", ["test", "testA"])
def test_people_split_may_call_itself_test(hub, stated):
    for row in hub.rows["testA"]:
        row["split"] = stated
    hub.save()
    assert len(hub.open("testA")) == 40


# --- Broken files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, -1])
def test_half_a_file_is_named(hub, keep):
    path = hub.path_of("train")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    message = hub.error("train")
    assert message.startswith(f"{path}: not a whole Parquet file") and "jxu124/refcoco again" in message


def test_damage_in_the_middle_of_a_file_is_never_another_error(hub):
    path = hub.path_of("train")
    content = path.read_bytes()
    refused = 0
    for at in range(10, len(content) - 8, 997):
        path.write_bytes(content[:at] + bytes(255 - b for b in content[at : at + 60]) + content[at + 60 :])
        try:
            hub.open("train")
        except DataError as error:
            refused += str(path) in str(error)
    assert refused > 0


@pytest.mark.parametrize("column", ["bbox", "raw_anns", "sentences", "split"])
def test_missing_column_is_named(hub, column):
    for row in hub.rows["train"]:
        del row[column]
    hub.save()
    assert f"{hub.path_of('train')}: has no column {column!r} (it has sent_ids," in hub.error("train")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("bbox", "[1, 2, 3, 4]", "column 'bbox' is string, not lists of floating-point numbers"),
        ("bbox", [1, 2, 3, 4], "column 'bbox' is list<element: int64>, not lists of floating-point numbers"),
        ("image_id", "5", "column 'image_id' is string, not whole numbers"),
        ("sentences", ["a", "b"], "column 'sentences' is list<element: string>, not lists of structs with sent"),
    ],
)
def test_column_of_another_type_is_named(hub, column, value, message):
    import pyarrow as pa

    for row in hub.rows["train"]:
        row[column] = value
    position = hub.schema.get_field_index(column)
    hub.schema = hub.schema.set(position, pa.field(column, pa.array([value]).type))
    hub.rows = {"train": hub.rows["train"]}
    hub.save()
    assert f"{hub.path_of('train')}: {message}" in hub.error("train")


def test_part_that_was_not_downloaded_is_named(hub):
    path = hub.path_of("train")
    path.rename(path.with_name("train-00000-of-00003.parquet"))
    assert "train-00000-of-00003.parquet: of its split, part 1 (counted from 0) is not there" in hub.error("train")


def test_second_edition_of_a_split_is_refused(hub):
    path = hub.path_of("train")
    path.with_name("train-00000-of-00001.parquet").write_bytes(path.read_bytes())
    message = hub.error("train")
    assert "a second edition of this split lies beside it" in message and "read twice" in message


def test_parts_of_a_split_are_read_in_order(tmp_path):
    things = many("train")
    hub = write_jxu124(tmp_path, "refcoco", things[:25])
    path = hub.path_of("train")
    path.rename(path.with_name("train-00000-of-00002.parquet"))
    hub.rows["train"] = write_jxu124(tmp_path / "other", "refcoco", things[25:]).rows["train"]
    hub.save()
    path.rename(path.with_name("train-00001-of-00002.parquet"))
    assert [s.expression for s in hub.samples("train")] == [t.sentences[0][1] for t in things]
