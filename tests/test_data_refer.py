"""A REFER folder is read exactly, safely and lazily, or refused with the file, the row and a remedy.

Silent when false: boxes in the wrong convention or frame train a model that looks merely weak; a
leaked picture or a data set served under another's name makes a number that is a lie; a pickle
from a mirror runs code with the user's rights.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from refer_layout import PHOTOS, python2_pickle, write_refer_folder

import ivt_env.data as data
from ivt_env import boxes
from ivt_env.data import DataError, DataMissingError, Dataset, DatasetFallbackWarning, load_dataset
from ivt_env.data import refer as module
from ivt_env.data.refer import Refer, read_pickle


@pytest.fixture(autouse=True)
def private_machine(tmp_path, monkeypatch):
    """No test may see or fill the data and cache folders of whoever runs it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    monkeypatch.delenv("IVT_DATA", raising=False)
    monkeypatch.setattr(data, "_warned", set())


@pytest.fixture
def layout(tmp_path):
    return write_refer_folder(tmp_path / "root")


def samples_of(dataset):
    return [dataset[i] for i in range(len(dataset))]


def index_file(layout):
    return layout.folder / ".ivt_index" / "refs-umd.parquet"


# --- What is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
@pytest.mark.parametrize(
    ("name", "partition", "label"),
    [
        ("refcocog", "umd", "refcocog"),
        ("refcocog", "google", "refcocog-google"),
        ("refcoco", "unc", "refcoco"),
        ("refcocoplus", "unc", "refcocoplus"),
    ],
)
def test_every_expression_is_served_once_with_its_box_and_picture(tmp_path, name, partition, label, protocol):
    layout = write_refer_folder(tmp_path, name, partition, protocol)
    found = {}
    for split in module.PARTITIONS[name][partition]:
        dataset = Refer(tmp_path, name, split, partition)
        assert isinstance(dataset, Dataset)
        assert (dataset.name, dataset.split, dataset.skipped) == (label, split, 0)
        for sample in samples_of(dataset):
            assert (sample.dataset, sample.split) == (label, split)
            found[sample.sample_id] = sample
            assert dataset.picture(sample).shape == (*sample.size, 3)
    assert found.keys() == layout.known.keys()
    for sample_id, known in layout.known.items():
        sample = found[sample_id]
        assert (sample.expression, sample.split) == (known["expression"], known["split"])
        assert (sample.size, sample.meta["category"]) == (known["size"], known["category"])
        # Whole-pixel xywh on disk gives back the drawn xyxy to the last bit of a float.
        height, width = sample.size
        expected = np.array(known["box_px"]) / [width, height, width, height]
        assert sample.box == tuple(expected)
        assert np.array_equal(np.round(boxes.to_pixels(sample.box, sample.size), 9), known["box_px"])


def test_record_of_the_published_annotations_converts_as_stated(layout):
    """RefCOCO ref 0, as VLM-R1 prints it: xyxy 103.93, 299.99, 238.15, 477.41 in 427x640."""
    ref = layout.refs[0]
    image = layout.image_of(ref)
    image["height"], image["width"] = 640, 427
    for other in layout.refs[1:]:  # its neighbours lie outside the new size
        if other["image_id"] == ref["image_id"]:
            layout.annotation_of(other)["bbox"] = [1, 1, 2, 2]
    layout.annotation_of(ref)["bbox"] = [103.93, 299.99, 134.22, 177.42]
    layout.save()
    sample = Refer(layout.root)[0]
    assert (sample.size, sample.sample_id, sample.meta["ann_id"]) == ((640, 427), "0-0", 1719310)
    assert np.allclose(boxes.to_pixels(sample.box, sample.size), [103.93, 299.99, 238.15, 477.41], atol=1e-9)
    assert np.floor(np.multiply(sample.box, 1000)).tolist() == [243, 468, 557, 745]


def test_box_arithmetic_is_that_of_the_boxes_module():
    rng = np.random.default_rng(0)
    for _ in range(200):
        height, width = rng.integers(50, 700, size=2).tolist()
        x, y = rng.uniform(-1, [width - 20, height - 20]).tolist()
        w, h = rng.uniform(1.5, [width - x, height - y]).tolist()
        expected = boxes.clip(boxes.to_relative(boxes.xywh_to_xyxy([x, y, w, h]), (height, width)))
        assert module._relative_box([x, y, w, h], (height, width)) == tuple(expected)


