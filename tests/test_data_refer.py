"""A REFER folder is read exactly and safely, or refused with the file, the row and a remedy.

Silent when false: boxes joined to the wrong image or read in the wrong convention train a model
that looks merely weak; a leaked image or a partition served under another's name makes a number
that is a lie.
"""

from __future__ import annotations

import logging
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from geometry import to_pixels
from refer_layout import write_refer_folder

from ivt_env.data import DataError, Dataset
from ivt_env.data import refer as module
from ivt_env.data.table import Table, open_table

pytestmark = pytest.mark.usefixtures("private_machine")


@pytest.fixture
def layout(tmp_path):
    return write_refer_folder(tmp_path / "root")


def opened(root: Path, name: str = "refcocog", split: str = "train", partition: str | None = None) -> Table:
    return open_table(module.source(root, name, partition), split)


# --- What is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "partition", "label"),
    [
        ("refcocog", "umd", "refcocog"),
        ("refcocog", "google", "refcocog-google"),
        ("refcoco", "unc", "refcoco"),
        ("refcocoplus", "unc", "refcocoplus"),
    ],
)
def test_every_expression_is_served_once_with_its_box_and_image(tmp_path, name, partition, label):
    layout = write_refer_folder(tmp_path, name, partition)
    found = {}
    for split in module.PARTITIONS[name][partition]:
        dataset = opened(tmp_path, name, split, partition)
        assert isinstance(dataset, Dataset)
        assert (dataset.name, dataset.split, dataset.skipped) == (label, split, 0)
        for sample in list(dataset):
            assert (sample.dataset, sample.split) == (label, split)
            found[sample.sample_id] = sample
            assert dataset.image(sample).shape == (*sample.size, 3)
    assert found.keys() == layout.known.keys()
    for sample_id, known in layout.known.items():
        sample = found[sample_id]
        assert (sample.expression, sample.split) == (known["expression"], known["split"])
        assert (sample.size, sample.meta["category"]) == (known["size"], known["category"])
        # Whole-pixel xywh on disk gives back the drawn xyxy to the last bit of a float.
        height, width = sample.size
        expected = np.array(known["box_px"]) / [width, height, width, height]
        assert sample.box == tuple(expected)
        assert np.array_equal(np.round(to_pixels(sample.box, sample.size), 9), known["box_px"])


def test_siblings_are_the_other_objects_of_the_category_in_the_image(layout):
    by_text = {s.expression: s for s in list(opened(layout.root))}
    left, right = by_text["the eye on the left"], by_text["the eye on the right"]
    assert (left.siblings, right.siblings) == ((right.box,), (left.box,))
    assert by_text["the cat's nose"].siblings == ()
    # Same category in another image is no sibling; an annotation nobody asks for is one.
    eye = layout.annotation_of(next(r for r in layout.refs if r["sentences"][0]["sent"] == left.expression))
    layout.instances["annotations"] += [
        eye | {"id": 5, "image_id": layout.refs[0]["image_id"]},
        eye | {"id": 6, "bbox": [10, 20, 30, 40]},
    ]
    layout.save()
    left = next(s for s in list(opened(layout.root)) if s.expression == left.expression)
    assert left.siblings == (right.box, (10 / 451, 20 / 300, 40 / 451, 60 / 300))


def test_google_partition_may_share_images_and_is_named_so(tmp_path):
    layout = write_refer_folder(tmp_path, "refcocog", "google")
    layout.refs[0]["split"] = "val"
    layout.save()
    train, val = (opened(tmp_path, split=s, partition="google") for s in ("train", "val"))
    assert {s.image_id for s in list(train)} & {s.image_id for s in list(val)}
    assert train.name == train[0].dataset == "refcocog-google"


# --- Images -------------------------------------------------------------------------------------


def test_missing_images_are_named_with_the_archive_that_holds_them(layout):
    layout.image_of(layout.refs[0]).unlink()
    dataset = opened(layout.root)
    with pytest.raises(DataError, match="train2014.COCO_train2014_000000581857.jpg.*missing.*train2014.zip"):
        dataset.image(dataset[0])
    layout.images.rename(layout.root / "elsewhere")
    with pytest.raises(DataError, match="refcocog is here but its images are not.*; unpack COCO's train2014.zip"):
        opened(layout.root)


# --- Files ----------------------------------------------------------------------------------------


