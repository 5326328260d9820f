"""If the credit is biased, training still runs and rewards still move: towards stopping too early or too late.

The four-turn problem below has an exact gradient by enumeration. Two estimators that look natural (per-turn group
means) miss it, one of them with the wrong sign at the second turn; the shipped ones do not.
"""

import itertools

import numpy as np
import pytest

from agents.grpo.advantages import (
    leave_one_out,
    per_step_advantages,
    return_to_go,
    trajectory_advantages,
    zero_variance,
)

THETA = np.array([0.3, -0.2, 0.5, 0.0])
PAY = np.array([0.5, 0.3, -0.6, 0.2])
GROUP = 8
GROUPS = 40_000


def exact_gradient() -> np.ndarray:
    """d E[return] / d theta by enumerating where the episode stops."""
    p = 1 / (1 + np.exp(-THETA))
    gradient = np.zeros(4)
    for stop_at in range(5):  # 4: never stops
        went_on = np.arange(4) < stop_at
        decided = np.arange(4) <= min(stop_at, 3)
        probability = np.prod(np.where(went_on, p, 1 - p)[decided])
        score = np.where(went_on, 1 - p, -p) * decided
        gradient += probability * PAY[:stop_at].sum() * score
    return gradient


def play(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rewards, taken and scores d log pi / d theta of many groups, each (groups, G, 4)."""
    p = 1 / (1 + np.exp(-THETA))
    on = np.random.default_rng(seed).random((GROUPS, GROUP, 4)) < p
    taken = np.concatenate([np.ones((GROUPS, GROUP, 1), bool), np.logical_and.accumulate(on, axis=-1)[..., :-1]], -1)
    rewards = np.where(taken & on, PAY, 0.0)
    scores = np.where(on, 1 - p, -p) * taken
    return rewards, taken, scores


def estimate(advantage, rewards, taken, scores) -> tuple[np.ndarray, np.ndarray]:
    """Mean gradient and its standard error over groups."""
    per_group = np.stack([(advantage(r, t) * s).mean(axis=0) for r, t, s in zip(rewards, taken, scores, strict=True)])
    return per_group.mean(axis=0), per_group.std(axis=0) / np.sqrt(len(per_group))


def per_turn_mean_over_alive_then_sum(rewards, taken):
    """Biased: each turn's reward minus the mean of those still playing, summed to the end."""
    alive = np.maximum(taken.sum(axis=0), 1)
    centred = np.where(taken, rewards - rewards.sum(axis=0) / alive, 0.0)
    return np.where(taken, return_to_go(centred), 0.0)


def per_turn_mean_ended_as_zero_then_sum(rewards, taken):
    """Biased: the same with ended episodes counted as 0 in the mean."""
    centred = np.where(taken, rewards - rewards.mean(axis=0), 0.0)
    return np.where(taken, return_to_go(centred), 0.0)


@pytest.fixture(scope="module")
def played():
    return play(0)


def test_the_exact_gradient_is_the_published_one():
    assert np.allclose(exact_gradient(), [0.1210, -0.0016, -0.0304, 0.0080], atol=6e-5)


@pytest.mark.parametrize("advantage", [per_step_advantages, trajectory_advantages])
def test_estimator_is_unbiased_with_a_stop_action(advantage, played):
    mean, error = estimate(advantage, *played)
    assert (np.abs(mean - exact_gradient()) < 4 * error).all(), (mean, exact_gradient(), error)


@pytest.mark.parametrize("biased", [per_turn_mean_over_alive_then_sum, per_turn_mean_ended_as_zero_then_sum])
def test_the_test_can_tell_a_biased_estimator(biased, played):
    mean, error = estimate(biased, *played)
    assert (np.abs(mean - exact_gradient()) > 8 * error).any()


def test_per_step_credit_varies_less_than_trajectory_credit(played):
    _, per_step = estimate(per_step_advantages, *played)
    _, trajectory = estimate(trajectory_advantages, *played)
    assert per_step[1] < 0.85 * trajectory[1] and per_step[2] < 0.85 * trajectory[2]


def test_return_to_go_adds_up_what_is_still_to_come():
    assert np.allclose(return_to_go(np.array([[1.0, 2.0, 4.0]])), [[7.0, 6.0, 4.0]])


def test_leave_one_out_is_the_mean_of_the_others():
    values = np.random.default_rng(1).normal(size=(5, 3))
    for i in range(5):
        assert np.allclose(leave_one_out(values)[i], np.delete(values, i, axis=0).mean(axis=0))


def test_advantages_are_zero_where_no_action_was_taken():
    rewards, taken = np.array([[0.5, 0.0], [0.2, 0.3]]), np.array([[True, False], [True, True]])
    for advantage in (per_step_advantages, trajectory_advantages):
        assert advantage(rewards, taken)[0, 1] == 0.0


def test_only_groups_that_earned_alike_at_every_step_are_skipped():
    assert zero_variance(np.array([[0.5, 0.1], [0.5, 0.1]]))
    # Equal totals, earned at different steps: the steps differ, so there is something to learn.
    assert not zero_variance(np.array([[0.5, 0.1], [0.1, 0.5]]))


def test_all_orders_of_a_group_give_the_same_credit():
    rewards = np.random.default_rng(2).normal(size=(4, 3))
    taken = np.ones((4, 3), bool)
    for order in itertools.islice(itertools.permutations(range(4)), 6):
        shuffled = per_step_advantages(rewards[list(order)], taken)
        assert np.allclose(shuffled, per_step_advantages(rewards, taken)[list(order)])
