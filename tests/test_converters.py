"""What a converter writes is what the other tool's file says: boxes, expressions, images, siblings.

Silent when false: percent taken for pixels, the wrong one of two annotations, an image in train
and test, or a name that fits two objects all give a data set that opens and trains.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from eval_layouts import EXPRESSIONS, bomb_bytes, image_bytes, opened, write_ref_l4
from hypothesis import given, settings
from hypothesis import strategies as st

from ivt_env.data import DataError, custom, ref_l4
from ivt_env.data.converters import CATEGORY_NAME, export, from_coco
from ivt_env.data.images import read_image
from ivt_env.data.label_studio import from_label_studio

pytestmark = pytest.mark.usefixtures("private_machine")


def samples(folder, split="train"):
    table = opened(custom.find, Path(folder), "custom", split)
    assert table.skipped == 0
    return list(table)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    return path


# --- COCO -----------------------------------------------------------------------------------------


def coco(images, annotations, categories=("cat", "dog")):
    """images: (id, file_name, height, width); annotations: dicts without the usual."""
    return {
        "images": [dict(zip(("id", "file_name", "height", "width"), image, strict=True)) for image in images],
        "annotations": [
            {"id": n, "iscrowd": 0, "image_id": 1, "category_id": 1} | a for n, a in enumerate(annotations)
        ],
        "categories": [{"id": n, "name": name} for n, name in enumerate(categories, 1)],
    }


@pytest.fixture
def place(tmp_path):
    """A folder with one image of 30 x 40 and a place for the rest."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(image_bytes((30, 40)))
    return tmp_path


def convert(place, content, **options):
    source = write(place / "instances.json", content)
    return from_coco(source, place / "images", place / "out", "my-set", **options)


ONE = {"bbox": [5, 6, 10, 12], "caption": "the cat"}
A = (1, "a.jpg", 30, 40)


@st.composite
def coco_files(draw):
    sizes = draw(st.lists(st.tuples(st.integers(8, 60), st.integers(8, 60)), min_size=1, max_size=4))
    annotations = []
    for _ in range(draw(st.integers(1, 12))):
        image = draw(st.integers(0, len(sizes) - 1))
        height, width = sizes[image]
        x, y = draw(st.integers(0, width - 4)), draw(st.floats(0, height - 4))
        bbox = [x, y, draw(st.floats(2, width - x)), draw(st.floats(2, height - y))]
        caption = draw(st.sampled_from([None, "the cat", EXPRESSIONS[0], ["one", "two"]]))
        annotations.append({"image_id": image + 1, "bbox": bbox, "category_id": draw(st.integers(1, 2)),
                            "iscrowd": draw(st.sampled_from([0, 0, 0, 1]))})  # fmt: skip
        if caption is not None:
            annotations[-1]["caption"] = caption
    return sizes, annotations


@settings(max_examples=25, deadline=None)
@given(coco_files(), st.booleans())
def test_coco_to_custom_equals_a_plain_reference(drawn, by_category):
    sizes, annotations = drawn
    content = coco([(n, f"{n}.jpg", *size) for n, size in enumerate(sizes, 1)], annotations)
    expected = {}
    for n, entry in enumerate(content["annotations"]):
        height, width = sizes[entry["image_id"] - 1]

        def relative(bbox, height=height, width=width):
            x, y, w, h = map(float, bbox)
            return tuple(min(v, 1.0) for v in (x / width, y / height, (x + w) / width, (y + h) / height))

        others = [a for a in content["annotations"] if a is not entry and a["image_id"] == entry["image_id"]
                  and a["category_id"] == entry["category_id"]]  # fmt: skip
        caption = ("cat", "dog")[entry["category_id"] - 1] if by_category else entry.get("caption", [])
        captions = caption if isinstance(caption, list) else [caption]
        if entry["iscrowd"] or (by_category and others):
            continue
        for i, each in enumerate(captions):
            key = str(n) if len(captions) == 1 else f"{n}-{i}"
            expected[key] = (each, relative(entry["bbox"]), tuple(relative(o["bbox"]) for o in others))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "images").mkdir()
        for n, size in enumerate(sizes, 1):
            (root / "images" / f"{n}.jpg").write_bytes(image_bytes(size))
        options = {"expression_key": CATEGORY_NAME} if by_category else {}
        if not expected:
            with pytest.raises(DataError):
                convert(root, content, **options)
            return
        convert(root, content, **options)
        found = {s.sample_id: (s.expression, s.box, s.siblings) for s in samples(root / "out")}
    assert found == expected


