"""One rule for how many samples a split gives: what is asked for, and no more than it has, in every command.

Silent when false: the second command of the README ends in `index 16: give an integer from 0 to 15`, after minutes.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from ivt_agents.evaluation import evaluate, swaps
from ivt_agents.grpo import train as train_grpo
from ivt_agents.sft import train as train_sft
from ivt_env.data.sample import DataError
from ivt_env.rollouts import first_samples, make_vector_env

SFT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "steps": 1, "report_to": "none"}
GRPO = {"steps": 1, "prompts": 1, "num_generations": 2, "episode_steps": 3, "report_to": "none"}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Makes a data set of one's own with so many samples in each split."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))

    def make(**sizes: int) -> dict[str, str]:
        root = tmp_path / "set"
        (root / "images").mkdir(parents=True)
        (root / "dataset.json").write_text(json.dumps({"name": "my-set", "box": "xyxy", "frame": "px"}))
        rng = np.random.default_rng(0)
        for split, size in sizes.items():
            lines = []
            for k in range(size):
                Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(root / "images" / f"{split}{k}.png")
                box = [8 + k, 8, 40, 40 + k % 8]
                lines.append(json.dumps({"image": f"{split}{k}.png", "expression": "the red ring", "bbox": box}))
            (root / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
        return {"env": "IVT-Custom-v0", "data_root": str(root)}

    return make


def test_no_more_samples_are_taken_than_a_split_has():
    dataset = make_vector_env("IVT-Photos-v0", 1, split="val").dataset
    assert first_samples(dataset, 300) == range(16) and first_samples(dataset, 3) == range(3)


@pytest.mark.parametrize("sizes", [{"train": 12, "val": 5}, {"train": 1, "val": 1}])
def test_both_learners_train_on_a_small_set_with_the_numbers_that_they_have_by_default(
    tmp_path, own, monkeypatch, sizes
):
    options = own(**sizes)
    train, asked = train_sft.main, []

    def warm_start(args):
        asked.append(args.eval_samples)
        return train(replace(args, **SFT, eval_samples=train_sft.Args().eval_samples))

    monkeypatch.setattr(train_sft, "main", warm_start)
    train_grpo.main(train_grpo.Args(out=tmp_path / "run", max_unusable=1.0, **options, **GRPO))
    assert asked == [0], "GRPO measures it"
    lines = (tmp_path / "run-sft" / "demonstrations.jsonl").read_text().splitlines()
    assert {json.loads(line)["index"] for line in lines} == set(range(sizes["train"]))
    assert (tmp_path / "run" / "before_after.json").exists()


@pytest.mark.parametrize("script", [train_sft, train_grpo])
def test_a_missing_evaluation_split_is_found_first_and_the_options_that_help_are_named(
    tmp_path, own, monkeypatch, script
):
    options = own(train=3)
    monkeypatch.setattr(script, "load_policy", lambda *_, **__: pytest.fail("a model was loaded first"))
    args = script.Args(out=tmp_path / "run", **options)
    with pytest.raises(DataError, match=r"eval_split val: .*--eval-split \(train is\), or give --eval-samples 0"):
        script.main(args)
    assert not any((tmp_path / "run").glob("*.json*")) and not (tmp_path / "run-sft").exists()


def test_what_is_wrong_with_the_whole_set_is_said_as_it_is(tmp_path, own):
    with pytest.raises(DataError) as error:
        train_sft.main(train_sft.Args(out=tmp_path / "run", split="test", **own(train=3)))
    assert "eval" not in str(error.value)


def test_one_image_gives_no_interval_and_that_is_said_before_anything_is_played(tmp_path, own, monkeypatch):
    options = own(test=1) | {"split": "test"}
    for script in (evaluate, swaps):
        monkeypatch.setattr(script, "load_agent", lambda *_, **__: pytest.fail("an agent was loaded first"))
        with pytest.raises(DataError, match="the first 1 samples show one image.*another --split"):
            script.main(script.Args(policies=["a=centre"], out=tmp_path / "e", **options))


def test_evaluate_and_swaps_play_what_there_is(tmp_path, own):
    size = 3
    options = own(test=size) | {"split": "test"}
    policies = ["a=centre", "b=random"]
    found = evaluate.main(evaluate.Args(policies=policies, out=tmp_path / "e", **options))
    assert [len(one.stopping) for one in found.values()] == [size, size]
    swapped = swaps.main(swaps.Args(policies=policies, out=tmp_path / "s", **options))
    assert {swap.sample_id for swap in swapped["a"]} == {str(k + 1) for k in range(size)}
