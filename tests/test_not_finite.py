"""A run must not end well when it went wrong: what is not finite stops it before it is in the weights.

Silent when false: every tensor of the policy is NaN, both kept checkpoints too, the log leaves it out as if
nothing had been measured, and the exit status is 0.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from forked import launch
from learner import small_policy, small_trainer
from torch import nn

from ivt_agents.grpo import trainer as trainer_module
from ivt_agents.sft import train as train_sft
from ivt_agents.training.checkpoints import load_checkpoint
from ivt_agents.training.finite import NotFiniteError, check_finite, unusable_weight
from ivt_agents.training.folder import checkpoints, read_metrics
from ivt_agents.training.run import MetricsLog, end_training
from ivt_agents.vlm.load import PolicyError, load_policy

ROOT = Path(__file__).parent.parent


def poison_gradient(trainer, step: int, value: float, where: str = "lora_A") -> None:
    """One entry of one parameter's gradient, in that step alone (from 1)."""
    parameter = next(p for n, p in trainer.policy.model.named_parameters() if p.requires_grad and where in n)

    def hook(gradient):
        if trainer.step + 1 != step:
            return gradient
        spoiled = gradient.clone()
        spoiled.view(-1)[3] = value
        return spoiled

    parameter.register_hook(hook)


def poison_log_probs(trainer, monkeypatch, step: int) -> None:
    collect = trainer_module.collect

    def spoiled(*args, **options):
        groups = collect(*args, **options)
        if trainer.step + 1 == step:
            groups.turns[-1][0].log_probs[0] = float("nan")
        return groups

    monkeypatch.setattr(trainer_module, "collect", spoiled)


def poison_advantages(trainer, monkeypatch, step: int) -> None:
    true = trainer_module.advantages_of
    monkeypatch.setattr(
        trainer_module,
        "advantages_of",
        lambda *args, **named: true(*args, **named) * (float("nan") if trainer.step + 1 == step else 1.0),
    )


def poison_rewards(trainer, monkeypatch, step: int) -> None:
    true = trainer._rewards

    def spoiled(groups):
        rewards, metrics = true(groups)
        if trainer.step + 1 == step:
            rewards[0, 0, 0] = float("inf")
        return rewards, metrics

    monkeypatch.setattr(trainer, "_rewards", spoiled)


def poison_loss(trainer, monkeypatch, step: int) -> None:
    true = trainer._loss

    def spoiled(turns, advantages):
        loss, stats, drift = true(turns, advantages)
        factor = float("inf") if trainer.step + 1 == step else 1.0
        return loss * factor, stats * factor, drift

    monkeypatch.setattr(trainer, "_loss", spoiled)


def poison_weight(trainer, monkeypatch, step: int) -> None:
    """The gradient is finite, and what the optimizer makes of it is not."""
    true = trainer.optimizer.step

    def spoiled(*args, **options):
        true(*args, **options)
        if trainer.step + 1 == step:
            trainer.parameters[5].data.view(-1)[0] = float("inf")

    monkeypatch.setattr(trainer.optimizer, "step", spoiled)


POISONS = {
    "gradient's norm is nan": lambda t, _, step: poison_gradient(t, step, float("nan")),
    "gradient's norm is inf": lambda t, _, step: poison_gradient(t, step, float("-inf"), "lora_B"),
    "sampled log-probability is nan": poison_log_probs,
    "an advantage is nan": poison_advantages,
    "a reward is inf": poison_rewards,
    "the loss is (nan|inf|-inf)": poison_loss,
    r"weight \S+ is nan": poison_weight,
}


@pytest.mark.parametrize(("said", "step"), [(said, 2) for said in POISONS] + [("gradient's norm is inf", 4)])
def test_grpo_stops_at_the_step_names_the_quantity_and_keeps_the_last_good_checkpoint(
    tmp_path, monkeypatch, said, step
):
    policy = small_policy()
    policy.set_temperature(1.5)  # or the groups of a model so sure of itself would not differ
    trainer = small_trainer(tmp_path, policy, save_steps=1, prompts=1)
    POISONS[said](trainer, monkeypatch, step)
    kept = f"step-{step - 1:06d}"
    with pytest.raises(NotFiniteError, match=rf"step {step}: .*{said}.*last good checkpoint is \S+{kept}"):
        trainer.train(lambda step, metrics: None)
    assert checkpoints(tmp_path)[-1].name == kept
    assert unusable_weight(load_checkpoint(tmp_path)["parameters"].items()) is None
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, step))