def test_category_name_takes_only_objects_alone_of_their_category_crowds_counted(place):
    content = coco([A], [{"bbox": [1, 1, 5, 5]}, {"bbox": [9, 9, 5, 5], "iscrowd": 1},
                         {"bbox": [20, 9, 5, 5], "category_id": 2}])  # fmt: skip
    done = convert(place, content, expression_key=CATEGORY_NAME)
    assert [(s.sample_id, s.expression) for s in samples(place / "out")] == [("2", "dog")]
    assert done.notes == {
        "crowds are not targets": 1,
        "objects that share their category with another in the image are not targets": 1,
    }


@pytest.mark.parametrize("copy", [True, False])
def test_cocos_own_images_keep_cocos_id_and_are_copied_or_linked(place, copy):
    names = ("COCO_train2014_000000581857.jpg", "deep/000000000139.jpg", "000000000285.jpg")
    (place / "images" / "deep").mkdir()
    for name in names:
        (place / "images" / name).write_bytes(image_bytes((30, 40)))
    images = [(581857, names[0], 30, 40), (139, names[1], 30, 40), (7, names[2], 30, 40)]
    done = convert(place, coco(images, [ONE | {"image_id": image[0]} for image in images]), copy=copy)
    assert (done.counts, done.images, done.left_out) == ({"train": 3}, 3, ())
    table = opened(custom.find, place / "out", "custom", "train")
    assert [s.image_id for s in table] == ["coco-581857", "coco-139", names[2]] and table.name == "my-set"
    for sample, name in zip(table, names, strict=True):
        path = table.image_path(sample)
        assert path.read_bytes() == (place / "images" / name).read_bytes() and path.is_symlink() != copy


def test_shares_divide_images_and_a_seed_gives_the_same_again(place):
    for n in range(20):
        (place / "images" / f"{n}.jpg").write_bytes(image_bytes((30, 40)))
    images = [(n + 1, f"{n}.jpg", 30, 40) for n in range(20)]
    source = write(place / "instances.json", coco(images, [ONE | {"image_id": n % 20 + 1} for n in range(60)]))
    shares = {"train": 0.7, "val": 0.2, "test": 0.1}
    found = []
    for number, seed in enumerate((0, 0, 1)):
        out = place / f"out{number}"
        assert from_coco(source, place / "images", out, "my-set", split=shares, seed=seed).images == 20
        found.append({split: {s.image_id for s in samples(out, split)} for split in shares})
        assert {split: len(held) for split, held in found[-1].items()} == {"train": 14, "val": 4, "test": 2}
        assert len(set.union(*found[-1].values())) == 20
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("split", "said"),
    [
        ({"train": 0.5, "val": 0.4}, "add up to 1"),
        ({"train": 0.5, "testA": 0.5}, "is none of train, val, test"),
        ({"train": 0.5, "val": 0.5}, "none is left for"),
    ],
)
def test_shares_that_do_not_work_out_are_refused(place, split, said):
    with pytest.raises(DataError, match=said):
        convert(place, coco([A], [ONE]), split=split)
    assert not (place / "out" / "dataset.json").exists()


@pytest.mark.parametrize(
    ("annotation", "said"),
    [
        ({"bbox": [5, 6, float("nan"), 12]}, "is not four finite numbers"),
        ({"bbox": [20, 20, 30, 29]}, "it would fit as xyxy"),
        ({"image_id": 9}, "image_id 9 is not in 'images'"),
        ({"image_id": 2}, "no such image"),
        ({"image_id": 3}, "is not a path inside the folder"),
        ({"image_id": 4}, "is 40 wide and 30 high, its annotation says 30 wide and 41 high"),
        ({"image_id": 5}, "too large"),
        ({"category_id": 9}, "category_id 9 is not in 'categories'"),
        ({"caption": "  "}, "caption is '  ', not a text"),
        ({"id": 0}, "the annotation id 0 occurs twice"),
    ],
)
def test_unusable_annotation_is_left_out_with_its_reason(place, annotation, said):
    (place / "images" / "b.jpg").write_bytes(image_bytes((30, 40)))
    (place / "images" / "bomb.png").write_bytes(bomb_bytes())
    images = [A, (2, "gone.jpg", 30, 40), (3, "../a.jpg", 30, 40), (4, "b.jpg", 41, 30), (5, "bomb.png", 30, 40)]
    done = convert(place, coco(images, [ONE, ONE | annotation]))
    assert done.counts == {"train": 1}
    assert len(done.left_out) == 1
    assert done.left_out[0].startswith("row 1 of the annotations: ") and said in done.left_out[0]


