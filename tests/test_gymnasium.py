"""Gymnasium's own checks and promises hold for every registered id, without one warning.

The real data sets are there, in small: files in their layouts, so that nothing falls back and the list of
warnings that are let through is empty. Silent when false: an id that works only with the scenes behind it.
"""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from eval_layouts import PHOTOS, photo_rows, write_custom, write_ref_adv, write_ref_l4
from gui_layouts import write_gui
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from playing import assert_equal, random_action, random_actions
from refer_layout import write_refer_folder

import ivt_env
from ivt_env.data import load_dataset, mixture
from ivt_env.env import GroundingEnv
from ivt_env.vector_env import GroundingVectorEnv

IDS = sorted(ivt_env.IDS)
N = 2


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Every real data set, in small."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("refcoco", "refcocoplus", "refcocog"):
        write_refer_folder(folder, name)
    write_ref_l4(folder)
    write_ref_adv(folder)
    write_gui(folder)
    custom = folder / "custom"
    rows = photo_rows()[:4]
    write_custom(custom, [{k: row[k] for k in ("image", "expression", "bbox")} for row in rows])
    (custom / "images").mkdir()
    for row in rows:
        (custom / "images" / row["image"]).write_bytes((PHOTOS / row["image"]).read_bytes())
    # Five photographs are too few to draw 2,400 samples from: the first of each part instead.
    ids = {
        split: [(*part, load_dataset(*part, folder, strict=True)[0].sample_id) for part in parts]
        for split, parts in mixture.PARTS.items()
    }
    mixture.write_whole(folder / "mixed" / mixture.IDS_FILE, json.dumps({"splits": ids}))
    return folder


@pytest.fixture(autouse=True)
def all_data_are_there(root, monkeypatch):
    """Every warning is an error."""
    monkeypatch.setenv("IVT_DATA", str(root))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def options(root):
    """Keywords of ``gym.make`` for an id."""

    def of(env_id: str) -> dict[str, Any]:
        return {"canvas": 48, **({"data_root": str(root / "custom")} if env_id == "IVT-Custom-v0" else {})}

    return of


@pytest.mark.parametrize("env_id", IDS)
def test_check_env_finds_nothing_to_warn_of(env_id, options):
    env = gym.make(env_id, **options(env_id))
    served = env.unwrapped.dataset.name
    assert served == ("my-set" if env_id == "IVT-Custom-v0" else ivt_env.IDS[env_id]["dataset"])
    check_env(env.unwrapped)
    env.close()


MODES = [("IVT-Scenes-v0", mode) for mode in (None, "ansi", "human")] + [(one, "rgb_array") for one in IDS]


@pytest.mark.parametrize(("env_id", "render_mode"), MODES)
def test_the_passive_checker_and_the_order_enforcer_find_nothing_to_warn_of(env_id, render_mode, options):
    env = gym.make(env_id, render_mode=render_mode, **options(env_id))
    rng = np.random.default_rng(0)
    env.action_space.seed(0)
    for episode in range(2):
        env.reset(seed=episode)
        over = False
        while not over:
            action = env.action_space.sample() if episode % 2 else random_action(rng)
            action["box"] = action["box"].astype(np.float32)
            _, _, terminated, truncated, _ = env.step(action)
            over = terminated or truncated
            if render_mode is not None:
                env.render()
    env.close()


def vectorised(env_id: str, mode: str, vectorisation: str, **options: Any) -> Any:
    if vectorisation == "vector_entry_point":
        return gym.make_vec(env_id, N, vectorisation, autoreset_mode=AutoresetMode(mode), **options)
    return gym.make_vec(env_id, N, vectorisation, {"autoreset_mode": AutoresetMode(mode)}, **options)


PLAYED = [("IVT-Scenes-v0", mode) for mode in ("NextStep", "SameStep", "Disabled")]
PLAYED += [("IVT-RefCOCOg-v0", "Disabled"), ("IVT-Mixed-v0", "SameStep"), ("IVT-ScreenSpot-v0", "NextStep")]


@pytest.mark.parametrize(("env_id", "mode"), PLAYED)
def test_three_vectorisations_play_alike(env_id, mode, options):
    ways = ("vector_entry_point", "sync", "async")
    envs = [vectorised(env_id, mode, way, view="both", **options(env_id)) for way in ways]
    ended = 0

    def alike(results: Any) -> Any:
        first, *others = results
        for other in others:
            assert_equal(first, other)
        return first

    try:
        own = envs[0]
        assert isinstance(own.unwrapped, GroundingVectorEnv)
        for other in envs[1:]:
            assert own.metadata["autoreset_mode"] == other.metadata["autoreset_mode"] == AutoresetMode(mode)
            assert own.single_observation_space == other.single_observation_space
            assert own.observation_space == other.observation_space and own.action_space == other.action_space
        rng = np.random.default_rng(0)
        for seed in (5, [9, None]):
            seen, _ = alike(env.reset(seed=seed) for env in envs)
            for _ in range(6):
                actions = random_actions(rng, N)
                assert own.observation_space.contains(seen)
                seen, _, terminated, truncated, _ = alike(env.step(copy.deepcopy(actions)) for env in envs)
                done = terminated | truncated
                ended += done.sum()
                if mode == "Disabled" and done.any():
                    alike(env.reset(options={"reset_mask": done.copy()}) for env in envs)
        assert ended >= 2, "no episode ended: this test would show little"
    finally:
        for env in envs:
            env.close()


@pytest.mark.parametrize("env_id", IDS)
def test_a_pickled_copy_and_a_restored_state_go_on_as_the_original_does(env_id, options):
    for played in (False, True):
        env, restored = (gym.make(env_id, **options(env_id)) for _ in range(2))
        action = {"box": np.float32([0.1, 0.1, 0.6, 0.7]), "stop": 0}
        if played:
            env.reset(seed=4)
            env.step(action)
        twins = [pickle.loads(pickle.dumps(env))]
        assert isinstance(twins[0].unwrapped, GroundingEnv) and twins[0].unwrapped is not env.unwrapped
        if played:
            restored.reset(seed=1)
            restored.unwrapped.set_state(json.loads(json.dumps(env.unwrapped.get_state())))
            twins.append(restored)
        else:
            assert_equal(env.reset(seed=6), twins[0].reset(seed=6))
        rng = np.random.default_rng(0)
        for _ in range(2):
            while not env.unwrapped.game.over:
                action = {"box": rng.random(4).astype(np.float32), "stop": int(rng.random() < 0.2)}
                step = env.step(action)
                for twin in twins:
                    assert_equal(step, twin.step(copy.deepcopy(action)))
            begun = env.reset()
            for twin in twins:
                assert_equal(begun, twin.reset())


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))], ids=["copy", "pickle"])
def test_copies_of_a_vector_environment_go_on_as_the_original_does(how, keep):
    env = GroundingVectorEnv(N, "photos", canvas=48, view="both", copy=keep)
    rng = np.random.default_rng(0)
    for fresh in (True, False):
        twin = how(env)
        if fresh:
            assert_equal(env.reset(seed=2), twin.reset(seed=2))
        for _ in range(8):
            actions = {"box": rng.random((N, 4)).astype(np.float32), "stop": (rng.random(N) < 0.2).astype(np.int64)}
            assert_equal(env.step(actions), twin.step(copy.deepcopy(actions)))
