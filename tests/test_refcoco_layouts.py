"""The layouts of jxu124, lmms-lab, MDETR and VLM-R1 give REFER's samples, or an error with file, row and remedy.

Silent when false: the same box lies in these files as xyxy and as xywh, one pixel short, or beside running numbers
that look like COCO's, and a model trained on such boxes is merely weak. A part of a split that was not downloaded, or
a mixed split with images of the train split, makes a score that cannot be compared with the published one.
"""

from __future__ import annotations

import copy
import io
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_layouts import (
    PROMPT,
    image_bytes,
    is_the_record,
    many,
    odd_things,
    put_images,
    record,
    same_objects,
    things_of,
    write_jxu124,
    write_lmms,
    write_mdetr,
    write_vlm_r1,
    write_vlm_r1_jsonl,
)
from PIL import Image
from refer_layout import PHOTOS, write_refer_folder

import ivt_env.data as data
from ivt_env.data import DataError, refcoco, refer
from ivt_env.data.hub import parquet_rows
from ivt_env.data.table import open_table

NAMES = ("refcocog", "refcoco", "refcocoplus")
WRITERS = {
    "jxu124": write_jxu124,
    "lmms": write_lmms,
    "mdetr": write_mdetr,
    "vlm_r1": write_vlm_r1,
    "lines": write_vlm_r1_jsonl,
}
SET = {"mdetr": "refcocoplus", "vlm_r1": "refcocoplus"}
"""Layout -> the data set of ``hub``, where it is not RefCOCO."""
SPLITS = {"lmms": ("testA", "testB"), "vlm_r1": ("train", "val"), "lines": ("train",)}
REMEDY = {"lmms": "lmms-lab-encoder/RefCOCO again", "mdetr": "zenodo.org/record/4729015"}


pytestmark = pytest.mark.usefixtures("private_machine")


def written(tmp_path, layout):
    """40 objects in each of two splits (in one of VLM-R1's lines)."""
    things = [thing for split in SPLITS.get(layout, ("train", "testA")) for thing in many(split)]
    return WRITERS[layout](tmp_path, SET.get(layout, "refcoco"), things)


@pytest.fixture(params=WRITERS)
def hub(tmp_path, request):
    found = written(tmp_path, request.param)
    found.key = request.param
    found.split = SPLITS.get(request.param, ("train",))[0]
    return found


def served_splits(layout, name):
    held = {"lmms": refcoco.LMMS_SPLITS[name], "vlm_r1": ("train", "val"), "lines": ("train",)}
    return held.get(layout, next(iter(refer.PARTITIONS[name].values())))


# --- What is read ---------------------------------------------------------------------------------

OF_RECORD = {
    "jxu124": ("0-0", {"ann_id": 1719310, "ref_id": 0, "image_id": 581857, "category_id": 1}),
    "lmms": ("1719310-0", {"ann_id": 1719310, "image_id": 581857}),
    "mdetr": ("1719310-0", {"ann_id": 1719310, "image_id": 581857, "category_id": 1, "category": "person"}),
    "vlm_r1": ("1719310-0", {"ann_id": 1719310, "image_id": 581857, "category_id": 1}),
    "lines": ("0", {"image_id": 581857}),
}


