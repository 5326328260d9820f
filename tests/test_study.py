"""The study runs commands: what is done stays done, what fails is named, and every command is one that exists."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys

import pytest
import tyro

from experiments.study import Args, Job, _playing, _scoring, _training, names, run_jobs
from experiments.study_tables import last_screen, plot_map, summary
from ivt_agents.evaluation import evaluate, swaps
from ivt_agents.training.folder import RunError
from ivt_agents.vlm.load import load_policy
from ivt_agents.vlm.prompts import TINY
from ivt_env.rollouts import make_vector_env, rollout


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
        run_jobs(jobs, tmp_path, 2)
    assert jobs[1].made.exists()


def test_no_command_runs_before_what_it_needs(tmp_path):
    first = write(tmp_path, "first")
    code = f"assert open({str(first.made)!r}).read() == 'x'; open({str(tmp_path / 'second.txt')!r}, 'w')"
    second = Job("second", (sys.executable, "-c", code), tmp_path / "second.txt", ("first",))
    run_jobs([second, first], tmp_path, 2)
    assert second.made.exists()


@pytest.mark.parametrize("seeds", [1, 3])
def test_every_command_of_the_study_is_one_that_its_script_takes(tmp_path, seeds):
    args = Args(out=tmp_path, seeds=seeds, half=seeds == 3)
    jobs = [*_training(args), *_playing(args), *_scoring(args)]
    scripts = {"train_sft": "ivt_agents.sft.train", "train_grpo": "ivt_agents.grpo.train"}
    scripts["evaluate"] = "ivt_agents.evaluation.evaluate"
    for job in jobs:
        _, minus_m, module, *options = job.command
        assert minus_m == "-m"
        tyro.cli(importlib.import_module(scripts.get(module, module)).Args, args=options)
    assert {need for job in jobs for need in job.needs} <= {job.name for job in jobs}


def test_the_controls_get_the_steps_of_the_loop_and_no_answer_twice(tmp_path):
    """And the same seed, rate, optimizer and numbers: only what is taught differs."""
    args = Args(out=tmp_path, seeds=2)
    train = importlib.import_module("ivt_agents.sft.train").Args
    parsed = {
        job.name: tyro.cli(train, args=list(job.command[3:]))
        for job in _training(args)
        if job.command[2] == "train_sft"
    }
    for seed in range(2):
        loop = parsed[f"sft-{seed}"]
        for name in ("control", "control-pixels"):
            control = parsed[f"{name}-{seed}"]
            for same in ("model", "learning_rate", "optim", "smoothing", "bf16", "seed"):
                assert getattr(loop, same) == getattr(control, same), same
            assert control.steps == args.sft_steps + args.grpo_steps and not loop.single_shot and control.single_shot
            batch = control.per_device_train_batch_size * control.gradient_accumulation_steps
            assert batch == (16 if name == "control-pixels" else 48), "a step of seven times the pixels costs as much"
            assert control.samples >= control.steps * batch


def test_the_base_is_asked_again_in_the_question_that_it_knows(tmp_path):
    """In that of the policies that learn to look it writes no readable box, and keeps its first by doing so."""
    spec = next(word for job in _playing(Args(out=tmp_path)) for word in job.command if word.startswith("base="))
    policy = load_policy(spec.removeprefix("base="))
    assert policy.dialogue.prompts.text == TINY.first != TINY.text
    env = make_vector_env("IVT-Scenes-v0", 8, split="val", max_steps=3, **policy.shown)
    episodes = rollout(env, policy, 8, 0, ignore_stop=True)
    read = [not step.parse_failure for episode in episodes for step in episode.steps]
    assert len(read) == 24 and sum(read) >= 20


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A study's folder, played by scripted agents under the names of the study, by its own commands: two seeds."""
    args = Args(out=tmp_path_factory.mktemp("study"), seeds=2, splits=["val"], samples=12, marks=[8, 16], map_samples=4)
    agents = {"base": "centre", "grpo-0": "oracle", "control-pixels-0": "centre"}
    for name in names(args):
        agents.setdefault(name, "random")
    for job in _playing(args):
        options = list(job.command[3:])
        if job.name.startswith("swaps"):
            parsed = tyro.cli(swaps.Args, args=options)
            swaps.main(dataclasses.replace(parsed, policies=["loop=oracle"], samples=6))
            continue
        parsed = tyro.cli(evaluate.Args, args=options)
        name = parsed.policies[0].partition("=")[0]
        evaluate.main(dataclasses.replace(parsed, policies=[f"{name}={agents[name]}"]))
    for job in _scoring(args)[:1]:
        evaluate.main(tyro.cli(evaluate.Args, args=list(job.command[3:])))
    return args


def test_the_summary_and_the_last_screen_say_what_the_results_say(scored):
    results = json.loads((scored.out / "val" / "results.json").read_text())
    assert {name: len(seeds) for name, seeds in results["policies"].items()} == {
        "base": 1, "sft": 2, "grpo": 2, "control": 2, "control-pixels": 2,
    }  # fmt: skip
    rows = {(r["policy"], r["column"]): r["scores"]["Acc@0.5"]["value"] for r in results["rows"]}
    text, screen = summary(scored.out, ["val"], swapped=True), last_screen(scored.out, ["val"])
    lines = {tuple(cell.strip() for cell in line.split("|")[1:3]): line for line in text.splitlines()}
    expected = 100 * (rows["grpo", "learned_stop"] - rows["control", "step_0"])
    assert f"{expected:+.1f}" in lines["Acc@0.5", "control step_0"]
    assert f"{100 * rows['grpo', 'learned_stop']:.1f}" in screen and "val, without ground truth: the loop is" in screen
    assert len(screen.splitlines()) <= 15 and "| sibling" in text


def test_the_map_is_drawn_from_what_was_played(scored):
    plot_map(scored.out, scored.marks)
    assert (scored.out / "map.png").stat().st_size > 10_000
