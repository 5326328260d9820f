"""A data set of one's own is read in the convention it declares, from the images it means, under its own name.

Silent when false: boxes in another convention or frame train a model that looks merely weak; a
turned photograph has every box beside its object; a set that calls itself RefCOCOg makes a number
that is a lie.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
from eval_layouts import EXPRESSIONS, PHOTOS, failure, image_bytes, in_frame, opened, photo_rows, write_custom
from hypothesis import given, settings
from hypothesis import strategies as st

import ivt_env.data as data
from ivt_env.data import DataError, load_dataset
from ivt_env.data import custom as module
from ivt_env.data.custom import Declared
from ivt_env.data.images import read_image

BOXES = ("xyxy", "xywh")
FRAMES = ("px", "relative", "thousandths")
PAGE = Path(__file__).resolve().parent.parent / "docs" / "data" / "custom.md"


pytestmark = pytest.mark.usefixtures("private_machine")


@pytest.fixture
def root(tmp_path):
    (tmp_path / "set" / "images").mkdir(parents=True)
    return tmp_path / "set"


def table(root, split="train"):
    return opened(module.find, root, "custom", split)


def refusal(root, split="train"):
    return failure(module.find, root, "custom", split)


def put(root, name, content):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def line(**values):
    return {"image": "a.jpg", "expression": "the cat", "bbox": [5, 6, 20, 25], **values}


def one_bad(root, values, caplog, box="xyxy", frame="px"):
    """The log of opening a set whose second line is bad."""
    if not (root / "images" / "a.jpg").exists():
        put(root, "images/a.jpg", image_bytes((30, 40)))
    good = line(bbox=in_frame([5, 6, 20, 25], (30, 40), box, frame))
    write_custom(root, [good, good | values, good], box=box, frame=frame)
    with caplog.at_level(logging.WARNING):
        assert table(root).skipped == 1
    assert "row train.jsonl line 2: " in caplog.text
    return caplog.text


# --- What is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("frame", "unit"), [(999, 999), ("999", 999), ("1024ths", 1024)])
def test_boxes_may_be_in_any_whole_number_of_parts(root, frame, unit):
    put(root, "images/a.jpg", image_bytes((30, 40)))
    write_custom(root, [line(bbox=[unit // 4, 0, unit, unit // 2])], box="xyxy", frame=frame)
    assert table(root)[0].box == (unit // 4 / unit, 0, 1, unit // 2 / unit)


def test_the_page_shows_what_works(root, monkeypatch, capsys):
    page = PAGE.read_text("utf-8")
    files = re.findall(r'```json title="([^"]+)"\n(.*?)```', page, flags=re.S)
    assert [name for name, _ in files] == ["dataset.json", "train.jsonl"]
    folder = root / "page"
    for name, content in files:
        put(folder, name, content.encode())
    monkeypatch.chdir(folder)
    exec(re.search(r"```python\n(.*?)```", page, flags=re.S)[1], {})
    first, second = capsys.readouterr().out.splitlines()
    assert first == "3 my-set the eye on the left {'category': 'eye'}"
    assert second.startswith("(300, 451, 3)")
    known = {row["expression"]: row["bbox"] for row in photo_rows()}
    lines = [json.loads(each) for each in files[1][1].splitlines()]
    assert len(lines) == 3
    assert set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| `.*", page, re.M)))) >= module.KEYS
    assert all(known[each["expression"]] == each["bbox"] for each in lines)


@pytest.mark.parametrize(("box", "frame"), list(itertools.product(BOXES, FRAMES)))
def test_photographs_are_served_in_every_convention_and_frame(root, box, frame):
    rows = photo_rows()
    lines = []
    for number, row in enumerate(rows):
        put(root, f"images/{row['image']}", (PHOTOS / row["image"]).read_bytes())
        size = row["height"], row["width"]
        other = in_frame([1, 2, 30, 40], size, box, frame)
        lines.append(
            {"image": row["image"], "expression": EXPRESSIONS[number % 3], "siblings": [other],
             "bbox": in_frame(row["bbox"], size, box, frame)}
        )  # fmt: skip
    write_custom(root, lines, box=box, frame=frame)
    served = load_dataset("custom", "train", data_root=root, strict=True)
    assert len(served) == len(rows) and served.skipped == 0
    for number, row in enumerate(rows):
        sample = served[number]
        height, width = row["height"], row["width"]
        assert (sample.dataset, sample.sample_id, sample.image_id) == ("my-set", str(number + 1), row["image"])
        assert (sample.expression, sample.size) == (EXPRESSIONS[number % 3], (height, width))
        expected = np.array(row["bbox"]) / [width, height, width, height]
        assert np.allclose(sample.box, expected, rtol=0, atol=1e-15 if frame == "px" else 1e-12)
        assert np.allclose(sample.siblings, [[1 / width, 2 / height, 30 / width, 40 / height]], rtol=0, atol=1e-12)
        path = PHOTOS / row["image"]
        assert np.array_equal(served.image(sample), read_image(path, str(path)))


@st.composite
def boxes_in_images(draw):
    height, width = draw(st.integers(8, 3000)), draw(st.integers(8, 3000))
    x1, y1 = draw(st.floats(0, width - 4)), draw(st.floats(0, height - 4))
    x2, y2 = draw(st.floats(x1 + 2, width)), draw(st.floats(y1 + 2, height))
    return (height, width), [x1, y1, x2, y2]


@settings(max_examples=100, deadline=None)
@given(boxes_in_images(), st.sampled_from(BOXES), st.sampled_from(FRAMES))
def test_any_box_round_trips_in_every_convention_and_frame(drawn, box, frame):
    size, corners = drawn
    written = in_frame(corners, size, box, frame)
    if frame == "thousandths" and all(abs(value) <= 1 for value in written):
        return  # a box of a thousandth in the corner: refused, see below
    found = module.boxed(written, size, Declared("my-set", box, frame))
    expected = np.array(corners) / [size[1], size[0], size[1], size[0]]
    assert np.allclose(found, expected, rtol=0, atol=1e-12)
    assert 0 <= found[0] < found[2] <= 1 and 0 <= found[1] < found[3] <= 1


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_turned_photograph_is_read_upright_and_as_stated(root, orientation):
    path = put(root, "images/a.jpg", image_bytes((30, 40), orientation=orientation))
    upright, stored = read_image(path, "a"), read_image(path, "a", (30, 40))
    assert upright.shape == (40, 30, 3)
    for stated, size, image in (
        ({}, (40, 30), upright),
        ({"width": 30, "height": 40}, (40, 30), upright),
        ({"width": 40, "height": 30}, (30, 40), stored),
    ):
        for index in root.glob(".ivt_index/*.arrow"):
            index.unlink()
        write_custom(root, [line(bbox=[3, 6, 15, 24], **stated)])
        served = table(root)
        height, width = size
        assert (served[0].size, served[0].box) == (size, (3 / width, 6 / height, 15 / width, 24 / height))
        assert np.array_equal(served.image(served[0]), image)


@pytest.mark.parametrize(("size", "orientation"), [((30, 40), 2), ((30, 40), 3), ((30, 40), 4), ((30, 30), 6)])
def test_photograph_whose_frame_is_unclear_is_refused_unless_stated(root, size, orientation):
    path = put(root, "images/a.jpg", image_bytes(size, orientation=orientation))
    write_custom(root, [line()])
    message = refusal(root)
    assert f"{path}: its EXIF note says" in message and "mogrify -auto-orient" in message
    write_custom(root, [line(width=size[1], height=size[0])])
    served = table(root)
    assert np.array_equal(served.image(served[0]), read_image(path, "a", size))


def test_lines_may_be_blank_and_the_file_may_start_with_a_mark_and_ids_and_meta_are_kept(root):
    put(root, "deep/a.jpg", image_bytes((30, 40)))  # beside dataset.json
    first = line(image="deep/a.jpg", image_id="coco-5", expression=" \u2028 猫\n🐈")
    other = first | {"id": 7, "category": "猫", "meta": {"by": [1, None]}}
    path = write_custom(root, [])
    path.write_bytes(f"\ufeff{json.dumps(first)}\r\n\r\n   \n{json.dumps(other)}".encode())
    served = table(root)
    assert [(s.sample_id, s.image_id, s.expression) for s in served] == [
        ("1", "coco-5", "猫\n🐈"), ("7", "coco-5", "猫\n🐈")
    ]  # fmt: skip
    assert served[1].meta == {"by": [1, None], "category": "猫"}
    assert served.image_path(served[0]) == root / "deep" / "a.jpg"


def test_splits_are_those_whose_file_is_there(root, tmp_path):
    assert module.find(tmp_path, "custom") is module.find(tmp_path, "refcocog") is None
    put(root, "images/a.jpg", image_bytes((30, 40)))
    put(root, "images/b.jpg", image_bytes((30, 40)))
    write_custom(root, [line()])
    write_custom(root, [line(image="b.jpg")], "test")
    assert module.find(root, "custom").splits == ("train", "test")
    assert table(root, "test")[0].split == "test"
    assert "my-set (custom) has no split 'val'; it has train, test" in refusal(root, "val")


# --- What is declared -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, 'cannot be read (No such file or directory); it must hold {"name": "my-set", "box"'),
        ('{"name": "my-set", "box": "xyxy"', "not whole JSON"),
        ('{"name": "my-set", "box": "xyxy"}', "it must hold"),
        ('{"name": "my-set", "box": "cxcywh", "frame": "px"}', "box is 'cxcywh', which is none of xyxy, xywh"),
        ('{"name": "my-set", "box": "xyxy", "frame": "percent"}', "frame is 'percent'; choose one of px, relative"),
        ('{"name": "my-set", "box": "xyxy", "frame": "px", "boxes": 1}', "unknown key 'boxes'"),
        ('{"name": "", "box": "xyxy", "frame": "px"}', "the name '' is not 1 to 64"),
        ('{"name": "../x", "box": "xyxy", "frame": "px"}', "the name '../x' is not"),
    ],
)
def test_unclear_declaration_is_refused(root, content, said):
    write_custom(root, [line()])
    (root / "dataset.json").unlink()
    if content is not None:
        (root / "dataset.json").write_text(content)
    message = refusal(root)
    assert message.startswith(str(root / "dataset.json")) and said in message


def test_names_of_known_data_sets_are_refused_and_others_are_not():
    known = (*data.NAMES, "RefCOCOg", "refcoco-plus", "RefCOCO-unc", "refcocog-umd", "refcocog-google", "Ref-L4",
             "ref_adv", "ref-adv-s", "Scenes")  # fmt: skip
    for name in known:
        with pytest.raises(DataError, match="is that of a known data set"):
            module.check_name(name)
    for name in ("my-refcocog", "refcocog-kitchen", "photos2", "a", "A.b_c-9"):
        assert module.check_name(name) == name


# --- Broken input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"bbox": [20, 10, 10, 12]}, r"corners in the wrong order or no area; it would fit as xywh"),
        ({"bbox": [5, 6, 90, 25]}, "leaves the image, which is 40 wide and 30 high"),
        ({"bbox": [5, 6, 25, 39]}, "are width and height swapped?"),
        ({"bbox": [0.1, 0.2, 0.5, 0.9]}, "it would fit as 'relative': is the declared frame wrong?"),
        ({"bbox": [100, 200, 500, 900]}, "it would fit as 'thousandths'"),
        ({"bbox": [5, 6, 20, 1e999]}, "Infinity is no JSON number"),
        ({"bbox": [float("nan"), 6, 20, 25]}, "NaN is no JSON number"),
        ({"siblings": [[5, 6, 20, 25], [9, 9, 2, 2]]}, r"siblings[1] [9, 9, 2, 2]"),
        ({"image": "../a.jpg"}, "is not a path inside the folder"),
        ({"image": "b.jpg"}, "image 'b.jpg': no such image, "),
        ({"expression": "  "}, "expression is '  ', not a text"),
        ({"width": 40}, "height is None"),
        ({"box": [1, 2, 3, 4]}, "unknown key 'box' (did you mean 'bbox'?)"),
        ({"meta": [1]}, "meta is [1], not a JSON object"),
        ({"meta": {"a": "\ud800"}}, "not valid Unicode"),
        ({"meta": {"category": "dog"}, "category": "cat"}, "category is 'cat', but in meta it is 'dog'"),
        ({"id": ""}, "id is '', not a text"),
        ({"image_id": "other"}, "'a.jpg' has the image_id 'a.jpg' in a line before, here 'other'"),
        ({"image": "c.jpg", "image_id": "a.jpg"}, "image_id 'a.jpg' is that of 'a.jpg'"),
        ({"image": "text.jpg"}, "not a whole image that can be read"),
        ({"image": "x" * 300}, "cannot be looked for (File name too long)"),
        ({"meta": {"a": float("inf")}}, "Infinity is no JSON number"),
        ({"meta": {"a": "1e999"}}, "holds a number that is too large"),  # JSON, and infinite
    ],
)
def test_bad_line_is_left_out_with_its_number_and_reason(root, caplog, values, said):
    for name, content in (("a", image_bytes((30, 40))), ("c", image_bytes((30, 40))), ("text", b"text")):
        put(root, f"images/{name}.jpg", content)
    good = line()
    path = write_custom(root, [])
    lines = "".join(json.dumps(each) + "\n" for each in (good, good | values, good))
    path.write_text(lines.replace('"1e999"', "1e999"))
    with caplog.at_level(logging.WARNING):
        assert table(root).skipped == 1
    assert "row train.jsonl line 2: " in caplog.text and said in caplog.text


@pytest.mark.parametrize(
    ("box", "frame", "bbox", "said"),
    [
        ("xywh", "px", [20, 20, 30, 29], "it would fit as xyxy"),
        ("xywh", "relative", [0.5, 0.5, 0.9, 0.9], "it would fit as xyxy"),
        ("xyxy", "relative", [5, 6, 20, 25], "it would fit as 'px'"),
        ("xyxy", "relative", [0.5, 0.5, 1.2, 0.9], "leaves the image, which is 1 wide and 1 high"),
        ("xyxy", "relative", [0.5, 0.5, 0.2, 0.3], "it would fit as xywh"),
        ("xyxy", "thousandths", [0.5, 0.5, 0.9, 0.9], "it would fit as 'relative'"),
        ("xyxy", "thousandths", [5, 6, 2000, 25], "leaves the image, which is 1000 wide"),
    ],
)
def test_box_of_another_convention_or_frame_is_recognised(root, caplog, box, frame, bbox, said):
    assert said in one_bad(root, {"bbox": bbox}, caplog, box, frame)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"image": "a.jpg", "expr', "not a whole JSON object"),
        (b"[1, 2]", "a line is a JSON object"),
        (b"[" * 100_000, "not a whole JSON object"),
        (b'{"image": "a.jpg", "expression": "caf\xe9"}', "not UTF-8"),
        ("{}".encode("utf-16"), "not UTF-8"),
    ],
)
def test_broken_line_is_left_out_with_its_number(root, caplog, content, said):
    put(root, "images/a.jpg", image_bytes((30, 40)))
    path = write_custom(root, [line()])
    path.write_bytes(path.read_bytes() + b"\n" + content + b"\n" + json.dumps(line()).encode())
    with caplog.at_level(logging.WARNING):
        assert table(root).skipped >= 1
    assert "row train.jsonl line 3: " in caplog.text and said in caplog.text


def test_image_in_train_and_test_is_refused_however_it_is_spelt(root):
    put(root, "images/a.jpg", image_bytes((30, 40)))
    write_custom(root, [line()])
    write_custom(root, [line(image="./a.jpg")], "test")
    assert "train and test share 1 images (a.jpg is one)" in refusal(root)