@pytest.mark.parametrize("layout", WRITERS)
def test_published_record_is_reproduced(tmp_path, layout):
    split = "testA" if layout == "lmms" else "train"
    sample = WRITERS[layout](tmp_path, "refcoco", [record(split)]).samples(split)[0]
    is_the_record(sample)
    assert (sample.sample_id, sample.meta) == OF_RECORD[layout]
    if layout == "lines":
        is_the_record(write_vlm_r1_jsonl(tmp_path, "refcoco", [record()], as_text=True).samples("train")[0])
    if layout == "lmms":  # not only to float32, as the file holds it, but to the digits of the annotators' file
        assert sample.box == tuple(np.divide([103.93, 299.99, 103.93 + 134.22, 299.99 + 177.42], [427, 640] * 2))


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("name", NAMES)
def test_samples_and_images_are_those_of_the_refer_layout(tmp_path, name, layout):
    splits = served_splits(layout, name)
    things = things_of(write_refer_folder(tmp_path, name))
    hub = WRITERS[layout](tmp_path, name, [thing for thing in things if thing.split in splits])
    assert hub.find(tmp_path, name).splits == splits
    shared = [key for key in ("ann_id", "ref_id", "image_id", "category") if key in OF_RECORD[layout][1]]
    for split in splits:
        original, table = open_table(refer.source(tmp_path, name), split), hub.open(split)
        same_objects(list(table), list(original), tuple(shared))
        assert np.array_equal(table.image(table[0]), original.image(original[0]))
        if layout == "jxu124":
            assert table.sample_ids() == original.sample_ids()
        if layout == "lmms":  # byte for byte: a JPEG that is encoded again is another image
            assert table.image_path(table[0]).read_bytes() == original.image_path(original[0]).read_bytes()


@pytest.mark.parametrize("layout", WRITERS)
def test_odd_sizes_texts_and_images_round_trip_in_the_stored_frame(tmp_path, layout):
    split, name = ("val", "refcocoplus") if layout == "lmms" else ("train", "refcoco")
    things = odd_things(split)
    put_images(tmp_path / "train2014", things)
    table = WRITERS[layout](tmp_path, name, things).open(split)
    for sample, thing in zip(table, things, strict=True):
        assert (sample.expression, sample.size) == (thing.sentences[0][1], thing.size)
        # float32 gives a third of a pixel back as no short decimal
        assert np.allclose(sample.box, thing.relative, rtol=0, atol=3e-7 if layout == "lmms" else 1e-15)
        with Image.open(io.BytesIO(thing.image)) as image:  # no EXIF turn, also where the image is square
            assert np.array_equal(table.image(sample), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    ("layout", "place"),
    [(layout, place) for layout in ("jxu124", "mdetr") for place in refcoco.IMAGE_FOLDERS]
    + [("vlm_r1", f"{place}/train2014".lstrip("/")) for place in refcoco.VLM_R1_IMAGE_FOLDERS],
)
def test_images_are_found_in_every_documented_place(tmp_path, layout, place):
    things = [t for t in things_of(write_refer_folder(tmp_path / "elsewhere")) if t.split == "train"]
    put_images(tmp_path / place, things)
    hub = WRITERS[layout](tmp_path, "refcocog", things)
    table = open_table(hub.find(tmp_path, "refcocog"), "train")
    with Image.open(PHOTOS / "astronaut.jpg") as image:
        assert np.array_equal(table.image(table[0]), np.asarray(image))


def test_only_splits_on_disk_are_offered(tmp_path, hub):
    source = hub.find(tmp_path, hub.name)
    splits = SPLITS.get(hub.key, ("train", "testA"))
    assert (source.name, source.layout, source.splits) == (hub.name, hub.layout, splits)
    assert hub.find(tmp_path, "refcocog") is hub.find(tmp_path, "photos") is None
    with pytest.raises(DataError, match=rf"\({hub.layout}\) has no split 'test'; it has {', '.join(splits)}"):
        open_table(source, "test")


# --- Bad rows -------------------------------------------------------------------------------------


def first_sentence(**changes):
    return lambda row: row["sentences"][0].update(changes)


def in_json(key, **changes):
    return lambda row: row.update({key: json.dumps(json.loads(row[key]) | changes)})


def annotation(**changes):
    return lambda content: content["annotations"][3].update(changes)


def turns(asked, answer):
    return {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]}


