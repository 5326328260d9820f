"""Many episodes at once are the same episodes as one at a time.

Silent when false: the members of a group play different samples or reset in mid-flight, a reward is
credited to another environment, or a run with eight environments learns something else than a run
with one.
"""

from __future__ import annotations

import subprocess
from typing import Any

import gymnasium as gym
import gymnasium.wrappers.vector as vector_wrappers
import numpy as np
import pytest
from gymnasium import wrappers
from gymnasium.spaces import flatten, flatten_space, unflatten
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from playing import Notes, assert_equal, random_actions

from ivt_env.data.sample import DataError
from ivt_env.env import GroundingEnv
from ivt_env.expression_space import Expression
from ivt_env.vector_env import GroundingVectorEnv

N = 3
NAN = float("nan")


def make_notes_env() -> gym.Env[Any, Any]:
    return GroundingEnv(Notes(), canvas=32)


# test_gymnasium.py compares it with Gymnasium's own vectorisation.


# ---- text ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [SyncVectorEnv, AsyncVectorEnv])
def test_expressions_in_any_script_come_through_gymnasiums_vectorisation(cls):
    env = cls([make_notes_env] * 2)
    try:
        for index, expression in enumerate(Notes.expressions):
            observations, _ = env.reset(options={"index": index})
            assert observations["expression"] == (expression, expression)
        # An observation that was given out does not change when the environments move on.
        env.reset(options={"index": 0})
        assert observations["expression"] == (Notes.expressions[-1],) * 2
        stepped = env.step({"box": np.full((2, 4), NAN, np.float32), "stop": np.zeros(2, np.int64)})[0]
        assert stepped["expression"] == (Notes.expressions[0],) * 2
        expected = tuple(make_notes_env().reset(seed=s)[0]["expression"] for s in (1, 5))
        assert env.reset(seed=[1, 5])[0]["expression"] == expected and len(set(expected)) == 2
    finally:
        env.close()


def test_the_text_space_holds_every_string_up_to_its_length_and_nothing_else():
    space = Expression(5)
    assert all(text in space for text in ("", "abc", "红色的圆圈", "🟥🟥🟥🟥🟥"))
    assert all(thing not in space for thing in ("abcdef", 3, None, ["a"]))
    assert space.sample() in space
    assert space == Expression(5) != Expression(6)


def test_every_string_of_the_space_can_be_flattened_and_read_back():
    space = Expression()
    for text in (*Notes.expressions, "\ud800", "\U0010ffff" * 3, space.sample()):
        flat = flatten(space, text)
        assert flat in flatten_space(space) and unflatten(space, flat) == text
        assert unflatten(space, flat.astype(np.float64)) == text  # beside fractions in one vector
    with pytest.raises(ValueError, match="text of 1025 characters; at most 1024 fit"):
        flatten(space, "ü" * 1025)


WRAPPERS = {
    "FlattenObservation": wrappers.FlattenObservation,
    "FrameStackObservation": lambda env: wrappers.FrameStackObservation(env, 3),
    "DelayObservation": lambda env: wrappers.DelayObservation(env, 1),
    "FilterObservation": lambda env: wrappers.FilterObservation(env, ["expression"]),
    "TransformObservation": lambda env: wrappers.TransformObservation(env, dict, env.observation_space),
    "TimeAwareObservation": lambda env: wrappers.TimeAwareObservation(wrappers.TimeLimit(env, 3)),
    "RecordEpisodeStatistics": wrappers.RecordEpisodeStatistics,
    "PassiveEnvChecker": wrappers.PassiveEnvChecker,
    "Autoreset": wrappers.Autoreset,
    "stacked and flattened": lambda env: wrappers.FlattenObservation(wrappers.FrameStackObservation(env, 2)),
}


ASYNC = ("FlattenObservation", "stacked and flattened", "FilterObservation")


