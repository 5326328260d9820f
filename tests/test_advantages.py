"""If the credit is biased, training still runs and rewards still move: towards stopping too early or too late.

The four-turn problem below has an exact gradient by enumeration. Two estimators that look natural (per-turn group
means) miss it, one of them with the wrong sign at the second turn; the shipped ones do not.
"""

import itertools

import numpy as np
import pytest

from ivt_agents.grpo.advantages import (
    ADVANTAGES,
    advantages,
    episode_and_step_advantages,
    leave_one_out,
    per_step_advantages,
    return_to_go,
    same_state_advantages,
    spread,
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
    rewards = np.array([[1.0, 2.0, 4.0]])
    assert np.allclose(return_to_go(rewards), [[7.0, 6.0, 4.0]])
    assert np.allclose(return_to_go(rewards, 0.5), [[3.0, 4.0, 4.0]])
    assert np.array_equal(return_to_go(rewards, 0.0), rewards)


def test_where_what_follows_spoils_every_box_only_its_own_gain_tells_what_keeping_is_worth():
    """All begin at IoU 0.9; half keep it, half lose it, and then all lose it."""
    kept = np.array([True, False, True, False])
    rewards = np.stack([np.full(4, 0.9), np.where(kept, 0.0, -0.9), np.where(kept, -0.9, 0.0)], axis=-1)
    taken = np.ones_like(rewards, dtype=bool)
    assert not per_step_advantages(rewards, taken)[:, 1].any()
    assert np.allclose(per_step_advantages(rewards, taken, 0.0)[:, 1], np.where(kept, 0.6, -0.6))


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


def by_turn(rewards):
    """In the four-turn problem every member that still plays is in the same state."""
    return np.broadcast_to(np.arange(rewards.shape[-1]), rewards.shape)


def test_episode_and_step_weighs_a_step_by_how_often_others_share_its_state(played):
    """Its bias in closed form: step t counts 1 + omega * P(another member still plays), not 1 + omega."""
    omega = 2.0
    mean, error = estimate(lambda r, t: episode_and_step_advantages(r, t, by_turn(r), omega), *played)
    alive = np.cumprod(np.concatenate([[1.0], 1 / (1 + np.exp(-THETA[:3]))]))
    shared = 1 - (1 - alive) ** (GROUP - 1)
    assert (np.abs(mean - exact_gradient() * (1 + omega * shared)) < 4 * error).all()
    assert shared[0] == 1 and shared[3] < 0.75
    # No single factor makes it the exact gradient: the first step's factor is not the last step's.
    assert abs(mean[3] - (1 + omega) * exact_gradient()[3]) > 8 * error[3]


def test_episode_and_step_where_states_never_recur_counts_the_first_step_twice(played):
    """As in this environment, where boxes are continuous and the state is shared at step 0 only."""
    rewards, taken, scores = played
    never = np.where(np.arange(4) == 0, 0, 1 + np.arange(GROUP * 4).reshape(GROUP, 4))
    mean, error = estimate(lambda r, t: episode_and_step_advantages(r, t, never), rewards, taken, scores)
    assert (np.abs(mean - exact_gradient() * np.array([2, 1, 1, 1])) < 4 * error).all()
    assert abs(mean[0] - exact_gradient()[0]) > 8 * error[0]


def test_states_are_compared_at_the_same_step_only_and_alone_means_zero():
    rewards = np.array([[0.5, 0.1], [0.1, 0.4], [0.3, 0.2], [0.2, 0.0]])
    taken = np.array([[True, True], [True, True], [True, True], [True, False]])
    states = np.array([[0, 7], [0, 7], [0, 0], [0, -1]])
    found = same_state_advantages(rewards, taken, states)
    to_go = return_to_go(rewards)
    assert np.allclose(found[:, 0], to_go[:, 0] - leave_one_out(to_go)[:, 0])
    assert np.allclose(found[:2, 1], [0.1 - 0.4, 0.4 - 0.1])
    assert found[2, 1] == 0 and found[3, 1] == 0, "alone in its state, and no action at all"


def test_a_long_episode_counts_once_in_the_baseline():
    """Counting rows instead of episodes would pull the baseline towards those that went on."""
    rewards = np.array([[0.6, 0.0, 0.0], [0.1, 0.1, 0.1], [0.2, 0.0, 0.0]])
    taken = np.array([[True, False, False], [True, True, True], [True, False, False]])
    found = trajectory_advantages(rewards, taken)
    assert found[0, 0] == pytest.approx(0.6 - (0.3 + 0.2) / 2)
    assert per_step_advantages(rewards, taken)[0, 0] == pytest.approx(0.6 - (0.3 + 0.2) / 2)


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_credit_by_name_is_zero_behind_the_end_and_sums_to_zero_over_the_group_at_step_0(kind):
    rewards, taken, _ = play(3)
    found = advantages(kind, rewards[0], taken[0], by_turn(rewards[0]), 0.5)
    assert (found[~taken[0]] == 0).all() and found[taken[0]].any()
    assert found[:, 0].sum() == pytest.approx(0, abs=1e-12)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="per_token"):
        advantages("per_token", np.zeros((2, 1)), np.ones((2, 1), bool), np.zeros((2, 1), np.int64))


@pytest.mark.parametrize("difference", [1e-12, 1e-9, 3e-6, 1e-4])
def test_nearly_equal_rewards_are_not_blown_up(difference):
    """Dividing by the standard deviation plus 1e-8 makes any of these differences an advantage near 1."""
    rewards = np.full((6, 1), 0.7)
    rewards[0] += difference
    taken = np.ones_like(rewards, dtype=bool)
    scaled = trajectory_advantages(rewards, taken) / spread(rewards.sum(-1), 1e-3)
    assert np.abs(scaled).max() <= 1.01 * difference / 1e-3
    naive = trajectory_advantages(rewards, taken) / (rewards.std() + 1e-8)
    if difference >= 3e-6:
        assert np.abs(naive).max() > 2, "the test must show what the floor prevents"


def test_the_spread_is_the_standard_deviation_and_keeps_its_digits():
    values = np.random.default_rng(4).normal(size=50)
    assert spread(values, 1e-3) == pytest.approx(values.std(ddof=1))
    # One pass (mean of squares minus square of mean) has no digits left here.
    assert spread(values + 1e8, 1e-3) == pytest.approx(values.std(ddof=1), rel=1e-6)
    assert spread(values[:1], 0.25) == spread(np.full(4, 0.3), 0.25) == 0.25


def test_scaling_by_the_group_makes_easy_and_hard_groups_alike_and_by_the_batch_does_not():
    rng = np.random.default_rng(5)
    easy, hard = 0.9 + 0.01 * rng.normal(size=(8, 1)), 0.4 + 0.2 * rng.normal(size=(8, 1))
    taken = np.ones((8, 1), dtype=bool)
    both = spread(np.concatenate([easy, hard]), 1e-3)
    size = {
        name: [np.abs(trajectory_advantages(r, taken)).mean() / d for r, d in zip((easy, hard), divisors, strict=True)]
        for name, divisors in {"group": (spread(easy, 1e-3), spread(hard, 1e-3)), "batch": (both, both)}.items()
    }
    assert size["group"][0] == pytest.approx(size["group"][1], rel=0.5)
    assert size["batch"][1] > 5 * size["batch"][0]
