"""Both ways into TRL train, and what its trainer scores is what the model saw when it played.

Silent when false: images that belong to another rollout, or that lose their place in the sequence, change every
log-probability a little, raise no error, and train the model on conversations that it never had.
"""

from __future__ import annotations

import copy
import importlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from learner import trl_config
from trl import GRPOConfig, GRPOTrainer

from ivt_agents.trl import config_fields
from ivt_agents.trl.rollout import RolloutImages, TRLRollout, episode_return, rollout_processor, rollout_rows
from ivt_agents.vlm.adapters import add_lora
from ivt_agents.vlm.load import load_policy
from ivt_env.data.sample import DataMissingError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:You are using")

ROOT = Path(__file__).parent.parent


def trainer_of(folder: Path, policy: Any, view: str = "overlay", **options: object) -> GRPOTrainer:
    batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "temperature": 1.0, "seed": 3}
    return GRPOTrainer(
        model=policy.model,
        reward_funcs=episode_return,
        args=trl_config(folder, **(batch | options)),
        train_dataset=rollout_rows(range(8)),
        processing_class=rollout_processor(policy),
        rollout_func=TRLRollout(policy, "IVT-Scenes-v0", split="train", max_steps=3, view=view),
    )


def scored(trainer: GRPOTrainer, batch: dict[str, Any]) -> torch.Tensor:
    """Log-probabilities of a batch as TRL's loss computes them."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        return trainer._get_per_token_logps_and_entropies(
            trainer.model,
            ids,
            mask,
            batch["completion_ids"].size(1),
            pixel_values=batch["pixel_values"],
            image_grid_thw=batch["image_grid_thw"],
            num_images=batch["num_images"],
        )[0]


@pytest.mark.parametrize(("view", "lora"), [("overlay", False), ("both", True)])
def test_the_trainer_scores_what_was_sampled_with_the_images_that_were_seen(tmp_path, view, lora):
    """Through TRL's shuffling and its cut into micro-batches; with an adapter and checkpointing, too."""
    policy = load_policy("tiny", temperature=1.0, max_new_tokens=14, layout="prefix")
    policy.sampling = replace(policy.sampling, suppressed=())  # TRL scores with the whole vocabulary
    if lora:
        policy.model = add_lora(policy.model, 4)
        with torch.no_grad():  # a fresh adapter changes nothing
            for name, weight in policy.model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(0, 0.02, generator=torch.Generator().manual_seed(1))
    trainer = trainer_of(tmp_path, policy, view, gradient_checkpointing=lora)
    trainer.model.train()
    # As the data loader hands them over: a group's rows are looked up one by one, and dicts and lists rebuilt.
    rows = [trainer.train_dataset[i] for i in (2, 2, 2, 2, 5, 5, 5, 5)]
    lengths, turns = set(), 0
    for step in range(2):
        trainer._step = step
        batch = trainer._prepare_inputs(copy.deepcopy(rows))
        sampled, saw = batch["tool_mask"].bool() & batch["completion_mask"].bool(), batch["sampling_per_token_logps"]
        assert batch["pixel_values"].shape[0] == int(batch["image_grid_thw"].prod(-1).sum())
        assert float((scored(trainer, batch) - saw)[sampled].abs().max()) < 1e-4
        assert bool((saw[~sampled] == 0).all()) and bool((saw[sampled] != 0).any())
        turns += sum(int(n) for n in batch["num_images"])
        lengths.add(tuple(int(n) for n in batch["num_images"]))
        others = batch | {"pixel_values": batch["pixel_values"].roll(batch["pixel_values"].shape[0] // 2, 0)}
        assert float((scored(trainer, others) - saw)[sampled].abs().max()) > 1e-2, "the images do not count"
    assert turns > 8, f"nothing is said about later turns: {lengths}"


def test_what_the_rollout_cannot_do_is_refused(tmp_path):
    with pytest.raises(ValueError, match="layout='prefix'"):
        TRLRollout(load_policy("tiny", layout="fresh"), "IVT-Scenes-v0")
    policy = load_policy("tiny", temperature=0.7, max_new_tokens=14, layout="prefix")
    trainer = trainer_of(tmp_path, policy)
    rows = [trainer.train_dataset[0]["prompt"]]
    with pytest.raises(ValueError, match="samples at temperature 0.7 and the trainer scores at 1.0"):
        trainer.rollout_func(rows, trainer)
    policy.set_temperature(1.0)
    with pytest.raises(ValueError, match="rollout_rows"):
        trainer.rollout_func([[{"role": "user", "content": "", "index": 0}]], trainer)
    with pytest.raises(ValueError, match="rollout_func=TRLRollout"):
        trainer.processing_class(images=[RolloutImages()], text=["x"])
    once = trainer.rollout_func(rows, trainer)
    assert sum(once["env_mask"][0]) > 0 and len(once["env_mask"][0]) == len(once["completion_ids"][0])
    with pytest.raises(RuntimeError, match="played already"):
        trainer.rollout_func(rows, trainer)


def transcript(script: str) -> list[str]:
    """What docs/trl.md says that a script prints."""
    page = (ROOT / "docs" / "trl.md").read_text(encoding="utf-8")
    found = re.search(rf"```console\n\$ python {re.escape(script)}\n(.*?)```", page, re.DOTALL)
    assert found, f"docs/trl.md shows no run of {script}"
    return found[1].splitlines()


def without_figures(line: str) -> str:
    """Sampled figures depend on the versions installed."""
    return re.sub(r"[+-]?\d+\.\d+", "#", line)


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("train_with_trl")


@pytest.mark.parametrize("rollout", [False, True])
def test_an_example_trains_two_steps_and_prints_what_the_page_shows(example, rollout, capsys):
    example.main(example.Args(rollout=rollout))
    printed = capsys.readouterr().out.splitlines()
    page = transcript(f"examples/train_with_trl.py{' --rollout' if rollout else ''}")
    assert [without_figures(line) for line in printed] == [without_figures(line) for line in page]
    rewards = [float(re.search(r"reward ([\d.]+)", line)[1]) for line in printed[:2]]
    assert len(rewards) == 2 and all(0 <= r <= 1 for r in rewards) and max(rewards) > 0


def test_an_example_takes_other_data_and_fields_of_trl(example, tmp_path, capsys):
    options = {"rollout": True, "steps": 5, "prompts": 1, "group": 2, "turns": 2, "env": "IVT-Photos-v0"}
    example.main(example.Args(**options, grpo=("learning_rate=0.0", "max_steps=1")))
    printed = capsys.readouterr().out
    assert printed.count("step ") == 1 and "\n0 of 109 weights changed" in printed
    options["env"] = "IVT-RefCOCO-v0"
    with pytest.raises(DataMissingError):
        example.main(example.Args(**options, data_root=str(tmp_path)))


def test_a_field_that_trl_does_not_have_is_refused_with_the_nearest():
    words = ["use_vllm=true", "learning_rate=1e-5", "vllm_mode=colocate", "report_to=[]", "max_steps=3"]
    values = {"use_vllm": True, "learning_rate": 1e-5, "vllm_mode": "colocate", "report_to": [], "max_steps": 3}
    assert config_fields(words, GRPOConfig) == values
    for word, message in (("use_vlm=1", "GRPOConfig, such as use_vllm"), ("seed", "give name="), ("seed=[", "be read")):
        with pytest.raises(ValueError, match=message):
            config_fields([word], GRPOConfig)
