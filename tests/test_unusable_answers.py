"""A policy whose answers cannot be used is shown and refused after the first rollouts, not trained and saved.

Silent when false: `parse_failures 1.000 -> 1.000`, gradient norm 0, "policy saved".
"""

from __future__ import annotations

import numpy as np
import pytest
from learner import base_policy, small_policy, small_trainer

from ivt_agents.evaluation import evaluate
from ivt_agents.grpo import train as train_grpo
from ivt_agents.grpo import trainer as trainer_module
from ivt_agents.grpo.trainer import WITHOUT_VARIANCE
from ivt_agents.play.on_split import check_answers, check_episodes, play
from ivt_agents.play.scripted import RandomAgent
from ivt_agents.sft import train as train_sft
from ivt_agents.training.folder import RunError
from ivt_agents.vlm.load import load_policy

BOTH = {"steps": 1, "eval_samples": 0, "report_to": "none"}
SFT = BOTH | {"samples": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
GRPO = BOTH | {"prompts": 2, "num_generations": 2}


@pytest.fixture(scope="module")
def without_prompt(tmp_path_factory):
    """A model folder that lost its policy.json: it is asked in words that it never read."""
    folder = tmp_path_factory.mktemp("models") / "lost"
    load_policy("tiny").save(folder)
    (folder / "policy.json").unlink()
    return folder


def run_both(out, model, **options):
    for name, script, small in (("sft", train_sft, SFT), ("grpo", train_grpo, GRPO)):
        yield name, lambda s=script, o=small, n=name: s.main(s.Args(model=str(model), out=out / n, **o, **options))


def test_both_learners_show_three_answers_and_what_was_expected_and_save_nothing(tmp_path, without_prompt):
    for name, main in run_both(tmp_path, without_prompt):
        with pytest.raises(ValueError, match=r'\(100%\).*"bbox_2d": \[x1, y1, x2, y2\]') as error:
            main()
        said = str(error.value)
        assert said.count(" | ") == 2 and "--max-unusable 1" in said and "policy.json" in said
        assert not (tmp_path / name / "policy").exists() and not (tmp_path / name / "checkpoints").exists()


def test_told_to_go_on_they_go_on_and_say_it_loudly(tmp_path, without_prompt, caplog):
    for name, main in run_both(tmp_path, without_prompt, max_unusable=1.0):
        caplog.clear()
        assert (main() / "policy.json").exists()
        assert "cannot be used" in caplog.text and "bbox_2d" in caplog.text, name


def test_evaluate_says_it_loudly(tmp_path, without_prompt, caplog):
    evaluate.main(evaluate.Args(policies=[f"lost={without_prompt}"], samples=4, forced=False, out=tmp_path / "e"))
    assert "(100%) cannot be used" in caplog.text and '{"stop": true}' in caplog.text


class OutsideAgent(RandomAgent):
    """Its text parses, and its boxes lie in another frame."""

    def act(self, observations):
        actions = super().act(observations)
        return actions | {"box": np.asarray(actions["box"]) * 0 - 5, "stop": np.zeros_like(actions["stop"])}


def test_boxes_that_the_environment_refuses_count_too():
    with pytest.raises(ValueError, match="100%"):
        play(OutsideAgent(), "IVT-Scenes-v0", "val", range(3), ignore_stop=True, max_unusable=0.9)


def test_a_policy_that_can_answer_is_not_spoken_of(caplog):
    episodes = play(base_policy(), "IVT-Scenes-v0", "val", range(4), ignore_stop=False, max_steps=1, max_unusable=0.1)
    check_episodes(episodes, 0.0)
    assert caplog.text == ""


def test_the_share_is_what_counts(caplog):
    check_answers(5, 10, [], 0.9)
    assert caplog.text == ""
    check_answers(9, 10, ["a" * 200], 0.9)
    assert "9 of the first 10 answers (90%)" in caplog.text and "a" * 118 not in caplog.text
    with pytest.raises(ValueError, match="now 0.9"):
        check_answers(10, 10, [], 0.9)
    with pytest.raises(ValueError, match="now 0.2"):
        check_answers(3, 10, [], 0.2)
    for wrong in (-0.1, 1.1, float("nan")):
        for script in (train_sft, train_grpo):
            with pytest.raises(RunError, match="max_unusable"):
                script.check_options(script.Args(max_unusable=wrong))


def test_groups_without_variance_are_warned_of_once_after_several_steps(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(trainer_module, "zero_variance", lambda rewards: True)
    trainer = small_trainer(tmp_path, small_policy(), steps=WITHOUT_VARIANCE + 1, prompts=1, num_generations=2)
    told = []
    trainer.train(lambda step, metrics: told.append(caplog.text.count("nothing was learned")))
    assert told == [0] * (WITHOUT_VARIANCE - 1) + [1, 1]
    assert f"steps 1 to {WITHOUT_VARIANCE}" in caplog.text