def test_an_image_or_a_category_without_a_usable_id_is_as_if_it_were_not_there(place):
    content = coco([A], [ONE])
    for number in ([1], {"a": 1}, "1", None, True):
        for kind in ("images", "categories"):
            content[kind].append({"id": number, "name": "what", "file_name": "b.jpg"})
    assert convert(place, content).counts == {"train": 1}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "has no list 'images'"),
        ({"images": []}, "has no list 'annotations'"),
        (
            coco([A], [{"bbox": [1, 2, 3, 4], "text": "x"}]),
            "no annotation has the key 'caption' .*they have bbox, .*text",
        ),
        (coco([A, (2, "./a.jpg", 30, 40)], [ONE]), "images 1 and 2 are both './a.jpg'"),
    ],
)
def test_other_files_are_refused(place, content, said):
    with pytest.raises(DataError, match=said):
        convert(place, content)


def test_nothing_is_overwritten_and_known_names_are_refused(place):
    (place / "out" / "images").mkdir(parents=True)
    (place / "out" / "images" / "a.jpg").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"a\.jpg: another image is there already"):
        convert(place, coco([A], [ONE]))
    assert (place / "out" / "images" / "a.jpg").read_bytes() == b"mine"
    (place / "out" / "images" / "a.jpg").unlink()
    convert(place, coco([A], [ONE]))
    before = {path.name: path.read_bytes() for path in (place / "out").glob("*.json*")}
    with pytest.raises(DataError, match="is there already; choose another folder"):
        convert(place, coco([A], [ONE | {"caption": "other"}]))
    assert {path.name: path.read_bytes() for path in (place / "out").glob("*.json*")} == before
    with pytest.raises(DataError, match="is that of a known data set"):
        from_coco(place / "instances.json", place / "images", place / "out2", "refcoco")


# --- Label Studio ---------------------------------------------------------------------------------


def region(name, x, y, w, h, texts=("the cat",), label="cat", size=(30, 40), **more):
    """The results of one rectangle, as Label Studio exports them: percent of the image."""
    value = {"x": x, "y": y, "width": w, "height": h, "rotation": 0}
    base = {"id": name, "to_name": "image", "original_height": size[0], "original_width": size[1], "image_rotation": 0}
    box = {"type": "rectanglelabels", "from_name": "label", "value": value | {"rectanglelabels": [label]}}
    held = {"type": "textarea", "from_name": "caption", "value": value | {"text": list(texts)}}
    return [base | box | more, *([base | held] if texts else [])]


def task(*regions, image="/data/upload/3/a.jpg", number=11, data=None, annotations=None):
    results = [result for each in regions for result in each]
    own = [{"id": 1, "was_cancelled": False, "result": results}]
    return {"id": number, "data": {"image": image} | (data or {}), "predictions": [],
            "annotations": own if annotations is None else annotations}  # fmt: skip


def studio(place, tasks, **options):
    source = write(place / "project.json", tasks)
    return from_label_studio(source, place / "images", place / "out", "my-set", **options)


GOOD = region("r1", 12.5, 20.0, 25.0, 40.0)


def test_label_studio_percent_become_the_box_and_texts_the_expressions(place):
    regions = [region("r1", 12.5, 20.0, 25.0, 40.0, [EXPRESSIONS[0], " two "]), region("r2", 50, 50, 25, 25, ["x"]),
               region("r3", 0, 0, 100, 100, ["all"], "dog"), region("r4", 10, 10, 10, 10, ())]  # fmt: skip
    done = studio(place, [task(*regions)])
    found = {s.sample_id: s for s in samples(place / "out")}
    assert found.keys() == {"11-r1-0", "11-r1-1", "11-r2", "11-r3"}
    assert found["11-r1-0"].box == (0.125, 0.2, 0.375, 0.2 + 0.4)
    assert (found["11-r1-0"].expression, found["11-r1-1"].expression) == (EXPRESSIONS[0], "two")
    assert (found["11-r3"].box, found["11-r3"].siblings) == ((0.0, 0.0, 1.0, 1.0), ())
    assert found["11-r2"].siblings == ((0.125, 0.2, 0.375, 0.2 + 0.4), (0.1, 0.1, 0.2, 0.2))
    assert found["11-r2"].meta == {"task": 11, "region": "r2", "category": "cat"}
    assert done.notes == {"rectangles without an expression are not targets": 1}


