"""The environment keeps Gymnasium's contract and its own, for every registered id.

Silent when false: rewards that do not add up to what is reported, a picture that one episode drew
on and the next one sees, an option that was misspelt and ignored, a refused box that counts.
"""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env

import ivt_env
from ivt_env import boxes, data
from ivt_env.data import DataError, DatasetFallbackWarning
from ivt_env.env import GroundingEnv
from ivt_env.rendering import Overlay, closeup, draw_overlay, frame, pixel_rectangle, place_on_canvas
from ivt_env.rewards import POTENTIALS, RewardConfig
from ivt_env.vector_env import GroundingVectorEnv

REAL = sorted(set(ivt_env.IDS) - {"IVT-Scenes-v0", "IVT-Photos-v0"})
NAN, INF = float("nan"), float("inf")
INVALID = {
    "NaN": ([NAN, 0.1, 0.5, 0.5], "not finite"),
    "infinite": ([0.1, 0.1, INF, 0.5], "not finite"),
    "too large for float32": ([0.1, 0.1, 1e300, 0.5], "not finite"),
    "outside": ([0.1, 0.1, 0.5, 1.2], "outside"),
    "negative": ([-0.1, 0.1, 0.5, 0.5], "outside"),
    "reversed": ([0.5, 0.1, 0.2, 0.5], "x2 <= x1"),
    "upside down": ([0.1, 0.5, 0.2, 0.2], "y2 <= y1"),
    "flat": ([0.1, 0.3, 0.2, 0.3], "y2 <= y1"),
    "a point": ([0.3, 0.3, 0.3, 0.3], "x2 <= x1"),
    "all zeros": ([0.0, 0.0, 0.0, 0.0], "x2 <= x1"),
    "flat once it is float32": ([0.5, 0.1, 0.5 + 1e-12, 0.5], "x2 <= x1"),
}


@pytest.fixture(autouse=True)
def no_real_data(monkeypatch, tmp_path):
    """Real data sets fall back to the scenes on every machine, and each warns anew."""
    monkeypatch.setenv("IVT_DATA", str(tmp_path / "nothing here"))
    monkeypatch.setattr(data, "_warned", set())


def make(env_id: str, **kwargs: Any) -> GroundingEnv:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DatasetFallbackWarning)
        env = gym.make(env_id, **kwargs).unwrapped
    assert isinstance(env, GroundingEnv)
    return env


def scenes(**kwargs: Any) -> GroundingEnv:
    return make("IVT-Scenes-v0", **({"canvas": 64} | kwargs))


def propose(*box: float) -> dict[str, Any]:
    return {"box": np.array(box, dtype=np.float32), "stop": 0}


STOP = {"box": np.array([0.2, 0.2, 0.9, 0.9], dtype=np.float32), "stop": 1}


def random_action(rng: np.random.Generator) -> dict[str, Any]:
    """A valid box, a box that is refused, or a stop."""
    kind = rng.random()
    if kind < 0.2:
        box = np.array(list(INVALID.values())[int(rng.integers(len(INVALID)))][0])
    else:
        box = np.concatenate([rng.uniform(0, 0.5, 2), rng.uniform(0.5, 1, 2)])
    return {"box": box, "stop": int(kind > 0.85)}


def play(env: GroundingEnv, rng: np.random.Generator, seed: int) -> tuple[list[float], list[dict[str, Any]]]:
    """Random actions to the end: the rewards, and the info at the start and at the end."""
    _, start = env.reset(seed=seed)
    rewards, over = [], False
    while not over:
        _, reward, terminated, truncated, info = env.step(random_action(rng))
        rewards.append(reward)
        over = terminated or truncated
    return rewards, [start, info]


