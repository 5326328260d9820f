"""An answer in words plays exactly the action that it states, and what states none costs a step and nothing else.

Silent when false: a model is scored on boxes that it never gave, or a run ends at the first odd text.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import strategies as st

from ivt_agents.vlm import codec
from ivt_env import text_actions
from ivt_env.env import GroundingEnv
from ivt_env.text_actions import STOP_TEXT
from ivt_env.wrappers import TextActions, visible_image

ROOT = Path(__file__).parent.parent
BOX = '{"bbox_2d": [100, 200, 600, 700]}'


def make(env_id="IVT-Photos-v0", split="test", question=None, **kwargs):
    env = gym.make(env_id, split=split, **kwargs)
    return TextActions(env) if question is None else TextActions(env, question)


@pytest.fixture(scope="module")
def photos():
    env = make()
    yield env
    env.close()


def test_gymnasiums_checker_has_nothing_to_say():
    env = TextActions(GroundingEnv("photos", "test"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is different from the unwrapped version.*")
        check_env(env, skip_render_check=True)


def test_a_text_plays_the_box_that_it_states():
    plain, words = gym.make("IVT-Scenes-v0", split="val"), make("IVT-Scenes-v0", "val")
    plain.reset(seed=4)
    words.reset(seed=4)
    box = np.array([0.1, 0.2, 0.6, 0.7], dtype=np.float32)
    expected = plain.step({"box": box, "stop": 0})
    got = words.step(f"It sits further left.\n```json\n{BOX}\n```")
    assert got[1:4] == expected[1:4] and got[4]["iou"] == expected[4]["iou"]
    assert np.array_equal(got[0]["image"], expected[0]["image"]) and not got[4]["parse_failure"]
    assert words.step(STOP_TEXT)[2]


@pytest.mark.parametrize(
    ("text", "failed", "said"),
    [
        ("I cannot see it.", True, "holds no"),
        ('{"bbox_2d": [100, 200, 600]}', True, "holds no"),
        ('{"bbox_2d": [600, 200, 100, 700]}', False, "x2 <= x1"),
        ('{"bbox_2d": [100, 200, 600, 1700]}', False, "outside"),
        ('{"bbox_2d": [100, 200, 1e300, 700]}', False, "not finite"),
        ('{"image": 2, "bbox_2d": [100, 200, 600, 700]}', False, "refer to image 2"),
    ],
)
def test_a_text_without_a_usable_box_costs_a_step_and_says_why(photos, text, failed, said):
    photos.reset(seed=0)
    before, *_ = photos.step(BOX)
    after, reward, terminated, truncated, info = photos.step(text)
    assert info["parse_failure"] is failed and said in info["invalid"]
    assert reward == 0 and not terminated and not truncated
    assert np.array_equal(before["image"], after["image"]) and before["text"] == after["text"]
    assert photos.step(text)[3], "the third action is the last, so the refused ones were counted"


@given(st.tuples(*[st.floats(0, 1)] * 4))
def test_thousandths_are_the_frame_of_the_models_that_write_them(box):
    numbers = text_actions.to_thousandths(box)
    qwen = codec.BoxCodec("relative_1000")
    assert numbers == qwen.encode(box, ()) and text_actions.from_thousandths(numbers) == qwen.decode(numbers, ())


def test_the_question_names_what_to_find_and_the_current_box(photos):
    observation, _ = photos.reset(seed=0, options={"index": 2})
    assert f'"{photos.unwrapped.sample.expression}"' in observation["text"] and "box: none" in observation["text"]
    assert "box: [100, 200, 600, 700]" in photos.step(BOX)[0]["text"]


def test_braces_in_an_expression_stay_as_they_are(photos, monkeypatch):
    env = make(question="{box} {expression}")
    observation, _ = env.reset(seed=0)
    assert env._asked({**env.unwrapped.live[0].observe(), "expression": "{box}"})["text"] == "none {box}"
    assert observation["text"].startswith("none ")


def test_the_visible_image_has_no_margin(photos):
    dataset = photos.unwrapped.dataset
    oblong = next(i for i in range(len(dataset)) if dataset[i].size[0] != dataset[i].size[1])
    observation, _ = photos.reset(seed=0, options={"index": oblong})
    image = visible_image(observation)
    height, width, _ = image.shape
    sample = photos.unwrapped.sample
    assert height != width
    assert abs(height / width - sample.size[0] / sample.size[1]) < 0.01
    assert not observation["image"][height:].any() and not observation["image"][:, width:].any()


def test_sync_and_async_play_the_same_games():
    def play(mode):
        envs = gym.make_vec("IVT-Photos-v0", num_envs=2, split="test", vectorization_mode=mode, wrappers=[TextActions])
        seen = [envs.reset(seed=1)[0]]
        found = envs.step((BOX, "no box in this"))
        seen.append(found[0])
        envs.close()
        return seen, found[1].tolist(), found[4]["parse_failure"].tolist(), [list(o["text"]) for o in seen]

    sync, parallel = play("sync"), play("async")
    assert sync[1:] == parallel[1:] and sync[2] == [False, True]
    assert all(np.array_equal(a["image"], b["image"]) for a, b in zip(sync[0], parallel[0], strict=True))


def test_a_pickled_wrapper_plays_on(photos):
    photos.reset(seed=1)
    copy = pickle.loads(pickle.dumps(photos))
    a, b = photos.step(BOX), copy.step(BOX)
    assert np.array_equal(a[0]["image"], b[0]["image"]) and a[0]["text"] == b[0]["text"] and a[1] == b[1]


def test_what_cannot_be_wrapped_is_refused_by_name(photos):
    with pytest.raises(ValueError, match="grounding environment"):
        TextActions(gym.make("CartPole-v1"))
    with pytest.raises(ValueError, match="view='overlay'"):
        make(view="both")
    with pytest.raises(ValueError, match="expression"):
        make(question="Where is it?")
    photos.reset(seed=0)
    with pytest.raises(TypeError, match="dict"):
        photos.step({"box": [0, 0, 1, 1], "stop": 0})