def test_label_studio_boxes_refer_to_the_upright_image(place):
    (place / "images" / "a.jpg").write_bytes(image_bytes((30, 40), orientation=6))
    studio(place, [task(region("r1", 10, 20, 30, 40, size=(40, 30)))])
    table = opened(custom.find, place / "out", "custom", "train")
    assert np.array_equal(table.image(table[0]), read_image(place / "images" / "a.jpg", "a"))
    assert table[0].size == (40, 30)


def test_label_studio_prefixes_are_taken_off_the_path(place):
    (place / "images" / "a b.jpg").write_bytes(image_bytes((30, 40)))
    images = ("/data/upload/3/a b.jpg", "/data/upload/a%20b.jpg", "/data/local-files/?d=a%20b.jpg", "a b.jpg",
              "./a b.jpg", "http://localhost:8080/data/upload/12/a%20b.jpg",
              "https://here/data/local-files/?d=a b.jpg")  # fmt: skip
    studio(place, [task(GOOD, image=image, number=number) for number, image in enumerate(images)])
    assert [s.image_id for s in samples(place / "out")] == ["a b.jpg"] * len(images)


def test_first_annotation_that_was_not_cancelled_counts_and_that_is_said(place):
    second = [{"id": n, "was_cancelled": n == 1, "result": region("r1", 10 * n, 10, 20, 20)} for n in (1, 2, 3)]
    only_cancelled = [{"id": 9, "was_cancelled": True, "result": GOOD}]
    done = studio(place, [task(annotations=second), task(number=12, annotations=only_cancelled)])
    assert [s.box[0] for s in samples(place / "out")] == [0.2]
    assert done.notes == {
        "of several annotations of a task the first that was not cancelled was taken": 1,
        "tasks without an annotation that was not cancelled were passed over": 1,
    }


def test_expression_of_the_task_goes_to_its_only_rectangle(place):
    tasks = [task(region("r1", 10, 10, 20, 20, ()), data={"caption": "the mug"}),
             task(GOOD, region("r2", 50, 50, 20, 20), number=12, data={"caption": "the mug"})]  # fmt: skip
    done = studio(place, tasks, expression_key="data.caption")
    assert [s.expression for s in samples(place / "out")] == ["the mug"]
    assert len(done.left_out) == 2 and "2 regions and one expression" in done.left_out[0]
    with pytest.raises(DataError, match=r"'caption' is not 'data\.<field>'"):
        studio(place, tasks, expression_key="caption")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (task(region("r9", 10, 10, 20, 20, value={"x": 1, "y": 1, "width": 9, "height": 9, "rotation": 30})),
         "rotation is 30, and a turned rectangle is no box"),
        (task(region("r9", 10, 10, 20, 20, image_rotation=90)), "image_rotation is 90"),
        (task(region("r9", 10, 10, 120, 20)), "leaves the image"),
        (task(region("r9", 10, float("nan"), 20, 20)), "is not four finite numbers"),
        (task(region("r9", 10, 10, 20, 20, size=(31, 40))), "its annotation says 40 wide and 31 high"),
        (task(region("r9", 10, 10, 20, 20, [""])), "text is '', not a text"),
        (task(GOOD, image="/data/upload/3/gone.jpg"), "no such image"),
        (task(GOOD, image="/data/local-files/?d=../a.jpg"), "is not a path inside the folder"),
        (task(GOOD, image="https://example.org/a.jpg"), "lies elsewhere; fetch the images"),
        (task(GOOD, image="/data/upload/3/turned.jpg"), "orientation 3"),
        (task(annotations="none"), "annotations is 'none'"),
        ("no task", "annotations is None"),
    ],
)  # fmt: skip
def test_unusable_task_or_region_is_left_out_with_its_reason(place, bad, said):
    (place / "images" / "turned.jpg").write_bytes(image_bytes((30, 40), orientation=3))
    if isinstance(bad, dict):
        bad["id"] = 77
    done = studio(place, [task(GOOD), bad])
    assert done.counts == {"train": 1}
    assert len(done.left_out) == 1
    assert done.left_out[0].startswith(f"row task {77 if isinstance(bad, dict) else 1}: ") and said in done.left_out[0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"tasks": []}, "not a list of tasks"),
        ([{"id": 1, "image": "/data/upload/a.jpg", "label": []}], r"no task has 'annotations'; .*not JSON-MIN"),
        (
            [task(GOOD) | {"data": {"a": "x.jpg", "b": "y.png"}}],
            r"data has no field 'image', and 2 of its fields name an image \(\['a', 'b'\]",
        ),
    ],
)
def test_other_exports_are_refused(place, content, said):
    with pytest.raises(DataError, match=said):
        studio(place, content)