GOOD = f"<image>{PROMPT}the cat."
NO_TURNS = "not one turn of human and one of gpt"
# What is done to row 3, as a change of its fields or a function, and a part of what is said.
BAD_ROWS = {
    "jxu124": [
        (
            lambda row: (row.update(bbox=[5.0, 6.0, 5.0, 15.0]), in_json("raw_anns", bbox=[5.0, 6.0, 0.0, 9.0])(row)),
            "bbox [5.0, 6.0, 5.0, 15.0] (x1, y1, x2, y2) has",
        ),
        (in_json("raw_anns", bbox=None), "bbox in raw_anns is None"),
        (in_json("raw_anns", id=5), "id in raw_anns is 5, and"),
        (in_json("raw_image_info", id=5), "id in raw_image_info is 5, and"),
        (in_json("raw_image_info", file_name="COCO_train2014_000000000005.jpg"), "5.jpg', but its id is"),
        (in_json("raw_image_info", file_name="../x.jpg"), "'../x.jpg' is not the plain name"),
        (lambda row: row.update(raw_anns=row["raw_anns"][:30]), "not whole JSON"),
        ({"raw_image_info": "[1]"}, "raw_image_info is [1], not a JSON object"),
        ({"split": "testB"}, "says split 'testB' in a file of train"),
        ({"sentences": [], "sent_ids": []}, "has no sentences"),
        ({"sentences": [None]}, "sent_id is None"),
        ({"sent_ids": [1, 2]}, "sent_ids [1, 2], but its sentences have"),
        (first_sentence(sent="  "), "sent is '  ', not a text"),
    ],
    "lmms": [
        ({"bbox": [1.0, float("nan"), 3.0, 4.0]}, "is not four finite numbers"),
        ({"question_id": "12a"}, "question_id is '12a', not the number of an annotation"),
        ({"file_name": "17.jpg"}, "file name '17.jpg' is not that of a COCO train2014 image"),
        ({"file_name": "../x.jpg"}, "file_name '../x.jpg' is not the plain name of a file"),
        ({"answer": []}, "answer is None, not a text"),
        ({"image": {"bytes": None, "path": "x.jpg"}}, "the image is not in the file (image is {"),
        ({"image": {"bytes": image_bytes(120, 80, shade=9), "path": None}}, "another image than an earlier row with"),
    ],
    "mdetr": [
        (annotation(bbox=[5, 6, 0, 9]), "bbox [5, 6, 0, 9] (x, y, width, height) has no area"),
        (annotation(original_id="12"), "original_id is '12', not a whole number"),
        (lambda content: content["annotations"].pop(3), "image id 3: has 0 annotations, not one"),
        (
            lambda content: content["annotations"].append(copy.deepcopy(content["annotations"][3])),
            "image id 3: has 2 annotations, not one",
        ),
        ({"dataset_name": "refcoco"}, "dataset_name is 'refcoco', not 'refcoco+'"),
        ({"original_id": 4}, "but its id is 4"),
        ({"file_name": "/etc/COCO_train2014_000000000004.jpg"}, "is not the plain name of a file"),
        ({"caption": " "}, "caption is ' ', not a text"),
    ],
    "vlm_r1": [
        ({"solution": [60, 40, 20, 30]}, "it would fit as xywh (x, y, width, height)"),
        ({"dataset_name": "refcocog"}, "dataset_name is 'refcocog' in a file of refcocoplus"),
        ({"image": "train2014/17.jpg"}, "file name '17.jpg' is not that of a COCO train2014 image"),
        ({"image": "../COCO_train2014_000000000004.jpg"}, "is not a path inside the folder of the images"),
        ({"normal_caption": ""}, "normal_caption is '', not a text"),
        ({"original_id": 1.5}, "original_id is 1.5, not a whole number"),
        ([1, 2], "is [1, 2], not an object"),
    ],
    "lines": [
        (turns(GOOD, "at 1, 2, 3, 4"), "the answer is 'at 1, 2, 3, 4', not whole JSON"),
        (turns(GOOD, "[60, 40, 20, 30]"), "it would fit as xywh (x, y, width, height)"),
        (turns("<image>Where is the cat?", [1, 2, 3, 4]), "the human's value is '<image>Where is the cat?'"),
        (turns(GOOD[:-1], [1, 2, 3, 4]), "not '<image>Please provide the bounding box"),
        (turns(f"<image>{PROMPT} .", [1, 2, 3, 4]), "expression is ' ', not a text"),
        ({"conversations": turns(GOOD, "[1, 2, 3, 4]")["conversations"][::-1]}, NO_TURNS),
        ({"conversations": [GOOD, "[1, 2, 3, 4]"]}, NO_TURNS),
        ({"id": None}, "id is None"),
        ({"image": "train2014/COCO_train2014_000000000004.jpg"}, "4.jpg': no such image, "),
        ([1, 2], "is [1, 2], not an object"),
    ],
}