class Attack:
    """Creates a file when unpickled by ``pickle.load``."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def test_tampered_refs_file_is_refused_unread_and_leaves_no_index(layout, tmp_path):
    layout.refs_path.write_bytes(pickle.dumps([*layout.refs, Attack(tmp_path / "was-run")]))
    with pytest.raises(DataError, match=r"refs\(umd\)\.p: refused, .*can run code. Nothing was run"):
        opened(layout.root)
    assert not (tmp_path / "was-run").exists()
    assert not list(layout.folder.rglob("*.arrow"))
    for value in ({}, [], "refs", 7, None):
        layout.refs_path.write_bytes(pickle.dumps(value))
        with pytest.raises(DataError, match=r"refs\(umd\)\.p: holds .*not a list of refs"):
            opened(layout.root)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not whole JSON"),
        (b"[]", "has no list 'images'"),
        (b'{"images": [], "annotations": {}, "categories": []}', "has no list 'annotations'"),
        (b'{"images": [], "annotations": [1, null], "categories": [{}]}', "rows are unusable"),
    ],
)
def test_broken_instances_file_is_named(layout, content, reason):
    layout.instances_path.write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        opened(layout.root)
    assert "instances.json" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "refclef"}, "'refclef'; there are refcocog, refcoco, refcocoplus"),
        ({"partition": "unc"}, "'unc'; it has umd, google"),
        ({"split": "testA"}, r"refcocog \(refs-umd\) has no split 'testA'; it has train, val, test"),
        ({"partition": "google", "split": "test"}, "'test'; it has train, val"),
    ],
)
def test_unknown_choice_lists_the_valid_ones(layout, arguments, message):
    with pytest.raises(DataError, match=message):
        opened(layout.root, **arguments)


def test_partitions_have_an_index_each(tmp_path):
    write_refer_folder(tmp_path, "refcocog", "google")
    layout = write_refer_folder(tmp_path, "refcocog", "umd")
    for _ in range(2):
        assert opened(tmp_path).name == "refcocog"
        assert opened(tmp_path, partition="google").name == "refcocog-google"
    names = sorted(path.name for path in (layout.folder / ".ivt_index").iterdir())
    assert names == ["refcocog-google-refs-google.arrow", "refcocog-refs-umd.arrow"]


# --- Bad rows -------------------------------------------------------------------------------------


def ref(**values):
    return lambda layout, ref: ref.update(values)


def annotation(**values):
    return lambda layout, ref: layout.annotation_of(ref).update(values)


def image(**values):
    return lambda layout, ref: layout.annotated_image(ref).update(values)


def sentence(**values):
    return lambda layout, ref: ref["sentences"][0].update(values)


# How a ref of val, or what belongs to it, is damaged, and what is said.
DAMAGES = [
    (annotation(bbox=[10, 10, 0, 5]), "has no area"),
    (annotation(bbox=[10, float("nan"), 5, 5]), "not four finite numbers"),
    (annotation(id=5), "instances.json has no .* in its annotations"),
    (image(id=5), "instances.json has no .* in its images"),
    (image(file_name="../../secret.jpg"), "not the plain name"),
    (image(height=0), "are not an image's"),
    (lambda layout, ref: layout.instances["categories"][ref["category_id"] - 1].pop("id"), "in its categories"),
    (ref(image_id=581857), "says image 581857"),
    (ref(category_id=1), "category 1"),
    (ref(split="trian"), "split 'trian' is none of train, val, test"),
    (ref(sent_ids=[77]), r"sent_ids \[77\], but its sentences have"),
    (lambda layout, ref: ref["sent_ids"].append(ref["sent_ids"]), "but its sentences have"),
    (ref(sentences=[]), "has no sentences"),
    (ref(sentences=["a cat"]), "sent_id is None"),
    (sentence(sent="  "), "sent is .*not a text"),
    (ref(ann_id="5"), "ann_id is '5'"),
    (lambda layout, ref: layout.refs.append(ref), "occurs twice"),
    (lambda layout, ref: layout.refs.append([1]), "ref_id is None"),
]


@pytest.mark.parametrize(("change", "reason"), DAMAGES)
def test_bad_row_is_named_counted_and_left_out_and_the_rest_is_served(layout, caplog, change, reason):
    whole = {s.sample_id for s in list(opened(layout.root, split="train"))}
    ref = next(r for r in layout.refs if r["split"] == "val")  # rocket.jpg, 640x427: two refs
    change(layout, ref)
    layout.save()
    with caplog.at_level(logging.WARNING):
        dataset = opened(layout.root, split="train")
    assert {s.sample_id for s in list(dataset)} == whole
    assert 1 <= dataset.skipped <= 3
    named = [r.getMessage() for r in caplog.records if "left out row" in r.getMessage()]
    assert all("refs(umd).p" in message for message in named)
    counts = [re.search(r"\((\d+) samples\)$", message) for message in named]
    assert sum(int(count[1]) if count else 1 for count in counts) == dataset.skipped
    assert any(re.search(reason, message) for message in named), named


def test_refs_whose_annotations_are_bad_count_against_the_limit_with_every_sentence(layout):
    layout.instances["annotations"] = []
    layout.save()
    total = len(layout.known)
    with pytest.raises(
        DataError, match=rf"refs\(umd\)\.p.*: {total} of {total} rows are unusable .*first: row 0 of refs"
    ):
        opened(layout.root)
