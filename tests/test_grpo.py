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
from forked import launch
from learner import small_policy, small_trainer
from refer_layout import write_refer_folder

from ivt_agents import cli
from ivt_agents.grpo import train as train_grpo
from ivt_agents.grpo.collect import Groups, collect
from ivt_agents.grpo.losses import CLIPS, LOSSES, denominator
from ivt_agents.grpo.trainer import _states
from ivt_agents.training.checkpoints import load_checkpoint
from ivt_agents.training.folder import RunError
from ivt_agents.training.run import end_training
from ivt_agents.vlm.generation import TokenScorer
from ivt_agents.vlm.load import load_policy
from ivt_env.rendering import Overlay, Surroundings
from ivt_env.rewards import RewardConfig, from_options
from ivt_env.rollouts import make_vector_env

ROOT = Path(__file__).parent.parent


def move_adapter(policy) -> None:
    """A fresh adapter's B is zero: half of the gradient would be, too, and every ratio 1."""
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02, generator=torch.Generator().manual_seed(1))


def keep_gradients(trainer) -> dict[str, torch.Tensor]:
    """Where the gradients of the next update will be, which changes no weight."""
    kept: dict[str, torch.Tensor] = {}
    named = [(n, p) for n, p in trainer.policy.model.named_parameters() if p.requires_grad]
    trainer.optimizer.step = lambda *_, **__: kept.update({n: p.grad.clone() for n, p in named})
    return kept


def gradients_of(trainer, rows, advantages) -> dict[str, torch.Tensor]:
    kept = keep_gradients(trainer)
    tokens = float(sum(len(t.completion) for t in rows))
    divisor = denominator(trainer.config.loss_type, tokens, len(rows), 3 * tokens)
    trainer.last_metrics = trainer._update(rows, advantages, rows[0], divisor, True)
    return kept


def play(samples=(3, 4), size: int = 4) -> Groups:
    """Groups of the untrained policy, the same in every process."""
    policy = small_policy()
    env = make_vector_env("IVT-Scenes-v0", len(samples) * size, split="train")
    policy.generator.manual_seed(5)
    return collect(env, policy, list(samples), size)


def bounds(loss: str) -> dict[str, object]:
    return {"loss_type": loss, "epsilon": CLIPS[loss][0], "epsilon_high": CLIPS[loss][1]}


@pytest.fixture(scope="module")
def rows():
    """Of several lengths, which the shipped model's answers do not have: else some losses are the same."""
    turns = [t for episode in play().turns for t in episode]
    for number, turn in enumerate(turns):
        keep = len(turn.completion) - number % 4
        turn.completion, turn.log_probs = turn.completion[:keep], turn.log_probs[:keep]
    return turns


@pytest.mark.parametrize(("lora", "loss"), [(False, "dapo"), *((True, loss) for loss in LOSSES)])
def test_one_batch_of_all_rows_equals_many_of_one(tmp_path, rows, lora, loss):
    advantages = list(np.linspace(-1, 1, len(rows)))
    policy = small_policy(lora)
    if lora:
        move_adapter(policy)
    options = bounds(loss) | {"beta": 0.1 if lora else 0.0}
    whole = gradients_of(
        small_trainer(tmp_path / "a", policy, per_device_train_batch_size=len(rows), **options), rows, advantages
    )
    single = gradients_of(
        small_trainer(tmp_path / "b", policy, per_device_train_batch_size=1, **options), rows, advantages
    )
    assert whole and all(whole[n].abs().sum() > 0 for n in whole)
    for name in whole:
        assert torch.allclose(whole[name], single[name], atol=2e-5 * float(whole[name].abs().max() + 1e-3)), name


CASES: dict[str, dict[str, object]] = {
    **{
        loss: bounds(loss) | {"scale_rewards": "batch", "advantage": "episode_and_step", "beta": 0.1} for loss in LOSSES
    },
    "kl in reward": {"beta": 0.1, "kl_in": "reward"},
    "group scale": {"scale_rewards": "group", "loss_type": "grpo"},
    "defaults": {},
    "one process learns nothing": {},
}