@pytest.mark.parametrize(
    ("layout", "damage", "reason"), [(layout, *case) for layout, cases in BAD_ROWS.items() for case in cases]
)
def test_bad_row_is_named_and_left_out_and_the_rest_is_served(tmp_path, caplog, layout, damage, reason):
    hub = written(tmp_path, layout)
    split = next(iter(hub.rows))
    content = hub.rows[split]
    is_mdetr = layout == "mdetr"
    if isinstance(damage, list):
        content[3] = damage
    elif not callable(damage):
        (content["images"] if is_mdetr else content)[3].update(damage)
    else:
        damage(content if is_mdetr else content[3])
    hub.save()
    log = hub.left_out(split, caplog)
    assert f"row 3 of {'the images of ' if is_mdetr else ''}{hub.path_of(split).name}: " in log and reason in log


@pytest.mark.parametrize("layout", ["lmms", "mdetr", "vlm_r1"])
def test_file_of_boxes_in_the_other_convention_is_refused_and_said_to_be_so(tmp_path, layout):
    hub = written(tmp_path, layout)
    split = list(hub.rows)[1] if layout != "mdetr" else "train"
    rows = hub.rows[split]["annotations"] if layout == "mdetr" else hub.rows[split]
    for row in rows:
        if layout == "vlm_r1":
            x1, y1, x2, y2 = row["solution"]
            row["solution"] = [x1 + 40, y1 + 40, x2 - x1, y2 - y1]
        else:
            x, y, w, h = row["bbox"]
            row["bbox"] = [x + 45, y + 40, x + 45 + w, y + 40 + h]
    hub.save()
    message = hub.error(next(iter(hub.rows)))
    assert ("would fit as xywh" if layout == "vlm_r1" else "would fit as xyxy") in message
    assert "(the limit is 10)" in message and REMEDY.get(layout, f"`ivt data fetch {layout}`") in message
    assert str(hub.path_of(split)) in message


# --- Broken files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 200, 0.5])
def test_half_a_file_is_named(hub, keep):
    path = hub.path_of(hub.split)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    if hub.key == "lines":  # not one bad row of many: what follows it is missing
        if keep != 0:
            assert "only half there" in hub.error(hub.split)
        return
    message = hub.error(hub.split)
    kind = "not a whole Parquet file" if path.suffix == ".parquet" else "not whole JSON"
    assert message.startswith(f"{path}: {kind}") and f"`ivt data fetch {hub.layout}`" in message


@pytest.mark.parametrize("content", [None, {}, {"images": {}, "annotations": []}, "x"])
@pytest.mark.parametrize("layout", ["mdetr", "vlm_r1"])
def test_file_of_another_form_is_named(tmp_path, layout, content):
    hub = written(tmp_path, layout)
    hub.path_of("train").write_text(json.dumps(content))
    said = "has no list" if layout == "mdetr" else "holds"
    assert f"{hub.path_of('train')}: {said}" in hub.error("train")


# --- jxu124 ---------------------------------------------------------------------------------------


@pytest.fixture
def parquet(tmp_path):
    return written(tmp_path, "jxu124")


def test_xywh_in_the_column_is_refused_and_said_to_be_so(parquet):
    parquet.rows["train"][7]["bbox"] = [8.5, 2.25, 30.75, 20.5]
    parquet.save()
    message = parquet.error("train")
    assert f"{parquet.path_of('train')}: row 7: bbox [8.5, 2.25, 30.75, 20.5] should be xyxy" in message
    assert "probably xywh" in message and "`ivt data fetch jxu124`" in message


