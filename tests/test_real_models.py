"""What a large model needs and a small one does not: weights in fewer bits, and adapters that stay adapters.

If these claims are false nothing crashes: a rounded merge is another policy than the trained one, a
reference without its warm start pulls the policy back to the base, and rollouts that compute otherwise
than the update make every first ratio wrong.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from ivt_agents.grpo.trainer import GRPOTrainer
from ivt_agents.training.folder import RunError
from ivt_agents.training.options import TrainingOptions
from ivt_agents.training.run import MetricsLog
from ivt_agents.vlm.adapters import add_lora, drop_reference, has_reference, make_trainable, merged, reference_adapter
from ivt_agents.vlm.footprint import count_parts, weight_bytes
from ivt_agents.vlm.generation import TokenScorer, core_of
from ivt_agents.vlm.load import PolicyError, load_policy
from ivt_agents.vlm.policy import VLMPolicy
from ivt_agents.vlm.precision import can_merge, stored_as
from ivt_agents.vlm.prompts import load_prompts
from ivt_agents.vlm.turns import Turn
from ivt_env.rollouts import make_vector_env
from tests.learner import small_config

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason='pip install "ivt-env[quantize]"'
)
FORMATS = [
    pytest.param({"dtype": "bfloat16"}, id="bfloat16"),
    pytest.param({"quantize": "nf4"}, id="nf4", marks=needs_bitsandbytes),
]


def moved(model, seed: int = 0):
    """An adapter that does something: a fresh one is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and "reference" not in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def observations(count: int = 6):
    env = make_vector_env("IVT-Scenes-v0", count, split="val")
    return env.reset(seed=3, options={"index": list(range(count))})[0]


def played(policy: VLMPolicy, count: int = 6) -> list[Turn]:
    policy.generator.manual_seed(1)
    policy.act(observations(count))
    turns = [t for t in policy.turns if t is not None]
    assert len(turns) == count and sum(len(t.completion) for t in turns) > 20
    return turns


def scored(policy: VLMPolicy, turns: list[Turn]) -> torch.Tensor:
    with torch.no_grad():
        return TokenScorer(policy.model, policy.sampling, frozen_vision=False)(turns)[0]


def adapted(folder, **options) -> VLMPolicy:
    """The tiny model with an adapter of rank 4 that does something, saved."""
    policy = load_policy("tiny", temperature=1.0, **options)
    policy.model.requires_grad_(False)
    policy.model = moved(add_lora(policy.model, 4))
    policy.save(folder)
    return policy


# --- Weights ----------------------------------------------------------------------------------------