def test_one_pixel_outside_is_cut_off_and_more_is_a_bad_row(layout):
    last = layout.refs_of("train")[-1]
    height, width = layout.image_of(last)["height"], layout.image_of(last)["width"]
    layout.annotation_of(last)["bbox"] = [-1, -0.5, width + 2, height + 1.5]
    layout.save()
    assert samples_of(Refer(layout.root))[-1].box == (0.0, 0.0, 1.0, 1.0)
    for number, bbox in enumerate(
        ([-1.5, 0, 20, 20], [0, -1.5, 20, 20], [0, 0, width + 1.5, 20], [0, 0, 20, height + 1.5])
    ):
        layout.annotation_of(last)["bbox"] = bbox
        layout.save()
        os.utime(layout.instances_path, ns=(0, 10**18 + number))
        assert Refer(layout.root).skipped == len(last["sentences"]), bbox


def test_siblings_are_the_other_objects_of_the_category_in_the_picture(layout):
    by_text = {s.expression: s for s in samples_of(Refer(layout.root))}
    left, right = by_text["the eye on the left"], by_text["the eye on the right"]
    assert (left.siblings, right.siblings) == ((right.box,), (left.box,))
    assert by_text["the cat's nose"].siblings == ()
    # Same category in another picture is no sibling; an annotation nobody asks for is one.
    eye = layout.annotation_of(next(r for r in layout.refs if r["sentences"][0]["sent"] == left.expression))
    layout.instances["annotations"] += [
        eye | {"id": 5, "image_id": layout.refs[0]["image_id"]},
        eye | {"id": 6, "bbox": [10, 20, 30, 40]},
    ]
    layout.save()
    left = next(s for s in samples_of(Refer(layout.root)) if s.expression == left.expression)
    assert left.siblings == (right.box, (10 / 451, 20 / 300, 40 / 451, 60 / 300))


def test_ids_and_meta_are_json_able_and_join_back(layout):
    for sample in samples_of(Refer(layout.root)):
        meta = json.loads(json.dumps(dict(sample.meta)))
        ref = next(r for r in layout.refs if r["ref_id"] == meta["ref_id"])
        assert meta.keys() == {"ann_id", "ref_id", "image_id", "category"}
        assert (meta["ann_id"], meta["image_id"]) == (ref["ann_id"], ref["image_id"])
        assert sample.picture_id == f"coco-{ref['image_id']}"
        assert sample.sample_id in {f"{ref['ref_id']}-{sent_id}" for sent_id in ref["sent_ids"]}


def test_splits_share_no_picture(layout):
    pictures = {s: {x.picture_id for x in samples_of(Refer(layout.root, split=s))} for s in ("train", "val", "test")}
    assert all(pictures.values())
    assert len(set.union(*pictures.values())) == sum(map(len, pictures.values())) == 5


def test_google_partition_may_share_pictures_and_is_named_so(tmp_path):
    layout = write_refer_folder(tmp_path, "refcocog", "google")
    layout.refs[0]["split"] = "val"
    layout.save()
    train, val = (Refer(tmp_path, split=s, partition="google") for s in ("train", "val"))
    assert {s.picture_id for s in samples_of(train)} & {s.picture_id for s in samples_of(val)}
    assert train.name == train[0].dataset == "refcocog-google"


def test_picture_shared_by_train_and_test_is_refused(layout):
    layout.refs[0]["split"] = "test"
    layout.save()
    with pytest.raises(DataError, match=r"refs\(umd\)\.p: train and test share 1 pictures \(image 581857 is one\)"):
        Refer(layout.root)


@pytest.mark.parametrize("index", [-1, 10**6])
def test_index_outside_the_range_is_an_index_error(layout, index):
    with pytest.raises(IndexError, match=f"no sample {index}"):
        Refer(layout.root)[index]


def test_numpy_index_and_iteration_work(layout):
    dataset = Refer(layout.root)
    assert dataset[np.int64(2)] == dataset[2]
    assert list(dataset) == samples_of(dataset)


# --- Pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", module.PICTURE_FOLDERS)
def test_pictures_are_found_in_every_documented_place(tmp_path, place):
    layout = write_refer_folder(tmp_path, pictures=place)
    dataset = Refer(tmp_path)
    photo = layout.known[dataset[0].sample_id]["photo"]
    with Image.open(PHOTOS / photo) as image:
        assert np.array_equal(dataset.picture(dataset[0]), np.asarray(image))


def test_opening_reads_no_picture_and_few_are_kept(layout, monkeypatch):
    read = []
    monkeypatch.setattr(module, "read_picture", lambda path, *rest: read.append(path.name) or np.zeros((1, 1, 3)))
    dataset = Refer(layout.root, cached_pictures=2)
    a, b, c = ({s.picture_id: s for s in samples_of(dataset)}).values()
    assert read == []
    for sample in (a, a, b, a, c):
        dataset.picture(sample)
    assert len(read) == 3  # c pushed out b, the least recently used
    dataset.picture(a)
    assert len(read) == 3
    dataset.picture(b)
    assert len(read) == 4