def test_one_disagreement_of_more_than_the_tolerance_refuses_the_file(parquet):
    for corner, by in enumerate([5e-5, 2e-4, -2e-4, 2e-4]):
        parquet.rows["train"][39]["bbox"][corner] += by
        parquet.save()
        if by == 5e-5:
            assert len(parquet.open("train")) == 40
        else:
            message = parquet.error("train")
            assert "row 39: bbox" in message and "can be trusted" in message and "probably" not in message
            parquet.rows["train"][39]["bbox"][corner] -= by


def test_people_split_may_call_itself_test(parquet):
    for row in parquet.rows["testA"][::2]:
        row["split"] = "test"
    parquet.save()
    assert len(parquet.open("testA")) == 40


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("bbox", "[1, 2, 3, 4]", "bbox '[1, 2, 3, 4]' is not four finite numbers"),
        ("image_id", "5", "image_id is '5', not a whole number"),
        ("sentences", ["a", "b"], "sent_id is None, not a whole number"),
        ("sentences", 7, "has no sentences"),
    ],
)
def test_column_of_another_type_is_named(parquet, column, value, message):
    for row in parquet.rows["train"]:
        row[column] = value
    position = parquet.schema.get_field_index(column)
    parquet.schema = parquet.schema.set(position, pa.field(column, pa.array([value]).type))
    parquet.rows = {"train": parquet.rows["train"]}
    parquet.save()
    assert f"rows are unusable (the limit is 10), the first: row 0 of {parquet.path_of('train').name}: " in (
        said := parquet.error("train")
    )
    assert message in said and "download the Hub data set jxu124/refcoco again" in said


def test_parts_of_a_split_are_read_in_order_and_a_missing_or_second_one_is_refused(tmp_path):
    things = many("train")
    hub = write_jxu124(tmp_path, "refcoco", things[:25])
    path = hub.path_of("train")
    first = path.rename(path.with_name("train-00000-of-00002.parquet"))
    assert "of its split, part 1 (counted from 0) is not there" in hub.error("train")
    hub.rows["train"] = write_jxu124(tmp_path / "other", "refcoco", things[25:]).rows["train"]
    hub.save()
    path.rename(path.with_name("train-00001-of-00002.parquet"))
    assert [s.expression for s in hub.samples("train")] == [t.sentences[0][1] for t in things]
    path.write_bytes(first.read_bytes())
    message = hub.error("train")
    assert "a second edition of this split lies beside it" in message and "read twice" in message


# --- lmms -----------------------------------------------------------------------------------------


def test_every_box_in_hundredths_of_a_pixel_comes_back_to_the_bit(tmp_path):
    numbers = np.random.default_rng(0).integers(1, 4000, (400, 4)) / 100
    things = [replace(t, xywh=tuple(xywh)) for t, xywh in zip(many("testA", 400), numbers.tolist(), strict=True)]
    assert [s.box for s in write_lmms(tmp_path, "refcoco", things).samples("testA")] == [t.relative for t in things]


@pytest.mark.parametrize(
    ("name", "refused"),
    [("refcoco", ("train", "val", "test")), ("refcocog", ("train", "val")), ("refcocoplus", ("train",))],
)
def test_mixed_and_absent_splits_are_never_served(tmp_path, name, refused):
    hub = write_lmms(tmp_path, name, [t for split in (*refused, *refcoco.LMMS_SPLITS[name]) for t in many(split, 3)])
    source = refcoco.lmms(tmp_path, name)
    assert source.splits == refcoco.LMMS_SPLITS[name]
    for split in refused:
        assert hub.path_of(split) not in source.files
        assert data.find_source(name, split, tmp_path) is None
    assert {s.split for split in source.splits for s in hub.samples(split)} == set(source.splits)
    for split in source.splits:
        hub.path_of(split).unlink()
    assert refcoco.lmms(tmp_path, name) is None


def test_few_images_are_in_memory_at_once(tmp_path):
    rng = np.random.default_rng(0)
    row = write_lmms(tmp_path, "refcoco", many("testA", 1)).rows["testA"][0]
    rows = [row | {"image": {"bytes": rng.bytes(100_000), "path": "x"}} for _ in range(200)]
    path = tmp_path / "big.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=10)
    del rows
    before, most = pa.total_allocated_bytes(), 0
    for _ in parquet_rows(path, refcoco.LMMS_COLUMNS, "fetch it again", refcoco.LMMS_ROWS_AT_ONCE):
        most = max(most, pa.total_allocated_bytes() - before)
    assert 0 < most < path.stat().st_size / 2


