"""A run that is cut off and goes on must be the run that was never cut off: the same lines, the same
weights, to the bit. If it is not, nothing crashes; a curve has a step in it that no one can explain.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import before_file_operations, forked, launch
from learner import small_trainer, with_out

from ivt_agents.grpo import train as train_grpo
from ivt_agents.grpo.train import MAY_CHANGE, Args, check_run
from ivt_agents.training.checkpoints import load_checkpoint, save_checkpoint
from ivt_agents.training.folder import PROCESSES, RunError, checkpoints, read_metrics, recorded_options, write_json
from ivt_agents.training.run import MetricsLog, end_training
from ivt_agents.vlm.load import load_policy
from ivt_env.files import FileError, lock_folder

ROOT = Path(__file__).parent.parent

TINY = {
    "model": "tiny",
    "prompts": 1,
    "num_generations": 2,
    "episode_steps": 3,
    "max_completion_length": 14,
    "lora_r": 4,
    "learning_rate": 5e-3,
    "warmup_steps": 1,
    "temperature": 1.5,  # the shipped model is so sure that its answers are alike, and nothing is learned
    "eval_samples": 0,
    "report_to": "none",
    "save_steps": 1,
}


def lines(folder: Path, prefix: str = "") -> list[dict[str, float]]:
    """The run's lines without what the clock says."""
    rows = read_metrics(folder / "metrics.jsonl")
    kept = [{k: v for k, v in row.items() if not k.startswith(("time/", "speed/"))} for row in rows]
    return [row for row in kept if any(k.startswith(prefix) for k in row)]


def assert_same_state(one: Path, two: Path, kept: tuple[str, ...] = ("exp_avg", "exp_avg_sq", "step")) -> None:
    """Checkpoints with equal weights and equal optimizer states, to the bit; ``kept`` for each parameter."""
    a, b = load_checkpoint(one), load_checkpoint(two)
    assert a["step"] == b["step"] and a["parameters"].keys() == b["parameters"].keys()
    assert a["parameters"] and all(torch.equal(v, b["parameters"][n]) for n, v in a["parameters"].items())
    ((mine, other),) = [(x["state"], y["state"]) for x, y in zip(a["optimizers"], b["optimizers"], strict=True)]
    assert mine and mine.keys() == other.keys()
    for i, state in mine.items():
        assert set(kept) <= state.keys() == other[i].keys()
        assert all(torch.equal(value, other[i][k]) for k, value in state.items())
    assert any(bool(state[kept[0]].any()) for state in mine.values()), "nothing was trained, nothing was compared"


# --- killed -----------------------------------------------------------------------------------------


def train(options: dict[str, Any], die_at_file: int | None) -> None:
    """Runs in a process of its own, which dies before a file operation in the run's folder."""

    def told(number: int) -> None:
        if number == die_at_file:
            os.kill(os.getpid(), signal.SIGKILL)

    before_file_operations(str(options["out"]), told)
    train_grpo.main(Args(**options))


def run(options: dict[str, Any], kill_after: float | None = None, die_at_file: int | None = None) -> tuple[int, float]:
    """Start a run and wait for its end, or kill it after so many seconds; returns its exit code and its seconds."""
    begun = time.perf_counter()
    process = forked(os.devnull, train, options, die_at_file)
    process.join(kill_after)
    process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, time.perf_counter() - begun


def test_a_run_that_is_killed_again_and_again_ends_as_the_run_that_was_not(tmp_path):
    options, steps = TINY, 4
    code, whole = run(with_out(options, tmp_path / "whole", steps=steps))
    assert code == 0
    seconds = [row["time/update"] + row["time/rollout_model"] for row in read_metrics(tmp_path / "whole/metrics.jsonl")]
    start = whole - sum(seconds)
    rng = np.random.default_rng(7)
    out, killed, before = tmp_path / "cut", 0, 0
    for attempt in range(7):
        # By turns: at a moment of the start or of the first steps, and at a file operation.
        late = float(start * rng.uniform(0.2, 1.0) + rng.uniform(0.0, 2.0) * np.mean(seconds))
        how = {"kill_after": late} if attempt % 2 else {"die_at_file": int(rng.integers(1, 24))}
        code, _ = run(with_out(options, out, steps=steps, resume=bool(checkpoints(out))), **how)
        assert code in (0, -signal.SIGKILL), "it must go on from whatever the kill before left behind"
        killed += code == -signal.SIGKILL
        if checkpoints(out):
            state = load_checkpoint(out)
            assert state["step"] >= before, "what was saved is never lost"
            before = state["step"]
            read_metrics(out / "metrics.jsonl")
            recorded_options(out)
    assert killed >= 4, "a run that was never killed proves nothing"
    code, _ = run(with_out(options, out, steps=steps, resume=bool(checkpoints(out))))
    assert code == 0
    assert [row["step"] for row in lines(out)] == list(range(1, steps + 1))
    assert lines(out) == lines(tmp_path / "whole")
    assert_same_state(out, tmp_path / "whole")
    assert not list(out.rglob("*.partial"))


