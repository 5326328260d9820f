"""The forced rollout that goes on from the stopping one is the one that would be played from the beginning.

Silent when false: the columns after the stop belong to episodes that no policy plays.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ivt_agents.play.cost import Metered
from ivt_agents.play.scripted import Continued
from ivt_agents.vlm.load import load_policy
from ivt_agents.vlm.policy import VLMPolicy
from ivt_env.rollouts import make_vector_env, rollout


class StopsOnSome(VLMPolicy):
    """Stops by what it is shown: on some boxes, never without one."""

    def act(self, observations):
        actions = super().act(observations)
        stops = observations["box"].any(axis=1) & (observations["box"].sum(axis=1) % 0.1 < 0.05)
        return {**actions, "stop": stops.astype(np.int64)}


STATED = ("confidence", "stop_probability")


def without_what_is_stated(episodes):
    return [replace(e, steps=[replace(s, **dict.fromkeys(STATED)) for s in e.steps]) for e in episodes]


@pytest.mark.parametrize("num_envs", [5, 12])
def test_it_equals_the_forced_rollout_from_the_beginning_and_asks_only_after_the_stops(num_envs):
    policy = load_policy("tiny")
    policy.__class__ = StopsOnSome
    env = make_vector_env("IVT-Scenes-v0", num_envs, split="val", max_steps=4, **policy.shown)
    stopping = rollout(env, policy, 12, 0, indices=range(12))
    forced = rollout(env, policy, 12, 0, indices=range(12), ignore_stop=True)
    lengths = [len(e.steps) for e in stopping]
    assert len(set(lengths)) > 1 and sum(e.terminated for e in stopping) > 3, "some stop early, some late or never"

    metered = Metered(Continued(policy, stopping, num_envs))
    continued = rollout(env, metered, 12, 0, indices=range(12), ignore_stop=True)
    assert without_what_is_stated(continued) == without_what_is_stated(forced)
    stated = [[[getattr(s, n) for n in STATED] for e in some for s in e.steps] for some in (continued, forced)]
    assert np.allclose(*stated, atol=1e-5), "one row more or less in a batch moves the last bits"
    assert metered.cost.answers == sum(len(e.steps) for e in forced) - sum(lengths)


def test_only_a_greedy_policy_without_a_conversation_repeats_itself():
    assert load_policy("tiny").repeats_itself
    assert not load_policy("tiny", temperature=0.5).repeats_itself
    assert not load_policy("tiny", layout="prefix").repeats_itself
    derived = load_policy("tiny")
    derived.__class__ = StopsOnSome
    assert not derived.repeats_itself, "it might remember"
