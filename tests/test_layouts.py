"""One prompt a step, or one growing conversation. The layouts must differ in what the model sees of the
past and in nothing else; a conversation continued on a cache must be the conversation computed anew.
A wrong position or a forgotten image shows nowhere but in worse answers.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from learner import small_policy, small_trainer
from test_grpo import gradients_of, move_adapter

from ivt_agents.grpo.collect import Groups, collect
from ivt_agents.sft.demonstrations import Demonstration
from ivt_agents.sft.trainer import to_turns
from ivt_agents.vlm.adapters import folded
from ivt_agents.vlm.cache import Memory, refuse_inexact_cache
from ivt_agents.vlm.codec import parse_action
from ivt_agents.vlm.generation import TokenScorer, generate
from ivt_agents.vlm.load import load_policy
from ivt_agents.vlm.policy import VLMPolicy
from ivt_env import boxes
from ivt_env.rollouts import make_vector_env, rollout


@cache
def play(layout: str, view: str = "overlay", max_steps: int = 3) -> tuple[VLMPolicy, Groups]:
    """Eight episodes; a test that changes the policy names a length of its own."""
    policy = small_policy()
    policy.layout = layout
    env = make_vector_env("IVT-Scenes-v0", 8, split="train", view=view, max_steps=max_steps)
    policy.generator.manual_seed(7)
    return policy, collect(env, policy, [3, 4], 4)


def test_first_turns_are_the_same_in_both_layouts():
    (_, fresh), (_, prefix) = play("fresh", "both"), play("prefix", "both")
    for a, b in zip(fresh.turns, prefix.turns, strict=True):
        assert a[0].prompt.ids == b[0].prompt.ids
        assert a[0].completion == b[0].completion
        assert a[0].log_probs == b[0].log_probs
    assert np.array_equal(fresh.rewards[:, :, 0], prefix.rewards[:, :, 0])


def test_episodes_of_one_action_give_the_same_gradient_in_both_layouts(tmp_path):
    found = {}
    for layout in ("fresh", "prefix"):
        policy, groups = play(layout, max_steps=1)
        move_adapter(policy)
        rows = [t for episode in groups.turns for t in episode]
        found[layout] = gradients_of(
            small_trainer(tmp_path / layout, policy), rows, list(np.linspace(-1, 1, len(rows)))
        )
    for name, gradient in found["fresh"].items():
        assert torch.equal(gradient, found["prefix"][name]), name


def test_a_conversation_holds_what_was_sampled_and_every_image_in_its_order():
    policy, groups = play("prefix")
    longer = [episode for episode in groups.turns if len(episode) == 3]
    assert longer, "no episode of three turns: nothing is tested"
    for episode in longer:
        for before, after in zip(episode, episode[1:], strict=False):
            said = before.prompt.ids + before.completion
            assert after.prompt.ids[: len(said)] == said
            assert after.prompt.images[:-1] == before.prompt.images
        words = policy.tokenizer.decode(episode[2].prompt.ids)
        assert words.count("<|im_start|>user") == words.count("<|vision_start|>") == 3
        # An answer that ran into the limit gets its end from the template, and that token carries no loss.
        assert words.count("<|im_end|>\n") + words.count("<|endoftext|>\n") == 5


def test_a_continued_cache_gives_what_computing_everything_anew_gives():
    """Greedy, so that equal logits give equal ids; the log-probabilities are compared as numbers."""
    found = []
    for reuse in (True, False):
        policy = small_policy()
        policy.layout, policy.reuse = "prefix", reuse
        policy.set_temperature(0.0)
        env = make_vector_env("IVT-Scenes-v0", 6, split="val", view="both")
        found.append(collect(env, policy, list(range(6)), 1).turns)
    assert max(map(len, found[0])) == 3, "no episode went on: nothing is tested"
    for with_cache, anew in zip(*found, strict=True):
        for a, b in zip(with_cache, anew, strict=True):
            assert a.prompt.ids == b.prompt.ids and a.completion == b.completion
            assert np.allclose(a.log_probs, b.log_probs, atol=2e-5)


@pytest.mark.parametrize("layout", ["fresh", "prefix"])
def test_what_was_sampled_is_what_is_scored(layout):
    policy, groups = play(layout, "both")
    turns = [t for episode in groups.turns for t in episode]
    with torch.no_grad():
        scored, _ = TokenScorer(policy.model, policy.sampling, True)(turns)
    assert (scored - torch.tensor([v for t in turns for v in t.log_probs])).abs().max() < 5e-5


def test_memories_of_unlike_lengths_side_by_side_change_nothing():
    policy = small_policy()
    whole = (0.0, 0.0, 1.0, 1.0)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (*s, 3), dtype=np.uint8) for s in ((96, 96), (64, 96), (96, 96), (80, 64))]
    encoded = policy.dialogue.process(images)
    asked = ["the ring", "the second large striped circle from the left"]
    prompts = [policy.dialogue.prompt(e, None, [(p, whole)]) for e, p in zip(asked, encoded[:2], strict=True)]
    greedy = replace(policy.sampling, temperature=0.0)
    memories: list[Memory | None] = [None, None]
    turns = generate(policy.core.eval(), prompts, greedy, None, True, memories)
    assert [m.length for m in memories if m] == [len(t.prompt.ids) + len(t.completion) - 1 for t in turns]
    later = [
        policy.dialogue.following(t, e, (0.1, 0.2, 0.6, 0.9), [(p, whole)])
        for t, e, p in zip(turns, asked, encoded[2:], strict=True)
    ]
    assert len(later[0].ids) != len(later[1].ids)
    # One of them has forgotten everything and is computed anew beside the other.
    for kept in (memories, [memories[0], None], [None, memories[1]]):
        continued = generate(policy.core, later, greedy, None, True, list(kept))
        anew = generate(policy.core, later, greedy, None, True)
        for a, b in zip(continued, anew, strict=True):
            assert a.completion == b.completion and np.allclose(a.log_probs, b.log_probs, atol=2e-5)


def test_a_model_whose_cache_forgets_is_refused():
    class Sliding:
        config = small_policy().core.config

    config = type(Sliding.config).from_dict(Sliding.config.to_dict())
    config.text_config.sliding_window, config.text_config.layer_types = 16, ["sliding_attention"] * 4
    Sliding.config = config
    with pytest.raises(ValueError, match="DynamicSlidingWindowLayer.*reuse=False"):
        refuse_inexact_cache(Sliding)


def test_a_template_that_rewrites_earlier_turns_is_refused():
    policy = small_policy()
    policy.tokenizer.chat_template = policy.tokenizer.chat_template.replace(
        "{% for m in messages %}", "{% for m in messages[-1:] %}"
    )
    policy.layout = "prefix"
    env = make_vector_env("IVT-Scenes-v0", 2, split="train")
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        collect(env, policy, [1], 2)


def test_a_new_episode_begins_a_new_conversation():
    policy = small_policy()
    policy.layout = "prefix"
    env = make_vector_env("IVT-Scenes-v0", 2, split="train")
    for _ in range(2):
        first = collect(env, policy, [1], 2).turns
    assert all(episode[0].prompt.ids == first[0][0].prompt.ids for episode in first)
    assert len(first[0][0].prompt.images) == 1
    # rollout() plays in waves and resets between them, too.
    assert len(rollout(env, policy, 4, indices=[1, 2, 3, 4])) == 4


@pytest.mark.parametrize("layout", ["fresh", "prefix"])
@pytest.mark.parametrize("view", ["overlay", "closeup", "both"])
def test_a_demonstration_looks_like_the_rollout_it_teaches(layout, view):
    """What SFT teaches in a layout and view is what the policy meets there: ids and pixels."""
    policy = load_policy("tiny", layout=layout)
    env = make_vector_env("IVT-Scenes-v0", 1, split="train", view=view)
    dataset = env.dataset
    boxes_said = [(0.1, 0.2, 0.5, 0.7), (0.2, 0.2, 0.6, 0.75)]
    observations, _ = env.reset(options={"index": [5]})
    policy.reset(np.ones(1, dtype=bool))
    for box in boxes_said:
        (prompt,) = policy.prompts_for(observations, [0])
        views = list(zip(prompt.images[-len(prompt.windows) :], prompt.windows, strict=True))
        (said,) = to_turns_like(policy, prompt, policy.dialogue.action_text(box, views))
        policy._said = {0: (said, None)} if layout == "prefix" else {}
        decoded = policy.dialogue.box_of(parse_action(policy.text(said)), prompt)
        observations, *_ = env.step({"box": np.array([decoded], dtype=np.float32), "stop": np.zeros(1, dtype=np.int64)})
    (rolled,) = policy.prompts_for(observations, [0])
    shown = tuple(float(v) for v in env.games[0].box)
    first = tuple(round(v, 3) for v in boxes_said[0])
    demonstration = Demonstration("scenes", "train", 5, "train-5", shown, dataset[5].box, before=(first,))
    (turn,) = to_turns(policy, env.screen, dataset, [demonstration])
    assert turn.prompt.ids == rolled.ids
    for a, b in zip(turn.prompt.images, rolled.images, strict=True):
        assert (a.patches == b.patches).all()


def to_turns_like(policy, prompt, text):
    from ivt_agents.vlm.turns import Turn

    return [Turn(prompt, policy.dialogue.completion(text), finished=True)]


def test_an_answer_in_the_closeups_frame_is_a_box_of_the_whole_image():
    policy = load_policy("tiny")
    env = make_vector_env("IVT-Scenes-v0", 1, split="train", view="both")
    box = (0.3, 0.4, 0.45, 0.6)
    observations, _ = env.reset(options={"index": [5], "initial_box": [box]})
    (prompt,) = policy.prompts_for(observations, [0])
    assert len(prompt.images) == 2 and prompt.windows[0] == (0, 0, 1, 1)
    views = list(zip(prompt.images, prompt.windows, strict=True))
    for number in (1, 2):
        text = policy.dialogue.action_text(box, views, number)
        back = policy.dialogue.box_of(parse_action(text), prompt)
        extent = views[number - 1][1][2] - views[number - 1][1][0]
        assert np.allclose(back, box, atol=0.0006 * extent), text
    assert text.startswith('{"image": 2, ')
    assert boxes.iou(back, box) > 0.99
    third = parse_action('{"image": 3, "bbox_2d": [1, 2, 3, 4]}')
    assert policy.dialogue.box_of(third, prompt) is None
    for wrong in ("0", "true", '"2"', "1.5"):
        assert parse_action(f'{{"image": {wrong}, "bbox_2d": [1, 2, 3, 4]}}').failed


def test_folding_an_adapter_for_a_rollout_changes_neither_what_is_sampled_nor_the_weights():
    """The sampler runs on W + BA, the scorer on W and BA apart; afterwards every weight is what it was."""
    policy = small_policy()
    move_adapter(policy)
    before = {n: p.detach().clone() for n, p in policy.model.named_parameters()}
    env = make_vector_env("IVT-Scenes-v0", 4, split="train")
    turns = [t for episode in collect(env, policy, [3], 4).turns for t in episode]
    assert all(torch.equal(before[n], p) for n, p in policy.model.named_parameters())
    scorer = TokenScorer(policy.model, policy.sampling, True)
    log_probs, _ = scorer(turns)
    assert (log_probs - torch.tensor([v for t in turns for v in t.log_probs])).abs().max() < 5e-5
    log_probs.sum().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in policy.model.named_parameters() if "lora_" in n)
    with folded(policy.model):
        plain = [m for m in policy.model.modules() if getattr(m, "merged", False)]
        assert len(plain) == 7 * 4
        with torch.no_grad():
            alone, _ = scorer(turns)
    assert (alone - log_probs).abs().max() < 5e-5


def test_no_conversation_is_kept_behind_the_end_of_its_episode():
    policy, groups = play("prefix")
    assert policy._said == {}
    env = make_vector_env("IVT-Scenes-v0", 2, split="train")
    observations, _ = env.reset(seed=0)
    policy.act(observations)
    assert set(policy._said) == {0, 1}
    policy.act({**observations, "active": np.array([True, False])})
    assert set(policy._said) == {0}
    actions = policy.act({**observations, "active": np.zeros(2, dtype=bool)})
    assert policy._said == {} and np.isnan(actions["box"]).all()


def test_adapters_that_are_more_than_a_product_are_not_folded():
    policy = small_policy()
    layer = next(m for m in policy.model.modules() if hasattr(m, "get_delta_weight"))
    before = layer.base_layer.weight.data_ptr()
    layer.lora_bias["default"] = True
    with folded(policy.model):
        assert not any(getattr(m, "merged", False) for m in policy.model.modules())
        assert layer.base_layer.weight.data_ptr() == before
    layer.lora_bias["default"] = False
    with pytest.raises(RuntimeError, match="in the middle"), folded(policy.model):
        assert layer.merged
        raise RuntimeError("in the middle")
    assert not layer.merged and layer.base_layer.weight.data_ptr() == before