@pytest.mark.parametrize("mode", [{}, {"single_shot": True}, {"optim": "adamw"}, {"lora_r": 2}])
def test_train_sft_with_a_rate_that_blows_up_ends_with_one_line_and_writes_no_policy(tmp_path, mode):
    options = {
        "samples": 8,
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 4,
        "steps": 3,
        "eval_samples": 0,
        "report_to": "none",
    }
    with pytest.raises(NotFiniteError, match=r"step [123]: .* is \S+, so training stops"):
        train_sft.main(train_sft.Args(learning_rate=1e25, out=tmp_path / "run", **options, **mode))
    assert not (tmp_path / "run" / "policy").exists()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_policy_with_one_broken_weight_is_neither_saved_nor_loaded(tmp_path, value):
    policy = load_policy("tiny")
    policy.save(tmp_path / "good")
    weight = dict(policy.model.named_parameters())["model.visual.blocks.1.mlp.linear_fc1.bias"]
    weight.data[3] = value
    with pytest.raises(NotFiniteError, match="visual.blocks.1.mlp.linear_fc1.bias"):
        policy.save(tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    policy.model.save_pretrained(tmp_path / "good")  # as somebody else would write it
    with pytest.raises(PolicyError, match=r"good: .*visual.blocks.1.mlp.linear_fc1.bias"):
        load_policy(tmp_path / "good")


def test_the_log_tells_not_measured_from_not_finite(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(1, {"train/loss": 0.5, "rollout/stop_precision": None})
    for wrong in (float("nan"), float("inf"), float("-inf")):
        for each in (log, MetricsLog(tmp_path / "other", enabled=False)):
            with pytest.raises(NotFiniteError, match="step 2: train/loss is"):
                each.write(2, {"train/loss": wrong})
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "train/loss": 0.5}


def test_what_is_finite_passes_whatever_its_size():
    check_finite(1, {"a": 1e308, "b": -0.0}, "")
    model = nn.Linear(2, 2)
    model.weight.data.fill_(3e38)
    assert unusable_weight(model.named_parameters()) is None
    assert unusable_weight({"ids": torch.tensor([1, 2]), "none": torch.empty(0)}.items()) is None


def train_with_a_poisoned_process(out: Path) -> None:
    """Runs in each of two processes; only in the second something is wrong."""
    said = {}
    for name, broken in (("reward", poison_rewards), ("gradient", None)):
        folder = out.parent / f"{out.stem}-{name}"
        trainer = small_trainer(folder, small_policy(), save_steps=1)
        second = trainer.accelerator.process_index == 1
        patch = pytest.MonkeyPatch()
        if second and broken:
            broken(trainer, patch, 2)
        elif second:
            poison_gradient(trainer, 2, float("nan"))
        try:
            trainer.train(lambda step, metrics: None)
        except NotFiniteError as error:
            said[name] = str(error)
        said[f"{name} kept"] = [c.name for c in checkpoints(folder)]
        patch.undo()
    (out.parent / f"said-{trainer.accelerator.process_index}.json").write_text(json.dumps(said))
    end_training(trainer.accelerator)


def test_two_processes_stop_together_where_one_of_them_went_wrong(tmp_path):
    launch(2, train_with_a_poisoned_process, tmp_path / "run")
    first, second = (json.loads((tmp_path / f"said-{k}.json").read_text()) for k in (0, 1))
    assert first["reward"].startswith("step 2: a reward is not finite in another process")
    assert second["reward"].startswith("step 2: a reward is inf")
    for said in (first, second):
        assert said["gradient"].startswith("step 2: the gradient's norm is nan")
        assert said["reward kept"] == said["gradient kept"] == ["step-000001"]
