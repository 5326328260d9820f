"""What an observation and a frame show is the image, the box and nothing of another episode.

Silent when false: an image that one episode drew on and the next one sees, an overlay or a
close-up beside the box that it stands for, a canvas that has lost the detail the task needs.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
from playing import NAN, STOP, assert_equal, make, propose, scenes

from ivt_env import boxes, data
from ivt_env.rendering import Overlay, draw_overlay, frame, pixel_rectangle, place_on_canvas


@pytest.fixture(autouse=True)
def no_real_data(monkeypatch, tmp_path):
    """Real data sets fall back to the scenes on every machine, and each warns anew."""
    monkeypatch.setenv("IVT_DATA", str(tmp_path / "nothing here"))
    monkeypatch.setattr(data, "_warned", set())


# ---- what is seen ----------------------------------------------------------------------------


@pytest.mark.parametrize("view", ["overlay", "closeup", "both"])
@pytest.mark.parametrize("env_id", ["IVT-Scenes-v0", "IVT-Photos-v0"])
def test_an_observation_never_aliases_the_cached_image_or_another_observation(env_id, view):
    env, clean = make(env_id, view=view, canvas=96), make(env_id, view=view, canvas=96)
    actions = [propose(NAN, 0, 1, 1), propose(0.1, 0.2, 0.6, 0.7), propose(0.5, 0.5, 0.4, 0.6)]
    for options in ({"index": 3}, {"index": 3, "initial_box": np.float32([0.2, 0.2, 0.5, 0.5])}):
        spoilt, _ = env.reset(options=options)
        expected, _ = clean.reset(options=copy.deepcopy(options))
        assert_equal(spoilt, expected)
        for action in actions:
            for value in (*spoilt.values(), *options.values()):
                if isinstance(value, np.ndarray):
                    value[...] = 77
            own = copy.deepcopy(action)
            step = env.step(own)
            own["box"][...] = 0.5
            assert_equal(step, clean.step(action))
            spoilt = step[0]
            step[4]["target"][...] = 77


@pytest.mark.parametrize("style", ["fill", "outline", "both"])
def test_the_overlay_touches_the_pixels_of_its_box_and_no_others(style):
    rng = np.random.default_rng(0)
    options = {"style": style, "colour": [10, 200, 90], "opacity": 0.6, "width": 4}
    for env_id in ("IVT-Scenes-v0", "IVT-Photos-v0"):
        env = make(env_id, overlay=options, canvas=160)
        for seed in range(10):
            before = env.reset(seed=seed)[0]
            box = np.concatenate([rng.uniform(0, 0.9, 2), np.zeros(2)])
            box[2:] = box[:2] + rng.uniform(0.002, 1, 2) * (1 - box[:2])
            after = env.step(propose(*box))[0]
            x1, y1, x2, y2 = pixel_rectangle(np.float32(box), before["extent"])
            height, width = before["extent"]
            assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
            ideal = np.array(box) * np.array([width, height, width, height])
            # Rounded to whole pixels, and one pixel at least.
            assert np.abs(ideal - (x1, y1, x2, y2)).max() <= 1.5
            inside = np.zeros((160, 160), dtype=bool)
            inside[y1:y2, x1:x2] = True
            changed = (before["image"] != after["image"]).any(-1)
            assert not (changed & ~inside).any()
            assert changed[y1, x1] and changed[y2 - 1, x2 - 1]


@pytest.mark.parametrize("opacity", [0.01, 0.35, 0.77, 1.0])
def test_the_fill_is_the_alpha_blend_to_within_one_grey_level(opacity):
    assert (Overlay().style, Overlay().colour, Overlay().opacity) == ("fill", (255, 0, 0), 0.35)
    levels = np.arange(256, dtype=np.uint8)
    for colour in ((255, 0, 0), (0, 0, 0), (255, 255, 255), (13, 130, 201)):
        canvas = np.stack([np.tile(levels, (8, 1))] * 3, axis=-1)
        before = canvas.astype(float)
        draw_overlay(canvas, (8, 256), (0, 0, 1, 1), Overlay(colour=colour, opacity=opacity))
        exact = before * (1 - opacity) + np.array(colour) * opacity
        assert np.abs(canvas - exact).max() <= 1


def test_the_outline_is_as_wide_as_asked_and_leaves_the_inside_alone():
    canvas = np.full((40, 40, 3), 9, dtype=np.uint8)
    draw_overlay(canvas, (40, 40), (0.25, 0.25, 0.75, 1), Overlay("outline", (0, 255, 0), width=3))
    green = (canvas == (0, 255, 0)).all(-1)
    expected = np.zeros((40, 40), dtype=bool)
    expected[10:40, 10:30] = True
    expected[13:37, 13:27] = False
    np.testing.assert_array_equal(green, expected)
    assert (canvas[~expected] == 9).all()


@pytest.mark.parametrize("canvas", [256, 700])
def test_an_image_is_at_the_top_left_in_its_own_shape_and_never_enlarged(canvas):
    env = make("IVT-Photos-v0", canvas=canvas)
    shapes = set()
    for index in range(len(env.dataset)):
        observation, _ = env.reset(options={"index": index})
        image = env.dataset.image(env.sample)
        height, width = observation["extent"].tolist()
        assert max(height, width) == min(canvas, max(image.shape))
        assert height / width == pytest.approx(image.shape[0] / image.shape[1], abs=0.01)
        shown = observation["image"][:height, :width]
        if canvas > max(image.shape):
            np.testing.assert_array_equal(shown, image)
        assert np.abs(shown.mean((0, 1)) - image.mean((0, 1))).max() < 2
        assert not observation["image"][height:].any() and not observation["image"][:, width:].any()
        shapes.add((height, width))
    assert len(shapes) >= 3
    assert place_on_canvas(np.zeros((3000, 2, 3), dtype=np.uint8), 64)[1] == (64, 1)


@pytest.mark.parametrize("view", ["closeup", "both"])
def test_a_closeup_shows_its_window_cut_from_the_full_resolution_image(view):
    env = make("IVT-Photos-v0", view=view, canvas=200, overlay={"style": "outline", "width": 1})
    image, extent_key = ("image", "extent") if view == "closeup" else ("closeup", "closeup_extent")
    for index in (0, 6, 12, 15):
        first, _ = env.reset(options={"index": index})
        assert first["window"].tolist() == [0, 0, 1, 1]
        pixels = env.dataset.image(env.sample)
        canvas, extent = place_on_canvas(pixels, 200)
        np.testing.assert_array_equal(first[image], canvas)
        assert tuple(first[extent_key]) == extent
        box = np.float32([0.4, 0.35, 0.52, 0.5])
        seen = env.step(propose(*box))[0]
        window, (height, width) = seen["window"], seen[extent_key]
        assert max(height, width) == 200
        assert (window[:2] < box[:2]).all() and (window[2:] > box[2:]).all()
        x1, y1, x2, y2 = (window * np.array([*pixels.shape[1::-1]] * 2)).round().astype(int)
        # Smaller than the canvas, so it was enlarged; the whole canvas would be too blurred to match.
        assert max(x2 - x1, y2 - y1) < 200
        back = np.array([y1, x1]) + np.indices((y2 - y1, x2 - x1)).reshape(2, -1).T
        places = ((back - (y1, x1) + 0.5) * ((height / (y2 - y1)), (width / (x2 - x1)))).astype(int)
        shown = seen[image][places[:, 0], places[:, 1]].astype(float)
        true = pixels[back[:, 0], back[:, 1]].astype(float)
        assert np.median(np.abs(shown - true)) <= 4
        # The box is drawn where it lies within the window.
        red = np.argwhere((seen[image] == (255, 0, 0)).all(-1))
        expected = boxes.into_window(box, window) * np.array([width, height, width, height])
        drawn = [red[:, 1].min(), red[:, 0].min(), red[:, 1].max() + 1, red[:, 0].max() + 1]
        assert np.abs(drawn - expected).max() <= 1


def test_the_view_both_shows_the_overlay_and_the_closeup_view_beside_each_other():
    both, whole, close = (make("IVT-Photos-v0", view=view, canvas=120) for view in ("both", "overlay", "closeup"))
    for index in range(0, 16, 3):
        seen = [env.reset(options={"index": index})[0] for env in (both, whole, close)]
        for box in ([0.1, 0.2, 0.3, 0.9], [0.6, 0.6, 0.99, 0.7]):
            a, b, c = seen
            for key in ("image", "extent", "box", "step", "expression"):
                assert_equal(a[key], b[key])
            for key, other in (("closeup", "image"), ("closeup_extent", "extent"), ("window", "window")):
                assert_equal(a[key], c[other])
            seen = [env.step(propose(*box))[0] for env in (both, whole, close)]


def test_the_initial_box_is_drawn_from_the_start():
    env = scenes()
    plain = env.reset(options={"index": 2})[0]
    started = env.reset(options={"index": 2, "initial_box": [0.25, 0.25, 0.75, 0.75]})[0]
    proposed = env.reset(options={"index": 2}) and env.step(propose(0.25, 0.25, 0.75, 0.75))[0]
    assert (plain["image"] != started["image"]).any()
    np.testing.assert_array_equal(started["image"], proposed["image"])
    assert (started["step"], proposed["step"]) == (0, 1)


# ---- rendering -------------------------------------------------------------------------------


def test_frames_have_one_size_over_all_samples_and_steps_and_are_fresh():
    env = make("IVT-Photos-v0", canvas=160, render_mode="rgb_array")
    shapes = set()
    for index in range(len(env.dataset)):
        env.reset(options={"index": index})
        frames = [env.render()]
        for action in (propose(0.1, 0.1, 0.6, 0.9), propose(NAN, 0, 1, 1), STOP):
            env.step(action)
            frames.append(env.render())
        shapes |= {(f.shape, f.dtype) for f in frames}
        assert (frames[0] != frames[1]).any() and (frames[2] != frames[3]).any()
        frames[-1][...] = 0
        assert env.render().any()
    assert len(shapes) == 1
    ((height, width, channels), dtype) = shapes.pop()
    assert (width, channels, dtype) == (160, 3, np.uint8) and height > 160


def test_a_frame_shows_the_target_in_green_and_the_proposal_in_red():
    env = scenes(canvas=384, render_mode="rgb_array")
    env.reset(options={"index": 1})
    x1, y1, x2, y2 = pixel_rectangle(env.sample.box, (384, 384))
    before = env.render()
    for corner in ((y1, x1), (y2 - 1, x2 - 1)):
        assert before[corner].tolist() == [0, 220, 90]
    env.step(propose(0, 0, 0.01, 0.01))
    assert env.render()[0, 0].tolist() == [255, 0, 0] != before[0, 0].tolist()


def test_a_caption_that_is_too_long_is_cut_to_the_frame_with_an_ellipsis():
    def end(text):
        """Where the line of text ends, in pixels."""
        caption = frame(np.zeros((200, 200, 3), np.uint8), (200, 200), None, (0, 0, 1, 1), [text])[202:]
        return np.flatnonzero((caption > 60).any((0, 2))).max()

    assert end("lorem ipsum") < 100
    assert 170 < end("lorem ipsum dolor sit amet " * 20) < 198
    sizes = {
        frame(np.zeros((64, 64, 3), np.uint8), (64, 64), None, (0, 0, 1, 1), [t]).shape for t in ("", "a\nb", "红")
    }
    assert len(sizes) == 1
    assert end("lorem ipsum dolor sit amet " * 20) == end("lorem ipsum dolor sit amet " * 40)


def test_ansi_tells_the_expression_the_step_the_iou_and_the_reward():
    env = scenes(render_mode="ansi")
    env.reset(seed=0)
    assert "step 0/3 (running)" in env.render() and "box none" in env.render()
    _, reward, _, _, info = env.step(propose(0.1, 0.1, 0.9, 0.9))
    text = env.render()
    assert env.sample.expression in text and "step 1/3 (running)" in text
    assert f"IoU {info['iou']:.3f}" in text and f"reward {reward:+.3f}" in text
    assert "box 0.100 0.100 0.900 0.900" in text
    env.step(STOP)
    assert "(stopped)" in env.render()


def test_human_opens_one_window_with_the_frame_and_close_closes_it():
    import pygame

    env = scenes(canvas=128, render_mode="human")
    twin = scenes(canvas=128, render_mode="rgb_array")
    for e in (env, twin):
        e.reset(seed=0)
    for action in (propose(0.1, 0.1, 0.9, 0.9), propose(0.4, 0.4, 0.6, 0.6)):
        assert_equal(env.step(action), twin.step(action))
        assert env.render() is None
        window = pygame.display.get_surface()
        shown = pygame.surfarray.array3d(window).swapaxes(0, 1)
        np.testing.assert_array_equal(shown, twin.render())
    env.close()
    env.close()
    assert not pygame.get_init()


def test_render_without_a_mode_warns_and_gives_nothing():
    env = scenes()
    env.reset(seed=0)
    with pytest.warns(UserWarning, match="render mode"):
        assert env.render() is None
