"""An option that contradicts another does not crash: the run goes through and is called what it is not. Each
contradiction is refused before anything is loaded, with its value and with what would have gone wrong.
"""

from __future__ import annotations

import copy
import itertools
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import tyro

from experiments import study
from ivt_agents.command import parse
from ivt_agents.config import MEANT, ConfigError
from ivt_agents.evaluation import evaluate, swaps
from ivt_agents.grpo.advantages import ADVANTAGES, SCALES
from ivt_agents.grpo.losses import CLIPS, LOSSES
from ivt_agents.grpo.train import Args, check_options
from ivt_agents.sft import train as train_sft
from ivt_agents.training.folder import RunError
from ivt_agents.vlm import pretrain

ROOT = Path(__file__).parent.parent

NAN = float("nan")

REFUSED = [
    ({"steps": -1}, "steps -1", "at least 0"),
    ({"warmup_steps": -1}, "warmup_steps -1", "at least 0"),
    ({"save_steps": 0}, "save_steps 0", "at least 1"),
    ({"eval_steps": -1}, "eval_steps -1", "at least 0"),
    ({"eval_samples": -1}, "eval_samples -1", "at least 0"),
    ({"lora_r": -1}, "lora_r -1", "at least 0"),
    ({"seed": -1}, "seed -1", "at least 0"),
    ({"learning_rate": 0.0}, "learning_rate 0", "greater than 0"),
    ({"learning_rate": NAN}, "learning_rate nan", "greater than 0"),
    ({"episode_steps": 0}, "episode_steps 0", "at least 1"),
    ({"max_grad_norm": -1.0}, "max_grad_norm -1", "uphill"),
    ({"max_grad_norm": NAN}, "max_grad_norm nan", "uphill"),
    ({"temperature": 0.0}, "temperature 0", "every advantage 0"),
    ({"temperature": NAN}, "temperature nan", "every advantage 0"),
    ({"num_generations": 1}, "num_generations 1", "every advantage is 0"),
    ({"prompts": 15}, "prompts 15 on 2 processes", "one more than the others"),
    ({"prompts": 0}, "prompts 0", "at least 1"),
    ({"num_iterations": 0}, "num_iterations 0", "at least 1"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size 0", "at least 1"),
    ({"max_completion_length": 0}, "max_completion_length 0", "at least 1"),
    ({"episode_steps": 1, "reward": "final", "advantage": "return_to_go"}, "episode_steps 1", "nothing to refine"),
    ({"discount": 1.5}, "discount 1.5", "more than an earlier one"),
    ({"discount": NAN}, "discount nan", "more than an earlier one"),
    ({"discount": 0.5, "advantage": "trajectory"}, "discount 0.5", "weighs later gains"),
    ({"discount": 0.0, "reward": "final"}, "discount 0", "weighs later gains"),
    ({"optim": "muon", "lora_r": 16}, "lora_r 16", "an adapter leaves none"),
    ({"cooldown": 51}, "cooldown 51 of 50", "0 to 50"),
    ({"cooldown": -1}, "cooldown -1", "0 to 50"),
    ({"scale_rewards": "group", "loss_type": "dr_grpo"}, "dr_grpo", "GRPO without that division"),
    ({"scale_rewards": "group", "kl_in": "reward", "beta": 0.04}, "kl_in reward", "from 0.04 to 40"),
    ({"loss_type": "gspo", "epsilon": 0.2}, "epsilon 0.2", "6,320 times as probable"),
    ({"loss_type": "gspo", "epsilon_high": 0.28}, "epsilon_high 0.28", "times as probable"),
    ({"loss_type": "gspo", "bf16": True}, "bf16 with", "74 % of the answers"),
    ({"loss_type": "gspo", "dtype": "bfloat16"}, "dtype bfloat16", "74 % of the answers"),
    ({"loss_type": "gspo", "quantize": "nf4"}, "nf4 with", "74 % of the answers"),
    ({"epsilon_high": 0.0}, "epsilon_high 0", "have not moved yet"),
    ({"epsilon": -0.1}, "epsilon -0.1", "have not moved yet"),
    ({"epsilon": 1.5}, "epsilon 1.5", "never bind"),
    ({"beta": -0.1}, "beta -0.1", "paid for leaving"),
    ({"kl_in": "reward", "beta": 0.0}, "beta 0", "nothing would be subtracted"),
]


@pytest.mark.parametrize(("options", "value", "consequence"), REFUSED, ids=[v for _, v, _ in REFUSED])
def test_a_contradiction_is_refused_with_its_value_and_its_consequence(options, value, consequence):
    with pytest.raises(RunError) as caught:
        check_options(Args(**options), processes=2)
    assert value in str(caught.value) and consequence in str(caught.value)


SFT_REFUSED = [
    *(
        ({name: 0}, f"{name} 0", "at least 1")
        for name in ("samples", "gradient_accumulation_steps", "per_device_train_batch_size")
    ),
    *(({name: -1}, f"{name} -1", "at least 0") for name in ("steps", "lora_r", "seed", "eval_samples")),
    *(({name: -1}, f"{name} -1", "at least 0") for name in ("teacher_max_requests", "teacher_max_tokens")),
    ({"first_answers": "model", "single_shot": True}, "first_answers model", "nothing would be learned"),
    ({"first_answers": "model", "layout": "prefix"}, "first_answers model", "two models"),
    ({"learning_rate": -1.0}, "learning_rate -1", "greater than 0"),
    ({"learning_rate": NAN}, "learning_rate nan", "greater than 0"),
    ({"smoothing": -1.0}, "smoothing -1", "0 or more"),
    ({"smoothing": NAN}, "smoothing nan", "0 or more"),
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
        (study, {"episode_steps": 1}, "episode_steps 1"),
        (study, {"sft_samples": 0}, "sft_samples 0"),
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
        args = Args(loss_type=loss, advantage=credit, scale_rewards=scale, kl_in=kl_in, beta=0.04)
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
    check_options(Args(), processes=8)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_default_bounds_of_a_loss_are_accepted_when_given(loss):
    low, high = CLIPS[loss]
    check_options(Args(loss_type=loss, epsilon=low, epsilon_high=high))


def test_the_choices_of_the_command_are_those_of_the_code():
    for name, names in (("loss_type", LOSSES), ("advantage", ADVANTAGES), ("scale_rewards", SCALES)):
        for value in names:
            assert getattr(tyro.cli(Args, args=[f"--{name.replace('_', '-')}", value]), name) == value


NAMES = [
    (Args, "--max-steps 3", "--max-steps: say --steps (training steps) or --episode-steps (actions in an episode)"),
    (Args, "--lr=1e-4", "--lr: say --learning-rate"),
    (Args, "--mixed_precision bf16", "--mixed_precision: say --bf16 (a switch)"),
    (Args, "--no-use-peft", "--no-use-peft: say --lora-r (rank; 0: no adapter)"),
    (train_sft.Args, "--batch 8", "say --per-device-train-batch-size or --gradient-accumulation-steps"),
    (swaps.Args, "--max-steps 3", "--max-steps: say --episode-steps (actions in an episode)"),
]


@pytest.mark.parametrize(("args", "words", "said"), NAMES, ids=[words for _, words, _ in NAMES])
def test_a_foreign_name_is_refused_with_the_one_that_is_meant(args, words, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        parse(args, words.split())


def test_a_command_that_has_such_a_name_takes_it():
    assert parse(pretrain.Args, ["--batch", "8"]).batch == 8
    assert not set(MEANT) & {f.name for args in (Args, train_sft.Args) for f in fields(args)}


def test_the_command_ends_before_it_loads_anything(tmp_path):
    options = "--model ./no/such/model --loss-type dr_grpo --scale-rewards group --out".split() + [
        str(tmp_path / "run")
    ]
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


@pytest.mark.parametrize(("args", "section", "count"), [(Args, "grpo", 25), (train_sft.Args, "sft", 23)])
def test_help_shows_what_a_newcomer_needs_and_says_where_the_others_are(args, section, count, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(args, ["--help"], section)
    said = capsys.readouterr().out
    shown = set(re.findall(r"^[^\w\n]*--([a-z][a-z0-9-]+)", said, re.MULTILINE))
    names = {f.name.replace("_", "-") for f in fields(args)}
    assert ended.value.code == 0 and "config" in shown and len(shown) == count
    assert f"{len(names - shown)} more options are listed in docs/command_line.md" in said
    assert parse(args, ["--save-steps", "7"], section).save_steps == 7, "what is not shown is accepted"


def test_the_table_of_options_is_that_of_both_commands():
    page = (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `--([a-z0-9-]+)`.* \| (?:SFT|GRPO|both) \|", page, re.MULTILINE)
    names = {f.name.replace("_", "-") for args in (Args, train_sft.Args) for f in fields(args)}
    assert sorted(listed) == sorted(names)
