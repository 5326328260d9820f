"""Behind the wrapper the game is the same one, in spaces that Stable-Baselines3 takes without a word.

Silent when false: a policy trains on images whose coordinates are not those of its boxes, or on words that mean
another place in every process, and merely stays bad.
"""

from __future__ import annotations

import pickle
import warnings

import gymnasium as gym
import numpy as np
import pytest
from geometry import encode_box
from gymnasium.utils.env_checker import check_env as check_gymnasium
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3 import PPO
from stable_baselines3.common import vec_env
from stable_baselines3.common.env_checker import check_env

from ivt_env import boxes
from ivt_env.data import load_dataset
from ivt_env.env import GroundingEnv
from ivt_env.wrappers import HashedText, SB3Wrapper
from ivt_env.wrappers.sb3 import SMALLEST, decode_action, square_image

UNIT = st.floats(-1, 1, width=32)
ACTION = np.array([0.1, -0.2, 0.3, 0.4, -1], dtype=np.float32)
OTHER = np.array([-0.4, 0.5, 0.1, -0.2, 0.4], dtype=np.float32)
STOP = np.array([0, 0, 0, 0, 1], dtype=np.float32)


def make(env_id="IVT-Scenes-v0", split="val", side=36, **kwargs):
    return SB3Wrapper(gym.make(env_id, split=split, **kwargs), side=side)


@pytest.mark.parametrize("view", ["overlay", "closeup", "both"])
def test_the_checkers_of_stable_baselines_and_of_gymnasium_have_nothing_to_say(view):
    env = SB3Wrapper(GroundingEnv("photos", "test", view=view), side=36)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env)
        warnings.filterwarnings("ignore", message=".*is different from the unwrapped version.*")
        check_gymnasium(env, skip_render_check=True)


@given(st.tuples(*[UNIT] * 5))
def test_every_action_is_a_usable_box(action):
    box, _ = decode_action(np.array(action, dtype=np.float32), 0.5)
    assert box.dtype == np.float32 and boxes.invalid_reason(box) is None


@given(*[st.floats(0, 1)] * 4)
def test_every_box_of_a_fair_size_can_be_asked_for(x, y, w, h):
    width, height = SMALLEST + w * (1 - SMALLEST), SMALLEST + h * (1 - SMALLEST)
    left, top = x * (1 - width), y * (1 - height)
    wanted = np.array([left, top, left + width, top + height])
    box, stop = decode_action(encode_box(np.clip(wanted, 0, 1)), 0.5)
    assert np.abs(box - wanted).max() < 1e-5 and not stop


def test_the_ends_of_the_scales_are_where_the_table_says():
    assert decode_action([0, 0, 1, 1, -1], 0.5)[0].tolist() == [0, 0, 1, 1]
    middle = decode_action([0, 0, 0, 0, -1], 0.5)[0]
    assert np.allclose(middle, [0.4, 0.4, 0.6, 0.6], atol=1e-6)
    corner = decode_action([1, 1, -1, -1, -1], 0.5)[0]
    assert np.allclose(corner, [1 - SMALLEST / 2] * 2 + [1, 1], atol=1e-6)
    for value, threshold, stops in ((0.5, 0.5, False), (0.51, 0.5, True), (0.0, -0.1, True), (-1.0, -1.0, False)):
        assert decode_action([0, 0, 0, 0, value], threshold)[1] == stops


def test_actions_of_a_batch_are_read_one_by_one():
    actions = np.random.default_rng(0).uniform(-1, 1, (3, 7, 5)).astype(np.float32)
    batch, stops = decode_action(actions, 0.2)
    assert batch.shape == (3, 7, 4) and stops.shape == (3, 7) and 0 < stops.sum() < 21
    single = decode_action(actions[2, 3], 0.2)
    assert np.array_equal(batch[2, 3], single[0]) and stops[2, 3] == single[1]


def test_rewards_ends_and_boxes_are_those_of_the_environment():
    plain, wrapped = gym.make("IVT-Scenes-v0", split="val"), make()
    plain.reset(seed=3)
    wrapped.reset(seed=3)
    for action in (ACTION, OTHER, STOP):
        box, stop = decode_action(action, 0.5)
        expected = plain.step({"box": box, "stop": int(stop)})
        got = wrapped.step(action)
        assert got[1:4] == expected[1:4] and got[4]["iou"] == expected[4]["iou"]
        assert np.array_equal(got[0]["box"], expected[0]["box"]) and got[0]["step"].argmax() == expected[0]["step"]
    assert expected[2] and wrapped.unwrapped.game.step_count == 2


def test_an_action_that_is_no_number_costs_a_step_and_says_why():
    env = make()
    env.reset(seed=0)
    observation, reward, *_, info = env.step(np.full(5, np.nan, dtype=np.float32))
    assert "not finite" in info["invalid"] and reward == 0 and observation["step"].tolist() == [0, 1, 0, 0]


def test_the_image_fills_the_square_so_that_its_coordinates_are_those_of_the_boxes():
    env = make("IVT-Photos-v0", "test", side=40, overlay={"opacity": 1.0, "colour": [255, 0, 0]})
    dataset = env.unwrapped.dataset
    oblong = next(i for i in range(len(dataset)) if dataset[i].size[0] != dataset[i].size[1])
    env.reset(seed=0, options={"index": oblong})
    height, width = env.unwrapped.screen.load(env.unwrapped.sample)[1].extent
    assert height != width
    box = np.array([0.25, 0.5, 0.75, 1.0])
    red = np.array([255, 0, 0])
    image = env.step(encode_box(box))[0]["image"].transpose(1, 2, 0)
    assert image.shape == (40, 40, 3)
    assert (image[21:40, 11:29] == red).all()
    outside = np.concatenate([image[:19].reshape(-1, 3), image[:, :9].reshape(-1, 3), image[:, 31:].reshape(-1, 3)])
    assert not (outside == red).all(axis=1).any()


