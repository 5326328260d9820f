"""Weights spread over processes (FSDP2). What would go wrong silently: a gradient that is a part of the
gradient, a checkpoint that holds a part of the weights, a rollout of another policy. What would go wrong
loudly, but only after hours: one process waiting for a forward pass that the others never make.

accelerate does not shard on a CPU; told so here, the same code runs with gloo on two processes.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import ModuleType, SimpleNamespace

import learner
import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from forked import launch
from learner import small_policy, small_trainer, with_out
from test_grpo import keep_gradients, move_adapter, play
from test_resume import TINY, assert_same_state, lines

from ivt_agents.grpo import train as train_grpo
from ivt_agents.grpo.collect import Groups, collect
from ivt_agents.grpo.train import Args
from ivt_agents.sft import train as train_sft
from ivt_agents.training.checkpoints import load_checkpoint
from ivt_agents.training.folder import RunError
from ivt_agents.training.run import end_training, make_accelerator
from ivt_agents.training.sharding import check_shareable, gathered
from ivt_agents.vlm.load import checkpoint_layers, load_policy

CASES: dict[str, tuple[bool, dict[str, object]]] = {
    "moved adapter": (True, {}),
    "checkpointed adapter": (True, {}),
    "every weight": (False, {}),
    "reference without adapter": (True, {"beta": 0.1}),
    "reference as a copy": (False, {"beta": 0.1}),
    "kl in reward": (True, {"beta": 0.1, "kl_in": "reward"}),
}


def sharding_accelerator(**_: object) -> Accelerator:
    """An accelerator that shards although there is no GPU; one process stays as it is."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Qwen3VLTextDecoderLayer"],
        reshard_after_forward=True,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    if accelerator.num_processes > 1:
        # As its own state does where there is a GPU; every later object copies from here.
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    return accelerator


def save_sharded_updates(out: Path) -> None:
    """Runs in each process: the same groups, shared out; the ranks call the model differently often."""
    learner.Accelerator = sharding_accelerator  # type: ignore[assignment]
    groups, found = play(), {}
    for name, (lora, options) in CASES.items():
        policy = small_policy(lora)
        if name == "moved adapter":  # elsewhere it must be fresh, or "without adapter" would be no reference
            move_adapter(policy)
        if name == "checkpointed adapter":
            checkpoint_layers(policy.model)
        trainer = small_trainer(out.parent / f"{out.stem}-{name}", policy, per_device_train_batch_size=3, **options)
        world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
        assert trainer.sharded == (world > 1)
        mine = slice(0, 2) if world == 1 else slice(rank, rank + 1)
        turns = groups.turns[4 * mine.start : 4 * mine.stop]
        arrays = (a[mine] for a in (groups.rewards, groups.taken, groups.ious, groups.stopped))
        share = Groups(turns, *arrays, parse_failures=0)
        with trainer.whole_weights():
            for _ in range(1 + rank):
                policy.generator.manual_seed(5)
                sampled = collect(trainer.env, policy, [3, 4][mine], 4)
            rewards, metrics = trainer._rewards(share)
        credit = trainer._credit(share, rewards)
        totals = trainer._totals(share, credit)
        kept = keep_gradients(trainer)
        metrics |= trainer._update(credit.rows, credit.advantages, turns[0][0], totals["denominator"], True)
        gradients = {n: gathered(g) for n, g in kept.items()}
        found[name] = {"gradients": gradients, "metrics": metrics, "processes": world}
        assert sampled.taken.any()
    if trainer.accelerator.is_main_process:
        torch.save(found, out)
    end_training(trainer.accelerator)


def sharding(command: ModuleType) -> list[Accelerator]:
    """Let a training command shard, and leave its processes together at its end; the list gets its accelerators."""
    made: list[Accelerator] = []

    def make(_: object) -> Accelerator:
        made.append(sharding_accelerator())
        made[-1].end_training = lambda: None
        return made[-1]

    command.make_accelerator = make  # type: ignore[attr-defined]
    return made


def run_sharded_commands(out: Path) -> None:
    """Runs in each process: a whole run, half a run, and the other half of it."""
    accelerators = sharding(train_grpo)
    options = TINY | {"prompts": 2, "eval_samples": 2, "eval_steps": 0}
    train_grpo.main(Args(**with_out(options, out / "whole", steps=4)))
    train_grpo.main(Args(**with_out(options, out / "cut", steps=2)))
    train_grpo.main(Args(**with_out(options, out / "cut", steps=4, resume=True)))
    assert all(a.is_fsdp2 and a.num_processes == 2 for a in accelerators)
    accelerators[-1].wait_for_everyone()
    accelerators[-1].state.destroy_process_group()


