"""A policy sees where it has looked: earlier boxes are drawn, filled grey, and stand in ``history``.

Silent when false: two states of an episode that want different actions look the same, and a policy goes round
in circles.
"""

from __future__ import annotations

import json

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from PIL import Image

from ivt_env.env import GroundingEnv
from ivt_env.rollouts import make_vector_env

BOXES = [(0.1, 0.1, 0.3, 0.3), (0.6, 0.6, 0.9, 0.8), (0.2, 0.7, 0.4, 0.9)]
OPTIONS = {
    "split": "val",
    "max_steps": 4,
    "canvas": 96,
    "overlay": {"trail": True, "opacity": 0.6, "style": "outline", "width": 2},
}


def act(box, stop=0):
    return {"box": np.array(box, dtype=np.float32), "stop": stop}


def played(env, boxes=BOXES, **options):
    observation, _ = env.reset(seed=0, options={"index": 3, **options})
    seen = [observation]
    for box in boxes:
        seen.append(env.step(act(box))[0])
    return seen


def test_without_a_trail_nothing_is_drawn_or_given():
    plain = {**OPTIONS, "overlay": {"style": "outline", "width": 2}}
    seen, last = played(GroundingEnv(**plain)), GroundingEnv(**plain)
    assert "history" not in seen[-1]
    alone, _ = last.reset(seed=0, options={"index": 3, "initial_box": BOXES[-1]})
    assert np.array_equal(seen[-1]["image"], alone["image"])


def test_earlier_boxes_are_grey_the_current_one_is_not_and_history_holds_them_in_order():
    env = GroundingEnv(**OPTIONS)
    seen = played(env)
    for count, observation in enumerate(seen):
        wanted = np.zeros((4, 4), dtype=np.float32)
        wanted[: max(count - 1, 0)] = np.array(BOXES[: max(count - 1, 0)]).reshape(-1, 4)
        assert np.array_equal(observation["history"], wanted)
        assert env.observation_space.contains(observation)
    first, last = seen[0]["image"].astype(int), seen[-1]["image"].astype(int)
    for x1, y1, x2, y2 in BOXES[:2]:
        inside = np.s_[round(y1 * 96) : round(y2 * 96), round(x1 * 96) : round(x2 * 96)]
        assert np.abs(last[inside] - (0.4 * first[inside] + 0.6 * 128)).max() <= 2
    x1, y1, x2, y2 = (round(v * 96) for v in BOXES[2])
    assert np.array_equal(last[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2], first[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2])
    assert (last[y1, x1:x2] == (255, 0, 0)).all()
    assert np.array_equal(seen[0]["image"], played(env)[0]["image"]), "the kept canvas was painted on"


def test_an_initial_box_is_a_part_of_the_trail_and_a_refused_box_is_not():
    env = GroundingEnv(**OPTIONS)
    seen = played(env, [BOXES[1], (0.5, 0.5, 0.4, 0.6), BOXES[2]], initial_box=list(BOXES[0]))
    assert np.allclose(seen[-1]["history"], [BOXES[0], BOXES[1], (0, 0, 0, 0), (0, 0, 0, 0)])
    full = played(env, [*BOXES, BOXES[0]], initial_box=list(BOXES[0]))[-1]["history"]
    assert np.allclose(full, [BOXES[0], *BOXES]), "as many as there are steps always have room"


def test_a_state_holds_the_trail():
    env, other = GroundingEnv(**OPTIONS), GroundingEnv(**OPTIONS)
    played(env)
    state = json.loads(json.dumps(env.get_state()))
    other.reset(seed=1)
    there, _ = other.set_state(state)
    here = env.step(act(BOXES[0]))[0]
    assert there["history"].any()
    resumed = other.step(act(BOXES[0]))[0]
    assert all(np.array_equal(here[key], resumed[key]) for key in here)
    state["episodes"][0]["earlier"] *= 3
    with pytest.raises(ValueError, match="6 earlier boxes"):
        other.set_state(state)


def test_gymnasiums_checks_pass_with_a_trail():
    env = gym.make("IVT-Scenes-v0", **OPTIONS, view="both")
    check_env(env.unwrapped, skip_render_check=True)
    vector = make_vector_env("IVT-Scenes-v0", 2, **OPTIONS)
    seen, _ = vector.reset(seed=0)
    assert vector.observation_space.contains(seen) and seen["history"].shape == (2, 4, 4)


def test_a_frame_shows_the_trail():
    env, plain = (
        GroundingEnv(**OPTIONS | {"render_mode": "rgb_array", "overlay": {"trail": t}}) for t in (True, False)
    )
    played(env), played(plain)
    changed = np.abs(env.render().astype(int) - plain.render()).max(-1) > 0
    x1, y1, x2, y2 = (round(v * 96) for v in BOXES[0])
    assert changed[y1:y2, x1:x2].mean() > 0.5


# ---- how much a close-up shows -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("closeup", "window"),
    [
        (None, (0.25, 0.3, 0.65, 0.7)),
        ({"margin": 0.0, "smallest": 0.0}, (0.35, 0.4, 0.55, 0.6)),
        ({"margin": 0.25, "smallest": 0.1}, (0.3, 0.35, 0.6, 0.65)),
        ({"margin": 0.0, "smallest": 0.5}, (0.2, 0.25, 0.7, 0.75)),
    ],
)
def test_a_close_up_shows_as_much_around_the_box_as_is_asked_for(closeup, window):
    env = GroundingEnv(split="val_search", view="closeup", canvas=96, closeup=closeup)
    env.reset(seed=0, options={"index": 1})
    seen = env.step(act((0.35, 0.4, 0.55, 0.6)))[0]
    assert np.allclose(seen["window"], window, atol=1 / 768)


def test_a_close_up_that_is_not_drawn_on_shows_every_pixel_as_it_is_and_the_whole_image_shows_the_box():
    seen = {}
    for drawn in (True, False):
        env = GroundingEnv(split="val_search", view="both", canvas=96, closeup={"margin": 0.0, "drawn": drawn})
        env.reset(seed=0, options={"index": 1})
        seen[drawn] = env.step(act((0.25, 0.25, 0.5, 0.5)))[0]
    assert np.array_equal(seen[True]["image"], seen[False]["image"])
    assert np.array_equal(seen[True]["window"], seen[False]["window"])
    cut = env.dataset.image(env.sample)[192:384, 192:384]
    enlarged = np.asarray(Image.fromarray(cut).resize((96, 96), Image.Resampling.BICUBIC))
    assert np.array_equal(seen[False]["closeup"], enlarged)
    assert not np.array_equal(seen[True]["closeup"], enlarged)


def test_a_square_close_up_is_square_in_pixels_and_holds_the_box():
    env = GroundingEnv(
        dataset="photos", split="all", view="closeup", canvas=96, closeup={"smallest": 0, "square": True}
    )
    for index in range(len(env.dataset)):
        env.reset(options={"index": index})
        height, width = env.sample.size
        box = (0.5, 0.3, 0.6, 0.6)
        seen = env.step(act(box))[0]
        x1, y1, x2, y2 = seen["window"] * np.array([width, height, width, height])
        assert abs((x2 - x1) - (y2 - y1)) <= 1.5 and np.ptp(seen["extent"]) <= 1
        assert x1 <= 0.5 * width + 1 and y1 <= 0.3 * height + 1 and x2 >= 0.6 * width - 1 and y2 >= 0.6 * height - 1
