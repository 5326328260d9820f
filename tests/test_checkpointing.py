"""Checkpointing may change memory and speed, never the gradient.

Checkpointing that loses the gradients of layers or adapters, or that is active under rollouts (where it
throws the key-value cache away), crashes nothing: the policy merely learns something else, or nothing.
"""

from __future__ import annotations

import pytest
import torch

from ivt_agents.training.options import TrainingOptions
from ivt_agents.vlm.adapters import make_trainable
from ivt_agents.vlm.generation import TokenScorer, core_of
from ivt_agents.vlm.load import checkpoint_layers, load_policy
from ivt_agents.vlm.policy import VLMPolicy
from ivt_env.rollouts import make_vector_env


def learner(lora: bool) -> VLMPolicy:
    policy = load_policy("tiny", temperature=1.0, max_new_tokens=10, attention="sdpa")
    torch.manual_seed(0)
    policy.model = make_trainable(policy.model, 4 if lora else 0)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    policy.frozen_vision = lora
    return policy


def turns_of(policy: VLMPolicy, count: int = 6) -> list:
    env = make_vector_env("IVT-Scenes-v0", count, split="train")
    seen, _ = env.reset(seed=0, options={"index": [i // 2 for i in range(count)]})
    policy.generator.manual_seed(1)
    policy.act(seen)
    return [t for t in policy.turns if t is not None]


def loss_and_gradients(policy: VLMPolicy, turns: list) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    policy.model.train()
    loss = -TokenScorer(policy.model, policy.sampling, policy.frozen_vision)(turns)[0].mean()
    loss.backward()
    named = [(n, p) for n, p in policy.model.named_parameters() if p.requires_grad]
    return loss.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


class Recomputed:
    """Counts how often decoder layers run."""

    def __init__(self, policy: VLMPolicy) -> None:
        self.runs = 0
        for layer in core_of(policy.model).model.language_model.layers:
            layer.self_attn.register_forward_hook(self.count)

    def count(self, *_: object) -> None:
        self.runs += 1


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_checkpointing_gives_the_same_loss_and_gradients(lora):
    plain, saving = learner(lora), learner(lora)
    checkpoint_layers(saving.model)
    turns = turns_of(plain)
    runs = Recomputed(saving)
    (wanted, gradients), (loss, found) = loss_and_gradients(plain, turns), loss_and_gradients(saving, turns)
    layers = len(core_of(saving.model).model.language_model.layers)
    assert runs.runs == 2 * layers, "each layer is computed once more"
    assert torch.equal(loss, wanted)
    assert len(gradients) == len(found) == sum(p.requires_grad for p in plain.model.parameters())
    for name, gradient in gradients.items():
        assert torch.equal(found[name], gradient), name
    assert all(bool(g.any()) for n, g in found.items() if "lora_" in n)


def test_asking_the_embeddings_for_gradients_changes_nothing():
    """Reentrant checkpointing needs that; ours does not, and the first layer is spared a backward pass."""
    ours, theirs = learner(True), learner(True)
    for policy in (ours, theirs):
        checkpoint_layers(policy.model)
    core_of(theirs.model).enable_input_require_grads()
    turns = turns_of(ours)
    (wanted, gradients), (loss, found) = loss_and_gradients(ours, turns), loss_and_gradients(theirs, turns)
    assert torch.equal(loss, wanted) and all(torch.equal(found[n], g) for n, g in gradients.items())


def test_checkpointing_is_never_active_in_a_rollout_and_the_mode_is_given_back():
    plain, saving = learner(True), learner(True)
    checkpoint_layers(saving.model)
    saving.model.train()
    seen = []
    core_of(saving.model).model.language_model.layers[0].register_forward_pre_hook(
        lambda module, *_: seen.append((module.training, torch.is_grad_enabled()))
    )
    wanted, found = turns_of(plain), turns_of(saving)
    assert [t.completion for t in found] == [t.completion for t in wanted]
    assert [t.log_probs for t in found] == [t.log_probs for t in wanted]
    assert len(seen) > 5 and set(seen) == {(False, False)}
    assert saving.model.training


def test_checkpointing_keeps_less_for_the_backward_pass():
    def kept(policy: VLMPolicy, turns: list) -> int:
        sizes: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        policy.model.train()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            out = TokenScorer(policy.model, policy.sampling, True)(turns)
        del out
        return sum(sizes.values())

    plain, saving = learner(True), learner(True)
    checkpoint_layers(saving.model)
    turns = turns_of(plain)
    assert kept(saving, turns) < 0.7 * kept(plain, turns)


def test_the_option_reaches_the_model():
    policy = learner(True)
    TrainingOptions().prepare_update(policy.model)
    assert not core_of(policy.model).is_activation_checkpointing
    TrainingOptions(gradient_checkpointing=True).prepare_update(policy.model)
    assert core_of(policy.model).is_activation_checkpointing
