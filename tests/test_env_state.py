"""A state that was taken and restored plays on as if nothing had happened.

Silent when false: a search that returns to a node and plays another sample there, or a resumed run
that draws other episodes than the one it resumes.
"""

from __future__ import annotations

import copy
import json
from functools import partial
from typing import Any

import numpy as np
import pytest
from playing import assert_equal, random_action, random_actions, scenes

from ivt_env.env import GroundingEnv
from ivt_env.vector_env import GroundingVectorEnv

N = 3


def vector(**kwargs: Any) -> GroundingVectorEnv:
    return GroundingVectorEnv(N, **({"dataset": "photos", "split": "val", "canvas": 40} | kwargs))


def single(**kwargs: Any) -> GroundingEnv:
    return GroundingEnv(**({"dataset": "photos", "split": "val", "canvas": 40} | kwargs))


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(state, allow_nan=False))


def play_on(env: GroundingEnv, rng: np.random.Generator, episodes: int = 4) -> list[Any]:
    """Random actions to the end of this and of further episodes: all that came back."""
    seen: list[Any] = []
    for _ in range(episodes):
        while env.game is not None and not env.game.over:
            seen.append(env.step(random_action(rng)))
        seen.append(env.reset())
    return seen


@pytest.mark.parametrize("view", ["overlay", "closeup", "both"])
def test_a_restored_environment_plays_on_identically_in_itself_and_in_another(view):
    reward = None if view == "both" else {"kind": "final", "potential": "giou", "step_cost": 0.01}
    options = {"view": view, "reward": reward, "initial_box": [0.2, 0.2, 0.6, 0.7], "max_steps": 4}
    env = single(**options)
    for seed in range(5):
        left = env.reset(seed=seed)
        rng = np.random.default_rng(seed)
        for _ in range(seed % 5):
            if not env.game.over:
                observation, *_, info = env.step(random_action(rng))
                left = observation, {key: value for key, value in info.items() if key != "invalid"}
        state = through_json(env.get_state())
        expected = play_on(env, np.random.default_rng(seed))
        other = single(**options)
        for restored in (env, other):
            assert_equal(restored.set_state(copy.deepcopy(state)), left)
            assert restored.get_state() == state
            assert_equal(play_on(restored, np.random.default_rng(seed)), expected)


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
@pytest.mark.parametrize("keep", [True, False])
def test_restored_vector_environments_play_on_identically(mode, keep):
    options = {"autoreset_mode": mode, "view": "both", "copy": keep}
    env, other = vector(**options), vector(**options)
    env.reset(seed=1)
    rng = np.random.default_rng(0)
    for round_number in range(4):
        for _ in range(round_number):
            env.step(random_actions(rng, N))
        state = through_json(env.get_state())

        def on(environment: GroundingVectorEnv, seed: int = round_number) -> list[Any]:
            own = np.random.default_rng(seed)
            seen = []
            for number in range(8):
                if mode == "Disabled" and number == 5:
                    seen.append(copy.deepcopy(environment.reset()))
                seen.append(copy.deepcopy(environment.step(random_actions(own, N))))
            return seen

        expected = on(env)
        for restored in (env, other):
            observations, infos = restored.set_state(state)
            assert restored.observation_space.contains(observations)
            assert infos["sample_id"].tolist() == [episode["sample_id"] for episode in state["episodes"]]
            assert restored.get_state() == state
            assert_equal(on(restored), expected)


def test_a_state_does_not_change_when_the_environment_moves_on():
    for env, act in ((single(), random_action), (vector(), partial(random_actions, n=N))):
        env.reset(seed=0)
        state = env.get_state()
        kept = copy.deepcopy(state)
        env.step(act(np.random.default_rng(0)))
        env.reset()
        assert state == kept != env.get_state()


def test_an_environment_that_was_never_seeded_can_be_cloned_too():
    env, clone = scenes(), scenes()
    env.reset()
    clone.set_state(env.get_state())
    for _ in range(3):
        assert_equal(env.reset(), clone.reset())


def test_before_the_first_reset_there_is_no_state():
    for env in (single(), vector()):
        with pytest.raises(RuntimeError, match="reset"):
            env.get_state()


def with_episode(state: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A state whose first episode differs."""
    first, *others = state["episodes"]
    return state | {"episodes": [first | changes, *others]}


def made_with(state: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return state | {"made_with": state["made_with"] | changes}


WRONG: dict[str, tuple[Any, str]] = {
    "no dict": (lambda s: [s], "indices must be integers"),
    "empty": (lambda s: {}, "lacks 'made_with'"),
    "a part missing": (lambda s: {k: v for k, v in s.items() if k != "episodes"}, "lacks 'episodes'"),
    "an episode missing": (lambda s: s | {"episodes": s["episodes"][1:]}, "shorter"),
    "a random generator missing": (lambda s: s | {"rngs": s["rngs"][1:]}, "shorter"),
    "other options": (lambda s: made_with(s, max_steps=9), "max_steps 9, this environment has 3"),
    "another data set": (lambda s: made_with(s, dataset=["scenes", "val", 9]), "dataset .'scenes'"),
    "another view": (lambda s: made_with(s, view=["both", 40]), "view .'both'"),
    "another sample": (lambda s: with_episode(s, sample_id="another"), "it was 'another'"),
    "an index outside": (lambda s: with_episode(s, index=99), "99"),
    "an episode without a box": (lambda s: s | {"episodes": [{"index": 0}] * len(s["episodes"])}, "lacks 'sample_id'"),
    "a box that is none": (lambda s: with_episode(s, box=[0.5, 0, 0.1, 1]), "x2 <= x1"),
    "another random generator": (lambda s: s | {"rngs": [{"bit_generator": "MT19937"}] * len(s["rngs"])}, "PCG64"),
    "a random state of text": (lambda s: s | {"rngs": ["PCG64"] * len(s["rngs"])}, "dict"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_state_is_a_value_error_and_changes_nothing(name):
    spoil, message = WRONG[name]
    for env in (single(), vector()):
        env.reset(seed=0)
        before = env.get_state()
        with pytest.raises(ValueError, match=f"no state of an environment like this one: .*{message}"):
            env.set_state(spoil(copy.deepcopy(before)))
        assert env.get_state() == before


@pytest.mark.parametrize(("changes", "message"), [({"autoreset_mode": "Disabled"}, "autoreset_mode"), ({}, "num_envs")])
def test_a_state_of_another_number_of_environments_or_mode_is_refused(changes, message):
    env, other = vector(), GroundingVectorEnv(N if changes else 2, "photos", "val", canvas=40, **changes)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        other.set_state(env.get_state())
