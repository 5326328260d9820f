"""An option that contradicts another does not crash: the run goes through and is called what it is not. Each
contradiction is refused before anything is loaded, with its value and with what would have gone wrong.
"""

from __future__ import annotations

import copy
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from experiments import study
from ivt_agents.evaluation import evaluate, swaps
from ivt_agents.grpo.advantages import ADVANTAGES, SCALES
from ivt_agents.grpo.losses import CLIPS, LOSSES
from ivt_agents.grpo.train import Args, check_options
from ivt_agents.sft import train as train_sft
from ivt_agents.training.run import RunError

ROOT = Path(__file__).parent.parent

NAN = float("nan")

REFUSED = [
    ({"steps": -1}, "steps -1", "at least 0"),
    ({"warmup": -1}, "warmup -1", "at least 0"),
    ({"save_every": 0}, "save_every 0", "at least 1"),
    ({"eval_every": -1}, "eval_every -1", "at least 0"),
    ({"eval_samples": -1}, "eval_samples -1", "at least 0"),
    ({"lora_rank": -1}, "lora_rank -1", "at least 0"),
    ({"seed": -1}, "seed -1", "at least 0"),
    ({"lr": 0.0}, "lr 0", "would stay"),
    ({"lr": NAN}, "lr nan", "would stay"),
    ({"max_steps": 0}, "max_steps 0", "at least 1"),
    ({"max_grad_norm": -1.0}, "max_grad_norm -1", "uphill"),
    ({"max_grad_norm": NAN}, "max_grad_norm nan", "uphill"),
    ({"temperature": 0.0}, "temperature 0", "every advantage 0"),
    ({"temperature": NAN}, "temperature nan", "every advantage 0"),
    ({"group": 1}, "group 1", "every advantage is 0"),
    ({"prompts": 15}, "prompts 15 on 2 processes", "one more than the others"),
    ({"prompts": 0}, "prompts 0", "never be updated"),
    ({"iterations": 0}, "iterations 0", "never be updated"),
    ({"micro_batch": 0}, "micro_batch 0", "never be updated"),
    ({"max_new_tokens": 0}, "max_new_tokens 0", "never be updated"),
    ({"max_steps": 1, "reward": "final"}, "max_steps 1", "nothing to refine"),
    ({"advantage": "episode_and_step", "omega": 0.0}, "omega 0", "nothing of the step comparison"),
    ({"advantage": "episode_and_step", "omega": -1.0}, "omega -1", "turned round"),
    ({"advantage": "trajectory", "omega": 0.5}, "omega 0.5", "ignored"),
    ({"scale_floor": 0.1}, "scale_floor 0.1", "ignored"),
    ({"discount": 1.5}, "discount 1.5", "more than an earlier one"),
    ({"discount": NAN}, "discount nan", "more than an earlier one"),
    ({"discount": 0.5, "advantage": "trajectory"}, "discount 0.5", "weighs later gains"),
    ({"discount": 0.0, "reward": "final"}, "discount 0", "weighs later gains"),
    ({"optimizer": "muon"}, "lora_rank 16", "an adapter leaves none"),
    ({"start_share": 1.0}, "start_share 1", "would be left"),
    ({"start_share": NAN}, "start_share nan", "would be left"),
    ({"start_share": 0.2, "quantize": "nf4"}, "start_share 0.2", "cannot be merged exactly"),
    ({"cooldown": 61}, "cooldown 61 of 60", "0 to 60"),
    ({"cooldown": -1}, "cooldown -1", "0 to 60"),
    ({"scale": "group", "scale_floor": 0.0}, "scale_floor 0", "as large as"),
    ({"scale": "batch", "scale_floor": NAN}, "scale_floor nan", "as large as"),
    ({"scale": "group", "loss": "dr_grpo"}, "dr_grpo", "GRPO without that division"),
    ({"scale": "group", "kl_in": "reward", "beta": 0.04}, "kl_in reward", "from 0.04 to 40"),
    ({"loss": "gspo", "clip_low": 0.2}, "clip_low 0.2", "1,470 times as probable"),
    ({"loss": "gspo", "clip_high": 0.28}, "clip_high 0.28", "times as probable"),
    ({"loss": "gspo", "mixed_precision": "bf16"}, "mixed_precision bf16", "74 % of the answers"),
    ({"loss": "gspo", "dtype": "bfloat16"}, "dtype bfloat16", "74 % of the answers"),
    ({"loss": "gspo", "quantize": "nf4"}, "quantize nf4", "74 % of the answers"),
    ({"clip_high": 0.0}, "clip_high 0", "have not moved yet"),
    ({"clip_low": -0.1}, "clip_low -0.1", "have not moved yet"),
    ({"clip_low": 1.5}, "clip_low 1.5", "never bind"),
    ({"beta": -0.1}, "beta -0.1", "paid for leaving"),
    ({"kl_in": "reward"}, "beta 0", "nothing would be subtracted"),
]


