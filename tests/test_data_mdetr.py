"""MDETR's files give REFER's samples, or an error that names the file, the row and a remedy.

Silent when false: ``id`` and ``image_id`` are running numbers in these files, and taken for COCO's
they join every expression with a box of another image, of which each number looks right.
"""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
from hub_layouts import is_the_record, many, odd_things, put_images, record, same_objects, things_of, write_mdetr
from PIL import Image
from refer_layout import PHOTOS, write_refer_folder

from ivt_env.data import mdetr, refer
from ivt_env.data.table import open_table


@pytest.fixture(autouse=True)
def private_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))


@pytest.fixture
def hub(tmp_path):
    """refcoco+ with 40 objects in train and in testA."""
    return write_mdetr(tmp_path, "refcocoplus", many("train") + many("testA"))


# --- What is read ---------------------------------------------------------------------------------


def test_published_record_is_reproduced(tmp_path):
    sample = write_mdetr(tmp_path, "refcoco", [record()]).samples("train")[0]
    is_the_record(sample)
    assert sample.sample_id == "1719310-0"
    assert sample.meta == {"ann_id": 1719310, "image_id": 581857, "category_id": 1, "category": "person"}


@pytest.mark.parametrize("name", ["refcocog", "refcoco", "refcocoplus"])
def test_samples_are_those_of_the_refer_layout(tmp_path, name):
    folder = write_refer_folder(tmp_path, name)
    hub = write_mdetr(tmp_path, name, things_of(folder))
    splits = next(iter(refer.PARTITIONS[name].values()))
    assert mdetr.find(tmp_path, name).splits == splits
    for split in splits:
        original = open_table(refer.source(tmp_path, name), split)
        expected, found = [original[i] for i in range(len(original))], hub.samples(split)
        same_objects(found, expected, ("ann_id", "image_id", "category"))
        table = hub.open(split)
        assert np.array_equal(table.image(table[0]), original.image(original[0]))


def test_odd_sizes_texts_and_images_round_trip(tmp_path):
    things = odd_things("val")
    put_images(tmp_path / "train2014", things)
    table = write_mdetr(tmp_path, "refcoco", things).open("val")
    for sample, thing in zip([table[i] for i in range(len(table))], things, strict=True):
        assert (sample.expression, sample.size) == (thing.sentences[0][1], thing.size)
        assert np.allclose(sample.box, thing.relative, rtol=0, atol=1e-15)
        assert table.image(sample).shape == (*thing.size, 3)


@pytest.mark.parametrize("place", mdetr.IMAGE_FOLDERS)
def test_images_are_found_in_every_documented_place(tmp_path, place):
    things = things_of(write_refer_folder(tmp_path / "elsewhere"))
    put_images(tmp_path / place, things)
    write_mdetr(tmp_path, "refcocog", things)
    table = open_table(mdetr.find(tmp_path, "refcocog"), "train")
    with Image.open(PHOTOS / "astronaut.jpg") as image:
        assert np.array_equal(table.image(table[0]), np.asarray(image))


def test_only_splits_on_disk_are_offered_and_each_set_has_its_own_index(tmp_path, hub):
    source = mdetr.find(tmp_path, "refcocoplus")
    assert (source.name, source.splits) == ("refcocoplus", ("train", "testA"))
    assert mdetr.find(tmp_path, "refcoco") is mdetr.find(tmp_path, "photos") is None
    other = write_mdetr(tmp_path, "refcoco", [record()])
    for _ in range(2):  # the second time from the index
        assert (len(hub.open("train")), len(other.open("train"))) == (40, 3)
        assert (hub.open("train").name, other.open("train").name) == ("refcocoplus", "refcoco")
    assert len(list((tmp_path / "mdetr" / ".ivt_index").glob("*.arrow"))) == 2


def test_running_numbers_join_nothing_but_the_two_lists(hub):
    expected = hub.samples("train")
    content = hub.rows["train"]
    for entry in content["images"]:
        entry["id"] += 581_000
    for entry in content["annotations"]:
        entry["image_id"] += 581_000
        entry["id"] = 3
    content["annotations"].reverse()
    hub.save()
    found = hub.samples("train")
    assert [s.sample_id for s in found] != [s.sample_id for s in expected]
    same_objects(found, expected, ("ann_id", "image_id", "category"))


@pytest.mark.parametrize("categories", [None, [], [{"id": 1}], "none"])
def test_file_without_names_of_categories_is_served_without_them(hub, categories):
    hub.rows["train"]["categories"] = categories
    hub.save()
    assert hub.samples("train")[0].meta.keys() == {"ann_id", "image_id", "category_id"}