def save_whole_updates(out: Path) -> None:
    """Runs in each of several processes: reward, credit, counts and gradient of the same groups, shared out."""
    groups, found = play(), {}
    for name, options in CASES.items():
        trainer = small_trainer(out.parent / f"{out.stem}-{name}", per_device_train_batch_size=3, **options)
        world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
        move_adapter(trainer.policy)
        rewards = groups.rewards.copy()
        if name == "one process learns nothing":
            rewards[1] = 0.5
        mine = slice(0, 2) if world == 1 else slice(rank, rank + 1)
        turns = groups.turns[4 * mine.start : 4 * mine.stop]
        arrays = (a[mine] for a in (rewards, groups.taken, groups.ious, groups.stopped))
        share = Groups(turns, *arrays, parse_failures=3 if rank == 0 else 0)
        kept = keep_gradients(trainer)
        credited, metrics = trainer._rewards(share)
        credit = trainer._credit(share, credited)
        totals = trainer._totals(share, credit)
        metrics |= trainer._update(credit.rows, credit.advantages, turns[0][0], totals["denominator"], True)
        metrics |= trainer._describe(share, totals, credit)
        found[name] = {"gradients": kept, "metrics": metrics, "processes": world}
    if trainer.accelerator.is_main_process:
        torch.save(found, out)
    end_training(trainer.accelerator)


def test_every_loss_credit_and_metric_is_the_same_on_one_process_and_on_two(tmp_path):
    save_whole_updates(tmp_path / "1.pt")
    launch(2, save_whole_updates, tmp_path / "2.pt")
    one, two = (torch.load(tmp_path / f"{count}.pt", weights_only=True) for count in (1, 2))
    assert one.keys() == two.keys() == CASES.keys()
    for name, case in one.items():
        assert (case["processes"], two[name]["processes"]) == (1, 2), "else one run is compared with itself"
        assert case["gradients"] and all(g.abs().sum() > 0 for g in case["gradients"].values()), name
        for n, gradient in case["gradients"].items():
            limit = 2e-5 * float(gradient.abs().max() + 1e-3)
            assert torch.allclose(gradient, two[name]["gradients"][n], atol=limit), (name, n)
        assert case["metrics"].keys() == two[name]["metrics"].keys()
        for key, value in case["metrics"].items():
            other = two[name]["metrics"][key]
            alike = other is None if value is None else value == pytest.approx(other, rel=1e-4, abs=1e-6)
            assert alike, (name, key)
    assert one["one process learns nothing"]["metrics"]["rollout/zero_variance_groups"] == 0.5


def test_the_losses_of_an_update_differ_from_each_other(tmp_path, rows):
    """Else the comparisons above would hold for an option that does nothing."""
    advantages = list(np.linspace(-1, 1, len(rows)))
    policy = small_policy()
    move_adapter(policy)
    norms = {
        loss: sum(
            float(g.square().sum())
            for g in gradients_of(small_trainer(tmp_path / loss, policy, **bounds(loss)), rows, advantages).values()
        )
        for loss in LOSSES
    }
    assert len({round(v, 12) for v in norms.values()}) == len(LOSSES), norms


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains_with_several_updates_on_a_rollout(tmp_path, loss):
    trainer = small_trainer(tmp_path, num_iterations=2, **bounds(loss))
    before = {n: p.clone() for n, p in trainer.policy.model.named_parameters() if p.requires_grad}
    metrics = trainer.train_step()
    assert np.isfinite(metrics["train/loss"]) and metrics["train/grad_norm"] > 0
    after = dict(trainer.policy.model.named_parameters())
    assert any(not torch.equal(after[n], p) for n, p in before.items())


def test_at_the_first_update_the_ratio_is_one_and_the_kl_zero(tmp_path):
    trainer = small_trainer(tmp_path, beta=0.1)
    metrics = trainer.train_step()
    assert metrics["train/sampler_scorer_difference"] < 1e-5
    assert metrics["train/sampler_scorer_difference"] <= metrics["train/sampler_scorer_difference_max"] < 1e-4
    assert metrics["train/clip_fraction"] == 0
    assert abs(metrics["train/kl"]) < 1e-6
    assert trainer.train_step()["train/kl"] > 1e-7, "after an update the policy differs from its reference"


