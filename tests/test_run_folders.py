"""What lies in a folder is what was asked for, and what was asked for is what lies there.

If this is false, a command trains on another seed's policy, prints another run's table or loses a finished
evaluation, and ends with status 0.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from forked import forked
from learner import small_trainer, with_out

from experiments import study
from ivt_agents.cli import main
from ivt_agents.evaluation import evaluate
from ivt_agents.evaluation.report import Args as ReportArgs
from ivt_agents.evaluation.report import main as report
from ivt_agents.grpo import train as train_grpo
from ivt_agents.grpo.trainer import GRPOTrainer
from ivt_agents.sft import train as train_sft
from ivt_agents.training import options as training_options
from ivt_agents.training.checkpoints import load_checkpoint
from ivt_agents.training.folder import RunError, checkpoints, read_metrics
from ivt_agents.vlm.load import load_policy
from ivt_env import failures
from ivt_env.episodes import Episode, Step, image_file, load_episodes, save_episodes
from ivt_env.files import FileError, asked_of, lock_folder, whole_folder

GRPO = {"model": "tiny", "prompts": 1, "num_generations": 2, "episode_steps": 3, "max_completion_length": 14}
GRPO |= {"lora_r": 4, "learning_rate": 5e-3, "warmup_steps": 1, "steps": 1, "save_steps": 1}
GRPO |= {"temperature": 1.5}  # the shipped model is so sure that its answers are alike, and nothing is learned
GRPO |= {"eval_samples": 0, "report_to": "none"}
SFT = {"samples": 6, "steps": 3, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 4}
SFT |= {"eval_samples": 3, "report_to": "none", "save_steps": 1}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_policy(str(folder)).model.named_parameters())


# --- SFT ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "cut"), [({"lora_r": 4}, "taught"), ({"optim": "muon"}, "trained")])
def test_sft_that_was_cut_off_ends_as_the_run_that_was_not(tmp_path, kind, cut, monkeypatch):
    options, whole, out = SFT | kind, tmp_path / "whole", tmp_path / cut
    train_sft.main(train_sft.Args(**with_out(options, whole)))
    played: list[int] = []
    real = train_sft.play
    for module in (train_sft, training_options):
        monkeypatch.setattr(module, "play", lambda *a, **k: played.append(1) or real(*a, **k))
    shutil.copytree(whole, out)
    shutil.rmtree(out / "policy")
    (out / "before_after.json").unlink()
    shutil.rmtree(out / "checkpoints" if cut == "taught" else checkpoints(out)[-1])
    assert cut == "taught" or load_checkpoint(out)["step"] == 2
    train_sft.main(train_sft.Args(**with_out(options, out, resume=True)))
    assert len(played) == 1, "the table's second column; what was measured and harvested before is kept"
    one, other = weights(whole / "policy"), weights(out / "policy")
    assert all(torch.equal(v, other[n]) for n, v in one.items())
    same = ("before_after.json", "demonstrations.jsonl", "metrics.jsonl", "before.json")
    assert all((out / name).read_bytes() == (whole / name).read_bytes() for name in same)
    assert [row["step"] for row in read_metrics(whole / "metrics.jsonl")] == [1, 2, 3]


def test_a_finished_warm_start_is_neither_replaced_nor_used_for_another_seed(tmp_path, monkeypatch):
    out = tmp_path / "run-sft"
    train_sft.main(train_sft.Args(**with_out(SFT, out, seed=0)))
    before = files_of(out)
    with pytest.raises(RunError, match="holds a run of 3 steps: add --resume .*--overwrite"):
        train_sft.main(train_sft.Args(**with_out(SFT, out, seed=1)))
    with pytest.raises(RunError, match="seed: the run has 0, this command 1"):
        train_sft.main(train_sft.Args(**with_out(SFT, out, seed=1, resume=True)))
    with pytest.raises(FileError, match="policy was made with seed 0, not 1"):
        train_grpo.main(train_grpo.Args(**with_out(GRPO, tmp_path / "run", model=None, seed=1)))
    assert files_of(out) == before

    for module in (train_sft, training_options):
        monkeypatch.setattr(module, "play", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_sft.main(train_sft.Args(**with_out(SFT, out, seed=1, overwrite=True)))
    assert asked_of(out, "config.json")["seed"] == 1
    assert sorted(files_of(out)) == ["config.json", "metrics.jsonl"], "nothing of seed 0 lies beside it"


def test_demonstrations_of_the_run_that_is_overwritten_can_be_learned_from(tmp_path):
    out = tmp_path / "run"
    train_sft.main(train_sft.Args(**with_out(SFT, out, steps=0, eval_samples=0)))
    own = out / "demonstrations.jsonl"
    before = own.read_bytes()
    changes = {"steps": 1, "eval_samples": 0, "demonstrations": own, "overwrite": True}
    train_sft.main(train_sft.Args(**with_out(SFT, out, **changes)))
    assert own.read_bytes() == before


# --- GRPO ---------------------------------------------------------------------------------------------


def test_a_run_anew_that_is_cut_off_leaves_nothing_of_the_old_one_beside_its_configuration(tmp_path, monkeypatch):
    out = tmp_path / "run"
    train_grpo.main(train_grpo.Args(**with_out(GRPO, out)))
    assert asked_of(out / "policy")["seed"] == 0 and asked_of(out / "adapter")["seed"] == 0

    monkeypatch.setattr(GRPOTrainer, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_grpo.main(train_grpo.Args(**with_out(GRPO, out, seed=7, overwrite=True)))
    assert asked_of(out, "config.json")["seed"] == 7
    assert sorted(files_of(out)) == ["config.json", "metrics.jsonl"]


def test_a_run_cut_off_before_a_checkpoint_begins_anew_and_a_mistake_in_one_anew_costs_nothing(tmp_path):
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    (out / "config.json").write_text("{}")
    train_grpo.main(train_grpo.Args(**with_out(GRPO, out)))
    assert load_checkpoint(out)["step"] == 1
    before = files_of(out)
    for wrong in ({"env": "IVT-Nothing-v0"}, {"model": str(tmp_path / "nothing")}, {"num_generations": 1}):
        with pytest.raises(Exception, match="IVT-Nothing|tmp.*nothing|num_generations 1"):
            train_grpo.main(train_grpo.Args(**with_out(GRPO, out, overwrite=True, **wrong)))
    assert files_of(out) == before


def test_two_runs_in_one_folder_are_refused_by_name(tmp_path, capsys):
    with lock_folder(tmp_path):
        for command in (
            lambda: train_grpo.main(train_grpo.Args(**with_out(GRPO, tmp_path, resume=True))),
            lambda: train_sft.main(train_sft.Args(**with_out(SFT, tmp_path))),
            lambda: evaluate.main(evaluate.Args(out=tmp_path, samples=1)),
        ):
            with pytest.raises(FileError, match="in use by process"):
                command()
        assert main(["play", "--out", str(tmp_path)]) == 2 and "in use by process" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of two steps, as it was, and a trainer that would go on with it."""
    folder = tmp_path_factory.mktemp("whole")
    small_trainer(folder, steps=2, num_iterations=2, save_steps=1).train(lambda *_: None)
    path = checkpoints(folder)[-1] / "state.pt"
    return path, path.read_bytes(), small_trainer(folder, steps=2, num_iterations=2)


