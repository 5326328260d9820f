"""What a file of annotations holds is taken exactly, or refused with the value and the likely cause.

Silent when false: boxes in the wrong convention or frame train a model that looks merely weak, a
file name from a stranger reads outside the data folder, and a half-broken file looks like a small
data set.
"""

from __future__ import annotations

import json
import logging
import math

import numpy as np
import pytest
from geometry import xywh_to_xyxy
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from ivt_env import boxes
from ivt_env.data import DataError
from ivt_env.data.checked import (
    BadRowError,
    BadRows,
    box_inside,
    image_size,
    integer,
    plain_file_name,
    read_json,
    relative_box,
    relative_path,
    short,
    text,
)

SIZES = st.tuples(st.integers(2, 5000), st.integers(2, 5000))
FRACTIONS = st.floats(0, 1)
CONVENTIONS = ("xyxy", "xywh")


def reason(function, *arguments) -> str | None:
    """Why a value is refused; None where it is not."""
    try:
        function(*arguments)
    except BadRowError as error:
        return str(error)
    return None


# --- Boxes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", CONVENTIONS)
@settings(deadline=None)  # a busy machine is no failure
@given(size=SIZES, x=FRACTIONS, y=FRACTIONS, w=FRACTIONS, h=FRACTIONS, whole=st.booleans())
@example(size=(2, 11), x=1 - 2**-53, y=0.0, w=1.0, h=1.0, whole=False)  # a sliver that the division rounds away
def test_box_arithmetic_is_that_of_the_boxes_module(convention, size, x, y, w, h, whole):
    height, width = size
    left, top = x * (width + 2) - 1, y * (height + 2) - 1  # up to one pixel outside on every side
    bbox = [left, top, w * (width + 1 - left), h * (height + 1 - top)]
    if whole:
        bbox = [round(value) for value in bbox]
    if convention == "xyxy":
        bbox = [bbox[0], bbox[1], bbox[0] + bbox[2], bbox[1] + bbox[3]]
    assume(reason(relative_box, bbox, size, convention) is None)
    found = relative_box(bbox, size, convention)
    xyxy = xywh_to_xyxy(bbox) if convention == "xywh" else np.asarray(bbox, dtype=float)
    assert found == tuple(boxes.to_relative(xyxy, size).tolist())  # neither clipped nor rounded
    assert found[0] < found[2] and found[1] < found[3]


@settings(deadline=None)  # a busy machine is no failure
@given(
    size=SIZES,
    bbox=st.lists(st.integers(-3, 5003) | st.floats(-3, 5003), min_size=4, max_size=4),
    convention=st.sampled_from(CONVENTIONS),
)
@example(size=(100, 100), bbox=[-1, -1, 101, 101], convention="xyxy")
@example(size=(100, 100), bbox=[-1, -1, 102, 102], convention="xywh")
@example(size=(100, 100), bbox=[-0.9, 10, 0.5, 5], convention="xywh")
@example(size=(100, 100), bbox=[-1.5, 0, 50, 50], convention="xyxy")
@example(size=(100, 100), bbox=[0, -1.5, 50, 50], convention="xyxy")
@example(size=(100, 100), bbox=[0, 0, 101.5, 50], convention="xyxy")
@example(size=(100, 100), bbox=[0, 0, 50, 101.5], convention="xyxy")
def test_own_boxes_are_taken_up_to_one_pixel_outside_and_refused_beyond(size, bbox, convention):
    height, width = size
    x1, y1, c, d = map(float, bbox)
    x2, y2 = (x1 + c, y1 + d) if convention == "xywh" else (c, d)
    near = x1 >= -1 and y1 >= -1 and x2 <= width + 1 and y2 <= height + 1
    area = (c > 0 and d > 0 if convention == "xywh" else c > x1 and d > y1) and (
        min(x2 / width, 1) > max(x1 / width, 0) and min(y2 / height, 1) > max(y1 / height, 0)
    )
    assert (reason(box_inside, bbox, size, convention) is None) == (near and area)