def test_a_run_with_muon_and_a_falling_rate_goes_on_as_if_it_had_not_been_cut(tmp_path):
    options = TINY | {"lora_r": 0, "optim": "muon", "learning_rate": 1e-2, "steps": 4, "cooldown": 3}
    train_grpo.main(Args(**with_out(options, tmp_path / "whole")))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(checkpoints(tmp_path / "cut")[-1])
    assert load_checkpoint(tmp_path / "cut")["step"] == 3
    with pytest.raises(RunError, match=r"steps: the run has 4, this command 5"):
        train_grpo.main(Args(**with_out(options, tmp_path / "cut", steps=5, resume=True)))
    train_grpo.main(Args(**with_out(options, tmp_path / "cut", resume=True)))
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert_same_state(tmp_path / "cut", tmp_path / "whole", ("momentum_buffer",))
    rates = [row["train/lr"] for row in lines(tmp_path / "whole", "train/lr")]
    assert rates == pytest.approx([1e-2, 1e-2, 1e-2 * 2 / 3, 1e-2 / 3])
    before, after = load_policy("tiny").model, load_policy(str(tmp_path / "whole" / "policy")).model
    moved = {
        n for (n, a), b in zip(before.named_parameters(), after.parameters(), strict=True) if not torch.equal(a, b)
    }
    assert moved and all("language_model.layers" in n and n.endswith("weight") and "norm" not in n for n in moved)


def write_a_run(folder: Path, begun: int) -> None:
    """What a run writes between its steps, without a model: it goes on from ``begun`` steps to four."""
    with lock_folder(folder):
        write_json(folder / "config.json", {"steps": 4})
        log = MetricsLog(folder, keep_until=begun or None)
        for step in range(begun + 1, 5):
            log.write(step, {"train/loss": float(step)})
            log.sync()
            state = {"parameters": torch.full((50,), float(step)), "optimizers": None}
            save_checkpoint(folder, step, state)
        log.close()


def test_whatever_file_operation_is_never_made_the_run_goes_on(tmp_path):
    """Each of the operations in turn is the one before which the process dies."""
    died, number = 0, 0
    while True:
        number += 1
        folder = tmp_path / str(number)
        pid = os.fork()
        if pid == 0:

            def told(seen: int, number: int = number) -> None:
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)

            before_file_operations("", told)
            write_a_run(folder, 0)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        died += 1
        saved = load_checkpoint(folder)["step"] if checkpoints(folder) else 0
        assert len(checkpoints(folder)) <= 3
        for checkpoint in checkpoints(folder):
            assert torch.load(checkpoint / "state.pt", weights_only=True)["step"] == int(checkpoint.name[5:])
        write_a_run(folder, saved)
        assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3, 4]
        assert [c.name for c in checkpoints(folder)][-2:] == ["step-000003", "step-000004"]
        if saved < 4:  # else nothing was written that could have cleared up
            assert len(checkpoints(folder)) == 2 and not list(folder.rglob("*.partial"))
    assert died > 32