def run_sft_commands(out: Path) -> None:
    """Runs in each process: a whole run of the supervised training, and its second half from a checkpoint."""
    accelerators = sharding(train_sft)
    processes = int(os.environ["WORLD_SIZE"])
    options = {"model": "tiny", "samples": 6, "optim": "adamw", "lora_r": 4, "eval_samples": 2, "learning_rate": 5e-3}
    options |= {
        "per_device_train_batch_size": 8 // processes,
        "gradient_accumulation_steps": 1,
        "save_steps": 2,
        "steps": 4,
    }
    whole, cut = out / f"{processes}-whole", out / f"{processes}-cut"
    train_sft.main(train_sft.Args(**options, out=whole))
    if accelerators[-1].is_main_process:
        shutil.copytree(whole, cut)
        shutil.rmtree(cut / "policy")
        shutil.rmtree(cut / "checkpoints" / "step-000004")
    accelerators[-1].wait_for_everyone()
    train_sft.main(train_sft.Args(**options, out=cut, resume=True))
    assert all(a.num_processes == 1 or a.is_fsdp2 for a in accelerators)
    end_training(accelerators[-1])
    accelerators[-1].state.destroy_process_group()


def test_two_processes_that_share_the_weights_learn_what_one_learns(tmp_path):
    found = []
    for processes in (1, 2):
        launch(processes, save_sharded_updates, tmp_path / f"{processes}.pt")
        found.append(torch.load(tmp_path / f"{processes}.pt", weights_only=True))
    one, two = found
    assert one.keys() == two.keys() == CASES.keys()
    for name, case in one.items():
        assert (case["processes"], two[name]["processes"]) == (1, 2)
        assert case["metrics"]["train/grad_norm"] > 1e-3, name
        for key, value in case["metrics"].items():
            assert value == pytest.approx(two[name]["metrics"][key], rel=1e-4, abs=2e-6, nan_ok=True), (name, key)
        assert case["gradients"].keys() == two[name]["gradients"].keys() and case["gradients"]
        for n, gradient in case["gradients"].items():
            limit = 2e-5 * float(gradient.abs().max() + 1e-3)
            assert torch.allclose(gradient, two[name]["gradients"][n], atol=limit), (name, n)


def test_the_command_evaluates_saves_and_resumes_with_shared_weights(tmp_path):
    launch(2, run_sharded_commands, tmp_path)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert [row["step"] for row in lines(whole, "train/")] == [1, 2, 3, 4]
    assert lines(cut, "train/") == lines(whole, "train/")
    assert_same_state(cut, whole)
    for row in lines(whole, "train/"):
        assert row["train/sampler_scorer_difference"] < 1e-5, "rollouts were sampled by the policy that is trained"
    assert [row["step"] for row in lines(whole, "eval/")] == [0, 4]
    # What was saved is the policy that was trained, whole: the base with the adapter of the last checkpoint.
    trained = load_checkpoint(whole)["parameters"]
    again = train_grpo._load(Args(model="tiny", lora_r=TINY["lora_r"]), "cpu").model
    with torch.no_grad():
        for name, parameter in again.named_parameters():
            if name in trained:
                parameter.copy_(trained[name])
    wanted = again.merge_and_unload().state_dict()
    saved, base = (load_policy(name).model.state_dict() for name in (whole / "policy", "tiny"))
    assert all(torch.equal(saved[n], wanted[n]) for n in wanted)
    assert any(not torch.equal(saved[n], base[n]) for n in base)


def test_supervised_training_with_shared_weights_learns_what_one_process_learns_and_resumes(tmp_path):
    for processes in (1, 2):
        launch(processes, run_sft_commands, tmp_path)
    one, two, cut = (tmp_path / name for name in ("1-whole", "2-whole", "2-cut"))
    assert_same_state(cut, two)
    for a, b in zip(lines(one, "sft/"), lines(two, "sft/"), strict=True):
        assert a["sft/loss"] == pytest.approx(b["sft/loss"], rel=1e-4)
    single, shared, base = (load_policy(name).model.state_dict() for name in (one / "policy", two / "policy", "tiny"))
    moved = max(float((single[n] - base[n]).abs().max()) for n in base)
    apart = max(float((single[n] - shared[n]).abs().max()) for n in base)
    assert moved > 1e-3 and apart < 0.02 * moved


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        ("ACCELERATE_USE_FSDP", "FSDP was asked for.*ddp.yaml"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed was asked for.*fsdp.yaml"),
    ],
)
@pytest.mark.parametrize("processes", ["1", "2"])
def test_sharding_that_would_not_happen_is_refused(monkeypatch, variable, said, processes):
    """accelerate drops the wish on a CPU, and each process holds everything."""
    monkeypatch.setenv(variable, "true")
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RunError, match=said):
        make_accelerator(False)


def test_what_cannot_be_shared_out_is_refused_before_training():
    sharing = SimpleNamespace(distributed_type=DistributedType.FSDP)
    four_bits = torch.nn.Linear(2, 2)
    four_bits.weight = torch.nn.Parameter(torch.zeros(4, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(RunError, match="quantize nf4 with FSDP"):
        check_shareable(four_bits, sharing)
    check_shareable(four_bits, SimpleNamespace(distributed_type=DistributedType.MULTI_GPU))
    check_shareable(torch.nn.Linear(2, 2), sharing)
    with pytest.raises(RunError, match="each matrix whole"):
        check_shareable(torch.nn.Linear(2, 2), sharing, "muon")