def change(state, of, value):
    """``value`` in the place of the first parameter, or of ``of`` of the optimizer's first state."""
    where = state["parameters"] if of is None else state["optimizers"][0]["state"][0]
    name = next(iter(where)) if of is None else of
    where[name] = value(where[name])


MUTATIONS = {
    "shape": (lambda s: change(s, None, lambda v: torch.zeros(1, 1)), r"is float32 \(1, 1\), and the model has"),
    "broadcast": (lambda s: change(s, None, lambda v: v[:1]), "and the model has float32"),
    "type": (lambda s: change(s, None, lambda v: v.to(torch.int8)), "is int8 .* and the model has float32"),
    "double": (lambda s: change(s, None, lambda v: v.double()), "is float64"),
    "nan": (lambda s: change(s, None, lambda v: v * float("nan")), "is not finite"),
    "infinite": (lambda s: change(s, None, lambda v: v + float("inf")), "is not finite"),
    "no tensor": (lambda s: change(s, None, lambda v: v.tolist()), "is not a tensor"),
    "sparse": (lambda s: change(s, None, lambda v: v.to_sparse()), "is not a tensor"),
    "names": (lambda s: s["parameters"].popitem(), "another --model or other LoRA options"),
    "parameters": (lambda s: s.update(parameters=[1]), "another --model or other LoRA options"),
    "moments gone": (lambda s: s["optimizers"][0]["state"].clear(), "the optimizer knows nothing of"),
    "one moment gone": (lambda s: s["optimizers"][0]["state"][0].pop("exp_avg"), "is not that of AdamW"),
    "moment shape": (lambda s: change(s, "exp_avg", lambda v: v[:1, :1]), "exp_avg of .* and the model has"),
    "moment nan": (lambda s: change(s, "exp_avg", lambda v: v * float("nan")), "exp_avg of .* is not finite"),
    "moment negative": (lambda s: change(s, "exp_avg_sq", lambda v: v - 1), "exp_avg_sq of .* is negative"),
    "moment type": (lambda s: change(s, "exp_avg_sq", lambda v: v.half()), "is float16"),
    "updates": (lambda s: change(s, "step", lambda v: v * 0 + 1e9), "is none of 1 to 4"),
    "updates nan": (lambda s: change(s, "step", lambda v: v * float("nan")), "is none of 1 to 4"),
    "updates text": (lambda s: change(s, "step", lambda v: "many"), "is none of 1 to 4"),
    "betas": (lambda s: s["optimizers"][0]["param_groups"][0].update(betas=(0.0, 2.0)), "with other settings of it"),
    "rate": (lambda s: s["optimizers"][0]["param_groups"][0].update(lr=float("nan")), "not a finite number"),
    "groups": (lambda s: s["optimizers"][0].update(param_groups=None), "another --optim"),
    "group": (lambda s: s["optimizers"][0].update(param_groups=[3]), "another --optim"),
    "optimizer": (lambda s: s.update(optimizers=[]), "another --optim"),
    "optimizer text": (lambda s: s.update(optimizers=["adam"]), "optimizer state is none"),
    "no optimizer": (lambda s: s.update(optimizers=None), "another --optim"),
    "step": (lambda s: s.update(step=10**9), "not hold a checkpoint of step 2"),
    "step text": (lambda s: s.update(step="2"), "not hold a checkpoint of step 2"),
    "no step": (lambda s: s.pop("step"), "not hold a checkpoint of step 2"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_runs(checkpoint, name):
    path, whole, trainer = checkpoint
    path.write_bytes(whole)
    state = torch.load(path, weights_only=True)
    mutate, message = MUTATIONS[name]
    mutate(state)
    torch.save(state, path)
    before = {n: p.detach().clone() for n, p in trainer.policy.model.named_parameters()}
    Accelerator(cpu=True)  # conftest takes its state back after each test
    with pytest.raises(RunError, match=message):
        trainer.resume()
    assert trainer.step == 0 and not trainer.optimizer.state_dict()["state"]
    assert all(torch.equal(before[n], p) for n, p in trainer.policy.model.named_parameters())


def test_a_checkpoint_under_another_number_or_of_too_many_steps_is_refused(tmp_path, checkpoint):
    path, whole, trainer = checkpoint
    path.write_bytes(whole)
    shutil.copytree(path.parent.parent, tmp_path / "checkpoints")
    with pytest.raises(RunError, match="has made 2 steps already, more than --steps 1: give at least 2"):
        small_trainer(tmp_path, trainer.policy, steps=1, num_iterations=2).resume()
    checkpoints(tmp_path)[-1].rename(tmp_path / "checkpoints" / "step-1000000000")
    with pytest.raises(RunError, match="not hold a checkpoint of step 1000000000"):
        small_trainer(tmp_path, trainer.policy, steps=2, num_iterations=2).resume()


# --- evaluations --------------------------------------------------------------------------------------

EVALUATION = {"policies": ["base=random", "centre=centre"], "samples": 4, "page_episodes": 1, "num_envs": 4}


def same_scores(one: Path, other: Path) -> bool:
    a, b = (json.loads((folder / "results.json").read_text()) for folder in (one, other))
    return a["rows"] == b["rows"] and a["comparisons"] == b["comparisons"]


def test_an_evaluation_is_not_overwritten_without_a_word(tmp_path):
    evaluate.main(evaluate.Args(out=tmp_path, **EVALUATION))
    before = files_of(tmp_path)
    fewer = EVALUATION | {"samples": 2}
    with pytest.raises(RunError, match=r"results of another run .*--resume .*--overwrite"):
        evaluate.main(evaluate.Args(out=tmp_path, **fewer))
    with pytest.raises(RunError, match="samples: the run has 4, this command 2"):
        evaluate.main(evaluate.Args(out=tmp_path, resume=True, **fewer))
    for wrong in ({"env": "IVT-Nothing-v0"}, {"policies": ["base=nothing"]}):
        with pytest.raises((ValueError, gymnasium.error.Error), match="(?i)nothing"):
            evaluate.main(evaluate.Args(out=tmp_path, overwrite=True, **EVALUATION | wrong))
    assert files_of(tmp_path) == before
    evaluate.main(evaluate.Args(out=tmp_path, overwrite=True, **fewer))
    assert len(load_episodes(tmp_path / "episodes" / "base")) == 2
    assert asked_of(tmp_path / "episodes" / "base")["samples"] == 2


def test_an_evaluation_that_was_cut_off_goes_on_and_never_lies_beside_old_tables(tmp_path, monkeypatch):
    evaluate.main(evaluate.Args(out=tmp_path / "whole", **EVALUATION))
    evaluate.main(evaluate.Args(out=tmp_path / "cut", **EVALUATION | {"samples": 2}))
    real, played = evaluate.rollout, []

    def until(limit: int):
        def some(*arguments: object, **options: object) -> list[Episode]:
            if len(played) == limit:
                raise KeyboardInterrupt
            played.append(options["agent_name"])
            return real(*arguments, **options)

        return some

    monkeypatch.setattr(evaluate, "rollout", until(3))
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(evaluate.Args(out=tmp_path / "cut", overwrite=True, **EVALUATION))
    assert not (tmp_path / "cut" / "results.json").exists() and not (tmp_path / "cut" / "table.txt").exists()
    with pytest.raises(ValueError, match="results.json is not there"):
        report(ReportArgs(folder=tmp_path / "cut"))
    played.clear()
    monkeypatch.setattr(evaluate, "rollout", until(9))
    evaluate.main(evaluate.Args(out=tmp_path / "cut", resume=True, **EVALUATION))
    assert played == ["centre"], "the forced episodes of the second policy were missing, and nothing else"
    assert same_scores(tmp_path / "whole", tmp_path / "cut")


def test_an_evaluation_that_goes_on_always_says_what_its_episodes_were_played_for(tmp_path, monkeypatch):
    evaluate.main(evaluate.Args(out=tmp_path, **EVALUATION))
    with monkeypatch.context() as until, pytest.raises(KeyboardInterrupt):
        until.setattr(evaluate, "write_json", interrupted)
        evaluate.main(evaluate.Args(out=tmp_path, resume=True, **EVALUATION))
    assert not (tmp_path / "results.json").exists() and asked_of(tmp_path, "config.json")["samples"] == 4
    evaluate.main(evaluate.Args(out=tmp_path, resume=True, **EVALUATION))
    assert (tmp_path / "results.json").exists()


def test_saved_episodes_are_scored_where_they_lie_and_stay(tmp_path):
    evaluate.main(evaluate.Args(out=tmp_path, **EVALUATION))
    kept = files_of(tmp_path / "episodes")
    given = [f"base={tmp_path / 'episodes' / 'base'}"]
    with pytest.raises(RunError, match="results of another run"):
        evaluate.main(evaluate.Args(out=tmp_path, episodes=given))
    evaluate.main(evaluate.Args(out=tmp_path, episodes=given, overwrite=True))
    assert files_of(tmp_path / "episodes") == kept


# --- studies ------------------------------------------------------------------------------------------


def test_a_study_begun_again_with_other_numbers_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "run_jobs", lambda *_: None)
    monkeypatch.setattr(study, "summary", lambda *_, **__: "table")
    monkeypatch.setattr(study, "plot_map", lambda *_: None)
    monkeypatch.setattr(study, "last_screen", lambda *_: "screen")
    args = study.Args(out=tmp_path, seeds=1)
    study.main(args)
    study.main(replace(args, jobs=1))
    with pytest.raises(FileError, match="was made with samples 500, not 5: give another --out"):
        study.main(replace(args, samples=5))
    assert asked_of(tmp_path, "study.json")["samples"] == 500


def study_of_sleepers(out: Path) -> None:
    """Runs in a process of its own."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    child = f"import os,time,pathlib; pathlib.Path({str(out)!r}, 'pid').write_text(str(os.getpid())); time.sleep(60)"
    jobs = [study.Job(name, (sys.executable, "-c", child), out / "never") for name in ("a", "b")]
    sys.exit(failures.run(lambda: study.run_jobs(jobs, out, 1)))


@pytest.mark.parametrize(("number", "status"), [(9, -9), (15, 143), (2, 130)])
def test_the_children_of_a_study_die_with_it(tmp_path, number, status):
    process = forked(tmp_path / "log", study_of_sleepers, tmp_path)
    deadline = time.monotonic() + 120
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline and process.exitcode is None
        time.sleep(0.05)
    child = Path("/proc") / (tmp_path / "pid").read_text()
    assert child.exists()
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == status
    while child.exists() and "Z" not in (child / "stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "the child lives on"
        time.sleep(0.05)
    assert len((tmp_path / "commands.txt").read_text().splitlines()) == 1, "the second was never begun"


# --- images -------------------------------------------------------------------------------------------


def episode(image_id: str) -> Episode:
    box = (0.1, 0.1, 0.5, 0.5)
    steps = [Step(proposal=box, stop=False, box=box, iou=1.0, reward=1.0)]
    return Episode(f"s-{image_id}", image_id, "scenes", "val", "the cup", box, (20, 30), steps)


def test_long_ids_become_short_names_that_stay_apart(tmp_path):
    ids = ["x" * 1000, "x" * 999 + "y", "ü" * 300, "a/" * 400, "x" * 200, "x" * 201, "ok"]
    found = [image_file(one) for one in ids]
    assert len(set(found)) == len(ids) and max(len(name.encode()) for name in found) <= 255
    assert found[-1] == "ok.png"
    save_episodes(tmp_path, [episode(one) for one in ids], lambda e: np.zeros((20, 30, 3), np.uint8))
    assert {p.name for p in (tmp_path / "images").iterdir()} == set(found)


def test_a_device_is_not_replaced(tmp_path, capsys):
    save_episodes(tmp_path, [episode("a")], lambda e: np.zeros((20, 30, 3), np.uint8))
    assert main(["view", str(tmp_path), "--out", "/dev/null"]) == 2
    assert "/dev/null is a device" in capsys.readouterr().err
    assert Path("/dev/null").is_char_device()


def test_a_policy_folder_is_complete_or_absent(tmp_path, monkeypatch):
    policy = load_policy("tiny")
    policy.save(tmp_path / "policy", {"seed": 0})

    monkeypatch.setattr(type(policy.image_processor), "save_pretrained", interrupted)
    for name in ("policy", "other"):
        with pytest.raises(KeyboardInterrupt):
            policy.save(tmp_path / name, {"seed": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["policy"] and asked_of(tmp_path / "policy") == {"seed": 0}
    load_policy(str(tmp_path / "policy"))


def test_a_rollout_says_what_it_replaces(tmp_path, capsys):
    assert main(["rollout", "--episodes", "2", "--out", str(tmp_path)]) == 0
    assert "replaces" not in capsys.readouterr().err
    assert main(["rollout", "--out", str(tmp_path)]) == 0
    assert "replaces 2 episode(s)" in capsys.readouterr().err


def test_a_warm_start_of_the_same_options_is_used(tmp_path, capsys):
    same = train_sft.Args()
    asked = {k: getattr(same, k) for k in ("env", "split", "data_root", "seed", "view", "layout", "lessons")}
    with whole_folder(tmp_path / "run-sft" / "policy", asked):
        pass
    args = train_grpo.Args(out=tmp_path / "run")
    assert train_grpo._warm_start(args, Accelerator(cpu=True)) == str(tmp_path / "run-sft" / "policy")
    for name, other in (("env", "IVT-Photos-v0"), ("view", "both"), ("stop", False)):
        with pytest.raises(FileError, match=f"was made with {'lessons' if name == 'stop' else name} "):
            train_grpo._warm_start(replace(args, **{name: other}), Accelerator(cpu=True))