def test_a_pixel_is_the_mean_of_those_that_fall_on_it():
    canvas = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    small = square_image(canvas, (72, 36), 18)
    means = canvas[:72, :36].reshape(18, 4, 18, 2, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
    assert small.flags.c_contiguous and np.abs(small - means).max() <= 1.0  # rounded once a direction


def test_three_kinds_of_vectorisation_play_the_same_games():
    def play(envs):
        observations = [envs.reset(seed=5)[0]]
        rewards = []
        for _ in range(4):
            seen, reward, *_ = envs.step(np.stack([ACTION, OTHER]))
            observations.append({k: np.array(v) for k, v in seen.items()})
            rewards.append(reward)
        envs.close()
        return observations, rewards

    options = {
        "num_envs": 2,
        "split": "val",
        "reward": {"potential": "giou"},
        "wrappers": [lambda env: SB3Wrapper(env, side=36)],
    }
    sync = play(gym.make_vec("IVT-Scenes-v0", vectorization_mode="sync", **options))
    parallel = play(gym.make_vec("IVT-Scenes-v0", vectorization_mode="async", **options))
    assert np.array_equal(sync[1], parallel[1]) and np.any(sync[1])
    for a, b in zip(sync[0], parallel[0], strict=True):
        assert all(np.array_equal(a[key], b[key]) for key in ("image", "box", "step", "expression"))


def test_a_pickled_wrapper_plays_on_and_its_spec_makes_it_again():
    env = make()
    env.reset(seed=1)
    env.step(ACTION)
    copy = pickle.loads(pickle.dumps(env))
    a, b = env.step(OTHER), copy.step(OTHER)
    assert np.array_equal(a[0]["image"], b[0]["image"]) and a[1:4] == b[1:4]
    assert gym.make(make(side=44).spec).observation_space["image"].shape == (3, 44, 44)


@pytest.mark.parametrize(
    "options", [{"side": 0}, {"side": 40.0}, {"stop_above": 1}, {"text_size": 0}, {"text_seed": -1}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=repr(next(iter(options.values())))):
        SB3Wrapper(gym.make("IVT-Photos-v0", split="test"), **options)
    with pytest.raises(ValueError, match="grounding environment"):
        SB3Wrapper(gym.make("CartPole-v1"))


# ---- the text embedding ----------------------------------------------------------------------


def test_the_embedding_is_the_same_in_every_process_and_on_every_machine():
    """Figures written down once: Python's own hash would differ in the next process."""
    vector = HashedText(8).embed("the red ring")
    assert np.allclose(vector, GOLDEN, atol=1e-6), vector.tolist()


GOLDEN = [0, 0, 0, -0.801784, 0, 0.267261, 0, 0.534522]


def test_different_expressions_of_the_scenes_have_different_vectors():
    dataset = load_dataset("scenes", "val")
    texts = sorted({dataset[i].expression for i in range(150)})
    vectors = np.array([HashedText().embed(text) for text in texts])
    likeness = vectors @ vectors.T - 2 * np.eye(len(texts))
    assert len(texts) > 100 and likeness.max() < 0.999


def test_case_and_punctuation_do_not_count_and_neighbours_do():
    embed = HashedText().embed
    assert np.array_equal(embed("The red ring, left of it!"), embed("the  RED ring left of it"))
    assert not np.allclose(embed("red ring and blue star"), embed("blue ring and red star"))


@settings(deadline=None, max_examples=50)
@given(st.text(max_size=40))
def test_any_text_has_a_vector_of_length_one_or_zero(text):
    vector = HashedText(64).embed(text)
    length = np.linalg.norm(vector)
    assert vector.shape == (64,) and (length == 0 or abs(length - 1) < 1e-6)


def test_scripts_without_spaces_are_read_sign_by_sign():
    embed = HashedText(256).embed
    likeness = embed("左边的红色圆环") @ embed("右边的红色圆环")
    assert 0.5 < likeness < 0.99


VECTOR_WRAPPERS = {
    "VecFrameStack": lambda envs: vec_env.VecFrameStack(envs, 3),
    "VecNormalize": vec_env.VecNormalize,
    "both": lambda envs: vec_env.VecNormalize(vec_env.VecFrameStack(envs, 2)),
    "VecCheckNan": lambda envs: vec_env.VecCheckNan(envs, raise_exception=True),
    "VecMonitor": vec_env.VecMonitor,
    "VecExtractDictObs": lambda envs: vec_env.VecExtractDictObs(envs, "step"),
}


@pytest.mark.parametrize(("name", "view"), [*zip(VECTOR_WRAPPERS, ["overlay", "both"] * 3, strict=True)])
def test_every_vector_wrapper_of_stable_baselines_takes_the_observations_and_ppo_learns_behind_it(name, view):
    """`VecFrameStack` and `VecNormalize` take `Box` alone; VecTransposeImage is for channels that come last."""
    envs = VECTOR_WRAPPERS[name](vec_env.DummyVecEnv([lambda: make(view=view)] * 2))
    policy = "MlpPolicy" if name == "VecExtractDictObs" else "MultiInputPolicy"
    PPO(policy, envs, n_steps=4, batch_size=8, n_epochs=1, device="cpu").learn(8)
