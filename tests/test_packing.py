"""What turns share is computed once. If sharing changed a context, a position or an image, every
gradient would be a little wrong and nothing would crash.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from learner import small_policy

from ivt_agents.grpo.collect import collect
from ivt_agents.vlm.generation import TokenScorer
from ivt_agents.vlm.packing import break_even, micro_batches, pack, plan_rows
from ivt_agents.vlm.policy import VLMPolicy
from ivt_agents.vlm.turns import Turn
from ivt_env.rollouts import make_vector_env

MERGE = 2


def rollouts(policy: VLMPolicy, view: str = "overlay", samples: tuple[int, ...] = (3, 4), size: int = 4) -> list[Turn]:
    env = make_vector_env("IVT-Scenes-v0", len(samples) * size, split="train", view=view)
    policy.generator.manual_seed(5)
    return [t for episode in collect(env, policy, list(samples), size).turns for t in episode]


@pytest.fixture(
    scope="module", params=[("fresh", "overlay"), ("fresh", "both"), ("prefix", "overlay"), ("prefix", "both")]
)
def played(request) -> tuple[VLMPolicy, list[Turn]]:
    layout, view = request.param
    policy = small_policy()
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02, generator=torch.Generator().manual_seed(1))
    policy.layout = layout
    # The base does not know the question that counts looks, and fills every turn to its limit.
    policy.dialogue.prompts = replace(policy.dialogue.prompts, text=policy.dialogue.prompts.first)
    return policy, rollouts(policy, view)


def pack_turns(policy: VLMPolicy, turns: list[Turn]):
    """Everything shared that can be."""
    return pack(turns, policy.sampling.pad_id, policy.image_token, MERGE)


@pytest.mark.parametrize("worth", [math.inf, 277.0, 30.0])
def test_turns_that_share_a_beginning_score_as_in_rows_of_their_own(played, worth):
    policy, turns = played
    rows = plan_rows(turns, policy.image_token, worth)
    assert len(rows) < len(turns), "nothing is shared: nothing is tested"
    scorer = TokenScorer(policy.model, policy.sampling, True)
    scorer.worth = worth
    with torch.no_grad():
        shared = scorer(turns)
        apart = TokenScorer(policy.model, policy.sampling, True, packing=False)(turns)
    for a, b in zip(shared, apart, strict=True):
        assert (a - b).abs().max() < 5e-5


def test_sharing_stops_where_attention_would_cost_more_than_it_saves():
    """Eight conversations in one row would be one row of eight times the attention."""
    policy = small_policy()
    policy.layout = "prefix"
    turns = rollouts(policy, samples=(3,), size=8)
    episodes = 8
    everything, balanced = (plan_rows(turns, policy.image_token, worth) for worth in (math.inf, 277.0))
    assert len(everything) == 1
    assert 1 < len(balanced) <= episodes < len(turns)
    # The earlier turns of a conversation stand in the row of its last one.
    computed = sum(row.length for row in balanced)
    assert computed < 1.2 * everything[0].length + 60 * len(balanced)
    config = policy.core.config
    assert 250 < break_even(config) < 300


def test_their_gradients_are_equal_too(played):
    policy, turns = played
    found = []
    for packing in (True, False):
        policy.model.zero_grad()
        log_probs, _ = TokenScorer(policy.model, policy.sampling, True, packing)(turns)
        (log_probs * torch.linspace(-1, 1, len(log_probs))).sum().backward()
        found.append({n: p.grad.clone() for n, p in policy.model.named_parameters() if p.requires_grad})
    assert all(g.abs().sum() > 0 for g in found[0].values())
    for name, gradient in found[0].items():
        assert (gradient - found[1][name]).abs().max() <= 1e-4 * gradient.abs().max(), name


def test_every_token_sees_its_own_past_and_nothing_else(played):
    policy, turns = played
    packed = pack_turns(policy, turns)
    assert packed.attention_mask.ndim == 4
    start = 0
    for turn in turns:
        ids = turn.prompt.ids + turn.completion
        for k in range(len(turn.completion)):
            row, column = packed.rows[start + k], packed.columns[start + k]
            sees = packed.attention_mask[row, 0, column] == 0
            past = len(turn.prompt.ids) + k
            assert packed.input_ids[row][sees].sort().values.tolist() == sorted(ids[:past])
            assert packed.position_ids[0, row][sees].sort().values.tolist() == list(range(past))
        start += len(turn.completion)
    assert start == len(packed.sampled)


def test_no_row_of_the_mask_hides_everything(played):
    """Kernels that recompute exp(score - logsumexp) backwards overflow there: NaN gradients on a GPU."""
    policy, turns = played
    packed = pack_turns(policy, turns)
    assert len({row.length for row in plan_rows(turns, policy.image_token)}) > 1, "nothing is padded: nothing is tested"
    assert (packed.attention_mask == 0).any(-1).all()


def test_each_distinct_beginning_is_computed_once(played):
    policy, turns = played
    computed = sum(row.length for row in plan_rows(turns, policy.image_token))
    beginnings = set()
    for turn in turns:
        ids, images = turn.prompt.ids + turn.completion, iter(turn.prompt.images)
        # Rows are made by first image: what stands before it is computed once for each.
        shown, seen = [], (id(turn.prompt.images[0]),)
        for k, token in enumerate(ids):
            if token == policy.image_token and (k == 0 or ids[k - 1] != token):
                seen = (*seen, id(next(images)))
            shown.append(token)
            beginnings.add((tuple(shown), seen))
    alone = sum(len(t.prompt.ids) + len(t.completion) for t in turns)
    assert computed == len(beginnings) < 0.9 * alone


def test_equal_ids_with_other_images_are_not_shared():
    """The same words about another image: placeholders are equal ids, what stands behind them is not."""
    policy = small_policy()
    images = policy.dialogue.process([np.full((96, 96, 3), v, dtype=np.uint8) for v in (10, 200)])
    whole = (0.0, 0.0, 1.0, 1.0)
    first = policy.dialogue.prompt("the ring", None, [(images[0], whole), (images[0], whole)])
    second = policy.dialogue.prompt("the ring", None, [(images[0], whole), (images[1], whole)])
    assert first.ids == second.ids
    turns = [Turn(p, policy.dialogue.completion("x"), finished=True) for p in (first, second)]
    (row,) = plan_rows(turns, policy.image_token)
    assert sorted(row.fresh)[1] == first.ids.index(policy.image_token) + 36 + _between(first.ids, policy.image_token)
    with torch.no_grad():
        shared = TokenScorer(policy.model, policy.sampling, False)(turns)[0]
        apart = torch.cat([TokenScorer(policy.model, policy.sampling, False)([t])[0] for t in turns])
    assert (shared - apart).abs().max() < 2e-5 and (shared[0] - shared[-1]).abs() > 1e-6


def _between(ids: list[int], image_token: int) -> int:
    """Tokens between the first run of placeholders and the second."""
    places = [k for k, i in enumerate(ids) if i == image_token]
    return next(b - a - 1 for a, b in zip(places, places[1:], strict=False) if b > a + 1)


def test_a_turn_that_begins_another_and_its_repetition_keep_their_scores():
    policy = small_policy()
    turns = rollouts(policy, samples=(3,), size=2)
    short = Turn(turns[0].prompt, turns[0].completion[:3], turns[0].log_probs[:3])
    many = [turns[0], short, turns[0], short]
    with torch.no_grad():
        scorer = TokenScorer(policy.model, policy.sampling, True)
        together = scorer(many)[0]
        apart = torch.cat([scorer([t])[0] for t in many])
    assert (together - apart).abs().max() < 2e-5


@pytest.mark.parametrize("size", [1, 3, 64])
def test_micro_batches_hold_every_turn_once_and_keep_to_the_limit(played, size):
    policy, turns = played
    parts = micro_batches(turns, size, policy.image_token)
    assert sorted(i for part in parts for i in part) == list(range(len(turns)))
    assert max(map(len, parts)) <= size