@pytest.mark.parametrize(
    ("bbox", "message"),
    [
        (None, "bbox None is not four finite numbers"),
        ("1234", "bbox '1234' is not four finite numbers"),
        ({"x": 1}, "bbox {'x': 1} is not four finite numbers"),
        ([10, 10, "5", 5], "is not four finite numbers"),
        ([10, 10, True, 5], "is not four finite numbers"),
        ([10, math.nan, 5, 5], "is not four finite numbers"),
        ([10, 10, 10**400, 5], "is not four finite numbers"),
    ],
)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_anything_but_four_finite_numbers_is_refused_with_its_value(bbox, message, convention):
    found = reason(relative_box, bbox, (100, 100), convention)
    assert found is not None and message in found and len(found) < 300


@pytest.mark.parametrize(
    ("bbox", "convention", "message"),
    [
        ([10, 10, 0, 5], "xywh", "bbox [10, 10, 0, 5] (x, y, width, height) has no area"),
        ([-0.9, 10, 0.5, 5], "xywh", "has no area inside the image"),
        ([10, 10, 10, 50], "xyxy", "[10, 10, 10, 50] (x1, y1, x2, y2) has its corners in the wrong order or no area"),
        ([-0.9, 10, -0.5, 50], "xyxy", "has no area inside the image"),
        ([10, 10, 900, 50], "xyxy", "leaves the image, which is 120 wide and 100 high"),
        ([10, 10, 900, 50], "xywh", "leaves the image, which is 120 wide and 100 high"),
        ([60, 60, 50, 30], "xyxy", "it would fit as xywh (x, y, width, height): is the declared convention wrong?"),
        ([60, 60, 70, 90], "xywh", "it would fit as xyxy (x1, y1, x2, y2): is the declared convention wrong?"),
    ],
)  # fmt: skip
def test_impossible_box_is_refused_with_its_value_and_what_it_was_taken_for(bbox, convention, message):
    assert message in (reason(box_inside, bbox, (100, 120), convention) or "")


@settings(deadline=None)  # a busy machine is no failure
@given(size=SIZES, bbox=st.lists(st.integers(0, 600), min_size=4, max_size=4), convention=st.sampled_from(CONVENTIONS))
def test_other_convention_is_proposed_only_where_the_box_fits_it_and_whenever_it_alone_does(size, bbox, convention):
    found = reason(box_inside, bbox, size, convention)
    other = "xywh" if convention == "xyxy" else "xyxy"
    fits_other = reason(box_inside, bbox, size, other) is None
    proposed = found is not None and f"it would fit as {other}" in found
    swapped = found is not None and "swapped" in found
    if proposed:
        assert fits_other or "no area inside" in reason(box_inside, bbox, size, other)
    if found is not None and fits_other:
        assert proposed or swapped


@pytest.mark.parametrize(("bbox", "convention"), [([300, 100, 300, 200], "xywh"), ([300, 100, 600, 300], "xyxy")])
def test_swapped_width_and_height_are_suspected_where_the_box_fits_the_turned_image(bbox, convention):
    assert reason(box_inside, bbox, (427, 640), convention) is None
    assert reason(box_inside, bbox, (640, 427), convention).endswith("(are width and height swapped?)")
    assert "swapped" not in reason(box_inside, bbox, (200, 250), convention)


# --- Names of files -------------------------------------------------------------------------------

OUTSIDE = [
    "", ".", "..", "../secret.jpg", "../../secret.jpg", "a/../../secret.jpg", "/etc/passwd", "//server/share/x.jpg",
    "..\\secret.jpg", "a\\..\\..\\secret.jpg", "\\secret.jpg", "\\\\server\\share\\x.jpg", "C:\\secret.jpg",
    "C:/secret.jpg", "C:secret.jpg", "a\0.jpg", "a/\0/../b.jpg",
]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("check", [plain_file_name, relative_path])
def test_name_that_climbs_out_of_its_folder_is_refused_on_every_system(check, name):
    found = reason(check, name, "image")
    assert found is not None and found.startswith(f"image {name!r} is not ")


@pytest.mark.parametrize("name", ["a.jpg", "COCO_train2014_000000581857.jpg", "Größe 1.png", "..a.jpg", "a..jpg", ".a"])
def test_name_of_a_file_is_kept_as_it_is_and_a_plain_one_has_no_folder(name):
    assert plain_file_name(name) == relative_path(name) == name
    assert relative_path(f"train2014/{name}") == f"train2014/{name}"
    assert "is not the plain name of a file" in reason(plain_file_name, f"./{name}")


