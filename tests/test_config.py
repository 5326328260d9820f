"""A configuration file must mean what it says: a misspelt key that is ignored trains something else."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import pytest
import yaml

from ivt_agents.command import parse
from ivt_agents.config import SECTIONS, ConfigError, has_section, load_config
from ivt_agents.evaluation import evaluate
from ivt_agents.grpo import train as train_grpo
from ivt_agents.play import rollout
from ivt_agents.sft import train as train_sft

SHIPPED = Path(__file__).parent.parent / "configs" / "paper_qwen3vl_4b.yaml"
SCRIPTS = {"sft": train_sft.Args, "grpo": train_grpo.Args}


@dataclass
class Args:
    config: Path | None = None
    steps: int = 3
    lr: float = 0.1
    out: Path = Path("runs")
    name: str | None = None
    precision: Literal["fp16", "bf16"] = "fp16"
    image: tuple[int, int] = (1, 2)
    board: bool = True


def written(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("section", SCRIPTS)
def test_the_shipped_file_loads_and_every_key_is_a_field(section):
    values = yaml.safe_load(SHIPPED.read_text())[section]
    args = parse(SCRIPTS[section], ["--config", str(SHIPPED)], section)
    assert set(values) <= {f.name for f in fields(SCRIPTS[section])} and len(values) > 15
    for key, value in values.items():
        assert str(getattr(args, key)) == str(value), key
    assert args.config == SHIPPED


def test_the_shipped_file_contradicts_itself_nowhere_and_says_of_every_value_whose_it_is():
    train_grpo.check_options(load_config(SHIPPED, train_grpo.Args, "grpo"))
    lines = SHIPPED.read_text().splitlines()
    values = [x for x in lines if x.startswith("  ") and not x.strip().startswith("#")]
    unmarked = [x for x in values if "# paper" not in x and "# our choice" not in x and "  out:" not in x]
    assert [x.split(":")[0].strip() for x in unmarked] == ["teacher"], "explained in the lines above it"


def test_a_part_may_say_only_what_it_changes_of_another(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("grpo: {learning_rate: 0.5, num_generations: 3}\nown_gain: {num_generations: 4}\n")
    grpo = load_config(path, train_grpo.Args, "grpo")
    assert has_section(path, "own_gain") and not has_section(path, "sft")
    assert load_config(path, train_grpo.Args, "own_gain", grpo) == replace(grpo, num_generations=4)
    path.write_text("own_gain: {num_generation: 4}\n")
    with pytest.raises(ConfigError, match="'num_generation'; the closest is 'num_generations'"):
        load_config(path, train_grpo.Args, "own_gain", grpo)


def test_rollout_and_evaluate_read_their_parts_and_lists_are_checked_entry_by_entry(tmp_path):
    assert {"rollout", "evaluate", "own_gain", *SCRIPTS} == set(SECTIONS)
    text = "evaluate:\n  policies: [a=random, b=centre]\n  runs: [x/y]\n  samples: 5\nrollout:\n  agent: centre\n"
    path = str(written(tmp_path, text))
    found = parse(evaluate.Args, ["--config", path, "--samples", "6"], "evaluate")
    assert (found.policies, found.runs, found.samples) == (["a=random", "b=centre"], [Path("x/y")], 6)
    assert parse(rollout.Args, ["--config", path], "rollout").agent == "centre"
    for wrong, said in (("[a=b, 3]", r"evaluate.policies\[1\]: 3"), ("a=b", "expected a list")):
        bad = written(tmp_path, f"evaluate:\n  policies: {wrong}\n")
        with pytest.raises(ConfigError, match=said):
            parse(evaluate.Args, ["--config", str(bad)], "evaluate")


def test_a_flag_overrides_the_file_and_the_file_the_default(tmp_path):
    path = written(tmp_path, "sft: {steps: 7, lr: 1e-5}")
    args = parse(Args, ["--config", str(path), "--steps", "9"], "sft")
    assert (args.steps, args.lr, args.out) == (9, 1e-5, Path("runs"))
    assert parse(Args, [f"--config={path}"], "sft").steps == 7
    assert parse(Args, [], "sft").steps == 3


def test_values_become_what_the_fields_are(tmp_path):
    text = "grpo: {lr: 2, out: a/b, name: null, precision: bf16, image: [3, 4], board: false}"
    args = load_config(written(tmp_path, text), Args, "grpo")
    assert args == Args(None, 3, 2.0, Path("a/b"), None, "bf16", (3, 4), False)
    assert isinstance(args.lr, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sft: {step: 1}", "unknown key 'step'; the closest is 'steps'"),
        ("stf: {steps: 1}", "unknown key 'stf'; the closest is 'sft'"),
        ("sft: {config: x}", "unknown key 'config'"),
        ("grpo: {steps: 1}", "no part 'sft'"),
        ("sft: {steps: 1.5}", "steps: 1.5; expected int"),
        ("sft: {steps: true}", "steps: True; expected int"),
        ("sft: {lr: fast}", "lr: 'fast'; expected float"),
        ("sft: {board: 1}", "board: 1; expected bool"),
        ("sft: {steps: null}", "steps: None"),
        ("sft: {precision: fp8}", "'fp8'; choose from 'fp16', 'bf16'"),
        ("sft: {image: [1]}", "expected a list of 2"),
        ("sft: [1]", "expected a mapping"),
        ("", "expected a mapping"),
        (None, "no configuration at"),
        ("sft: {name: !!python/object/apply:os.getcwd []}", "cannot be read as YAML"),
        ("sft: {", "cannot be read as YAML"),
        ("sft: {steps: 1, steps: 2}", "key 'steps' is given twice, in lines 1 and 1"),
        ("sft:\n  steps: 1\n  lr: 1.0\n  'steps': 1\n", "key 'steps' is given twice, in lines 2 and 4"),
        ("sft: {steps: 1}\ngrpo: {}\nsft: {steps: 1}\n", "key 'sft' is given twice, in lines 1 and 3"),
        ("sft: {steps: 1}\ngrpo:\n  deep:\n    - {a: 1, a: 2}\n", "key 'a' is given twice"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_place(tmp_path, text, message):
    path = tmp_path / "c.yaml" if text is None else written(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        load_config(path, Args, "sft")
    assert message in str(error.value) and str(path) in str(error.value)


def test_a_merged_mapping_may_be_overridden(tmp_path):
    path = written(tmp_path, "sft: &shared {steps: 1, lr: 0.5}\ngrpo: {<<: *shared, steps: 2}\n")
    assert (load_config(path, Args, "grpo").steps, load_config(path, Args, "grpo").lr) == (2, 0.5)
