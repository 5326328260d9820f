"""First answers of another model: a policy that learned to look and correct gives the base's own first answers.

Silent when false: the loop's gain is measured from a first box that training made worse, or better.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from learner import small_policy, small_trainer

from ivt_agents.grpo.collect import collect
from ivt_agents.sft import train as train_sft
from ivt_agents.training.folder import RunError
from ivt_agents.vlm.load import PolicyError, load_policy
from ivt_env.rollouts import make_vector_env

COUNT = 6


def changed(**options):
    """A policy that answers otherwise than the tiny model, whose first answers are the tiny model's."""
    policy = load_policy("tiny", **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if "language_model.layers" in name and weight.ndim == 2:
                weight.add_(0.3 * weight.std() * torch.randn(weight.shape, generator=generator))
    policy.opener = load_policy("tiny")
    return policy


def asked(policy, **start):
    env = make_vector_env("IVT-Scenes-v0", COUNT, split="val", **policy.shown)
    actions = policy.act(env.reset(options={"index": list(range(COUNT)), **start})[0])
    return actions["text"], [(t.prompt.ids, t.completion, t.log_probs) for t in policy.turns]


def test_first_answers_are_bit_equal_to_the_other_models_and_later_ones_to_the_policys_own():
    mixed, own = changed(), changed()
    base, own.opener = load_policy("tiny"), None
    assert asked(mixed) == asked(base)
    boxes = {"initial_box": [[0.1, 0.2, 0.5, 0.6]] * COUNT}
    mixed.generator.manual_seed(1), own.generator.manual_seed(1)
    later = asked(mixed, **boxes)
    assert later == asked(own, **boxes)
    base.generator.manual_seed(1)
    assert later != asked(base, **boxes), "the two models do not differ: this test would show nothing"


def test_in_one_batch_each_environment_is_answered_by_the_one_whose_turn_it_is():
    mixed = changed()
    env = make_vector_env("IVT-Scenes-v0", COUNT, split="val", **mixed.shown)
    fresh, _ = env.reset(options={"index": list(range(COUNT))})
    later = env.step({"box": np.tile(np.float32([0.1, 0.2, 0.5, 0.6]), (COUNT, 1)), "stop": np.zeros(COUNT, int)})[0]
    odd = [k for k in range(COUNT) if k % 2]
    both = {key: [(later if k in odd else fresh)[key][k] for k in range(COUNT)] for key in fresh}
    said = mixed.act(both)["text"]
    assert [k for k, turn in enumerate(mixed.turns) if not turn.prompt.opening] == odd
    own, opener = mixed.act(later)["text"], mixed.act(fresh)["text"]
    assert said == [own[k] if k in odd else opener[k] for k in range(COUNT)]


def test_a_saved_policy_keeps_who_answers_first(tmp_path):
    mixed = changed()
    mixed.save(tmp_path / "policy")
    assert json.loads((tmp_path / "policy" / "policy.json").read_text())["first_answers"] == "tiny"
    again = load_policy(tmp_path / "policy")
    assert again.first_answers == "tiny" and asked(again) == asked(load_policy("tiny"))
    boxes = {"initial_box": [[0.1, 0.2, 0.5, 0.6]] * COUNT}
    assert asked(again, **boxes) == asked(mixed, **boxes)


def test_two_models_in_one_conversation_are_refused(tmp_path):
    changed().save(tmp_path / "policy")
    with pytest.raises(PolicyError, match="two models cannot hold one conversation"):
        load_policy(tmp_path / "policy", layout="prefix")
    policy = load_policy("tiny", layout="prefix")
    with pytest.raises(ValueError, match="two models cannot hold one conversation"):
        policy.opener = load_policy("tiny")


@pytest.mark.parametrize("name", ["", 1, "itself"])
def test_a_name_that_is_no_other_model_is_refused(tmp_path, name):
    folder = tmp_path / "policy"
    load_policy("tiny").save(folder)
    settings = json.loads((folder / "policy.json").read_text())
    settings["first_answers"] = str(folder) if name == "itself" else name
    (folder / "policy.json").write_text(json.dumps(settings))
    with pytest.raises(PolicyError):
        load_policy(folder)


def test_first_answers_of_another_model_carry_no_gradient_and_cost_no_kl(tmp_path):
    policy = small_policy()
    policy.opener = load_policy("tiny")
    trainer = small_trainer(tmp_path, policy, beta=1.0, kl_in="reward")
    groups = collect(trainer.env, policy, [3, 4], 4)
    groups.rewards[:] = np.random.default_rng(0).random(groups.rewards.shape)
    turns = [turn for episode in groups.turns for turn in episode]
    openings = [turn for turn in turns if turn.prompt.opening]
    assert len(openings) == 8 < len(turns)
    assert trainer._credit(groups, groups.rewards).rows == [t for t in turns if not t.prompt.opening]
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    paid = groups.rewards - trainer._rewards(groups)[0]
    assert (paid[..., 0] == 0).all() and (paid != 0).any()
    policy.opener = None
    assert len(trainer._credit(groups, groups.rewards).rows) == len(turns)


def trained(out, **options):
    values = {"samples": 6, "steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    values |= {"eval_samples": 0, "report_to": "none", "learning_rate": 1e-3}
    train_sft.main(train_sft.Args(out=out, **(values | options)))
    rows = [json.loads(line) for line in (out / "demonstrations.jsonl").read_text().splitlines()]
    return load_policy(out / "policy"), [row["shown"] for row in rows]


def test_training_to_look_keeps_the_first_answers_of_the_student_and_refuses_to_learn_nothing(tmp_path):
    policy, shown = trained(tmp_path / "one")
    assert policy.first_answers == "tiny" and all(shown) and asked(policy) == asked(load_policy("tiny"))
    again, _ = trained(tmp_path / "two", model=str(tmp_path / "one" / "policy"))
    assert again.first_answers == "tiny", "of whoever gave them before, not of the policy between"
    own, shown = trained(tmp_path / "own", first_answers="policy")
    assert own.first_answers == "policy" and None in shown and asked(own) != asked(load_policy("tiny"))
    assert trained(tmp_path / "single", single_shot=True)[0].first_answers == "policy"
    with pytest.raises(RunError, match="no demonstrations are left"):
        trained(tmp_path / "run", demonstrations=tmp_path / "single" / "demonstrations.jsonl")
