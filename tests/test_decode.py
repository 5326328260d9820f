"""Decoding at fixed places: the same completions and log-probabilities as the loop whose cache grows.

A GPU records one token's pass as a CUDA graph; here the same code runs it anew each time.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ivt_agents.vlm import decode
from ivt_agents.vlm.adapters import add_lora
from ivt_agents.vlm.cache import RoomyLayer, make_cache
from ivt_agents.vlm.decode import decode_fixed, fixed_decoder
from ivt_agents.vlm.generation import Sampling, TokenScorer, core_of, generate
from ivt_agents.vlm.load import load_policy
from ivt_agents.vlm.policy import VLMPolicy
from ivt_agents.vlm.tiny import build_model, tiny_tokenizer
from ivt_env.rollouts import make_vector_env


@pytest.fixture(scope="module")
def policy() -> VLMPolicy:
    return load_policy("tiny", attention="sdpa", device="cpu", temperature=1.0, max_new_tokens=30)


@pytest.fixture(scope="module")
def prompts(policy):
    env = make_vector_env("IVT-Scenes-v0", 6, split="val")
    seen, _ = env.reset(seed=0)
    asked = policy.prompts_for(seen, range(6))
    assert len({len(p.ids) for p in asked}) > 1, "all prompts are equally long: padding is not tested"
    return asked


def grown(policy, prompts, sampling, decoder, memories=None):
    generator = torch.Generator().manual_seed(5)
    return generate(policy.core, prompts, sampling, generator, False, memories, decoder)


def test_completions_are_those_of_the_growing_loop_when_greedy(policy, prompts):
    sampling = replace(policy.sampling, temperature=0.0)
    asked = [*prompts, *prompts[:2]]
    plain, fixed = (grown(policy, asked, sampling, d) for d in (None, decode_fixed))
    assert [t.completion for t in plain] == [t.completion for t in fixed]
    assert all(t.finished for t in fixed) and all(len(t.completion) < 30 for t in fixed)
    for a, b in zip(plain, fixed, strict=True):
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-5)
        assert b.stop_probability == pytest.approx(a.stop_probability, abs=1e-5)


def test_one_generator_gives_the_same_draws_while_no_row_has_ended(policy, prompts):
    # Rows that ended are freed by the growing loop, which then draws fewer numbers.
    sampling = replace(policy.sampling, temperature=1.3, end_ids=())
    plain, fixed = (grown(policy, prompts, sampling, d) for d in (None, decode_fixed))
    assert [t.completion for t in plain] == [t.completion for t in fixed]
    assert {len(t.completion) for t in fixed} == {30} and not any(t.finished for t in fixed)


def test_sampled_log_probabilities_are_those_of_the_scorer_in_both_layouts(policy, prompts):
    sampling = replace(policy.sampling, temperature=1.0)
    memories = [None] * 6
    first = grown(policy, prompts, sampling, decode_fixed, memories)
    again = [
        policy.dialogue.following(turn, "the red ring", (0.1, 0.2, 0.5, 0.6), [(turn.prompt.images[0], (0, 0, 1, 1))])
        for turn in first
    ]
    assert len({m.length for m in memories}) > 1
    second = grown(policy, again, sampling, decode_fixed, memories)
    scorer = TokenScorer(policy.core, sampling, frozen_vision=False)
    for turns in (first, second):
        scored, _ = scorer(turns)
        np.testing.assert_allclose([v for t in turns for v in t.log_probs], scored.detach(), atol=1e-4)


def test_memories_equal_those_of_the_growing_loop(policy, prompts):
    sampling = replace(policy.sampling, temperature=0.0)
    kept = []
    for decoder in (None, decode_fixed):
        memories = [None] * 6
        grown(policy, prompts, sampling, decoder, memories)
        kept.append(memories)
    for plain, fixed in zip(*kept, strict=True):
        assert plain.length == fixed.length
        for (k, v), (other_k, other_v) in zip(plain.layers, fixed.layers, strict=True):
            torch.testing.assert_close(k, other_k, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(v, other_v, atol=1e-4, rtol=1e-4)


def test_the_pass_of_a_token_moves_no_tensor(policy, prompts, monkeypatch):
    """What a graph reads and writes must lie where it lay when it was recorded."""
    places = []

    class Watched(decode._Decoder):
        def _advance(self):
            super()._advance()
            held = [v for v in vars(self).values() if isinstance(v, torch.Tensor)]
            held += [t for layer in self.cache.layers for t in (layer.keys, layer.values)]
            places.append([t.data_ptr() for t in held])

    monkeypatch.setattr(decode, "_Decoder", Watched)
    grown(policy, prompts, replace(policy.sampling, end_ids=()), decode_fixed)
    assert len(places) == 29 and all(p == places[0] for p in places)


def test_the_prefill_gives_its_memory_back(policy, prompts):
    layers = []

    def look(model, cache, *rest):
        layers.extend(cache.layers)
        decode_fixed(model, cache, *rest)

    grown(policy, prompts, policy.sampling, look)
    assert layers and all(isinstance(x, RoomyLayer) and x.keys is None and x._blocks is None for x in layers)


def test_a_cpu_keeps_the_growing_loop(policy):
    assert fixed_decoder(policy.core) is None and policy.decode is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("layout", ["fresh", "prefix"])
def test_a_replayed_graph_gives_the_log_probabilities_of_the_scorer(layout):
    policy = load_policy("tiny", device="cuda", temperature=1.0, layout=layout)
    assert policy.decode is decode_fixed
    env = make_vector_env("IVT-Scenes-v0", 16, split="val")
    seen, _ = env.reset(seed=0)
    for _ in range(3):
        seen, *_ = env.step(policy.act(seen))
        scored, _ = TokenScorer(policy.core, policy.sampling, True)(policy.turns)
        sampled = torch.tensor([v for t in policy.turns for v in t.log_probs])
        torch.testing.assert_close(sampled, scored.detach().cpu(), atol=1e-3, rtol=0)


def test_the_pass_of_a_token_never_waits_for_the_device():
    """On the meta device a number that is read, or a tensor that lies elsewhere, is an error; so it is in a graph."""
    model = build_model(tiny_tokenizer()).requires_grad_(False)
    model.set_attn_implementation("sdpa")
    model = add_lora(model, 4)
    core = core_of(model.to("meta"))
    cache, text = make_cache(core, 0), core.config.text_config
    for number in range(text.num_hidden_layers):
        columns = torch.zeros(2, text.num_key_value_heads, 40, text.head_dim, device="meta")
        cache.update(columns, columns, number)
    rows = torch.zeros(3, dtype=torch.long, device="meta")
    mask, last = (torch.zeros(*shape, dtype=torch.long, device="meta") for shape in ((3, 40), (4, 3)))
    sampling = Sampling(max_new_tokens=12, temperature=0.7, suppressed=(1, 2), stop_id=5)
    decoder = decode._Decoder(core, cache, rows, mask, last, sampling, None)
    decoder._choose(torch.zeros(3, text.vocab_size, device="meta"))
    for _ in range(3):
        decoder._advance()
    with pytest.raises(RuntimeError, match="meta"):
        decoder.ids.sum().item()