@pytest.mark.parametrize(
    ("name", "cls"), [(name, SyncVectorEnv) for name in WRAPPERS] + [(name, AsyncVectorEnv) for name in ASYNC]
)
def test_every_wrapper_that_takes_a_text_takes_every_script(name, cls):
    def make() -> gym.Env[Any, Any]:
        return WRAPPERS[name](make_notes_env())

    env = cls([make] * 2)
    action = {"box": np.float32([[0.1, 0.1, 0.9, 0.9]] * 2), "stop": np.zeros(2, np.int64)}
    try:
        for index in range(len(Notes.expressions)):
            observation, _ = env.reset(options={"index": index})
            assert observation in env.observation_space
            assert env.step(action)[0] in env.observation_space
    finally:
        env.close()


def test_flattened_vectors_of_environments_hold_their_texts():
    single = make_notes_env().observation_space
    env = vector_wrappers.FlattenObservation(AsyncVectorEnv([make_notes_env] * 2))
    try:
        for index, text in enumerate(Notes.expressions):
            flat, _ = env.reset(options={"index": index})
            assert [unflatten(single, row)["expression"] for row in flat] == [text, text]
    finally:
        env.close()


def test_an_expression_beyond_the_space_is_refused_by_name_before_it_is_played(monkeypatch):
    monkeypatch.setattr(Notes, "expressions", ("short", "x" * 1344))
    for env, index in ((make_notes_env(), 1), (GroundingVectorEnv(2, Notes(), canvas=32), [0, 1])):
        with pytest.raises(DataError, match="notes/train s1: expression of 1344 letters; at most 1024"):
            env.reset(options={"index": index})


# ---- groups ----------------------------------------------------------------------------------


def disabled(n: int = 4, dataset: Any = None, **kwargs: Any) -> GroundingVectorEnv:
    dataset = dataset or "scenes"
    return GroundingVectorEnv(n, dataset, canvas=32, autoreset_mode="Disabled", **kwargs)


def test_a_group_decodes_each_distinct_image_once():
    notes = Notes()
    env = disabled(8, notes)
    # Samples 0 and 1 are on one image, sample 4 is on another.
    env.reset(options={"index": [0, 0, 0, 1, 1, 4, 4, 4]})
    assert notes.decoded == {"p0": 1, "p2": 1}
    for _ in range(3):
        env.step(random_actions(np.random.default_rng(0), 8))
    env.reset(options={"index": [4, 4, 4, 4, 1, 1, 1, 1]})
    assert notes.decoded == {"p0": 1, "p2": 1}


def test_as_many_images_are_kept_as_there_are_environments():
    notes = Notes()
    env = disabled(2, notes)
    env.reset(options={"index": [0, 2]})
    env.reset(options={"index": [4, 4]})
    env.reset(options={"index": [4, 2]})
    assert notes.decoded == {"p0": 1, "p1": 1, "p2": 1}
    env.reset(options={"index": [0, 0]})
    assert notes.decoded == {"p0": 2, "p1": 1, "p2": 1}


def test_a_seed_counts_up_over_the_environments_and_equal_seeds_give_one_sample():
    env = disabled(3)
    expected = env.reset(seed=[20, 21, 22])[1]["sample_id"].tolist()
    assert len(set(expected)) == 3
    for seed in (20, np.int64(20), np.array([20, 21, 22])):
        assert env.reset(seed=seed)[1]["sample_id"].tolist() == expected
    assert not set(env.reset()[1]["sample_id"].tolist()) & set(expected)
    observations, infos = env.reset(seed=[22, 20, 20])
    assert infos["sample_id"].tolist() == [expected[2], expected[0], expected[0]]
    np.testing.assert_array_equal(observations["image"][1], observations["image"][2])