@pytest.mark.parametrize(("options", "value", "consequence"), REFUSED, ids=[v for _, v, _ in REFUSED])
def test_a_contradiction_is_refused_with_its_value_and_its_consequence(options, value, consequence):
    with pytest.raises(RunError) as caught:
        check_options(Args(**options), processes=2)
    assert value in str(caught.value) and consequence in str(caught.value)


SFT_REFUSED = [
    *(({name: 0}, f"{name} 0", "at least 1") for name in ("samples", "neighbours", "batch", "micro_batch")),
    *(({name: -1}, f"{name} -1", "at least 0") for name in ("steps", "lora_rank", "seed", "eval_samples")),
    *(({name: -1}, f"{name} -1", "at least 0") for name in ("teacher_max_requests", "teacher_max_tokens")),
    ({"harvested": 2}, "harvested 2 of 1", "1 to 1"),
    ({"first_answers": 0.5}, "first_answers 0.5", "verification"),
    ({"lr": -1.0}, "lr -1", "uphill"),
    ({"lr": NAN}, "lr nan", "be lost"),
    ({"smoothing": -1.0}, "smoothing -1", "0 or more"),
    ({"smoothing": NAN}, "smoothing nan", "0 or more"),
    ({"decision_weight": 0.0}, "decision_weight 0", "would not be learned"),
    ({"pixels": 0.0}, "pixels 0", "factor above 0"),
]


@pytest.mark.parametrize(("options", "value", "consequence"), SFT_REFUSED, ids=[v for _, v, _ in SFT_REFUSED])
def test_supervised_training_refuses_what_it_could_not_learn_from(options, value, consequence, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(RunError) as caught:
        train_sft.main(train_sft.Args(out=out, **options))
    assert value in str(caught.value) and consequence in str(caught.value) and not out.exists()


@pytest.mark.parametrize(
    ("command", "options", "value"),
    [
        (evaluate, {"samples": 0}, "samples 0"),
        (evaluate, {"page_episodes": -1}, "page_episodes -1"),
        (evaluate, {"num_envs": 0}, "num_envs 0"),
        (swaps, {"samples": 0}, "samples 0"),
        (swaps, {"seed": -1}, "seed -1"),
        (study, {"seeds": 0}, "seeds 0"),
        (study, {"jobs": 0}, "jobs 0"),
        (study, {"max_steps": 1}, "max_steps 1"),
        (study, {"batch": 1}, "batch 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_measurement_of_nothing_is_refused_before_its_folder_is_made(command, options, value, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(RunError, match=value):
        command.main(command.Args(out=out, **options))
    assert not out.exists()


def test_every_other_combination_is_accepted_and_nothing_is_changed():
    accepted = 0
    for loss, credit, scale, kl_in in itertools.product(LOSSES, ADVANTAGES, SCALES, ("loss", "reward")):
        args = Args(loss=loss, advantage=credit, scale=scale, kl_in=kl_in, beta=0.04)
        before = copy.deepcopy(args)
        refused = scale == "group" and (loss == "dr_grpo" or kl_in == "reward")
        if refused:
            with pytest.raises(RunError):
                check_options(args)
        else:
            check_options(args, processes=4)
            accepted += 1
        assert args == before
    assert accepted == 5 * 3 * 3 * 2 - 5 * 3 - 3
    check_options(Args(), processes=16)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_default_bounds_of_a_loss_are_accepted_when_given(loss):
    low, high = CLIPS[loss]
    check_options(Args(loss=loss, clip_low=low, clip_high=high))


def test_the_choices_of_the_command_are_those_of_the_code():
    for name, names in (("loss", LOSSES), ("advantage", ADVANTAGES), ("scale", SCALES)):
        for value in names:
            assert getattr(tyro.cli(Args, args=[f"--{name}", value]), name) == value


def test_old_and_new_names_of_an_option_are_one():
    for old, new, value in (("advantage", "credit", "trajectory"), ("beta", "kl-coef", "0.04")):
        assert tyro.cli(Args, args=[f"--{old}", value]) == tyro.cli(Args, args=[f"--{new}", value])
        assert tyro.cli(Args, args=[f"--{old}", value]) != Args()
    assert tyro.cli(Args, args=[]) == Args()


def test_the_command_ends_before_it_loads_anything(tmp_path):
    options = ["--model", "./no/such/model", "--loss", "dr_grpo", "--scale", "group", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "train_grpo.py", *options], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "without that division" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_the_table_of_pitfalls_holds_all_and_names_tests_that_exist():
    table = (ROOT / "docs" / "pitfalls.md").read_text(encoding="utf-8")
    assert sorted(int(n) for n in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)) == list(range(1, 39))
    there = {n for f in (ROOT / "tests").glob("test_*.py") for n in re.findall(r"^def (test_\w+)", f.read_text(), re.M)}
    named = {n.split("::")[-1] for n in re.findall(r"`((?:test_\w+::)?test_\w+)`", table)}
    assert len(named) > 40 and named <= there, named - there