def test_the_reference_is_the_policy_that_training_started_from(tmp_path):
    """Full fine-tuning keeps a frozen copy; its KL is zero first and grows too."""
    trainer = small_trainer(tmp_path, small_policy(lora=False), beta=0.1)
    assert abs(trainer.train_step()["train/kl"]) < 1e-6
    assert trainer.train_step()["train/kl"] > 1e-7


def test_the_reference_of_a_used_adapter_is_the_policy_with_it(tmp_path):
    """Switching such an adapter off would give the model from before its warm start."""
    policy = small_policy()
    move_adapter(policy)
    trainer = small_trainer(tmp_path, policy, beta=0.1)
    assert abs(trainer.train_step()["train/kl"]) < 1e-6
    assert trainer.train_step()["train/kl"] > 1e-7


def test_the_kl_in_the_reward_is_the_sum_of_k1_over_a_steps_tokens(tmp_path):
    groups = play()
    trainer = small_trainer(tmp_path, beta=0.1, kl_in="reward", per_device_train_batch_size=5)
    untouched, metrics = trainer._rewards(groups)
    assert np.abs(untouched - groups.rewards).max() < 1e-5 and abs(metrics["train/kl"]) < 1e-6
    # Now the reference moves away from the policy that sampled.
    other = small_policy()
    move_adapter(other)
    scorer = TokenScorer(other.model, other.sampling, True)

    def reference(turns):
        with torch.no_grad():
            return scorer(turns)[0]

    trainer.reference = reference
    before = groups.rewards.copy()
    changed, metrics = trainer._rewards(groups)
    assert np.array_equal(groups.rewards, before), "the rewards that are logged stay those of the environment"
    paid = 0.0
    for i, episode in enumerate(groups.turns):
        for t, turn in enumerate(episode):
            wanted = 0.1 * float((torch.tensor(turn.log_probs) - reference([turn])).sum())
            assert before[i // 4, i % 4, t] - changed[i // 4, i % 4, t] == pytest.approx(wanted, abs=1e-5)
            paid += wanted
    assert abs(paid) > 1e-3 and metrics["rollout/kl_penalty"] == pytest.approx(paid / 8, abs=1e-5)
    assert metrics["train/kl"] > 1e-5


def test_with_the_kl_in_the_reward_the_policy_is_held_back(tmp_path):
    free = small_trainer(tmp_path / "a", learning_rate=5e-3, steps=5)
    held = small_trainer(tmp_path / "b", learning_rate=5e-3, steps=5, beta=1.0, kl_in="reward")
    logged: list[dict[str, float]] = []
    held.train(lambda _, m: logged.append(m))
    assert abs(logged[0]["rollout/kl_penalty"]) < 1e-4 < abs(logged[-1]["rollout/kl_penalty"])
    assert all(abs(m["train/kl"]) < 10 for m in logged) and "train/kl" not in free.train_step()


def test_a_turn_cut_off_by_the_limit_has_no_gradient_and_is_counted(tmp_path):
    groups = play()
    cut = [groups.turns[0][0], groups.turns[5][1]]
    for turn in cut:
        turn.finished = False
    tokens = sum(len(t.completion) for episode in groups.turns for t in episode)
    for masked in (True, False):
        trainer = small_trainer(tmp_path / str(masked), mask_truncated_completions=masked)
        credit = trainer._credit(groups, groups.rewards)
        lost = sum(len(t.completion) for t in cut) if masked else 0
        assert credit.masked_tokens == lost
        assert all((t in credit.rows) is not masked for t in cut)
        totals = trainer._totals(groups, credit)
        assert totals["denominator"] == totals["tokens"] == tokens - lost, "out of the denominator, too"
        described = trainer._describe(groups, totals, credit)
        assert described["rollout/truncated_turns"] == pytest.approx(2 / groups.taken.sum())
        assert described["train/masked_tokens"] == lost


def test_a_group_that_earned_alike_is_skipped_and_counted(tmp_path):
    groups = play()
    groups.rewards[1] = 0.25
    credit = small_trainer(tmp_path)._credit(groups, groups.rewards)
    assert credit.skipped == 1
    assert set(map(id, credit.rows)) == {id(t) for episode in groups.turns[:4] for t in episode}


def test_states_are_equal_where_members_saw_the_same():
    groups = play((3,), 8)
    states = _states(groups.turns, 3)
    assert (states[:, 0] == states[0, 0]).all(), "all start alike"
    shown = {(t, i): tuple(e[t].prompt.ids) for i, e in enumerate(groups.turns) for t in range(len(e))}
    compared = 0
    for (t, i), (u, j) in ((a, b) for a in shown for b in shown if a[0] == b[0] > 0 and a[1] < b[1]):
        assert (states[i, t] == states[j, u]) == (shown[t, i] == shown[u, j])
        compared += 1
    assert compared > 20 and len(np.unique(states[:, 1])) > 1
    short = _states([e[:1] for e in groups.turns], 3)
    assert (short[:, 1:] == -1).all()


def test_training_changes_no_prompt(tmp_path, rows):
    before = [(list(t.prompt.ids), t.prompt.images[0].patches.clone(), list(t.completion)) for t in rows]
    trainer = small_trainer(tmp_path, num_iterations=2, per_device_train_batch_size=5, beta=0.1)
    trainer._update(rows, [1.0] * len(rows), rows[0], 100.0, True)
    for turn, (ids, patches, completion) in zip(rows, before, strict=True):
        assert turn.prompt.ids == ids and turn.completion == completion
        assert torch.equal(turn.prompt.images[0].patches, patches)


@pytest.mark.parametrize("place", ["attention", "layer"])
def test_a_policy_with_dropout_is_refused(tmp_path, place):
    policy = small_policy()
    if place == "attention":
        policy.core.model.language_model.layers[0].self_attn.attention_dropout = 0.1
    else:
        policy.core.lm_head = torch.nn.Sequential(policy.core.lm_head, torch.nn.Dropout(0.1))
    with pytest.raises(ValueError, match=r"dropout 0\.1 in .*first ratio would not be 1"):
        small_trainer(tmp_path, policy)


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


def test_a_broken_or_missing_checkpoint_is_an_error_that_names_it(tmp_path):
    with pytest.raises(RunError, match="nothing to resume"):
        load_checkpoint(tmp_path)
    folder = tmp_path / "checkpoints" / "step-000002"
    folder.mkdir(parents=True)
    (folder / "state.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(RunError, match=r"step-000002.*cannot be read"):
        load_checkpoint(tmp_path)


def command(*arguments: object) -> int:
    return cli.main(["train-grpo", *map(str, arguments)])


def metrics_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


SMALL = "--model tiny --steps 2 --prompts 2 --num-generations 4 --eval-samples 2 --report-to none".split()
SMALL += ["--episode-steps", "3", "--temperature", "1.5"]  # colder answers are alike: nothing would be learned


@pytest.mark.parametrize("place", ["photos", "refer"])
def test_it_trains_on_real_photographs(tmp_path, place, capsys):
    options = ["--env", "IVT-Photos-v0"]
    if place == "refer":
        write_refer_folder(tmp_path / "data")
        options = ["--env", "IVT-RefCOCOg-v0", "--data-root", str(tmp_path / "data")]
    assert command(*SMALL, *options, "--out", tmp_path / "run") == 0
    rows = metrics_of(tmp_path / "run")
    trained = [r for r in rows if "train/loss" in r]
    assert len(trained) == 2
    for row in trained:
        assert 0 <= row["rollout/final_iou"] <= 1 and row["train/entropy"] > 0
        assert row["train/sampler_scorer_difference"] < 1e-4
    assert any(row["train/grad_norm"] > 0 for row in trained)
    assert (tmp_path / "run" / "policy" / "policy.json").exists()
    assert "final_iou" in capsys.readouterr().out


def test_training_on_data_that_is_not_there_is_an_error(tmp_path, capsys):
    assert command(*SMALL, "--env", "IVT-RefCOCOg-v0", "--data-root", tmp_path, "--out", tmp_path / "x") == 2
    told = capsys.readouterr().err
    assert str(tmp_path) in told and "Traceback" not in told


def test_every_new_option_runs_from_the_command_and_is_recorded(tmp_path):
    options = ["--loss-type", "cispo", "--advantage", "episode_and_step", "--scale-rewards", "batch"]
    options += ["--beta", "0.01", "--kl-in", "reward", "--num-iterations", "2"]
    assert command(*SMALL, *options, "--no-mask-truncated-completions", "--out", tmp_path / "run") == 0
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (recorded["epsilon"], recorded["epsilon_high"]) == CLIPS["cispo"], "what None stood for"
    assert recorded["advantage"] == "episode_and_step" and recorded["beta"] == 0.01
    trained = [r for r in metrics_of(tmp_path / "run") if "train/loss" in r]
    assert len(trained) == 2 and all("rollout/kl_penalty" in r and "train/masked_tokens" in r for r in trained)


def test_the_environment_of_the_command_has_its_reward_and_shows_what_the_policy_was_trained_for(tmp_path, monkeypatch):
    made = []

    def stop_here(policy, env, *_):
        made.append((policy, env))
        raise InterruptedError

    monkeypatch.setattr(train_grpo, "GRPOTrainer", stop_here)
    args = train_grpo.Args(model="tiny", out=tmp_path / "run", wrong_stop_penalty=0.3, step_cost=0.03, eval_samples=0)
    with pytest.raises(InterruptedError):
        train_grpo.main(args)
    ((policy, env),) = made
    assert env.reward_config == RewardConfig(step_cost=0.03, invalid_penalty=0.1, wrong_stop_penalty=0.3)
    screen, shown = env.screen, policy.shown
    assert (screen.view, screen.side) == (shown["view"], shown["canvas"]) == ("both", 288)
    assert (screen.overlay, screen.around) == (
        from_options(Overlay, "overlay", shown["overlay"]),
        Surroundings(**shown["closeup"] or {}),
    )


def test_the_command_is_one_run_on_two_processes(tmp_path):
    """Without a GPU accelerate has to be told so, or each process is a run of its own in the same folder."""
    options = [*SMALL, "--eval-samples", "0", "--out"]
    assert command(*options, tmp_path / "one") == 0
    torchrun = [*"-m torch.distributed.run --standalone --nproc_per_node 2 train_grpo.py".split(), *options]
    done = subprocess.run([sys.executable, *torchrun, tmp_path / "two"], cwd=ROOT, capture_output=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = ([r for r in metrics_of(tmp_path / name) if "train/loss" in r] for name in ("one", "two"))
    assert [r["step"] for r in one] == [r["step"] for r in two] == [1, 2]
    # Each process samples with a seed of its own, so only what is fixed by the options can be compared.
    assert one[0]["train/lr"] == two[0]["train/lr"] and 0 < two[0]["train/grad_norm"] < 10
    assert one[0]["rollout/final_iou"] != two[0]["rollout/final_iou"]


def test_an_adapter_as_the_starting_model_is_merged_first(tmp_path):
    """A second adapter would silently take its place: the warm start would be gone, the KL still 0."""
    policy = small_policy()
    move_adapter(policy)
    policy.save(tmp_path / "sft")
    options = ["--model", str(tmp_path / "sft"), *"--beta 0.1 --learning-rate 1e-12 --steps 1".split(), *SMALL[4:]]
    assert command(*options, "--out", tmp_path / "run") == 0
    (row,) = [r for r in metrics_of(tmp_path / "run") if "train/loss" in r]
    assert abs(row["train/kl"]) < 1e-6 and row["train/sampler_scorer_difference"] < 1e-4
    given = load_policy(tmp_path / "sft").model.merge_and_unload().state_dict()
    kept, base = (load_policy(name).model.state_dict() for name in (tmp_path / "run" / "policy", "tiny"))
    assert all(torch.allclose(kept[n], given[n], atol=1e-6) for n in given), "at such a rate nothing moves"
    assert any(not torch.allclose(base[n], given[n], atol=1e-4) for n in given)