def test_cached_picture_cannot_be_drawn_on(layout):
    dataset = Refer(layout.root)
    picture = dataset.picture(dataset[0])
    assert picture is dataset.picture(dataset[0])
    with pytest.raises(ValueError, match="read-only"):
        picture[0, 0] = 0


def test_missing_picture_is_an_error_with_its_path_only_when_asked_for(layout):
    layout.picture_of(layout.refs[0]).unlink()
    dataset = Refer(layout.root)
    with pytest.raises(DataError, match="train2014.COCO_train2014_000000581857.jpg.*missing.*train2014.zip"):
        dataset.picture(dataset[0])
    last = dataset[len(dataset) - 1]
    assert dataset.picture(last).shape == (*last.size, 3)


def test_annotations_without_any_picture_folder_are_refused_at_once(layout):
    layout.pictures.rename(layout.root / "elsewhere")
    with pytest.raises(DataError, match="refcocog is here but its pictures are not: unpack COCO's train2014.zip"):
        Refer(layout.root)


def test_truncated_jpeg_is_an_error_that_names_it(layout):
    path = layout.picture_of(layout.refs[0])
    path.write_bytes(path.read_bytes()[:5000])
    dataset = Refer(layout.root)
    with pytest.raises(DataError, match="COCO_train2014_000000581857.jpg: not a whole picture"):
        dataset.picture(dataset[0])


def test_picture_of_another_size_than_annotated_is_refused(layout):
    path = layout.picture_of(layout.refs[0])
    Image.new("RGB", (256, 256)).save(path)
    dataset = Refer(layout.root)
    with pytest.raises(DataError, match="581857.jpg: the picture is 256 wide and 256 high, .* 512 wide and 512 high"):
        dataset.picture(dataset[0])


def test_exif_rotation_does_not_move_a_picture_under_its_boxes(layout):
    """The boxes refer to the annotated 600x400; a rotation note would give 400x600."""
    ref = next(r for r in layout.refs if layout.image_of(r)["width"] == 600)
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(layout.picture_of(ref)) as image:
        pixels = np.asarray(image)
    Image.fromarray(pixels).save(layout.picture_of(ref), "PNG", exif=exif)
    dataset = Refer(layout.root)
    sample = next(s for s in samples_of(dataset) if s.meta["ref_id"] == ref["ref_id"])
    assert np.array_equal(dataset.picture(sample), pixels)


def test_sample_from_elsewhere_has_no_picture_here(layout):
    dataset = Refer(layout.root)
    with pytest.raises(DataError, match="has no picture 'scenes-"):
        dataset.picture(load_dataset("scenes")[0])


# --- Pickles --------------------------------------------------------------------------------------


