"""What makes the environment fast changes nothing that is seen or earned.

Silent when false: an observation that changes after it was given out because its memory is used again,
a rectangle of the last box that stays in the image, or an IoU of its own in the reward.
"""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import numpy as np
import pytest
from geometry import to_pixels
from hypothesis import given, settings
from hypothesis import strategies as st
from playing import random_actions

from ivt_env import boxes
from ivt_env.batches import RecycledMemory
from ivt_env.game import iou_of_two
from ivt_env.rendering import Overlay, Sheet, draw_overlay, pixel_rectangle
from ivt_env.vector_env import GroundingVectorEnv

N = 4
coordinate = st.floats(-0.5, 1.5, width=32) | st.sampled_from([0.0, 0.25, 0.5, 1.0])
any_box = st.tuples(coordinate, coordinate, coordinate, coordinate)


@given(any_box, any_box)
@settings(max_examples=200, deadline=None)
def test_the_iou_of_a_step_is_that_of_the_package_to_the_last_bit(a, b):
    for x, y in ((a, b), (a, a)):
        assert iou_of_two(x, y) == float(boxes.iou(x, y))


@given(any_box.map(lambda b: boxes.clip(b).astype(np.float32)), st.tuples(st.integers(1, 700), st.integers(1, 700)))
@settings(max_examples=100, deadline=None)
def test_a_pixel_rectangle_is_the_box_in_pixels_rounded_to_whole_ones(box, extent):
    left, top, right, bottom = np.round(to_pixels(box, extent)).astype(int).tolist()
    x1, y1, x2, y2 = pixel_rectangle(box, extent)
    height, width = extent
    assert (x1, y1) == (min(left, width - 1), min(top, height - 1))
    assert (x2, y2) == (min(width, max(x1 + 1, right)), min(height, max(y1 + 1, bottom)))


@pytest.mark.parametrize("style", ["fill", "outline", "both"])
def test_a_sheet_draws_what_draw_overlay_draws_however_many_boxes_it_has_drawn(style):
    rng = np.random.default_rng(0)
    canvas = rng.integers(0, 256, (60, 60, 3), dtype=np.uint8)
    overlay = Overlay(style, (30, 200, 90), opacity=0.4, width=2)
    sheet = Sheet(canvas, (48, 60), overlay)
    before = canvas.copy()
    for _ in range(30):
        box = np.sort(rng.random((2, 2)), axis=0).ravel()
        expected, found = canvas.copy(), canvas.copy()
        draw_overlay(expected, (48, 60), box, overlay)
        sheet.draw(found, box)
        np.testing.assert_array_equal(found, expected)
        copied = canvas.copy()
        pickle.loads(pickle.dumps(sheet)).draw(copied, box)
        np.testing.assert_array_equal(copied, expected)
    np.testing.assert_array_equal(canvas, before)


def env(**kwargs: Any) -> GroundingVectorEnv:
    return GroundingVectorEnv(N, "photos", "train", **({"canvas": 48} | kwargs))


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
@pytest.mark.parametrize("view", ["overlay", "closeup", "both"])
def test_without_copies_every_step_shows_what_it_shows_with_them(view, mode):
    kept, fresh = (env(view=view, autoreset_mode=mode, copy=c) for c in (False, True))
    rng = np.random.default_rng(0)
    for seed in range(4):
        options = {"reset_mask": rng.random(N) < 0.6} if seed and mode == "Disabled" else {}
        if options and not options["reset_mask"].any():
            options = {}
        shown, expected = (e.reset(seed=seed, options=copy.copy(options))[0] for e in (kept, fresh))
        for _ in range(5):
            for key, value in expected.items():
                np.testing.assert_array_equal(shown[key], value)
            actions = random_actions(rng, N)
            ours, theirs = kept.step(actions), fresh.step(actions)
            shown, expected = ours[0], theirs[0]
            for a, b in zip(ours[1:4], theirs[1:4], strict=True):
                np.testing.assert_array_equal(a, b)


def test_without_copies_the_arrays_are_the_same_ones_and_read_only():
    e = env(copy=False)
    first = e.reset(seed=0)[0]["image"]
    second = e.step(random_actions(np.random.default_rng(0), N))[0]["image"]
    assert np.shares_memory(first, second)
    with pytest.raises(ValueError, match="read-only"):
        second[0] = 0


def test_what_is_still_held_is_never_painted_again():
    """Whole observations, single rows, a view of a view, a memoryview: whatever is kept stays as it was."""
    e = env(view="both")
    rng = np.random.default_rng(0)
    held: list[tuple[Any, np.ndarray]] = []
    images = e.reset(seed=0)[0]
    for step in range(60):
        kind = step % 5
        image = images["image"]
        keep = (image, image[1], image[2, 3:9][:, ::2], memoryview(image), None)[kind]
        if keep is not None:
            held.append((keep, np.array(keep)))
        if len(held) > 12:
            del held[int(rng.integers(len(held)))]
        del image
        images = e.step(random_actions(rng, N))[0]
        for array, expected in held:
            np.testing.assert_array_equal(np.asarray(array), expected)
    assert len(held) == 12


def test_memory_that_nobody_holds_is_used_again_and_no_more_than_needed_is_spared():
    memory = RecycledMemory()
    places = set()
    held = memory.array((4, 10, 10, 3))
    for _ in range(20):
        new = memory.array((4, 10, 10, 3))
        assert new.flags.writeable and new.flags.c_contiguous and not np.shares_memory(new, held)
        new[...] = 1
        held = new
        places.add(new.__array_interface__["data"][0])
    assert len(places) <= 3
    many = [memory.array((5, 5)) for _ in range(10)]
    del many, held, new
    gc.collect()
    assert len(memory._spare) == 2
    assert pickle.loads(pickle.dumps(memory))._spare == []