def test_a_last_line_that_was_cut_off_is_dropped_and_a_broken_one_in_the_middle_is_not(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train/loss": 0.5}\n{"step": 2, "train/lo')
    assert [row["step"] for row in read_metrics(path)] == [1]
    MetricsLog(tmp_path, keep_until=5).write(2, {"train/loss": 0.25})
    assert [json.loads(x)["step"] for x in path.read_text().splitlines()] == [1, 2]
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(RunError, match=r"metrics.jsonl, line 2: is not a line of metrics"):
        MetricsLog(tmp_path, keep_until=5)
    assert "nonsense" in path.read_text(), "nothing is changed before it is understood"


def test_checkpoints_are_ordered_by_number_and_not_by_name(tmp_path):
    for step in (999_999, 1_000_000):
        save_checkpoint(tmp_path, step, {"parameters": {}, "optimizers": []})
    assert load_checkpoint(tmp_path)["step"] == 1_000_000


def test_an_evaluation_that_a_kill_prevented_is_made_when_the_run_goes_on(tmp_path):
    options = TINY | {"eval_samples": 2, "eval_steps": 2}
    train_grpo.main(Args(**with_out(options, tmp_path / "whole", steps=2)))
    train_grpo.main(Args(**with_out(options, tmp_path / "cut", steps=2)))
    path = tmp_path / "cut" / "metrics.jsonl"
    rows = path.read_text().splitlines()
    assert "eval/" in rows[-1]
    path.write_text("".join(row + "\n" for row in rows[:-1]))
    train_grpo.main(Args(**with_out(options, tmp_path / "cut", steps=2, resume=True)))
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    train_grpo.main(Args(**with_out(options, tmp_path / "cut", steps=2, resume=True)))
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole"), "and only once"


# --- other options ----------------------------------------------------------------------------------


def another(value: object) -> object:
    """A value that is not this one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return f"{value}-other"


def recorded() -> dict[str, object]:
    return json.loads(json.dumps(asdict(Args(model="tiny")) | {PROCESSES: 1}, default=str))


@pytest.mark.parametrize("name", sorted({f.name for f in fields(Args)} | {PROCESSES}))
def test_an_option_that_decides_the_result_cannot_change_and_others_can(name):
    was = recorded()
    given = was | {name: another(was[name])}
    if name in MAY_CHANGE:
        check_run(was, given, Path("runs/x"))
        return
    with pytest.raises(RunError) as caught:
        check_run(was, given, Path("runs/x"))
    told = str(caught.value)
    assert f"{name}: the run has {was[name]!r}, this command {given[name]!r}" in told
    assert "new --out" in told and "\n" not in told
    if was[name] is not None:
        advice = f"start {was[name]} processes" if name == PROCESSES else f"-{name.replace('_', '-')}"
        assert advice in told


def test_what_may_change_are_options_and_what_decides_the_result_is_not_among_them():
    names = {f.name for f in fields(Args)}
    assert names >= MAY_CHANGE
    decisive = set(
        "loss_type epsilon epsilon_high beta kl_in learning_rate warmup_steps num_generations prompts seed model env"
        " split reward advantage scale_rewards temperature episode_steps num_iterations lora_r lora_alpha view layout"
        " dtype quantize".split()
    )
    assert decisive <= names - MAY_CHANGE


def test_a_command_that_would_make_another_run_of_it_changes_nothing(tmp_path):
    out = tmp_path / "run"
    train_grpo.main(Args(**with_out(TINY, out, steps=1)))
    files = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(RunError, match=r"loss_type: the run has 'dapo', this command 'cispo'.*--loss-type dapo"):
        train_grpo.main(Args(**with_out(TINY, out, steps=2, loss_type="cispo", resume=True)))
    with pytest.raises(RunError, match=r"holds a run of 1 steps: add --resume"):
        train_grpo.main(Args(**with_out(TINY, out, steps=2)))
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == files
    # What may change does, and a new run leaves nothing of the old one that could be resumed from.
    train_grpo.main(Args(**with_out(TINY, out, steps=3, save_steps=2, resume=True)))
    assert load_checkpoint(out)["step"] == 3
    train_grpo.main(Args(**with_out(TINY, out, steps=1, seed=1, overwrite=True)))
    assert load_checkpoint(out)["step"] == 1 and recorded_options(out)["seed"] == 1


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no config.json"), ("{", "cannot be read"), ("3", "holds a int, not an object")]
)
def test_a_run_whose_options_are_not_known_is_not_gone_on_with(tmp_path, content, message):
    save_checkpoint(tmp_path, 1, {})
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises((RunError, FileError), match=message):
        train_grpo.main(Args(**with_out(TINY, tmp_path, resume=True)))


# --- several processes ------------------------------------------------------------------------------


def train_on_several(out: Path, part: str) -> None:
    """Runs in each of the processes: a whole run and the first half of another, or the second half."""
    lasting = {"learning_rate": 5e-3, "num_iterations": 2}
    if part == "first":
        small_trainer(out / "whole", steps=4, **lasting).train(lambda *_: None)
        trainer = small_trainer(out / "cut", steps=2, **lasting)
    else:
        trainer = small_trainer(out / "cut", steps=4, keep_until=2, **lasting)
        trainer.resume()
        assert trainer.step == 2 and trainer.accelerator.num_processes == 2
    trainer.train(lambda *_: None)
    end_training(trainer.accelerator)


def test_on_two_processes_four_steps_equal_two_and_a_resumed_two_to_the_bit(tmp_path):
    for part in ("first", "second"):
        launch(2, train_on_several, tmp_path, part)
    assert [row["step"] for row in lines(tmp_path / "cut")] == [1, 2, 3, 4]
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert_same_state(tmp_path / "cut", tmp_path / "whole")