def assert_equal(a: Any, b: Any) -> None:
    """Equal in keys, types, shapes and values; NaN does not occur."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    else:
        assert a == b


# ---- Gymnasium's contract --------------------------------------------------------------------


@pytest.mark.parametrize("env_id", ivt_env.IDS)
def test_check_env_warns_of_nothing_but_the_fallback(env_id):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        env = gym.make(env_id)
        check_env(env.unwrapped)
        env.close()
    fallback = [w for w in caught if issubclass(w.category, DatasetFallbackWarning)]
    assert [str(w.message) for w in caught if w not in fallback] == []
    assert len(fallback) == (env_id in REAL)


def test_eight_ids_are_registered_with_strings_only():
    assert len(ivt_env.IDS) == 8
    for env_id in ivt_env.IDS:
        spec = gym.spec(env_id)
        assert isinstance(spec.entry_point, str) and isinstance(spec.vector_entry_point, str)


@pytest.mark.parametrize("env_id", ivt_env.IDS)
def test_an_env_made_with_every_option_is_made_again_from_its_json(env_id, tmp_path):
    kwargs = {
        "split": data.splits(ivt_env.IDS[env_id]["dataset"])[-1],
        "data_root": str(tmp_path),
        "strict": env_id not in REAL,
        "max_steps": 5,
        "canvas": 48,
        "view": "both",
        "overlay": {"style": "both", "colour": [0, 80, 255], "opacity": 0.5, "width": 2},
        "reward": {"kind": "final", "potential": "giou", "step_cost": 0.01, "invalid_penalty": 0.2},
        "initial_box": [0.1, 0.2, 0.5, 0.9],
        "render_mode": "ansi",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DatasetFallbackWarning)
        env = gym.make(env_id, **kwargs)
        assert env.spec is not None
        again = gym.make(EnvSpec.from_json(env.spec.to_json()))
    assert again.spec is not None and json.loads(json.dumps(again.spec.kwargs)) == ivt_env.IDS[env_id] | kwargs
    assert_equal(env.reset(seed=3), again.reset(seed=3))
    action = propose(0.1, 0.1, 0.7, 0.8)
    assert_equal(env.step(action), again.step(action))
    assert env.render() == again.render()


@pytest.mark.parametrize("view", ["overlay", "closeup", "both"])
def test_every_observation_is_of_the_space_and_the_spaces_are_the_documented_ones(view):
    env = scenes(view=view)
    assert set(env.action_space.spaces) == {"box", "stop"}
    documented = {"image", "extent", "expression", "box", "step"}
    documented |= {"closeup": {"window"}, "both": {"window", "closeup", "closeup_extent"}}.get(view, set())
    rng = np.random.default_rng(0)
    for seed in range(20):
        observation, _ = env.reset(seed=seed)
        assert set(observation) == documented
        assert env.observation_space.contains(observation)
        assert not observation["box"].any()
        while not env.game.over:
            observation, *_ = env.step(random_action(rng))
            assert env.observation_space.contains(observation)


@pytest.mark.parametrize("view", ["overlay", "both"])
def test_a_pickled_env_goes_on_as_the_original_does(view):
    env = scenes(view=view)
    env.reset(seed=5)
    env.step(propose(0.1, 0.1, 0.4, 0.6))
    twin = pickle.loads(pickle.dumps(env))
    action = propose(0.2, 0.3, 0.8, 0.9)
    assert_equal(env.step(action), twin.step(action))
    for _ in range(3):
        assert_equal(env.reset(), twin.reset())
        assert_equal(env.step(action), twin.step(action))


def test_equal_seeds_and_actions_give_equal_episodes_and_other_seeds_other_samples():
    a, b = scenes(), scenes()
    names = set()
    for seed in range(20):
        assert_equal(a.reset(seed=seed), b.reset(seed=seed))
        names.add(a.sample.sample_id)
        rng = np.random.default_rng(seed)
        while not a.game.over:
            action = random_action(rng)
            assert_equal(a.step(action), b.step(copy.deepcopy(action)))
    assert len(names) == 20


# ---- rewards and ends ------------------------------------------------------------------------


@pytest.mark.parametrize("max_steps", [1, 3, 6])
def test_rewards_add_up_to_the_final_iou(max_steps):
    env = scenes(max_steps=max_steps)
    rng = np.random.default_rng(max_steps)
    finals, refused = [], 0
    for seed in range(100):
        rewards, (_, info) = play(env, rng, seed)
        assert sum(rewards) == pytest.approx(info["iou"], abs=1e-12)
        assert info["best_iou"] >= info["iou"]
        finals.append(info["iou"])
        refused += "invalid" in info
    assert len(set(finals)) > 30 and refused > 3, "too uniform to show anything"


def test_rewards_add_up_to_the_final_minus_the_first_iou_with_an_initial_box():
    env = scenes(initial_box=[0.2, 0.2, 0.7, 0.7])
    rng = np.random.default_rng(1)
    losses = 0
    for seed in range(100):
        rewards, (start, info) = play(env, rng, seed)
        first = start["iou"]
        assert first == boxes.iou(np.float32([0.2, 0.2, 0.7, 0.7]), env.sample.box)
        assert sum(rewards) == pytest.approx(info["iou"] - first, abs=1e-12)
        losses += info["iou"] < first
    assert losses > 10, "no episode lost anything: this test would show little"


@pytest.mark.parametrize("potential", POTENTIALS)
def test_gains_of_every_potential_add_up_to_the_potential_of_the_last_box(potential):
    env = scenes(reward={"potential": potential})
    rng = np.random.default_rng(2)
    for seed in range(60):
        rewards, _ = play(env, rng, seed)
        expected = 0.0 if env.game.box is None else POTENTIALS[potential](env.game.box, env.sample.box)
        assert sum(rewards) == pytest.approx(expected, abs=1e-12)
        assert 0 <= expected <= 1


def test_the_final_reward_pays_the_last_iou_once_when_the_episode_ends():
    env = scenes(reward={"kind": "final"})
    rng = np.random.default_rng(3)
    paid = 0
    for seed in range(100):
        rewards, (_, info) = play(env, rng, seed)
        assert rewards == [0.0] * (len(rewards) - 1) + [info["iou"]]
        paid += info["iou"] > 0
    assert paid > 30


def test_a_step_costs_what_was_asked_and_a_refused_box_costs_more_and_a_stop_nothing():
    env = scenes(reward={"step_cost": 0.25, "invalid_penalty": 0.5}, initial_box=[0.3, 0.3, 0.6, 0.6])
    env.reset(seed=0)
    same = propose(0.3, 0.3, 0.6, 0.6)
    assert env.step(same)[1] == -0.25
    assert env.step(propose(NAN, 0, 1, 1))[1] == -0.75
    assert env.step(STOP)[1] == 0


def test_a_stop_ends_the_episode_with_reward_0_and_ignores_its_box():
    for first in (None, [0.1, 0.1, 0.6, 0.6]):
        for ignored in ([0.2, 0.2, 0.9, 0.9], [NAN] * 4, [1, 1, 0, 0]):
            env = scenes()
            before, start = env.reset(seed=4, options={"initial_box": first})
            after, reward, terminated, truncated, info = env.step({"box": np.array(ignored), "stop": 1})
            assert (reward, terminated, truncated) == (0, True, False)
            assert "invalid" not in info
            assert_equal(before, after)
            assert_equal(start, info)


@pytest.mark.parametrize("max_steps", [1, 2, 3, 7])
def test_an_episode_is_truncated_exactly_at_max_steps(max_steps):
    env = scenes(max_steps=max_steps)
    rng = np.random.default_rng(0)
    env.reset(seed=0)
    for step in range(1, max_steps + 1):
        action = random_action(rng) | {"stop": 0}
        observation, _, terminated, truncated, _ = env.step(action)
        assert observation["step"] == step
        assert (terminated, truncated) == (False, step == max_steps)


def test_acting_outside_an_episode_is_an_error_that_says_to_reset():
    env = scenes(max_steps=1)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(STOP)
    env.reset(seed=0)
    env.step(STOP)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(STOP)


@pytest.mark.parametrize("name", INVALID)
@pytest.mark.parametrize("first", [None, [0.1, 0.1, 0.6, 0.6]])
def test_a_refused_box_uses_up_its_step_keeps_the_box_and_is_explained(name, first):
    box, reason = INVALID[name]
    env = scenes()
    before, start = env.reset(seed=1, options={"initial_box": first})
    after, reward, terminated, truncated, info = env.step({"box": np.array(box), "stop": 0})
    assert info.pop("invalid").startswith(reason)
    assert (reward, terminated, truncated) == (0, False, False)
    assert after.pop("step") == before.pop("step") + 1
    assert_equal(before, after)
    assert_equal(start, info)
    assert "invalid" not in env.step(propose(0.1, 0.2, 0.3, 0.4))[4]


def test_info_says_what_was_served_and_what_it_is_worth():
    env = make("IVT-RefCOCOg-v0")
    _, info = env.reset(seed=0)
    assert set(info) == {"iou", "best_iou", "sample_id", "dataset", "target"}
    assert info["dataset"] == "scenes"
    target = info["target"]
    _, reward, _, _, info = env.step({"box": target, "stop": 0})
    assert reward == info["iou"] == info["best_iou"] == pytest.approx(1, abs=1e-5)
    info = env.step(propose(0, 0, 0.01, 0.01))[4]
    assert info["iou"] == 0 and info["best_iou"] == pytest.approx(1, abs=1e-5)


# ---- what is seen ----------------------------------------------------------------------------


@pytest.mark.parametrize("view", ["overlay", "closeup", "both"])
@pytest.mark.parametrize("env_id", ["IVT-Scenes-v0", "IVT-Photos-v0"])
def test_an_observation_never_aliases_the_cached_picture_or_another_observation(env_id, view):
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


@pytest.mark.parametrize("opacity", [0.01, 0.2, 0.35, 0.5, 0.77, 1.0])
def test_the_fill_is_the_alpha_blend_to_within_one_grey_level(opacity):
    levels = np.arange(256, dtype=np.uint8)
    for colour in ((255, 0, 0), (0, 0, 0), (255, 255, 255), (13, 130, 201)):
        canvas = np.stack([np.tile(levels, (8, 1))] * 3, axis=-1)
        before = canvas.astype(float)
        draw_overlay(canvas, (8, 256), (0, 0, 1, 1), Overlay(colour=colour, opacity=opacity))
        exact = before * (1 - opacity) + np.array(colour) * opacity
        assert np.abs(canvas - exact).max() <= 1


def test_the_default_overlay_is_a_translucent_red_fill():
    env = scenes()
    before = env.reset(seed=0)[0]["image"].astype(float)
    after = env.step(propose(0, 0, 1, 1))[0]["image"]
    assert np.abs(before * 0.65 + np.array([255, 0, 0]) * 0.35 - after).max() <= 1


def test_the_outline_is_as_wide_as_asked_and_leaves_the_inside_alone():
    canvas = np.full((40, 40, 3), 9, dtype=np.uint8)
    draw_overlay(canvas, (40, 40), (0.25, 0.25, 0.75, 1), Overlay("outline", (0, 255, 0), width=3))
    green = (canvas == (0, 255, 0)).all(-1)
    expected = np.zeros((40, 40), dtype=bool)
    expected[10:40, 10:30] = True
    expected[13:37, 13:27] = False
    np.testing.assert_array_equal(green, expected)
    assert (canvas[~expected] == 9).all()


def test_a_picture_is_at_the_top_left_and_never_enlarged():
    for index in (0, 6, 15):
        env = make("IVT-Photos-v0", canvas=700)
        observation, _ = env.reset(options={"index": index})
        picture = env.dataset.picture(env.sample)
        height, width = picture.shape[:2]
        assert observation["extent"].tolist() == [height, width]
        np.testing.assert_array_equal(observation["image"][:height, :width], picture)
        assert not observation["image"][height:].any() and not observation["image"][:, width:].any()


def test_a_larger_picture_is_scaled_down_to_the_canvas_in_its_own_shape():
    env = make("IVT-Photos-v0", canvas=256)
    shapes = set()
    for index in range(len(env.dataset)):
        observation, _ = env.reset(options={"index": index})
        picture = env.dataset.picture(env.sample)
        height, width = observation["extent"].tolist()
        assert max(height, width) == 256
        assert height / width == pytest.approx(picture.shape[0] / picture.shape[1], abs=0.01)
        shown = observation["image"][:height, :width].astype(float)
        assert np.abs(shown.mean((0, 1)) - picture.mean((0, 1))).max() < 2
        assert not observation["image"][height:].any() and not observation["image"][:, width:].any()
        shapes.add((height, width))
    assert len(shapes) >= 3


@pytest.mark.parametrize(
    ("size", "extent"),
    [((300, 100), (64, 21)), ((100, 300), (21, 64)), ((64, 64), (64, 64)), ((10, 30), (10, 30))]
    + [((3000, 2), (64, 1))],
)
def test_the_extent_is_height_then_width_in_portrait_and_landscape(size, extent):
    canvas, found = place_on_canvas(np.full((*size, 3), 200, dtype=np.uint8), 64)
    assert found == extent
    lit = (canvas == 200).all(-1)
    assert lit[: extent[0], : extent[1]].all() and lit.sum() == extent[0] * extent[1]


@pytest.mark.parametrize("view", ["closeup", "both"])
def test_a_closeup_shows_its_window_cut_from_the_full_resolution_picture(view):
    env = make("IVT-Photos-v0", view=view, canvas=200, overlay={"style": "outline", "width": 1})
    image, extent_key = ("image", "extent") if view == "closeup" else ("closeup", "closeup_extent")
    for index in (0, 6, 12, 15):
        first, _ = env.reset(options={"index": index})
        assert first["window"].tolist() == [0, 0, 1, 1]
        picture = env.dataset.picture(env.sample)
        canvas, extent = place_on_canvas(picture, 200)
        np.testing.assert_array_equal(first[image], canvas)
        assert tuple(first[extent_key]) == extent
        box = np.float32([0.4, 0.35, 0.52, 0.5])
        seen = env.step(propose(*box))[0]
        window, (height, width) = seen["window"], seen[extent_key]
        assert max(height, width) == 200
        assert (window[:2] < box[:2]).all() and (window[2:] > box[2:]).all()
        x1, y1, x2, y2 = (window * np.array([*picture.shape[1::-1]] * 2)).round().astype(int)
        # Smaller than the canvas, so it was enlarged; the whole canvas would be too blurred to match.
        assert max(x2 - x1, y2 - y1) < 200
        back = np.array([y1, x1]) + np.indices((y2 - y1, x2 - x1)).reshape(2, -1).T
        places = ((back - (y1, x1) + 0.5) * ((height / (y2 - y1)), (width / (x2 - x1)))).astype(int)
        shown = seen[image][places[:, 0], places[:, 1]].astype(float)
        true = picture[back[:, 0], back[:, 1]].astype(float)
        assert np.median(np.abs(shown - true)) <= 4
        # The box is drawn where it lies within the window.
        red = np.argwhere((seen[image] == (255, 0, 0)).all(-1))
        expected = boxes.into_window(box, window) * np.array([width, height, width, height])
        drawn = [red[:, 1].min(), red[:, 0].min(), red[:, 1].max() + 1, red[:, 0].max() + 1]
        assert np.abs(drawn - expected).max() <= 1


def test_a_closeup_keeps_detail_that_the_canvas_has_lost():
    noise = np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8)
    image, (height, width), window = closeup(noise, (0.5, 0.5, 0.52, 0.52), 300, Overlay("outline", width=1))
    x1, y1, x2, y2 = (window * np.array([800, 600, 800, 600])).round().astype(int)
    assert (x2 - x1, y2 - y1) == (200, 150) and (height, width) == (225, 300)
    # Pixel (i, j) of the region is centred on 1.5 (i, j) + 0.75 of the close-up.
    shown = image[:height, :width][(np.arange(150) * 1.5 + 0.75).astype(int)]
    shown = shown[:, (np.arange(200) * 1.5 + 0.75).astype(int)]
    assert np.corrcoef(shown.ravel(), noise[y1:y2, x1:x2].ravel())[0, 1] > 0.9
    canvas, _ = place_on_canvas(noise, 300)
    assert canvas[:225, :300].std() < 0.6 * noise.std(), "the canvas has lost nothing: this would show little"


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


# ---- options ---------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"max_steps": 0}, "max_steps 0"),
    ({"max_steps": 2.5}, "max_steps 2.5"),
    ({"max_steps": "3"}, "max_steps '3'"),
    ({"canvas": 15}, "canvas 15"),
    ({"canvas": 64.0}, "canvas 64.0"),
    ({"view": "zoom"}, "view 'zoom'"),
    ({"overlay": "red"}, "overlay 'red'"),
    ({"overlay": {"color": [255, 0, 0]}}, "'color'"),
    ({"overlay": {"style": "dotted"}}, "'dotted'"),
    ({"overlay": {"colour": [255, 0]}}, "colour (255, 0)"),
    ({"overlay": {"colour": [256, 0, 0]}}, "colour (256, 0, 0)"),
    ({"overlay": {"colour": [0.5, 0.0, 0.0]}}, "colour (0.5, 0.0, 0.0)"),
    ({"overlay": {"colour": "red"}}, "colour 'red'"),
    ({"overlay": {"colour": None}}, "colour None"),
    ({"overlay": {"opacity": 0}}, "opacity 0"),
    ({"overlay": {"opacity": 1.1}}, "opacity 1.1"),
    ({"overlay": {"opacity": "half"}}, "opacity 'half'"),
    ({"overlay": {"width": 0}}, "width 0"),
    ({"overlay": {"width": 2.5}}, "width 2.5"),
    ({"reward": "final"}, "reward 'final'"),
    ({"reward": {"cost": 1}}, "'cost'"),
    ({"reward": {"kind": "sparse"}}, "'sparse'"),
    ({"reward": {"potential": "diou"}}, "'diou'"),
    ({"reward": {"step_cost": -0.1}}, "step_cost is -0.1"),
    ({"reward": {"step_cost": NAN}}, "step_cost is nan"),
    ({"reward": {"invalid_penalty": "1"}}, "invalid_penalty is '1'"),
    ({"initial_box": [0.5, 0.1, 0.2, 0.3]}, "initial_box [0.5, 0.1, 0.2, 0.3]"),
    ({"initial_box": [0.1, 0.1, 0.3]}, "initial_box [0.1, 0.1, 0.3]"),
    ({"render_mode": "video"}, "render_mode 'video'"),
    ({"dataset": "coco"}, "'coco'"),
    ({"split": "dev"}, "'dev'"),
]


@pytest.mark.parametrize("cls", [GroundingEnv, GroundingVectorEnv])
@pytest.mark.parametrize(("options", "named"), WRONG, ids=[named for _, named in WRONG])
def test_a_wrong_option_is_a_value_error_that_names_its_value(cls, options, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        cls(**options)


def test_every_option_has_a_wrong_value_in_the_list_above():
    unchecked = set(inspect.signature(GroundingEnv.__init__).parameters) - {k for o, _ in WRONG for k in o}
    assert unchecked == {"self", "data_root", "strict"}


@pytest.mark.parametrize("env_id", REAL)
def test_an_absent_data_set_is_an_error_where_it_was_asked_for_strictly(env_id, tmp_path):
    with pytest.raises(DataError, match=ivt_env.IDS[env_id]["dataset"]):
        gym.make(env_id, strict=True, data_root=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sample": 3}, "'sample'"),
        ({"index": 10_000_000}, "index 10000000"),
        ({"index": -1}, "index -1"),
        ({"index": "3"}, "index '3'"),
        ({"index": 2.0}, "index 2.0"),
        ({"initial_box": [0.5, 0.5, 0.5, 0.9]}, "initial_box [0.5, 0.5, 0.5, 0.9]"),
        ({"initial_box": [0.1, 0.1, 0.5, NAN]}, "initial_box [0.1, 0.1, 0.5, nan]"),
    ],
)
def test_a_wrong_reset_option_is_a_value_error_that_names_it(options, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        scenes().reset(options=options)


def test_the_reset_options_choose_the_sample_and_the_first_box():
    env = scenes(initial_box=[0.0, 0.0, 0.5, 0.5])
    for index in (0, 17, np.int64(9_999_999)):
        observation, info = env.reset(options={"index": index, "initial_box": [0.1, 0.2, 0.3, 0.4]})
        assert info["sample_id"] == f"train-{index}"
        assert observation["expression"] == env.dataset[int(index)].expression
        np.testing.assert_array_equal(observation["box"], np.float32([0.1, 0.2, 0.3, 0.4]))
        assert info["iou"] == boxes.iou(observation["box"], env.sample.box)
    assert env.reset()[0]["box"].tolist() == [0, 0, 0.5, 0.5]


def test_the_initial_box_is_drawn_from_the_start():
    env = scenes()
    plain = env.reset(options={"index": 2})[0]
    started = env.reset(options={"index": 2, "initial_box": [0.25, 0.25, 0.75, 0.75]})[0]
    proposed = env.reset(options={"index": 2}) and env.step(propose(0.25, 0.25, 0.75, 0.75))[0]
    assert (plain["image"] != started["image"]).any()
    np.testing.assert_array_equal(started["image"], proposed["image"])
    assert (started["step"], proposed["step"]) == (0, 1)


def test_a_reward_or_overlay_object_serves_as_well_as_its_options():
    made = GroundingEnv(overlay=Overlay(opacity=0.5), reward=RewardConfig(kind="final"))
    assert made.screen.overlay == Overlay.from_json({"opacity": 0.5})
    assert made.reward_config == RewardConfig.from_json({"kind": "final"})


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


@pytest.mark.parametrize("text", ["lorem " * 500, "two\nlines", "das größte Ü — 红色的圆", ""])
def test_a_frame_takes_any_text_without_changing_its_size(text):
    canvas = np.zeros((64, 64, 3), dtype=np.uint8)
    expected = frame(canvas, (64, 64), None, (0.1, 0.1, 0.5, 0.5), ["short", "b"]).shape
    assert frame(canvas, (64, 64), None, (0.1, 0.1, 0.5, 0.5), [text, "b"]).shape == expected


def test_a_caption_that_is_too_long_is_cut_to_the_frame_with_an_ellipsis():
    def end(text):
        """Where the line of text ends, in pixels."""
        caption = frame(np.zeros((200, 200, 3), np.uint8), (200, 200), None, (0, 0, 1, 1), [text])[202:]
        return np.flatnonzero((caption > 60).any((0, 2))).max()

    assert end("lorem ipsum") < 100
    assert 170 < end("lorem ipsum dolor sit amet " * 20) < 198
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


# ---- import ----------------------------------------------------------------------------------

_IMPORT = textwrap.dedent(
    """
    import pathlib, time
    schedule = pathlib.Path("/proc/self/schedstat")  # Linux: nanoseconds run, nanoseconds waited for a core
    waited = lambda: int(schedule.read_text().split()[1]) / 1e9 if schedule.exists() else 0.0
    begin = time.perf_counter() - waited()
    import ivt_env
    seconds = time.perf_counter() - waited() - begin
    import gymnasium, sys
    gymnasium.make("IVT-Scenes-v0").reset(seed=0)
    heavy = sorted({"torch", "transformers", "agents", "pygame", "matplotlib"} & set(sys.modules))
    print(seconds, *heavy)
    """
)


def test_import_is_fast_and_loads_no_torch_no_transformers_and_no_agents():
    """Wall time, less the time in which other programs had the core: a busy machine does not fail this."""
    root = str(Path(ivt_env.__file__).parent.parent)
    seconds = []
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", _IMPORT], cwd=root, check=True, capture_output=True, text=True)
        took, *heavy = done.stdout.split()
        assert heavy == []
        seconds.append(float(took))
    assert min(seconds) < 0.6, seconds