# --- Bad rows -------------------------------------------------------------------------------------


def image(**changes):
    return lambda content: content["images"][3].update(changes)


def annotation(**changes):
    return lambda content: content["annotations"][3].update(changes)


BAD_ROWS = {
    "NaN": (annotation(bbox=[1.0, float("nan"), 3.0, 4.0]), "is not four finite numbers"),
    "null": (annotation(bbox=None), "bbox None is not four numbers"),
    "text": (annotation(bbox="[1, 2, 3, 4]"), "bbox '[1, 2, 3, 4]' is not four numbers"),
    "truth value": (annotation(bbox=[True, 2, 3, 4]), "is not four finite numbers"),
    "zero area": (annotation(bbox=[5, 6, 0, 9]), "bbox [5, 6, 0, 9] (x, y, width, height) has no area"),
    "other set": (image(dataset_name="refcoco"), "dataset_name is 'refcoco', not 'refcoco+'"),
    "no set": (image(dataset_name=None), "dataset_name is None"),
    "other image": (image(original_id=4), "but its original_id is 4"),
    "no COCO name": (image(file_name="17.jpg"), "file name '17.jpg' is not that of a COCO train2014 image"),
    "path": (image(file_name="/etc/COCO_train2014_000000000004.jpg"), "is not the plain name of a file"),
    "no size": (image(width=None), "width is None"),
    "negative size": (image(height=-80), "height is -80"),
    "blank": (image(caption=" "), "caption is ' ', not a text"),
    "no caption": (lambda content: content["images"][3].pop("caption"), "caption is None"),
    "no object": (annotation(original_id="12"), "original_id is '12', not a whole number"),
    "no annotation": (lambda content: content["annotations"].pop(3), "image id 3: has 0 annotations, not one"),
    "no image entry": (lambda content: content["images"].__setitem__(3, 5), "is 5, not an object"),
}


@pytest.mark.parametrize("what", BAD_ROWS)
def test_bad_row_is_named_and_left_out_and_the_rest_is_served(hub, caplog, what):
    damage, reason = BAD_ROWS[what]
    damage(hub.rows["train"])
    hub.save()
    # Where the image entry is none, its annotation has no image: two rows to report, one sample lost.
    alone = what != "no image entry"
    assert (hub.open("train").skipped, len(hub.open("train"))) == (1 if alone else 2, 39)
    assert "row 3 of the images of finetune_refcoco+_train.json: " in caplog.text and reason in caplog.text


def test_image_with_two_annotations_is_a_bad_row(hub, caplog):
    content = hub.rows["train"]
    content["annotations"].append(copy.deepcopy(content["annotations"][3]))
    hub.save()
    assert "image id 3: has 2 annotations, not one" in hub.left_out("train", caplog)


def test_annotation_without_an_image_is_reported(hub, caplog):
    content = hub.rows["train"]
    content["annotations"] += [content["annotations"][3] | {"image_id": 99}, {"id": 5}]
    hub.save()
    assert (hub.open("train").skipped, len(hub.open("train"))) == (2, 40)
    assert "there is no image with their image_id 99" in caplog.text
    assert "row 41 of the annotations of finetune_refcoco+_train.json: image_id is None" in caplog.text


def test_file_of_xyxy_boxes_is_refused_and_said_to_be_so(hub):
    for entry in hub.rows["train"]["annotations"]:
        x, y, w, h = entry["bbox"]
        entry["bbox"] = [x + 45, y + 40, x + 45 + w, y + 40 + h]
    hub.save()
    message = hub.error("train")
    assert (
        "boxes do not fit their images as they are read (the limit is 10)" in message and "would fit as xyxy" in message
    )
    assert "zenodo.org/record/4729015" in message and str(hub.path_of("train")) in message


# --- Broken files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1, 200, 0.5, -1])
def test_half_a_file_is_named(hub, keep):
    path = hub.path_of("train")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    message = hub.error("train")
    assert message.startswith(f"{path}: not whole JSON") and "`ivt data fetch mdetr`" in message


@pytest.mark.parametrize("content", [[], None, {}, {"images": []}, {"images": {}, "annotations": []}, "x", 5])
def test_file_of_another_form_is_named(hub, content):
    hub.path_of("train").write_text(json.dumps(content))
    assert "finetune_refcoco+_train.json: has no list" in hub.error("train")
