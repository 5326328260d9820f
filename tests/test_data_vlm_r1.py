"""VLM-R1's files give REFER's samples, or an error that names the file, the row and a remedy.

Silent when false: ``bbox_list`` is one pixel short and looks like the box; ``image_id`` is a running
number and looks like COCO's; a prompt left in the expression is trained on and scored with.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from hub_layouts import (
    PROMPT,
    is_the_record,
    many,
    odd_things,
    put_images,
    record,
    same_objects,
    things_of,
    write_vlm_r1,
    write_vlm_r1_jsonl,
)
from PIL import Image
from refer_layout import PHOTOS, write_refer_folder

from ivt_env.data import refer, vlm_r1
from ivt_env.data.table import open_table


@pytest.fixture(autouse=True)
def private_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))


@pytest.fixture
def hub(tmp_path):
    """refcoco+ with 40 objects in train and in val, as .json."""
    return write_vlm_r1(tmp_path, "refcocoplus", many("train") + many("val"))


@pytest.fixture
def lines(tmp_path):
    """refcoco with 40 objects in train, as .jsonl."""
    return write_vlm_r1_jsonl(tmp_path, "refcoco", many("train"))


# --- What is read ---------------------------------------------------------------------------------


def test_published_record_is_reproduced(tmp_path):
    hub = write_vlm_r1(tmp_path, "refcoco", [record()])
    row = hub.rows["train"][0]
    assert np.allclose(row["solution"], [103.93, 299.99, 238.15, 477.41], rtol=0, atol=1e-12)
    assert np.allclose(row["bbox_list"], [[103.93, 299.99, 237.15, 476.41]], rtol=0, atol=1e-12)
    assert row["normalized_solution"] == [243, 468, 557, 745]
    sample = hub.samples("train")[0]
    is_the_record(sample)
    assert sample.sample_id == "1719310-0"
    assert sample.meta == {"ann_id": 1719310, "image_id": 581857, "category_id": 1}


@pytest.mark.parametrize("as_text", [False, True])
def test_published_record_is_reproduced_from_lines(tmp_path, as_text):
    sample = write_vlm_r1_jsonl(tmp_path, "refcoco", [record()], as_text).samples("train")[0]
    is_the_record(sample)
    assert (sample.sample_id, sample.meta) == ("0", {"image_id": 581857})


@pytest.mark.parametrize("write", [write_vlm_r1, write_vlm_r1_jsonl])
@pytest.mark.parametrize("name", ["refcocog", "refcoco", "refcocoplus"])
def test_samples_are_those_of_the_refer_layout(tmp_path, name, write):
    splits = ("train", "val") if write is write_vlm_r1 else ("train",)
    folder = write_refer_folder(tmp_path, name)
    hub = write(tmp_path, name, [t for t in things_of(folder) if t.split in splits])
    assert vlm_r1.find(tmp_path, name).splits == splits
    for split in splits:
        original = open_table(refer.source(tmp_path, name), split)
        expected, found = [original[i] for i in range(len(original))], hub.samples(split)
        same_objects(found, expected, ("ann_id", "image_id") if write is write_vlm_r1 else ("image_id",))
        table = hub.open(split)
        assert np.array_equal(table.image(table[0]), original.image(original[0]))


@pytest.mark.parametrize("write", [write_vlm_r1, write_vlm_r1_jsonl])
def test_odd_sizes_texts_and_images_round_trip_in_the_stored_frame(tmp_path, write):
    things = odd_things("train")
    put_images(tmp_path / "train2014", things)
    table = write(tmp_path, "refcoco", things).open("train")
    for sample, thing in zip([table[i] for i in range(len(table))], things, strict=True):
        assert (sample.expression, sample.size) == (thing.sentences[0][1], thing.size)
        assert np.allclose(sample.box, thing.relative, rtol=0, atol=1e-15)
        assert table.image(sample).shape == (*thing.size, 3)


@pytest.mark.parametrize("place", vlm_r1.IMAGE_FOLDERS)
def test_images_are_found_in_every_documented_place(tmp_path, place):
    things = [t for t in things_of(write_refer_folder(tmp_path / "elsewhere")) if t.split == "train"]
    put_images(tmp_path / place / "train2014", things)
    write_vlm_r1(tmp_path, "refcocog", things)
    table = open_table(vlm_r1.find(tmp_path, "refcocog"), "train")
    with Image.open(PHOTOS / "astronaut.jpg") as image:
        assert np.array_equal(table.image(table[0]), np.asarray(image))


def test_bbox_list_is_never_looked_at(hub):
    expected = hub.samples("train")
    for row in hub.rows["train"]:
        row["bbox_list"] = [[0, 0, 1, 1]]
        del row["normalized_solution"]
    hub.save()
    assert hub.samples("train") == expected


def test_only_files_on_disk_are_offered_and_json_goes_before_jsonl(tmp_path, hub, lines):
    assert vlm_r1.find(tmp_path, "refcocoplus").splits == ("train", "val")
    assert vlm_r1.find(tmp_path, "refcoco").splits == ("train",)
    assert vlm_r1.find(tmp_path, "refcocog") is vlm_r1.find(tmp_path, "photos") is None
    write_vlm_r1_jsonl(tmp_path, "refcocoplus", many("train", 3))
    assert len(hub.open("train")) == 40
    assert [path.name for path in vlm_r1.find(tmp_path, "refcocoplus").files] == [
        "refcocop_train.json",
        "refcocop_val.json",
    ]


@pytest.mark.parametrize("between", ["", "\n", " "])
def test_prompt_is_taken_off_and_one_full_stop_with_it(lines, between):
    turn = lines.rows["train"][0]["conversations"][0]
    turn["value"] = f"<image>{between}{PROMPT}Mr. X, left...."
    lines.rows["train"][0]["id"] = "refcoco-17"
    lines.save()
    sample = lines.samples("train")[0]
    assert (sample.expression, sample.sample_id) == ("Mr. X, left...", "refcoco-17")


def test_blank_lines_are_no_rows(lines):
    path = lines.path_of("train")
    path.write_text(path.read_text("utf-8").replace("\n", "\n\n", 5) + "  \n", "utf-8")
    assert (len(lines.open("train")), lines.open("train").skipped) == (40, 0)


# --- Bad rows -------------------------------------------------------------------------------------

BAD_ROWS = {
    "NaN": ({"solution": [1.0, float("nan"), 3.0, 4.0]}, "is not four finite numbers"),
    "null": ({"solution": None}, "solution None is not four numbers"),
    "box in a list": ({"solution": [[1, 2, 3, 4]]}, "solution [[1, 2, 3, 4]] is not four numbers"),
    "text": ({"solution": "[1, 2, 3, 4]"}, "is not four numbers"),
    "zero area": ({"solution": [5, 6, 5, 9]}, "solution [5, 6, 5, 9] (x1, y1, x2, y2) has its corners in the wrong"),
    "xywh": ({"solution": [60, 40, 20, 30]}, "it would fit as xywh (x, y, width, height)"),
    "other set": ({"dataset_name": "refcocog"}, "dataset_name is 'refcocog' in a file of refcocoplus"),
    "no COCO name": ({"image": "train2014/17.jpg"}, "file name '17.jpg' is not that of a COCO train2014 image"),
    "path": ({"image": "../COCO_train2014_000000000004.jpg"}, "is not a path inside the folder of the images"),
    "absolute path": ({"image": "/COCO_train2014_000000000004.jpg"}, "is not a path inside the folder"),
    "several images": ({"image": ["a.jpg", "b.jpg"]}, "image is ['a.jpg', 'b.jpg'], not a text"),
    "no size": ({"height": None}, "height is None"),
    "blank": ({"normal_caption": ""}, "normal_caption is '', not a text"),
    "half a letter": ({"normal_caption": "\ud800"}, "not valid Unicode"),
    "no object": ({"original_id": 1.5}, "original_id is 1.5, not a whole number"),
    "no category": ({"category_id": None}, "category_id is None"),
}


@pytest.mark.parametrize("what", BAD_ROWS)
def test_bad_row_is_named_and_left_out_and_the_rest_is_served(hub, caplog, what):
    changes, reason = BAD_ROWS[what]
    hub.rows["train"][3].update(changes)
    hub.save()
    log = hub.left_out("train", caplog)
    assert "row 3 of refcocop_train.json: " in log and reason in log


def turns(asked, answer, **more):
    return {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]} | more


GOOD = f"<image>{PROMPT}the cat."
BAD_LINES = {
    "NaN": (turns(GOOD, [1.0, float("nan"), 3.0, 4.0]), "the answer [1.0, nan, 3.0, 4.0] is not four finite numbers"),
    "NaN as text": (turns(GOOD, "[1.0, NaN, 3.0, 4.0]"), "is not four finite numbers"),
    "words": (turns(GOOD, "at 1, 2, 3, 4"), "the answer is 'at 1, 2, 3, 4', not a list of four numbers"),
    "three numbers": (turns(GOOD, [1, 2, 3]), "the answer [1, 2, 3] is not four numbers"),
    "no answer": (turns(GOOD, None), "the answer None is not four numbers"),
    "zero area": (turns(GOOD, [5, 6, 9, 6]), "the answer [5, 6, 9, 6] (x1, y1, x2, y2) has its corners"),
    "xywh": (turns(GOOD, "[60, 40, 20, 30]"), "it would fit as xywh (x, y, width, height)"),
    "other prompt": (
        turns("<image>Where is the cat?", [1, 2, 3, 4]),
        "the human's value is '<image>Where is the cat?'",
    ),
    "no full stop": (turns(GOOD[:-1], [1, 2, 3, 4]), "not '<image>Please provide the bounding box"),
    "no expression": (turns(f"<image>{PROMPT} .", [1, 2, 3, 4]), "expression is ' ', not a text"),
    "one turn": ({"conversations": [{"from": "human", "value": GOOD}]}, "not one turn of human and one of gpt"),
    "roles swapped": (
        {"conversations": [{"from": "gpt", "value": "[1, 2, 3, 4]"}, {"from": "human", "value": GOOD}]},
        "not one turn of human and one of gpt",
    ),
    "no turns": ({"conversations": None}, "conversations is None"),
    "turn is a text": ({"conversations": [GOOD, "[1, 2, 3, 4]"]}, "not one turn of human and one of gpt"),
    "no id": ({"id": None}, "id is None"),
    "two images": ({"image": ["a.jpg", "b.jpg"]}, "image is ['a.jpg', 'b.jpg'], not a text"),
    "missing image": (
        {"image": "train2014/COCO_train2014_000000000004.jpg"},
        "image 'train2014/COCO_train2014_000000000004.jpg', whose size is needed, is in none of",
    ),
}


@pytest.mark.parametrize("what", BAD_LINES)
def test_bad_line_is_named_and_left_out_and_the_rest_is_served(lines, caplog, what):
    changes, reason = BAD_LINES[what]
    lines.rows["train"][3].update(changes)
    lines.save()
    log = lines.left_out("train", caplog)
    assert "row 3 of refcoco_train.jsonl: " in log and reason in log


def test_line_whose_image_is_no_image_names_the_image(lines, caplog):
    path = lines.root / "vlm_r1" / "train2014" / "COCO_train2014_000000000004.jpg"
    path.write_bytes(b"half a pict")
    lines.rows["train"][3]["image"] = f"train2014/{path.name}"
    lines.save()
    assert f"{path}: not a whole image that can be read" in lines.left_out("train", caplog)


def test_lines_without_any_image_are_refused_with_the_remedy(lines):
    (lines.root / "vlm_r1" / "train2014").rename(lines.root / "elsewhere")
    message = lines.error("train")
    assert "40 of 40 rows are unusable" in message and "unpack COCO's train2014.zip" in message


@pytest.mark.parametrize("which", ["hub", "lines"])
def test_row_that_is_no_object_is_named(request, which, caplog):
    written = request.getfixturevalue(which)
    written.rows["train"][3] = [1, 2]
    written.save()
    assert "is [1, 2], not an object" in written.left_out("train", caplog)


def test_file_of_xywh_boxes_is_refused_and_said_to_be_so(hub):
    for row in hub.rows["val"]:
        x1, y1, x2, y2 = row["solution"]
        row["solution"] = [x1 + 40, y1 + 40, x2 - x1, y2 - y1]
    hub.save()
    message = hub.error("train")
    assert "rows are unusable (the limit is 10)" in message and "it would fit as xywh" in message
    assert "`ivt data fetch vlm_r1`" in message and str(hub.path_of("val")) in message


# --- Broken files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1, 200, 0.5, -1])
def test_half_a_file_is_named(hub, keep):
    path = hub.path_of("train")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    message = hub.error("train")
    assert message.startswith(f"{path}: not whole JSON") and "`ivt data fetch vlm_r1`" in message


@pytest.mark.parametrize("keep", [0.5, 0.99, -3])
def test_half_a_file_of_lines_is_refused_and_not_one_bad_row(lines, keep):
    path = lines.path_of("train")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    message = lines.error("train")
    assert message.startswith(f"{path}: row ") and "not whole JSON" in message and "only half there" in message


@pytest.mark.parametrize("content", [{}, None, "x", 5])
def test_file_of_another_form_is_named(hub, content):
    hub.path_of("train").write_text(json.dumps(content))
    assert f"refcocop_train.json: holds {content!r}, not a list of objects" in hub.error("train")
