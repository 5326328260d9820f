"""What goes wrong here goes wrong silently: a gradient that depends on how a batch was cut, a first
ratio that is not 1, a resumed run that is another run.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from learner import small_policy, small_trainer
from refer_layout import write_refer_folder

from agents.grpo.collect import collect
from agents.training import RunError, load_checkpoint
from ivt_env.rollouts import make_vector_env

ROOT = Path(__file__).parent.parent


def gradients_of(trainer, rows, advantages) -> dict[str, torch.Tensor]:
    kept: dict[str, torch.Tensor] = {}
    named = [(n, p) for n, p in trainer.policy.model.named_parameters() if p.requires_grad]
    trainer.optimizer.step = lambda *_, **__: kept.update({n: p.grad.clone() for n, p in named})
    tokens = float(sum(len(t.completion) for t in rows))
    trainer.last_metrics = trainer._update(rows, advantages, rows[0], tokens, True)
    return kept


@pytest.fixture(scope="module")
def rows():
    policy = small_policy()
    env = make_vector_env("IVT-Scenes-v0", 8, split="train")
    policy.generator.manual_seed(5)
    groups = collect(env, policy, [3, 4], 4)
    return [t for episode in groups.turns for t in episode]


@pytest.mark.parametrize("lora", [True, False])
def test_one_batch_of_all_rows_equals_many_of_one(tmp_path, rows, lora):
    advantages = list(np.linspace(-1, 1, len(rows)))
    policy = small_policy(lora)
    if lora:  # a fresh adapter's B is zero, and with it half of the gradient
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.02, generator=torch.Generator().manual_seed(1))
    whole = gradients_of(small_trainer(tmp_path / "a", policy, micro_batch=len(rows)), rows, advantages)
    single = gradients_of(small_trainer(tmp_path / "b", policy, micro_batch=1), rows, advantages)
    assert whole and all(whole[n].abs().sum() > 0 for n in whole)
    for name in whole:
        assert torch.allclose(whole[name], single[name], atol=2e-5 * float(whole[name].abs().max() + 1e-3)), name


def test_two_processes_give_the_gradient_of_one(tmp_path):
    found = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.pt"
        launch = ["accelerate.commands.launch", "--cpu", "--num_processes", str(processes), "--num_machines", "1"]
        extra = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
        command = [sys.executable, "-m", *launch, *extra, str(ROOT / "tests" / "ddp_gradients.py"), str(out)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(torch.load(out, weights_only=True))
    one, two = found
    assert one["gradients"].keys() == two["gradients"].keys() and one["gradients"]
    for name, gradient in one["gradients"].items():
        assert torch.allclose(gradient, two["gradients"][name], atol=1e-6), name
    assert one["metrics"]["train/loss"] == pytest.approx(two["metrics"]["train/loss"], abs=1e-6)


def test_at_the_first_update_the_ratio_is_one_and_the_kl_zero(tmp_path):
    trainer = small_trainer(tmp_path, beta=0.1)
    metrics = trainer.train_step()
    assert metrics["train/sampler_scorer_difference"] < 1e-5
    assert metrics["train/clip_fraction"] == 0
    assert abs(metrics["train/kl"]) < 1e-6
    assert trainer.train_step()["train/kl"] > 1e-7, "after an update the policy differs from its reference"


def test_the_reference_is_the_policy_that_training_started_from(tmp_path):
    """Full fine-tuning keeps a frozen copy; its KL is zero first and grows too."""
    trainer = small_trainer(tmp_path, small_policy(lora=False), beta=0.1)
    assert abs(trainer.train_step()["train/kl"]) < 1e-6
    assert trainer.train_step()["train/kl"] > 1e-7


def test_members_of_a_group_start_alike_and_share_one_prompt():
    policy = small_policy()
    env = make_vector_env("IVT-Scenes-v0", 6, split="train")
    groups = collect(env, policy, [7, 9], 3)
    for group in (groups.turns[:3], groups.turns[3:]):
        assert all(episode[0].prompt is group[0][0].prompt for episode in group)
    assert groups.turns[0][0].prompt.ids != groups.turns[3][0].prompt.ids


def test_rewards_of_a_rollout_add_up_to_the_final_iou():
    policy = small_policy()
    env = make_vector_env("IVT-Scenes-v0", 12, split="train")
    groups = collect(env, policy, [1, 2, 3], 4)
    assert np.allclose(groups.rewards.sum(-1), groups.ious[:, :, -1])
    assert groups.taken.sum() == sum(map(len, groups.turns)) > 0


def test_four_steps_equal_two_and_a_resumed_two_to_the_bit(tmp_path):
    whole = small_trainer(tmp_path / "whole", lr=5e-3)
    whole.train(lambda *_: None)
    first = small_trainer(tmp_path / "cut", lr=5e-3, steps=2)
    first.train(lambda *_: None)
    second = small_trainer(tmp_path / "cut", lr=5e-3)
    second.resume()
    assert second.step == 2
    second.train(lambda *_: None)
    a, b = (dict(t.policy.model.named_parameters()) for t in (whole, second))
    trained = [n for n, p in a.items() if p.requires_grad]
    assert trained and all(torch.equal(a[n], b[n]) for n in trained)
    start = dict(small_policy().model.named_parameters())
    assert any(not torch.equal(a[n], start[n]) for n in trained), "nothing was trained, nothing was compared"


def test_same_seed_gives_identical_metrics_and_another_seed_does_not(tmp_path):
    def run(name: str, seed: int) -> list[dict[str, float]]:
        found: list[dict[str, float]] = []
        trainer = small_trainer(tmp_path / name, steps=2, seed=seed)
        trainer.train(
            lambda _, m: found.append({k: v for k, v in m.items() if not k.startswith(("time/", "speed/")) and v == v})
        )
        return found

    first, again, other = run("a", 0), run("b", 0), run("c", 1)
    assert first == again
    assert first != other


def test_a_half_written_checkpoint_is_never_resumed_from(tmp_path):
    trainer = small_trainer(tmp_path, steps=2)
    trainer.train(lambda *_: None)
    (tmp_path / "checkpoints" / "partial-123").mkdir()
    (tmp_path / "checkpoints" / "partial-123" / "state.pt").write_bytes(b"half")
    assert load_checkpoint(tmp_path)["step"] == 2


def test_a_broken_or_missing_checkpoint_is_an_error_that_names_it(tmp_path):
    with pytest.raises(RunError, match="nothing to resume"):
        load_checkpoint(tmp_path)
    folder = tmp_path / "checkpoints" / "step-000002"
    folder.mkdir(parents=True)
    (folder / "state.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(RunError, match=r"step-000002.*cannot be read"):
        load_checkpoint(tmp_path)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    trainer = small_trainer(tmp_path, steps=2)
    trainer.train(lambda *_: None)
    with pytest.raises(ValueError, match="another --model or other LoRA options"):
        small_trainer(tmp_path, small_policy(lora=False)).resume()


def command(*arguments: str, timeout: int = 280) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def metrics_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


SMALL = ["--model", "tiny", "--steps", "2", "--prompts", "2", "--group", "4", "--eval-samples", "8", "--no-tensorboard"]


@pytest.mark.parametrize("place", ["photos", "refer"])
def test_it_trains_on_real_photographs(tmp_path, place):
    options = ["--env", "IVT-Photos-v0"]
    if place == "refer":
        write_refer_folder(tmp_path / "data")
        options = ["--env", "IVT-RefCOCOg-v0", "--data-root", str(tmp_path / "data")]
    done = command("train_grpo.py", *SMALL, *options, "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr[-3000:]
    rows = metrics_of(tmp_path / "run")
    trained = [r for r in rows if "train/loss" in r]
    assert len(trained) == 2
    for row in trained:
        assert 0 <= row["rollout/final_iou"] <= 1 and row["train/entropy"] > 0 and row["train/grad_norm"] >= 0
        assert row["train/sampler_scorer_difference"] < 1e-4
    assert (tmp_path / "run" / "policy" / "policy.json").exists()
    assert "final_iou" in done.stdout


def test_training_on_data_that_is_not_there_is_an_error(tmp_path):
    done = command("train_grpo.py", *SMALL, "--env", "IVT-RefCOCOg-v0", "--data-root", str(tmp_path), "--out", "x")
    assert done.returncode == 2 and str(tmp_path) in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "0"], "every advantage"),
        (["--group", "1"], "every advantage"),
        (["--env", "IVT-Nothing-v0"], "IVT-Nothing"),
        (["--model", "./no/such/folder"], "no/such/folder"),
        (["--resume"], "nothing to resume"),
    ],
)
def test_contradictions_and_mistakes_end_with_one_clear_line(tmp_path, options, message):
    done = command("train_grpo.py", *SMALL, *options, "--out", str(tmp_path / "run"))
    assert done.returncode == 2, done.stderr[-2000:]
    assert message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_a_resumed_command_goes_on_and_ends_with_the_whole_log(tmp_path):
    run = str(tmp_path / "run")
    assert command("train_grpo.py", *SMALL, "--save-every", "1", "--out", run).returncode == 0
    done = command("train_grpo.py", "--resume", *SMALL[:2], "--steps", "3", *SMALL[4:], "--out", run)
    assert done.returncode == 0, done.stderr[-2000:]
    steps = [r["step"] for r in metrics_of(tmp_path / "run") if "train/loss" in r]
    assert steps == [1, 2, 3]