def ocr_region(name, x, y, w, h, texts, label="Text", kind="rectangle", **more):
    """As Label Studio's OCR template exports it: a shape, its label and its text, three results of one id."""
    value = {"x": x, "y": y, "width": w, "height": h, "rotation": 0}
    if kind == "polygon":
        value = {"points": [[x, y], [x + w, y], [x + w, y + h]], "closed": True}
    base = {"id": name, "to_name": "image", "original_height": 30, "original_width": 40, "image_rotation": 0} | more
    return [base | {"type": kind, "from_name": "bbox", "value": value},
            base | {"type": "labels", "from_name": "label", "value": value | {"labels": [label]}},
            base | {"type": "textarea", "from_name": "transcription", "value": value | {"text": texts}}]  # fmt: skip


def test_ocr_template_is_read_and_its_polygons_are_counted(place):
    regions = [ocr_region("a", 10, 20, 30, 40, ["ONE"]), ocr_region("b", 50, 20, 30, 40, "TWO", "Handwriting"),
               ocr_region("c", 1, 2, 3, 4, ["THREE"], kind="polygon"),
               ocr_region("d", 60, 60, 30, 30, ["FOUR"])]  # fmt: skip
    exported = task(*regions)
    exported["data"] = {"ocr": "/data/upload/3/a.jpg", "note": "seen"}
    done = studio(place, [exported])
    found = {s.expression: s for s in samples(place / "out")}
    assert {text: s.meta["category"] for text, s in found.items()} == {
        "ONE": "Text",
        "TWO": "Handwriting",
        "FOUR": "Text",
    }
    assert found["ONE"].box == (0.1, 0.2, 0.4, 0.2 + 0.4) and found["ONE"].siblings == (found["FOUR"].box,)
    assert done.notes == {"regions that are no rectangles (polygon) were passed over": 1} and not done.left_out


REJECTED = {"last_action": "rejected"}


def reviewed(*accepted):
    """Reviews, the latest first."""
    return {"reviews": [{"created_at": f"2022-11-0{9 - n}", "accepted": yes} for n, yes in enumerate(accepted)]}


@pytest.mark.parametrize("rejected", [REJECTED, reviewed(False, True)])
def test_annotation_that_a_review_rejected_is_no_truth(place, rejected):
    def made(n, **more):
        return {"id": n, "was_cancelled": False, "result": region("r1", 10 * n, 10, 20, 20)} | more

    tasks = [task(annotations=[made(1, **rejected), made(2, **reviewed(True, False))]),
             task(annotations=[made(3, **rejected)], number=12),
             task(annotations=[made(4), made(5, ground_truth=True)], number=13),
             task(annotations=[made(6, last_action="accepted", **reviewed(False))], number=14)]  # fmt: skip
    done = studio(place, tasks)
    assert [s.box[0] for s in samples(place / "out")] == [0.2, 0.5, 0.6]
    assert done.notes["annotations that a review rejected were passed over"] == 2
    assert done.notes["of several annotations of a task the one marked as ground truth was taken"] == 1


def test_export_of_which_nothing_is_left_says_every_reason_and_the_remedy(place):
    rejected = task(annotations=[{"id": 1, "result": GOOD} | REJECTED], image="https://example.org/a.jpg")
    with pytest.raises(DataError) as caught:
        studio(place, [rejected, task(region("r1", 1, 1, 9, 9, ()), number=12)])
    for part in ("a review rejected", "lies elsewhere; fetch", "rectangles without an expression", "data.FIELD"):
        assert part in str(caught.value)