# --- Numbers and texts ----------------------------------------------------------------------------


def test_only_a_whole_number_from_0_is_an_integer():
    for value in (True, False, -1, 1.0, "5", None, [1], 2**63, math.nan):
        assert reason(integer, {"ref_id": value}, "ref_id") == f"ref_id is {short(value)}, not a whole number from 0"
    for value in (0, 1, 2**53 + 1, 2**63 - 1):
        assert integer({"id": value}, "id") == value


def test_only_a_text_that_is_not_blank_and_no_half_character_is_a_text_and_is_kept_as_it_is():
    for value in ("a cat", " größte Ü — 红色的圆 ", "😀"):
        assert text({"sent": value}, "sent") == value
    for value in ("", "  \n", 3, None, ["a cat"], b"a cat"):
        assert reason(text, {"sent": value}, "sent") == f"sent is {short(value)}, not a text"
    for value in ("a \udcff cat", json.loads('"cut \\ud83d off"')):
        assert "which is not valid Unicode" in reason(text, {"sent": value}, "sent")
    for row in ({}, None, [1], "sent", 7):
        assert reason(integer, row, "sent") == "sent is None, not a whole number from 0"
        assert reason(text, row, "sent") == "sent is None, not a text"


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (2**31, 5), (5, 2**31)])
def test_image_has_a_height_and_a_width(sizes):
    height, width = sizes
    found = reason(image_size, {"height": height, "width": width})
    assert found == f"height {height} and width {width} are not an image's"
    assert image_size({"h": 480, "w": 640}, "h", "w") == (480, 640)


def test_value_of_any_size_and_depth_is_shown_in_a_line():
    deep: list = []
    for _ in range(10_000):
        deep = [deep]
    endless: dict = {}
    endless["self"] = endless
    digits = 10**10_000  # more than Python writes
    for value in (deep, endless, "x" * 10**6, list(range(10**6)), {"k" * 10**5: "v" * 10**5}, digits, [-digits]):
        assert len(short(value)) < 400 and "\n" not in short(value)
    assert reason(integer, {"id": digits}, "id").startswith("id is <int with thousands of digits>, not a whole")


# --- Files and bad rows ---------------------------------------------------------------------------


def test_broken_or_missing_json_is_an_error_with_the_file_and_the_remedy(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(DataError, match=r"x\.json: cannot be read \(No such file or directory\); fetch it again$"):
        read_json(path, "fetch it again")
    for content in (b"", b'{"images": [', b"\xff\xfe\xfd", b"[" * 100_000, b"1" * 10_000):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"x\.json: not whole JSON \(.*\); fetch it again$"):
            read_json(path, "fetch it again")


@pytest.mark.parametrize(
    ("bad", "total", "refused"),
    [(0, 0, False), (0, 5, False), (1, 1, True), (10, 10, True), (10, 11, False), (11, 12, True)]
    + [(11, 1099, True), (11, 1100, False), (20, 2000, False), (21, 2000, True)],
)
def test_more_than_ten_and_more_than_one_percent_or_all_rows_bad_refuse_the_file(bad, total, refused):
    rows = BadRows("a.json", "fetch it again")
    for number in range(bad):
        rows.add(number, "is broken")
    if not refused:
        rows.check(total)
        return
    limit = max(10, total // 100)
    with pytest.raises(DataError) as caught:
        rows.check(total)
    assert str(caught.value) == (
        f"a.json: {bad} of {total} rows are unusable (the limit is {limit}), the first: row 0: is broken; "
        "fetch it again"
    )


def test_bad_row_counts_once_for_each_sample_and_only_the_first_are_logged(caplog):
    rows = BadRows("a.json", "fetch it again")
    with caplog.at_level(logging.WARNING):
        rows.add(7, BadRowError("is broken"), 3)
        for number in range(100):
            rows.add(f"name {number}", "is broken")
    assert len(rows.reasons) == 103 and rows.reasons[2] == "row 7: is broken"
    logged = [record.getMessage() for record in caplog.records]
    assert logged[:2] == ["a.json: left out row 7: is broken (3 samples)", "a.json: left out row name 0: is broken"]
    assert len(logged) < 25
