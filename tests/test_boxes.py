"""Box arithmetic keeps its promises for every box, not only for the ones in the examples.

Silent when false: rewards and scores that are off by a pixel or by a reversed axis, and close-ups
that cut off the box they are meant to show.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivt_env import boxes
from ivt_env.rendering import Surroundings

GRID = 4096  # coordinates are multiples of 1/4096: exact in float32 and far from underflow
prop = partial(settings, deadline=None, max_examples=200)

unit = st.integers(0, GRID).map(lambda k: k / GRID)


@st.composite
def valid_boxes(draw: st.DrawFn) -> tuple[float, float, float, float]:
    """A box inside the image with a positive area."""
    x1, x2 = sorted(draw(st.lists(st.integers(0, GRID), min_size=2, max_size=2, unique=True)))
    y1, y2 = sorted(draw(st.lists(st.integers(0, GRID), min_size=2, max_size=2, unique=True)))
    return x1 / GRID, y1 / GRID, x2 / GRID, y2 / GRID


any_box = st.tuples(*[st.floats(-2, 3, width=32)] * 4)
size_px = st.tuples(st.integers(1, 5000), st.integers(1, 5000))


@prop()
@given(any_box, any_box, valid_boxes(), valid_boxes())
def test_iou_is_symmetric_from_0_to_1_and_1_exactly_where_boxes_with_an_area_are_equal(a, b, c, d):
    assert boxes.iou(a, b) == boxes.iou(b, a) and 0 <= boxes.iou(a, b) <= 1
    assert boxes.iou(c, c) == 1 and (boxes.iou(c, d) == 1) == (c == d)


@prop(max_examples=60)
@given(st.tuples(*[st.integers(0, 12)] * 4), st.tuples(*[st.integers(0, 12)] * 4))
def test_iou_of_whole_pixel_boxes_equals_a_count_of_pixels(a, b):
    def covered(box):
        x1, y1, x2, y2 = box
        return {(x, y) for x in range(x1, x2) for y in range(y1, y2)}

    union = covered(a) | covered(b)
    expected = len(covered(a) & covered(b)) / len(union) if union else 0.0
    assert boxes.iou(a, b) == pytest.approx(expected, abs=1e-12)
    assert boxes.area(a) == len(covered(a))


@prop()
@given(valid_boxes(), valid_boxes())
def test_giou_is_at_most_iou_and_at_least_minus_1(a, b):
    giou, iou = boxes.giou(a, b), boxes.iou(a, b)
    assert -1 <= giou <= iou + 1e-12
    assert boxes.giou(a, a) == 1


def test_giou_equals_the_definition_on_two_boxes_with_a_gap():
    # Two unit squares with one unit between them: hull 3, union 2, no intersection.
    assert boxes.giou([0, 0, 1, 1], [2, 0, 3, 1]) == pytest.approx(-1 / 3)


@prop(max_examples=50)
@given(st.lists(st.tuples(any_box, any_box), min_size=1, max_size=5))
def test_arrays_of_boxes_give_what_each_box_gives_alone(pairs):
    a, b = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])
    for function in (boxes.iou, boxes.giou):
        alone = [function(x, y) for x, y in zip(a, b, strict=True)]
        np.testing.assert_array_equal(function(a, b), alone)
        table = function(a[:, None], b[None])
        assert table.shape == (len(a), len(b))
        np.testing.assert_array_equal(np.diagonal(table), alone)


def test_the_size_of_an_image_is_height_then_width():
    np.testing.assert_array_equal(boxes.to_relative([200, 50, 400, 100], (100, 400)), [0.5, 0.5, 1, 1])


@prop()
@given(any_box)
def test_clip_moves_only_what_is_outside_the_image(box):
    clipped = boxes.clip(box)
    for before, after in zip(box, clipped, strict=True):
        assert after == (0 if before < 0 else 1 if before > 1 else before)


@prop()
@given(any_box.map(lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))))
def test_a_closeup_window_lies_inside_the_image_and_holds_the_box(box):
    clipped = boxes.clip(box)
    window = Surroundings().window(clipped, (480, 640))
    assert (window[:2] >= 0).all() and (window[2:] <= 1 + 1e-12).all()
    assert (window[2:] - window[:2] >= 0.25 - 1e-12).all(), "smaller than the smallest window"
    assert (window[:2] <= clipped[:2] + 1e-12).all() and (window[2:] >= clipped[2:] - 1e-12).all()


def test_a_closeup_window_shows_half_a_box_of_margin_on_each_side():
    for box, window in (
        ([0.4, 0.3, 0.6, 0.7], [0.3, 0.1, 0.7, 0.9]),
        ([0.49, 0.49, 0.51, 0.51], [0.375, 0.375, 0.625, 0.625]),
        ([0.0, 0.8, 0.2, 1.0], [0.0, 0.6, 0.4, 1.0]),
    ):
        np.testing.assert_allclose(Surroundings().window(box, (480, 640)), window)


@prop()
@given(valid_boxes(), valid_boxes())
def test_into_window_gives_the_place_of_a_box_within_a_window(box, window):
    inside = boxes.into_window(box, window)
    extent = np.array([window[2] - window[0], window[3] - window[1]] * 2)
    np.testing.assert_allclose(inside * extent + np.array([*window[:2], *window[:2]]), box, atol=1e-12)
    np.testing.assert_array_equal(boxes.into_window(window, window), [0, 0, 1, 1])


@prop()
@given(valid_boxes(), st.integers(0, 3), st.sampled_from([np.nan, np.inf, -np.inf]), st.floats(1e-3, 1e6))
def test_the_reason_why_a_box_is_invalid_says_what_is_wrong_with_it(box, place, infinite, beyond):
    assert boxes.invalid_reason(box) is boxes.invalid_reason(np.array(box, dtype=np.float32)) is None
    x1, y1, x2, y2 = box
    wrong = {"not finite": [infinite], "outside [0, 1]": [-beyond, 1 + beyond]}
    for said, values in wrong.items():
        for value in values:
            broken = np.array(box)
            broken[place] = value
            assert str(boxes.invalid_reason(broken)).startswith(said)
    for flat_or_reversed in ((x2, y1, x1, y2), (x1, y1, x1, y2)):
        assert str(boxes.invalid_reason(flat_or_reversed)).startswith("x2 <= x1")
    for flat_or_reversed in ((x1, y2, x2, y1), (x1, y1, x2, y1)):
        assert str(boxes.invalid_reason(flat_or_reversed)).startswith("y2 <= y1")


@pytest.mark.parametrize("shape", [(), (3,), (5,), (1, 4), (4, 1)])
def test_a_box_that_is_not_4_numbers_is_invalid_and_the_reason_gives_its_shape(shape):
    assert str(shape) in str(boxes.invalid_reason(np.full(shape, 0.5)))


def test_looks_at_a_place_are_the_boxes_that_overlap_it_by_half_itself_included():
    here = (0.25, 0.25, 0.5, 0.5)
    assert boxes.looks_at(here, []) == boxes.looks_at(here, np.zeros((3, 4))) == 1
    half = (0.25, 0.25, 0.5, 0.375)  # an IoU of 0.5
    less = (0.25, 0.25, 0.5, 0.37)
    assert boxes.looks_at(here, [here, less, half, (0.6, 0.6, 0.8, 0.8)]) == 3


def test_no_box_is_all_zeros_and_nothing_else():
    stack = np.array([[0, 0, 0, 0], [0, 0, 0, 1e-9], [0.1, 0.1, 0.2, 0.2]])
    np.testing.assert_array_equal(boxes.is_no_box(stack), [True, False, False])
    assert boxes.is_no_box(boxes.NO_BOX)
    assert boxes.invalid_reason(boxes.NO_BOX) is not None