@pytest.mark.parametrize("convert_from", ["coco", "label-studio"])
def test_missing_images_are_counted_and_the_remedy_names_their_folder(place, convert_from):
    names = [f"gone{n}.jpg" for n in range(12)]
    with pytest.raises(DataError) as caught:
        if convert_from == "coco":
            images = [A, *((n + 2, name, 30, 40) for n, name in enumerate(names))]
            convert(place, coco(images, [ONE, *({**ONE, "image_id": n + 2} for n in range(12))]))
        else:
            studio(place, [task(GOOD), *(task(GOOD, image=name, number=n + 20) for n, name in enumerate(names))])
    said = f"12 of 13 images are not in {place / 'images'} (the first: gone0.jpg): put them there, or name the folder"
    assert said in str(caught.value)


# --- Export ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("copy", [True, False])
def test_exported_table_gives_the_same_samples_and_images(tmp_path, copy):
    write_ref_l4(tmp_path / "root")
    for split in ("val", "test"):
        before = opened(ref_l4.find, tmp_path / "root", "refl4", split)
        done = export(before, tmp_path / "out", "my-refl4", copy=copy)
        assert done.counts == {split: len(before)}
        after = opened(custom.find, tmp_path / "out", "custom", split)
        assert len(after) == len(before) > 0
        for a, b in zip(list(before), list(after), strict=True):
            same = ("sample_id", "image_id", "expression", "box", "size", "split", "siblings", "meta")
            assert [getattr(a, key) for key in same] == [getattr(b, key) for key in same]
            assert (a.dataset, b.dataset) == ("refl4", "my-refl4")
            assert np.array_equal(before.image(a), after.image(b))
            assert after.image_path(b).is_symlink() != copy
    assert len(list((tmp_path / "out" / "images").iterdir())) == 5


def test_links_are_relative_and_survive_a_move_of_both(tmp_path):
    write_ref_l4(tmp_path / "all" / "root")
    before = opened(ref_l4.find, tmp_path / "all" / "root", "refl4", "val")
    export(before, tmp_path / "all" / "out", "my-set", copy=False)
    assert not any(os.path.isabs(os.readlink(path)) for path in (tmp_path / "all" / "out" / "images").iterdir())
    (tmp_path / "all").rename(tmp_path / "moved")
    after = opened(custom.find, tmp_path / "moved" / "out", "custom", "val")
    assert after.image(after[0]).shape == (*after[0].size, 3)


def test_images_of_one_name_in_two_folders_stay_apart(tmp_path):
    lines = []
    for folder, size in (("x", (30, 40)), ("y", (50, 60))):
        path = tmp_path / "set" / folder / "a.jpg"
        path.parent.mkdir(parents=True)
        path.write_bytes(image_bytes(size))
        lines.append({"image": f"{folder}/a.jpg", "expression": folder, "bbox": [2, 2, 9, 9]})
    write(tmp_path / "set" / "dataset.json", {"name": "a-set", "box": "xyxy", "frame": "px"})
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    export(opened(custom.find, tmp_path / "set", "custom", "train"), tmp_path / "out", "b-set")
    assert [s.size for s in samples(tmp_path / "out")] == [(30, 40), (50, 60)]
    assert Counter(p.name for p in (tmp_path / "out" / "images").iterdir()) == Counter(["a.jpg", "a-2.jpg"])


def test_export_overwrites_nothing_and_says_which_split_or_name_is_wrong(tmp_path):
    write_ref_l4(tmp_path / "root")
    val = opened(ref_l4.find, tmp_path / "root", "refl4", "val")
    export(val, tmp_path / "out", "my-set")
    with pytest.raises(DataError, match=r"val\.jsonl: is there already"):
        export(val, tmp_path / "out", "my-set")
    with pytest.raises(DataError, match=r"dataset\.json: is there already, of 'my-set' \(xyxy, relative\)"):
        export(val, tmp_path / "out", "other-set", split="test")
    with pytest.raises(DataError, match="has no split 'testA'; give split="):
        export(val, tmp_path / "out2", "my-set", split="testA")
    with pytest.raises(DataError, match="is that of a known data set"):
        export(val, tmp_path / "out2", "refl4")
