"""A relay is nothing but its two agents: each answers where it is its turn, and nobody else."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest

from ivt_agents.play.by_name import load_agent
from ivt_agents.play.cost import Metered
from ivt_agents.play.scripted import Relay
from ivt_agents.vlm.load import load_policy
from ivt_env.rollouts import make_vector_env, rollout


def play(agent, count=6, view="overlay", **options):
    env = make_vector_env("IVT-Scenes-v0", 3, split="val", view=view, max_steps=3)
    return rollout(env, agent, count, 0, indices=range(count), **options)


def test_the_first_box_is_the_first_agents_and_what_follows_the_others():
    env = make_vector_env("IVT-Scenes-v0", 3, split="val", max_steps=3)
    agent = load_agent("relay:centre,oracle", env=env)
    episodes = rollout(env, agent, 6, 0, indices=range(6))
    centre = play(load_agent("centre"))
    for mine, its in zip(episodes, centre, strict=True):
        assert mine.steps[0].proposal == its.steps[0].proposal
        assert mine.steps[1].iou > 0.6, "the oracle goes on; the centre agent would have stopped"


def test_a_policy_in_relay_with_itself_is_the_policy_and_costs_the_same():
    alone, relayed = (Metered(load_agent(spec)) for spec in ("vlm:tiny", "relay:vlm:tiny,vlm:tiny"))
    assert [asdict(e) for e in play(relayed)] == [asdict(e) for e in play(alone)]
    assert relayed.cost == alone.cost


def test_an_episode_that_starts_from_a_box_is_the_second_agents():
    class Never:
        def act(self, observations):
            raise AssertionError("there was a box")

        def reset(self, mask):
            pass

    boxes = [[0.1, 0.1, 0.4, 0.4]] * 6
    second = load_policy("tiny")
    found = play(Relay(Never(), second), initial_boxes=boxes)
    assert [asdict(e) for e in found] == [asdict(e) for e in play(load_policy("tiny"), initial_boxes=boxes)]


def test_who_failed_to_give_a_box_is_asked_again():
    class Silent:
        def __init__(self):
            self.asked = 0

        def act(self, observations):
            self.asked += int(np.sum(observations["active"]))
            n = len(observations["box"])
            return {"box": np.full((n, 4), np.nan), "stop": np.zeros(n, int), "text": ["?"] * n}

        def reset(self, mask):
            pass

    silent = Silent()
    episodes = play(Relay(silent, load_agent("centre")))
    assert silent.asked == 6 * 3 and all(e.final_iou == 0 for e in episodes)
    assert {s.text for e in episodes for s in e.steps} == {"?"}


def test_the_view_is_that_of_the_one_who_sees_boxes():
    assert Relay(load_policy("tiny"), load_policy("tiny", view="closeup")).shown["view"] == "closeup"


@pytest.mark.parametrize("spec", ["relay:centre", "relay:,centre", "relay:centre,"])
def test_a_relay_of_one_is_refused(spec):
    with pytest.raises(ValueError, match="say who begins and who goes on"):
        load_agent(spec)
