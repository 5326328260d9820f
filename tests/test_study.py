"""The study runs commands: what is done stays done, what fails is named, and every command is one that exists."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import tyro

from agents.study import SPLITS, Args, Job, _playing, _scoring, _training, run_jobs
from agents.training import RunError


def write(tmp_path, name: str, status: int = 0) -> Job:
    """A command that appends a line to its file, and may fail."""
    made = tmp_path / f"{name}.txt"
    code = f"open({str(made)!r}, 'a').write('x'); print('said {name}'); raise SystemExit({status})"
    return Job(name, (sys.executable, "-c", code), made)


def test_what_is_done_is_not_done_again(tmp_path):
    jobs = [write(tmp_path, name) for name in ("a", "b", "c")]
    jobs[1].made.write_text("done before")
    for _ in range(2):
        run_jobs(jobs, tmp_path, 2)
    assert [job.made.read_text() for job in jobs] == ["x", "done before", "x"]
    assert "said a" in (tmp_path / "a.log").read_text()
    assert set(json.loads((tmp_path / "minutes.json").read_text())) == {"a", "c"}
    assert len((tmp_path / "commands.txt").read_text().splitlines()) == 2


def test_a_command_that_fails_is_named_with_its_log_and_the_others_are_finished(tmp_path):
    jobs = [write(tmp_path, "bad", status=3), write(tmp_path, "good")]
    with pytest.raises(RunError, match=r"bad failed; its log: .*bad\.log"):
        run_jobs(jobs, tmp_path, 1)
    assert jobs[1].made.exists()


@pytest.mark.parametrize("seeds", [1, 3])
def test_every_command_of_the_study_is_one_that_its_script_takes(tmp_path, seeds):
    args = Args(out=tmp_path, seeds=seeds)
    for job in [*_training(args), *_playing(args), *_scoring(args)]:
        _, minus_m, module, *options = job.command
        assert minus_m == "-m"
        tyro.cli(importlib.import_module(module).Args, args=options)


def test_the_control_gets_the_steps_and_the_demonstrations_of_the_loop(tmp_path):
    """And the same seed, rate, optimizer and numbers: only what is taught differs."""
    args = Args(out=tmp_path, seeds=2)
    train = importlib.import_module("train_sft").Args
    parsed = {job.name: tyro.cli(train, args=list(job.command[3:])) for job in _training(args)}
    for seed in range(2):
        loop, control = parsed[f"loop-{seed}"], parsed[f"control-{seed}"]
        for name in ("model", "split", "steps", "batch", "lr", "optimizer", "smoothing", "mixed_precision", "seed"):
            assert getattr(loop, name) == getattr(control, name), name
        assert (loop.single_shot, control.single_shot) == (False, True)
        assert control.samples >= control.steps * control.batch, "no answer is taught to the control twice"


def test_what_is_scored_is_what_was_played_and_seeds_share_a_name(tmp_path):
    args = Args(out=tmp_path, seeds=3)
    evaluate = importlib.import_module("evaluate").Args
    played = {job.made.parent for job in _playing(args)}
    for split, job in zip(SPLITS, _scoring(args), strict=True):
        parsed = tyro.cli(evaluate, args=list(job.command[3:]))
        names = [text.partition("=")[0] for text in parsed.episodes]
        assert [names.count(name) for name in ("base", "control", "loop", "large")] == [1, 3, 3, 1]
        assert names[0] == "base", "what the others are compared with"
        for text in parsed.episodes:
            folder = Path(text.partition("=")[2])
            # The folder of the episodes has the name under which the policy was played.
            assert folder.parts[-2:] == ("episodes", folder.parts[-3]) and folder.parent.parent in played
            assert folder.parts[-4] == split