class Attack:
    """Creates a file when unpickled by ``pickle.load``."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


class System:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (os.system, (f'echo > "{self.target}"',))


@pytest.mark.parametrize("attack", [Attack, System])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_that_tries_to_run_code_runs_nothing_and_is_named(layout, tmp_path, attack, protocol):
    target = tmp_path / "was-run"
    payload = pickle.dumps([*layout.refs, attack(target)], protocol=protocol)
    pickle.loads(payload)
    assert target.exists(), "the attack must work on an unguarded reader, or this test shows nothing"
    target.unlink()
    layout.refs_path.write_bytes(payload)
    with pytest.raises(DataError, match=r"refs\(umd\)\.p: refused, .*can run code. Nothing was run"):
        Refer(layout.root)
    assert not target.exists()
    assert not index_file(layout).exists()


def test_pickle_with_an_outside_object_is_refused(tmp_path):
    (tmp_path / "a.p").write_bytes(b"\x80\x02X\x03\x00\x00\x00abcQ.")
    with pytest.raises(DataError, match=r"a\.p: refused, .*outside object 'abc'"):
        read_pickle(tmp_path / "a.p")


def test_numpy_numbers_are_refused_with_the_advice_to_convert(layout):
    layout.refs[0]["ref_id"] = np.int64(0)
    layout.save()
    with pytest.raises(DataError, match="numpy.*save it again as plain lists"):
        Refer(layout.root)


@pytest.mark.parametrize("encoding", ["utf-8", "latin1"])
def test_python_2_pickles_keep_their_accents(layout, encoding):
    layout.refs[0]["sentences"][0]["sent"] = "the café at the left"
    layout.refs_path.write_bytes(python2_pickle(layout.refs, encoding))
    assert Refer(layout.root)[0].expression == "the café at the left"


@pytest.mark.parametrize("cut", [0, 1, 50, 2000])
def test_truncated_pickle_is_an_error_that_names_it(layout, cut):
    layout.refs_path.write_bytes(layout.refs_path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"refs\(umd\)\.p: not a whole pickle .*unpack the data set again"):
        Refer(layout.root)


def test_any_damaged_pickle_gives_data_or_a_data_error(layout):
    whole = np.frombuffer(pickle.dumps(layout.refs[:3], protocol=2), np.uint8)
    rng = np.random.default_rng(0)
    refused = 0
    path = layout.root / "damaged.p"
    for _ in range(300):
        damaged = whole.copy()
        damaged[rng.integers(len(damaged), size=3)] = rng.integers(256, size=3)
        path.write_bytes(damaged.tobytes())
        try:
            read_pickle(path)
        except DataError as error:
            assert "damaged.p" in str(error)
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("value", [{}, [], "refs", 7, None])
def test_pickle_of_something_else_is_refused(layout, value):
    layout.refs_path.write_bytes(pickle.dumps(value))
    with pytest.raises(DataError, match=r"refs\(umd\)\.p: holds .*not a list of refs"):
        Refer(layout.root)


# --- Bad rows -------------------------------------------------------------------------------------


def set_bbox(bbox):
    return lambda layout, ref: layout.annotation_of(ref).__setitem__("bbox", bbox)


def set_ref(key, value):
    return lambda layout, ref: ref.__setitem__(key, value)


def set_sentence(key, value):
    return lambda layout, ref: ref["sentences"][0].__setitem__(key, value)


def set_image(**entries):
    return lambda layout, ref: layout.image_of(ref).update(entries)


def drop(where, key):
    def apply(layout, ref):
        holder = ref if where == "ref" else ref["sentences"][0]
        del holder[key]

    return apply


def remove_annotation(layout, ref):
    layout.instances["annotations"].remove(layout.annotation_of(ref))


def remove_image(layout, ref):
    layout.instances["images"].remove(layout.image_of(ref))


def remove_category(layout, ref):
    layout.instances["categories"] = [c for c in layout.instances["categories"] if c["id"] != ref["category_id"]]


def swap_width_and_height(layout, ref):
    layout.annotation_of(ref)["bbox"] = [300, 100, 300, 200]
    layout.image_of(ref).update(height=640, width=427)


def recursive_sent_ids(layout, ref):
    ref["sent_ids"].append(ref["sent_ids"])


DAMAGES = {
    "zero width": (set_bbox([10, 10, 0, 5]), "has no area"),
    "zero height": (set_bbox([10, 10, 5, 0.0]), "has no area"),
    "negative width": (set_bbox([10, 10, -5, 5]), "has no area"),
    "NaN": (set_bbox([10, float("nan"), 5, 5]), "not four finite numbers"),
    "infinite": (set_bbox([10, 10, float("inf"), 5]), "not four finite numbers"),
    "huge integer": (set_bbox([10, 10, 10**400, 5]), "not four finite numbers"),
    "three numbers": (set_bbox([10, 10, 5]), "not four numbers"),
    "text in bbox": (set_bbox([10, 10, "5", 5]), "not four finite numbers"),
    "true in bbox": (set_bbox([10, 10, True, 5]), "not four finite numbers"),
    "no bbox": (set_bbox(None), "not four numbers"),
    "outside": (set_bbox([10, 10, 5000, 5]), "leaves the picture"),
    "beside": (set_bbox([-0.9, 10, 0.5, 5]), "no area inside the picture"),
    "w and h swapped": (swap_width_and_height, "are width and height swapped"),
    "no annotation": (remove_annotation, "annotation .* not in instances.json"),
    "no image": (remove_image, "image .* not in instances.json"),
    "no category": (remove_category, "category .* is not in instances.json"),
    "wrong image id": (set_ref("image_id", 581857), "says image 581857"),
    "wrong category id": (set_ref("category_id", 1), "category 1"),
    "unknown split": (set_ref("split", "trian"), "split 'trian' is none of train, val, test"),
    "split is a list": (set_ref("split", ["train"]), "is none of train, val, test"),
    "missing ref key": (drop("ref", "file_name"), r"keys missing: \['file_name'\]"),
    "extra ref key": (set_ref("box", 1), "unknown: .*box"),
    "missing sentence key": (drop("sentence", "raw"), r"keys missing: \['raw'\]"),
    "extra sentence key": (set_sentence("score", 1), "unknown: .*score"),
    "sent_ids disagree": (set_ref("sent_ids", [77]), r"sent_ids \[77\], but its sentences have"),
    "sent_ids hold themselves": (recursive_sent_ids, "but its sentences have"),
    "no sentence": (set_ref("sentences", []), "not a list of sentences"),
    "sentence is text": (set_ref("sentences", ["a cat"]), "sent_id is None"),
    "blank expression": (set_sentence("sent", "  "), "sent is .*not a text"),
    "expression is a number": (set_sentence("sent", 3), "sent is 3, not a text"),
    "half a character": (set_sentence("sent", "a \udcff cat"), "not valid Unicode"),
    "id is true": (set_ref("ref_id", True), "ref_id is True"),
    "id is text": (set_ref("ann_id", "5"), "ann_id is '5'"),
    "id too large": (set_ref("ann_id", 2**63), "ann_id is 9223372036854775808"),
    "duplicate": (lambda layout, ref: layout.refs.append(ref), "occurs twice"),
    "not a dict": (lambda layout, ref: layout.refs.append([1]), "a ref is a dict"),
    "path as file name": (set_image(file_name="../../secret.jpg"), "not the plain name"),
    "windows path as file name": (set_image(file_name="..\\secret.jpg"), "not the plain name"),
    "empty picture": (set_image(height=0), "are not a picture's"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_row_is_named_counted_and_left_out_and_the_rest_is_served(layout, caplog, damage):
    whole = {s.sample_id for s in samples_of(Refer(layout.root, split="train"))}
    ref = next(r for r in layout.refs if r["split"] == "val")  # rocket.jpg, 640x427: two refs
    change, reason = DAMAGES[damage]
    change(layout, ref)
    layout.save()
    with caplog.at_level(logging.WARNING):
        dataset = Refer(layout.root, split="train")
    assert {s.sample_id for s in samples_of(dataset)} == whole
    assert 1 <= dataset.skipped <= 3
    named = [r.getMessage() for r in caplog.records if "refs(umd).p: left out row" in r.getMessage()]
    assert len(named) == dataset.skipped
    assert any(re.search(reason, message) for message in named), named


def test_bad_rows_are_reported_again_when_the_index_is_reused(layout, caplog):
    layout.annotation_of(layout.refs[0])["bbox"] = [0, 0, 0, 0]
    layout.save()
    Refer(layout.root)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert Refer(layout.root).skipped == 2
    assert "2 unusable rows of refs(umd).p were left out" in caplog.text


def many_refs(layout, count):
    """``count`` further refs with one sentence each, all on one good annotation."""
    pattern = layout.refs[1]
    for i in range(count):
        sentence = pattern["sentences"][0] | {"sent_id": 10_000 + i}
        layout.refs.append(pattern | {"ref_id": 10_000 + i, "sent_ids": [10_000 + i], "sentences": [sentence]})


def break_rows(layout, count):
    for ref in layout.refs[-count:]:
        ref["split"] = "broken"


def test_ten_bad_rows_are_let_pass_and_eleven_of_few_are_not(layout):
    many_refs(layout, 100)
    whole = copy.deepcopy(layout.refs)
    break_rows(layout, 10)
    layout.save()
    assert Refer(layout.root).skipped == 10
    layout.refs = whole
    break_rows(layout, 11)
    layout.save()
    with pytest.raises(DataError, match=r"refs\(umd\)\.p: 11 of 122 rows are unusable \(the limit is 10\).*first: row"):
        Refer(layout.root)


def test_one_percent_of_many_rows_is_let_pass_and_more_is_not(layout):
    many_refs(layout, 1978)
    assert sum(len(r["sentences"]) for r in layout.refs) == 2000
    whole = copy.deepcopy(layout.refs)
    break_rows(layout, 20)
    layout.save()
    assert Refer(layout.root).skipped == 20
    layout.refs = whole
    break_rows(layout, 21)
    layout.save()
    with pytest.raises(DataError, match="21 of 2000 rows are unusable"):
        Refer(layout.root)


def test_file_without_one_good_row_is_refused_however_small(layout):
    layout.refs = [layout.refs[0] | {"split": "broken"}]
    layout.save()
    with pytest.raises(DataError, match="2 of 2 rows are unusable"):
        Refer(layout.root)


def test_empty_split_is_refused_with_the_counts_of_the_others(layout):
    layout.refs = layout.refs_of("train")
    layout.save()
    for _ in range(2):  # without an index, and with one
        with pytest.raises(DataError, match=r"no expression of split 'val' \(train: \d+, val: 0, test: 0\)"):
            Refer(layout.root, split="val")
    assert len(Refer(layout.root, split="train")) > 0


def test_counts_other_than_the_published_ones_are_logged(layout, caplog):
    with caplog.at_level(logging.WARNING):
        Refer(layout.root)
    assert "published are {'train': 80512, 'val': 4896, 'test': 9602}" in caplog.text


# --- Broken files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["refs_path", "instances_path"])
def test_missing_annotation_file_is_named_and_never_replaced_by_scenes(layout, missing):
    path = getattr(layout, missing)
    path.unlink()
    for strict in (False, True):
        with pytest.raises(DataError) as caught:
            load_dataset("refcocog", data_root=layout.root, strict=strict)
        assert str(path) in str(caught.value)
        assert "unpack the data set again" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not whole JSON"),
        (b'{"images": [', "not whole JSON"),
        (b"\xff\xfe\xfd", "not whole JSON"),
        (b"[" * 100_000, "not whole JSON"),
        (b"[]", "has no list 'images'"),
        (b'{"images": [], "annotations": {}, "categories": []}', "has no list 'annotations'"),
        (b'{"images": [], "annotations": [1, null], "categories": [{}]}', "rows are unusable"),
    ],
)
def test_broken_instances_file_is_named(layout, content, reason):
    layout.instances_path.write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        Refer(layout.root)
    assert "instances.json" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "refclef"}, "'refclef'; there are refcocog, refcoco, refcocoplus"),
        ({"partition": "unc"}, "'unc'; it has umd, google"),
        ({"split": "testA"}, r"refcocog \(umd\) has no split 'testA'; it has train, val, test"),
        ({"partition": "google", "split": "test"}, "'test'; it has train, val"),
    ],
)
def test_unknown_choice_lists_the_valid_ones(layout, arguments, message):
    with pytest.raises(DataError, match=message):
        Refer(layout.root, **arguments)


# --- The index ------------------------------------------------------------------------------------


@pytest.fixture
def conversions(monkeypatch):
    """How often the annotation files were read."""
    calls = []
    convert = module._convert
    monkeypatch.setattr(module, "_convert", lambda *a: calls.append(a) or convert(*a))
    return calls


def test_later_openings_read_the_index_alone_and_give_the_same_samples(layout, conversions):
    first = {s: samples_of(Refer(layout.root, split=s)) for s in ("train", "val", "test")}
    second = {s: samples_of(Refer(layout.root, split=s)) for s in ("train", "val", "test")}
    assert first == second
    assert len(conversions) == 1
    assert [p.name for p in index_file(layout).parent.iterdir()] == ["refs-umd.parquet"]


@pytest.mark.parametrize("which", ["refs_path", "instances_path"])
@pytest.mark.parametrize("how", ["neither", "size", "time"])
def test_index_is_rebuilt_when_the_size_or_the_time_of_a_source_changes(layout, which, how):
    for path in (layout.refs_path, layout.instances_path):
        os.utime(path, ns=(0, 10**18))
    old = Refer(layout.root)[0]
    assert (old.expression, layout.annotation_of(layout.refs[0])["bbox"]) == (
        "the woman's head",
        [152, 14, 149, 175],
    )
    size = getattr(layout, which).stat().st_size
    if which == "refs_path":
        layout.refs[0]["sentences"][0]["sent"] = "a head" if how == "size" else "the woman's HEAD"
    else:
        layout.annotation_of(layout.refs[0])["bbox"][3] = 75 if how == "size" else 174
    layout.save()
    for path in (layout.refs_path, layout.instances_path):
        os.utime(path, ns=(0, 10**18))
    assert (getattr(layout, which).stat().st_size != size) == (how == "size")
    if how == "time":
        os.utime(getattr(layout, which), ns=(0, 10**18 + 1_000_000))
    # "neither" is the stated limit of the check, and shows that nothing else made it rebuild.
    assert (Refer(layout.root)[0] == old) == (how == "neither")


def test_touched_source_rebuilds_and_untouched_does_not(layout, conversions):
    for path in (layout.refs_path, layout.instances_path):
        Refer(layout.root)
        count = len(conversions)
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 1_000_000))
        Refer(layout.root)
        Refer(layout.root)
        assert len(conversions) == count + 1


@pytest.mark.parametrize("damage", ["empty", "truncated", "other parquet", "other version", "folder"])
def test_damaged_index_is_built_again(layout, conversions, damage, monkeypatch):
    expected = samples_of(Refer(layout.root))
    path = index_file(layout)
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "other parquet":
        table = pq.read_table(path)
        pq.write_table(table.drop_columns(["box"]), path)
    elif damage == "other version":
        monkeypatch.setattr(module, "_INDEX_VERSION", module._INDEX_VERSION + 1)
    else:
        path.unlink()
        path.mkdir()
    assert samples_of(Refer(layout.root)) == expected
    assert len(conversions) == 2
    assert samples_of(Refer(layout.root)) == expected
    assert len(conversions) == 2


def refuse_writing(monkeypatch, *folders):
    """Make folders read-only, also for an administrator, whom file modes do not stop."""
    mkdir = Path.mkdir

    def guarded(self, *args, **kwargs):
        if any(self.is_relative_to(folder) for folder in folders):
            raise PermissionError(13, "Permission denied", str(self))
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", guarded)


def test_read_only_data_folder_puts_the_index_into_the_user_cache(layout, conversions, monkeypatch):
    refuse_writing(monkeypatch, layout.root)
    expected = samples_of(Refer(layout.root))
    assert samples_of(Refer(layout.root)) == expected
    assert len(conversions) == 1
    assert not index_file(layout).exists()
    cached = [p for p in data.cache_folder().rglob("*") if p.is_file()]
    assert [p.name for p in cached] == ["refs-umd.parquet"]


def test_two_read_only_folders_do_not_share_an_index(tmp_path, monkeypatch):
    layouts = [write_refer_folder(tmp_path / name) for name in "ab"]
    layouts[1].refs[0]["sentences"][0]["sent"] = "THE woman's head"
    layouts[1].save()
    for layout in layouts:  # so that only the folder tells them apart
        for path in (layout.refs_path, layout.instances_path):
            os.utime(path, ns=(0, 10**18))
    refuse_writing(monkeypatch, *(layout.root for layout in layouts))
    for _ in range(2):
        found = [Refer(layout.root)[0].expression for layout in layouts]
        assert found == ["the woman's head", "THE woman's head"]


def test_nowhere_to_write_still_serves_and_says_so(layout, conversions, monkeypatch, caplog, tmp_path):
    refuse_writing(monkeypatch, tmp_path)
    with caplog.at_level(logging.WARNING):
        assert len(Refer(layout.root)) == len(Refer(layout.root)) > 0
    assert len(conversions) == 2
    assert "no index can be written" in caplog.text


def test_interrupted_writing_leaves_no_index_behind(layout, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Refer(layout.root)
    assert list(index_file(layout).parent.iterdir()) == []


def test_opening_80000_expressions_is_quick_and_makes_no_samples(tmp_path, monkeypatch):
    layout = write_refer_folder(tmp_path)
    pattern = layout.refs[0]
    for i in range(1000, 41_000):
        pair = [pattern["sentences"][0] | {"sent_id": 2 * i + j} for j in range(2)]
        layout.refs.append(pattern | {"ref_id": i, "sent_ids": [2 * i, 2 * i + 1], "sentences": pair})
    layout.save()
    Refer(tmp_path)
    made = []
    monkeypatch.setattr(module, "Sample", lambda **fields: made.append(fields))
    start = time.perf_counter()
    dataset = Refer(tmp_path)
    seconds = time.perf_counter() - start
    assert len(dataset) > 80_000
    assert made == []
    assert seconds < 2
    assert dataset[80_000] is None and len(made) == 1


def test_open_data_set_travels_to_a_worker_process_without_its_pictures(layout):
    dataset = Refer(layout.root)
    dataset.picture(dataset[0])
    there = pickle.loads(pickle.dumps(dataset))
    assert samples_of(there) == samples_of(dataset)
    assert len(pickle.dumps(dataset)) < 100_000
    assert np.array_equal(there.picture(there[0]), dataset.picture(dataset[0]))


# --- load_dataset ---------------------------------------------------------------------------------


def test_data_root_goes_before_the_variable_and_the_variable_before_the_cache(tmp_path, monkeypatch):
    roots = {"argument": tmp_path / "a", "variable": tmp_path / "v", "cache": data.cache_folder() / "data"}
    for place, root in roots.items():
        layout = write_refer_folder(root)
        layout.refs[0]["sentences"][0]["sent"] = place
        layout.save()
    assert load_dataset("refcocog")[0].expression == "cache"
    monkeypatch.setenv("IVT_DATA", str(roots["variable"]))
    assert load_dataset("refcocog")[0].expression == "variable"
    assert load_dataset("refcocog", data_root=roots["argument"])[0].expression == "argument"


@pytest.mark.parametrize("name", ["refcocog", "refcoco", "refcocoplus"])
def test_data_that_are_there_are_served_without_a_warning(tmp_path, name):
    write_refer_folder(tmp_path, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = load_dataset(name, "val", data_root=tmp_path, strict=True)
    assert dataset.name == dataset[0].dataset == name


def test_fallback_warns_once_with_all_the_facts(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = load_dataset("refcocog", "val", data_root=tmp_path)
        load_dataset("refcocog", "val", data_root=tmp_path)
        load_dataset("refcocog", "train")
    assert [w.category for w in caught] == [DatasetFallbackWarning]
    text = str(caught[0].message)
    for fact in (
        "'refcocog' is not being used",
        "EMBEDDED SCENES ARE SERVED INSTEAD (refcocog val -> scenes val)",
        "says nothing about refcocog",
        str(tmp_path / "refcocog"),
        "refcocog.zip",
        "train2014.zip",
        str(tmp_path / "images" / "mscoco" / "images" / "train2014"),
        "IVT_DATA",
        "strict=True",
    ):
        assert fact in text
    assert caught[0].filename == __file__
    assert (first.name, first.split, first[0].dataset) == ("scenes", "val", "scenes")


def test_each_data_set_has_a_warning_of_its_own():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in ("refcocog", "refcoco", "refcocog", "refcoco"):
            load_dataset(name)
    assert len(caught) == 2


@pytest.mark.parametrize(
    ("name", "split", "served"),
    [
        ("refcocog", "train", "train"),
        ("refcocog", "test", "test"),
        ("refcoco", "testA", "test"),
        ("refcocoplus", "testB", "test"),
        ("refl4", "val", "val"),
        ("refl4", "test", "test"),
        ("refadv", "test", "test"),
        ("mixed", "train", "train"),
    ],
)
def test_fallback_serves_the_corresponding_split_under_its_own_name(name, split, served):
    with pytest.warns(DatasetFallbackWarning, match=f"{name} {split} -> scenes {served}"):
        dataset = load_dataset(name, split)
    assert (dataset.name, dataset.split) == ("scenes", served)
    assert dataset[0].dataset == "scenes"


@pytest.mark.parametrize("name", ["refcocog", "refcoco", "refcocoplus"])
def test_strict_makes_absence_an_error_with_the_same_facts(tmp_path, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataMissingError) as caught:
            load_dataset(name, "val", data_root=tmp_path, strict=True)
    folder = tmp_path / module.FOLDERS[name]
    assert f"looked for the folder {folder}" in str(caught.value)
    assert "train2014.zip" in str(caught.value)


@pytest.mark.parametrize("name", ["refl4", "refadv", "mixed"])
def test_data_set_without_a_reader_says_so(name):
    with pytest.raises(DataMissingError, match=f"{name}: this version has no reader for it yet"):
        load_dataset(name, "test", strict=True)
    with pytest.warns(DatasetFallbackWarning, match="no reader for it yet"):
        assert load_dataset(name, "test").name == "scenes"


@pytest.mark.parametrize("strict", [True, False])
def test_broken_data_never_fall_back(layout, strict):
    layout.refs_path.write_bytes(b"broken")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match="not a whole pickle"):
            load_dataset("refcocog", data_root=layout.root, strict=strict)


def test_empty_data_set_folder_is_broken_not_absent(tmp_path):
    (tmp_path / "refcocog").mkdir()
    (tmp_path / "train2014").mkdir()
    with pytest.raises(DataError, match=r"refs\(umd\)\.p: missing"):
        load_dataset("refcocog", data_root=tmp_path)


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        (
            "refcocg",
            "train",
            r"no data set 'refcocg' \(did you mean 'refcoco.?'\?\); there are scenes, photos, ",
        ),
        ("RefCOCOg", "train", "did you mean 'refcocog'"),
        ("imagenet", "train", "no data set 'imagenet'; there are"),
        ("refcocog", "tets", r"no split 'tets' \(did you mean 'test'\?\); it has train, val, test"),
        ("refcoco", "test", "it has train, val, testA, testB"),
        ("refadv", "train", "refadv has no split 'train'; it has test"),
        ("scenes", "valid", "did you mean 'val'"),
        ("photos", "testA", "it has train, val, test, all"),
    ],
)
def test_unknown_name_or_split_lists_the_valid_ones(name, split, message):
    with pytest.raises(DataError, match=message):
        load_dataset(name, split)


def test_every_name_opens_on_a_fresh_machine_with_each_of_its_splits():
    opened = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DatasetFallbackWarning)
        for name in data.NAMES:
            for split in data.splits(name):
                dataset = load_dataset(name, split)
                sample = dataset[0]
                assert sample.dataset == dataset.name == (name if name in ("scenes", "photos") else "scenes")
                assert dataset.picture(sample).shape == (*sample.size, 3)
                opened += 1
    assert opened >= 25


def test_cache_folder_honours_xdg_and_ignores_a_relative_one(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data.cache_folder() == tmp_path / "ivt_env"
    assert data.data_folder() == tmp_path / "ivt_env" / "data"
    for value in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert data.cache_folder() == Path.home() / ".cache" / "ivt_env"
    monkeypatch.setattr(data.sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert data.cache_folder() == tmp_path / "local" / "ivt_env"


def test_importing_the_data_package_imports_no_reader():
    code = "import sys, ivt_env.data; print([m for m in ('pyarrow', 'torch') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_jpeg_helper_pictures_are_whole(layout):
    """The helper itself: a broken picture there would make the tests above pass for a wrong reason."""
    for path in sorted(layout.pictures.iterdir()):
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            image.load()