def test_file_name_must_end_in_the_annotation_in_refcocog_alone(tmp_path, caplog):
    for name, split, skipped in (("refcocog", "test", 1), ("refcoco", "testA", 0), ("refcocoplus", "testB", 0)):
        hub = write_lmms(tmp_path, name, many(split))
        hub.rows[split][3]["question_id"] = "5"
        hub.save()
        assert hub.open(split).skipped == skipped, name
    assert "is of another annotation" in caplog.text


# --- MDETR ----------------------------------------------------------------------------------------


def test_running_numbers_join_nothing_but_the_two_lists(tmp_path):
    hub = written(tmp_path, "mdetr")
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


def test_file_without_names_of_categories_is_served_without_them(tmp_path):
    hub = written(tmp_path, "mdetr")
    for categories in (None, [], [{"id": 1}], "none"):
        hub.rows["train"]["categories"] = categories
        hub.save()
        assert hub.samples("train")[0].meta.keys() == {"ann_id", "image_id", "category_id"}


def test_annotation_without_an_image_is_reported(tmp_path, caplog):
    hub = written(tmp_path, "mdetr")
    content = hub.rows["train"]
    content["annotations"] += [content["annotations"][3] | {"image_id": 99}, {"id": 5}]
    hub.save()
    assert (hub.open("train").skipped, len(hub.open("train"))) == (2, 40)
    assert "there is no image with their image_id 99" in caplog.text
    assert "row 41 of the annotations of finetune_refcoco+_train.json: image_id is None" in caplog.text
    content["images"][3] = 5  # its annotation has no image: two rows to report, one sample lost
    hub.save()
    assert (hub.open("train").skipped, len(hub.open("train"))) == (4, 39)
    assert "row 3 of the images of finetune_refcoco+_train.json: is 5, not an object" in caplog.text


# --- VLM-R1 ---------------------------------------------------------------------------------------


def test_bbox_list_is_never_looked_at(tmp_path):
    hub = written(tmp_path, "vlm_r1")
    expected = hub.samples("train")
    for row in hub.rows["train"]:
        row["bbox_list"] = [[0, 0, 1, 1]]
        del row["normalized_solution"]
    hub.save()
    assert hub.samples("train") == expected


def test_json_goes_before_jsonl(tmp_path):
    hub = written(tmp_path, "vlm_r1")
    write_vlm_r1_jsonl(tmp_path, "refcocoplus", many("train", 3))
    assert len(hub.open("train")) == 40
    files = refcoco.vlm_r1(tmp_path, "refcocoplus").files
    assert [path.name for path in files] == ["refcocop_train.json", "refcocop_val.json"]


@pytest.fixture
def lines(tmp_path):
    return written(tmp_path, "lines")


def test_prompt_is_taken_off_and_one_full_stop_with_it_and_blank_lines_are_no_rows(lines):
    for row, between in zip(lines.rows["train"], ["", "\n", " "], strict=False):
        row["conversations"][0]["value"] = f"<image>{between}{PROMPT}Mr. X, left...."
        row["id"] = f"refcoco-{row['id']}"
    lines.save()
    path = lines.path_of("train")
    path.write_text(path.read_text("utf-8").replace("\n{", "\n\n{", 5) + "  \n", "utf-8")
    found = [(sample.expression, sample.sample_id) for sample in lines.samples("train")]
    assert found[:3] == [("Mr. X, left...", f"refcoco-{n}") for n in range(3)]
    assert (len(found), lines.open("train").skipped) == (40, 0)


def test_lines_without_any_image_are_refused_with_the_remedy(lines):
    (lines.root / "vlm_r1" / "train2014").rename(lines.root / "elsewhere")
    message = lines.error("train")
    assert "40 of 40 rows are unusable" in message and "unpack COCO's train2014.zip" in message