def test_without_autoreset_a_finished_episode_ignores_actions_earns_0_and_keeps_its_flags():
    env = disabled(3, max_steps=2)
    env.reset(seed=0)
    boxes = np.float32([[0.1, 0.1, 0.9, 0.9]] * 3)
    _, _, terminated, truncated, _ = env.step({"box": boxes, "stop": np.array([1, 0, 0])})
    assert (terminated.tolist(), truncated.tolist()) == ([True, False, False], [False] * 3)
    before, _, terminated, truncated, infos = env.step({"box": boxes, "stop": np.array([0, 0, 1])})
    assert (terminated.tolist(), truncated.tolist()) == ([True, False, True], [False, True, False])
    for other in (np.float32([[0, 0, 0.2, 0.2]] * 3), np.full((3, 4), NAN, np.float32)):
        for stop in (0, 1):
            after, rewards, still_terminated, still_truncated, later = env.step(
                {"box": other, "stop": np.full(3, stop)}
            )
            assert_equal(before, after)
            assert rewards.tolist() == [0, 0, 0]
            np.testing.assert_array_equal(terminated, still_terminated)
            np.testing.assert_array_equal(truncated, still_truncated)
            assert "invalid" not in later
            np.testing.assert_array_equal(infos["iou"], later["iou"])


def test_a_reset_mask_resets_the_chosen_environments_and_no_others():
    env = disabled(4)
    env.reset(seed=0)
    boxes = np.float32([[0.1, 0.1, 0.9, 0.9]] * 4)
    before = env.step({"box": boxes, "stop": np.array([0, 1, 0, 1])})[0]
    options = {"reset_mask": np.array([False, True, False, True]), "index": [1, 2, 3, None]}
    after, infos = env.reset(seed=[8, 8, 8, 9], options=options)
    assert set(options) == {"reset_mask", "index"}, "the caller's options were changed"
    assert after["step"].tolist() == [1, 0, 1, 0]
    assert infos["_sample_id"].tolist() == [False, True, False, True]
    assert env.samples[1].sample_id == "train-2"
    assert env.samples[3].sample_id == disabled(1).reset(seed=9)[1]["sample_id"][0]
    for i in (0, 2):
        np.testing.assert_array_equal(before["image"][i], after["image"][i])
        assert before["expression"][i] == after["expression"][i]
    terminated = env.step({"box": boxes, "stop": np.zeros(4, np.int64)})[2]
    assert not terminated.any()


def test_options_are_given_per_environment_with_none_for_the_default():
    env = disabled(3, initial_box=[0.5, 0.5, 1, 1])
    first = [[0.1, 0.2, 0.3, 0.4], None, (0, 0, 1, 1)]
    observations, infos = env.reset(seed=1, options={"index": [7, None, 9], "initial_box": first})
    assert infos["sample_id"][[0, 2]].tolist() == ["train-7", "train-9"]
    expected = np.float32([[0.1, 0.2, 0.3, 0.4], [0.5, 0.5, 1, 1], [0, 0, 1, 1]])
    np.testing.assert_array_equal(observations["box"], expected)


# ---- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "stop"), [((3, 4), (4,)), ((4, 4), (3,)), ((4,), (4,)), ((4, 5), (4,)), ((4, 4), ()), ((4, 4), (4, 1))]
)
def test_actions_of_a_wrong_shape_are_a_value_error_and_play_nothing(box, stop):
    env = disabled(4)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"box must be \(4, 4\) and stop \(4,\)"):
        env.step({"box": np.zeros(box), "stop": np.zeros(stop)})
    assert [game.step_count for game in env.games] == [0] * 4


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"reset_mask": [True, True]}, "reset_mask"),
        ({"reset_mask": [False] * 3}, "at least one of them true"),
        ({"index": [1, 2]}, r"index \[1, 2\]: give 3 entries"),
        ({"index": 1}, "index 1: give 3 entries"),
        ({"index": [0, 1, 10_000_000]}, "index 10000000"),
        ({"initial_box": [[0, 0, 1, 1]]}, "initial_box .* give 3 entries"),
        ({"initial_box": [None, None, [1, 0, 0, 1]]}, "x2 <= x1"),
        ({"indices": [0, 1, 2]}, "'indices'"),
    ],
)
def test_a_wrong_reset_option_is_a_value_error_that_names_it(options, named):
    env = disabled(3)
    with pytest.raises(ValueError, match=named):
        env.reset(options=options)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(random_actions(np.random.default_rng(0), N))
    assert env.reset(seed=0)[0]["step"].tolist() == [0, 0, 0]