@needs_bitsandbytes
def test_nf4_quantises_the_decoder_alone_and_takes_the_bytes_that_the_dry_run_reckons_with():
    import bitsandbytes

    plain, model = load_policy("tiny").model, load_policy("tiny", quantize="nf4").model
    modules = [(n, m) for n, m in model.named_modules() if hasattr(m, "weight")]
    quantised = {n for n, m in modules if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert len(quantised) == 7 * len(model.model.language_model.layers)
    assert all("language_model.layers" in n for n in quantised)
    rest = [p for n, p in model.named_parameters() if n.removesuffix(".weight") not in quantised]
    assert {p.dtype for p in rest} == {torch.bfloat16}, "vision, embeddings, norms and head"
    layer = model.model.language_model.layers[0].self_attn.q_proj
    state = layer.weight.quant_state
    assert state.quant_type == "nf4" and state.nested and layer.compute_dtype == torch.bfloat16
    states = [p.quant_state for p in model.parameters() if getattr(p, "quant_state", None) is not None]
    held = sum(p.nbytes for p in model.parameters())
    held += sum(s.absmax.nbytes + s.state2.absmax.nbytes for s in states)
    assert held == pytest.approx(weight_bytes(count_parts(plain), "nf4"), rel=0.01)


@pytest.mark.parametrize("options", FORMATS)
def test_a_model_in_few_bits_says_nearly_what_the_full_one_says_and_its_float32_adapters_learn(options):
    """Rounding is noise; a wrong scale would be nonsense. The bound is a third of the policy's own entropy."""
    full, policy = (load_policy("tiny", temperature=1.0, **o) for o in ({}, options))
    turns = played(full)
    difference = (scored(policy, turns) - scored(full, turns)).abs().mean()
    assert 0 < difference < 0.5
    policy.model = make_trainable(policy.model, 4)
    trained = {n: p for n, p in policy.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32} and all("lora_" in n for n in trained)
    TokenScorer(policy.model, policy.sampling, frozen_vision=True)(turns)[0].sum().backward()
    grown = [n for n, p in trained.items() if "lora_B" in n and p.grad is not None and bool(p.grad.any())]
    assert len(grown) == 7 * 4, "every matrix of every layer learns"


@pytest.mark.parametrize("options", FORMATS)
def test_a_saved_policy_is_loaded_as_it_was_trained_and_refused_on_other_weights(options, tmp_path):
    policy = adapted(tmp_path / "policy", **options)
    recorded = json.loads((tmp_path / "policy" / "policy.json").read_text())
    assert recorded | stored_as(policy.model) == recorded
    assert load_prompts(tmp_path / "policy" / "policy.json").prompts == policy.dialogue.prompts
    again = load_policy(tmp_path / "policy", temperature=1.0)
    assert stored_as(again.model) == stored_as(policy.model)
    turns = played(policy)
    assert torch.equal(scored(again, turns), scored(policy, turns))
    if "quantize" in options:
        with pytest.raises(PolicyError, match="would be another policy"):
            load_policy(tmp_path / "policy", quantize="none")
    with pytest.raises(RunError, match="give --lora-r 4"):
        make_trainable(policy.model, 8)


# --- Adapters ---------------------------------------------------------------------------------------


def test_on_float32_weights_an_adapter_is_merged_and_the_policy_stays_the_same(tmp_path):
    policy = adapted(tmp_path / "policy")
    turns = played(policy)
    wanted = scored(policy, turns)
    assert can_merge(policy.model)
    policy.model = make_trainable(policy.model, 8, reference=True)
    assert not has_reference(policy.model), "without adapter is the reference"
    assert (scored(policy, turns) - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("options", FORMATS)
def test_on_other_weights_merging_would_change_the_policy_so_the_adapter_itself_goes_on(options, tmp_path):
    policy = adapted(tmp_path / "policy", **options)
    turns = played(policy)
    wanted = scored(policy, turns)
    rounded = copy.deepcopy(policy)
    rounded.model = rounded.model.merge_and_unload()
    assert (scored(rounded, turns) - wanted).abs().mean() > 1e-3, "what would be lost"
    policy.model = make_trainable(policy.model, 4, reference=True)
    assert torch.equal(scored(policy, turns), wanted)
    assert all("default" in n for n, p in policy.model.named_parameters() if p.requires_grad)
    assert merged(policy.model) is policy.model


@pytest.mark.parametrize("options", FORMATS)
def test_the_frozen_copy_remembers_where_training_began_and_is_not_saved(options, tmp_path):
    policy = adapted(tmp_path / "policy", **options)
    turns = played(policy)
    wanted = scored(policy, turns)
    policy.model = make_trainable(policy.model, 4, reference=True)
    before = [n for n, p in policy.model.named_parameters() if p.requires_grad]
    moved(policy.model, seed=5)
    now = scored(policy, turns)
    assert (now - wanted).abs().max() > 1e-2
    with reference_adapter(policy.model):
        assert torch.equal(scored(policy, turns), wanted)
        assert not any(p.requires_grad for p in policy.model.parameters())
    assert torch.equal(scored(policy, turns), now)
    assert before == [n for n, p in policy.model.named_parameters() if p.requires_grad]
    drop_reference(policy.model)
    policy.save(tmp_path / "later")
    assert sorted(p.name for p in (tmp_path / "later").iterdir() if p.is_dir()) == []
    assert torch.equal(scored(load_policy(tmp_path / "later", temperature=1.0), turns), now)


@pytest.mark.parametrize("options", FORMATS)
def test_grpo_goes_on_with_the_warm_start_adapter_and_its_first_kl_is_zero(options, tmp_path):
    adapted(tmp_path / "policy", **options)
    policy = load_policy(tmp_path / "policy", temperature=1.0, max_new_tokens=14)
    policy.model = make_trainable(policy.model, 4, reference=True)
    frozen = {n: p.clone() for n, p in policy.model.named_parameters() if not p.requires_grad}
    config = small_config(beta=0.04, learning_rate=1e-2)
    env = make_vector_env("IVT-Scenes-v0", config.prompts * config.num_generations, split="train")
    log = MetricsLog(tmp_path / "run", enabled=False)
    trainer = GRPOTrainer(policy, env, config, Accelerator(cpu=True), log, tmp_path / "run")
    first, second = trainer.train_step(), trainer.train_step()
    assert first["train/kl"] == 0 and first["train/grad_norm"] > 0 and second["train/kl"] > 0
    assert any("reference" in n for n in frozen)
    assert all(torch.equal(p, frozen[n]) for n, p in policy.model.named_parameters() if n in frozen)


# --- Sampler and scorer -----------------------------------------------------------------------------


def drift(sampling, scoring, head: bool = True, attention: str = "sdpa") -> tuple[float, float]:
    """Mean and largest difference of log-probabilities over two steps of 24 episodes."""
    policy = load_policy("tiny", temperature=1.0, attention=attention)
    if not head:
        core_of(policy.model).lm_head.__class__ = torch.nn.Linear
    policy.autocast = sampling
    env = make_vector_env("IVT-Scenes-v0", 24, split="train")
    seen, _ = env.reset(seed=0, options={"index": [i // 8 for i in range(24)]})
    policy.generator.manual_seed(5)
    turns: list[Turn] = []
    for _ in range(2):
        actions = policy.act(seen)
        turns += [t for t in policy.turns if t is not None]
        seen, *_ = env.step({"box": actions["box"], "stop": np.zeros(24, dtype=np.int64)})
    for turn in turns:
        for image in turn.prompt.images:
            image.features = None  # the update must not profit from what the rollout has kept
    with scoring():
        found = scored(policy, turns)
    difference = (found - torch.tensor([v for t in turns for v in t.log_probs])).abs()
    return float(difference.mean()), float(difference.max())


def bf16():
    return torch.autocast("cpu", torch.bfloat16)


def test_rollouts_under_the_autocast_of_the_update_and_a_float32_head_bring_sampler_and_scorer_together():
    """With sdpa, whose sums depend on the batch's shape as a GPU's do."""
    apart = drift(nullcontext, bf16, head=False)[0]
    alike = drift(bf16, bf16, head=False)[0]
    both = drift(bf16, bf16)[0]
    exact = drift(nullcontext, nullcontext)
    assert both < 0.6 * alike and alike < 0.8 * apart
    assert both < 0.35 * apart
    assert exact[1] < 1e-4


def test_where_the_sums_do_not_depend_on_the_shape_only_a_trace_is_left():
    alike, apart = (drift(sampling, bf16, attention="eager")[0] for sampling in (bf16, nullcontext))
    assert alike < 1e-3 and alike < 0.05 * apart


def test_the_trainer_samples_as_it_scores(tmp_path):
    """In bfloat16 a fused kernel rounds the two passes a little further apart than plain products do."""
    found = {}
    for precision, attention in (("no", "sdpa"), ("bf16", "sdpa"), ("bf16", "eager")):
        policy = load_policy("tiny", temperature=1.0, max_new_tokens=14, attention=attention)
        policy.model = make_trainable(policy.model, 4)
        config = small_config()
        env = make_vector_env("IVT-Scenes-v0", config.prompts * config.num_generations, split="train")
        AcceleratorState._reset_state(True)  # one number format a process, but for this
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        log = MetricsLog(tmp_path / f"{precision}-{attention}", enabled=False)
        metrics = GRPOTrainer(policy, env, config, accelerator, log, tmp_path / f"{precision}-{attention}").train_step()
        found[precision, attention] = metrics["train/sampler_scorer_difference"]
    assert found["no", "sdpa"] < 1e-5
    assert found["bf16", "eager"] < 1e-3 and found["bf16", "sdpa"] < 2e-3, "0.010 where rollouts stay in float32"


# --- Options ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "rank", "said"),
    [
        ({"quantize": "nf4"}, 0, "lora_r 0 with weights in nf4"),
        ({"dtype": "bfloat16"}, 0, "lora_r 0 with weights in bfloat16"),
        ({"quantize": "nf4", "dtype": "float32"}, 8, "dtype float32 with quantize nf4"),
        ({"attn_implementation": "flash_attention_2"}, 8, "needs a GPU"),
    ],
)
def test_formats_that_contradict_each_other_or_cannot_be_had_are_refused(options, rank, said):
    with pytest.raises(ValueError, match=said):
        TrainingOptions(**options).check_model(rank)


def test_formats_that_are_unknown_or_need_a_package_are_refused_with_what_there_is(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else find(n, *a))
    for options, said in (
        ({"dtype": "float16"}, "bfloat16"),
        ({"quantize": "int8"}, "nf4"),
        ({"attention": "x"}, "sdpa"),
        ({"quantize": "nf4"}, r"ivt-env\[quantize\]"),
    ):
        with pytest.raises(PolicyError, match=said):
            load_policy("tiny", **options)
    with pytest.raises(RunError, match="--dtype float32"):
        make_trainable(load_policy("tiny", dtype="bfloat16").model, 0)