def test_the_first_reset_must_reset_all_and_a_wrong_number_of_seeds_is_refused():
    env = disabled(3)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(random_actions(np.random.default_rng(0), N))
    with pytest.raises(ValueError, match="first reset"):
        env.reset(options={"reset_mask": np.array([True, False, True])})
    with pytest.raises(ValueError, match="seed"):
        env.reset(seed=[1, 2])


@pytest.mark.parametrize(
    ("options", "named"),
    [({"num_envs": 0}, "num_envs 0"), ({"autoreset_mode": "Never"}, "Never"), ({"render_mode": "human"}, "human")],
)
def test_an_option_of_the_vector_environment_that_is_wrong_is_named(options, named):
    with pytest.raises(ValueError, match=named):
        GroundingVectorEnv(**options)


@pytest.mark.parametrize("trail", [False, True])
@pytest.mark.parametrize("view", ["overlay", "closeup", "both"])
def test_frames_observations_and_infos_are_those_of_the_single_environment(view, trail):
    options = {"dataset": "photos", "split": "val", "canvas": 95, "view": view, "render_mode": "rgb_array"}
    options |= {"overlay": {"trail": trail, "style": "both"}, "max_steps": 4}
    several = GroundingVectorEnv(N, autoreset_mode="Disabled", copy=trail, **options)
    singles = [GroundingEnv(**options) for _ in range(N)]
    observations, infos = several.reset(seed=5)
    one_by_one = [env.reset(seed=5 + i) for i, env in enumerate(singles)]
    rng, compared, trails = np.random.default_rng(0), 0, 0
    for _ in range(4):
        trails += int(observations["history"].any()) if trail else 1
        frames = several.render()
        for i, (env, (observation, info)) in enumerate(zip(singles, one_by_one, strict=True)):
            assert_equal({key: value[i] for key, value in observations.items()}, observation)
            known = {k: v for k, v in infos.items() if not k.startswith("_") and infos[f"_{k}"][i]}
            assert known.keys() == info.keys()
            assert all(np.array_equal(value[i], info[key]) for key, value in known.items())
            np.testing.assert_array_equal(frames[i], env.render())
            compared += 1
        acted = random_actions(rng, N)
        observations, rewards, _, _, infos = several.step(acted)
        for i, env in enumerate(singles):
            if env.game.over:  # the vector environment keeps it as it is, and nothing is refused any more
                one_by_one[i][1].pop("invalid", None)
                continue
            observation, reward, *_, info = env.step({"box": acted["box"][i], "stop": acted["stop"][i]})
            one_by_one[i] = observation, info
            assert rewards[i] == reward
    assert compared == 4 * N and trails
    assert disabled(2).render() is None


@pytest.mark.parametrize("canvas", [16, 40, 95, 96, 384, 640, 641])
def test_frames_have_even_sides_because_players_refuse_others(canvas):
    for env in (
        GroundingEnv(canvas=canvas, render_mode="rgb_array"),
        GroundingVectorEnv(2, canvas=canvas, render_mode="rgb_array"),
    ):
        env.reset(seed=0)
        found = env.render()
        for frame in [found] if isinstance(found, np.ndarray) else found:
            assert frame.shape[0] % 2 == frame.shape[1] % 2 == 0 and frame.shape[1] in (canvas, canvas + 1)


def test_a_recorded_video_is_of_the_kind_that_players_take(tmp_path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="recording needs moviepy")
    pytest.importorskip("moviepy")
    env = gym.make("IVT-Scenes-v0", canvas=95, render_mode="rgb_array")
    env = gym.wrappers.RecordVideo(env, str(tmp_path), episode_trigger=lambda _: True, disable_logger=True)
    env.reset(seed=0)
    env.step({"box": np.float32([0.1, 0.1, 0.6, 0.6]), "stop": 0})
    env.step({"box": np.float32([0, 0, 0, 0]), "stop": 1})
    env.close()
    (video,) = tmp_path.glob("*.mp4")
    described = subprocess.run([ffmpeg.get_ffmpeg_exe(), "-i", str(video)], capture_output=True, text=True).stderr
    assert "yuv420p" in described and "yuv444p" not in described
