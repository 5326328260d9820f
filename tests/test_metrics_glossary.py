"""A curve that no one can explain, and an explanation of a curve that is never drawn: the glossary and
the log must hold the same keys, and a key must mean what its entry says.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from learner import small_trainer
from test_grpo import play
from test_resume import TINY, with_out

from ivt_agents.grpo import train as train_grpo
from ivt_agents.grpo.collect import Groups, collect
from ivt_agents.grpo.losses import LOSSES, clipped_sides
from ivt_agents.grpo.train import Args
from ivt_agents.grpo.trainer import Credit
from ivt_agents.sft import train as train_sft
from ivt_agents.training.folder import read_metrics
from ivt_agents.training.run import MetricsLog, Stopwatch

GLOSSARY = Path(__file__).parent.parent / "docs" / "metrics.md"


def entries() -> list[str]:
    """Keys of the glossary: what stands in backticks in the first column of its tables."""
    rows = re.findall(r"^\| (`.+?) \|", GLOSSARY.read_text(encoding="utf-8"), re.MULTILINE)
    return [key for row in rows for key in re.findall(r"`([^`]+)`", row)]


def covers(entry: str, key: str) -> bool:
    return re.fullmatch(re.escape(entry).replace(r"\*", r"\d+"), key) is not None


def test_every_logged_key_has_an_entry_and_every_entry_is_logged(tmp_path, monkeypatch):
    """A value that could not be measured counts, too: its key is logged by a run that can."""
    logged: set[str] = set()
    write = MetricsLog.write

    def recording(log: MetricsLog, step: int, metrics: dict[str, float]) -> None:
        logged.update(metrics)
        write(log, step, metrics)

    monkeypatch.setattr(MetricsLog, "write", recording)
    options = TINY | {"steps": 1, "eval_samples": 2}
    train_grpo.main(Args(**with_out(options, tmp_path / "a", beta=0.01)))
    train_grpo.main(Args(**with_out(options, tmp_path / "b", beta=0.01, kl_in="reward", eval_samples=0)))
    sft = {
        "samples": 4,
        "steps": 1,
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 2,
        "eval_samples": 0,
        "report_to": "none",
    }
    train_sft.main(train_sft.Args(out=tmp_path / "c", **sft))
    known = entries()
    assert len(known) == len(set(known)) > 30
    assert [k for k in sorted(logged) if not any(covers(e, k) for e in known)] == []
    assert [e for e in known if not any(covers(e, k) for k in logged)] == []
    shown = {k for row in read_metrics(tmp_path / "a" / "metrics.jsonl") for k in row}
    assert {"rollout/final_iou", "train/entropy", "eval/final_iou", "speed/images_per_second"} <= shown


def described(tmp_path, ious: list[list[float]], stopped: list[bool], lengths: list[int]) -> dict[str, float]:
    """What is logged about four episodes of one sample with these IoUs after each of three actions."""
    example = play((3,), 4)
    taken = np.arange(3)[None, :] < np.array(lengths)[:, None]
    turns = [[episode[0]] * n for episode, n in zip(example.turns, lengths, strict=True)]
    array = np.array(ious)[None]
    groups = Groups(turns, np.zeros_like(array), taken[None], array, np.array(stopped)[None], parse_failures=0)
    trainer = small_trainer(tmp_path, prompts=1)
    credit = Credit([], [], 0, 0)
    return trainer._describe(groups, trainer._totals(groups, credit), credit)


def test_stop_precision_and_recall_are_what_the_glossary_says(tmp_path):
    ious = [
        [0.6, 0.6, 0.6],  # good at once, stopped on it: right, and found
        [0.6, 0.4, 0.4],  # good at once, made worse, stopped: wrong, and missed
        [0.2, 0.7, 0.8],  # good before the last action, which refined: missed
        [0.2, 0.3, 0.9],  # good with the last action only: no chance to stop
    ]
    found = described(tmp_path, ious, [True, True, False, False], [2, 3, 3, 3])
    assert found["rollout/stop_rate"] == 0.5
    assert found["rollout/stop_precision"] == pytest.approx(1 / 2)
    assert found["rollout/stop_recall"] == pytest.approx(1 / 3)
    # Action 1 refined in all but the first episode, which stopped; action 2 in the last two.
    assert found["rollout/gain_step_1"] == pytest.approx((-0.2 + 0.5 + 0.1) / 3)
    assert found["rollout/gain_step_2"] == pytest.approx((0.1 + 0.6) / 2)
    assert found["rollout/gain_per_refinement"] == pytest.approx((-0.2 + 0.5 + 0.1 + 0.1 + 0.6) / 5)
    assert found["rollout/final_iou"] == pytest.approx((0.6 + 0.4 + 0.8 + 0.9) / 4)


def test_what_never_happened_is_not_measured(tmp_path):
    found = described(tmp_path, [[0.1] * 3, [0.2] * 3, [0.3] * 3, [0.4] * 3], [False] * 4, [3] * 4)
    assert found["rollout/stop_precision"] is None and found["rollout/stop_recall"] is None
    assert found["rollout/stop_rate"] == 0


def test_tokens_at_the_lower_and_at_the_upper_bound_are_counted_apart():
    old = torch.zeros(6)
    new = torch.tensor([0.5, 0.5, 1.5, 1.5, 1.5, 1.0]).log()
    advantages = torch.tensor([-1.0, 1.0, 1.0, 1.0, -1.0, 1.0])
    sides = clipped_sides("dapo", new, old, advantages, torch.arange(6), 0.2, 0.28)
    assert [int(s) for s in sides] == [1, 2], "where the clip would push further, the gradient stays"
    sides = clipped_sides("cispo", new, old, advantages, torch.arange(6), 0.2, 0.28)
    assert [int(s) for s in sides] == [2, 3], "a weight is capped whatever the advantage"
    for loss in LOSSES:
        both = clipped_sides(loss, new, old, advantages, torch.arange(6), 0.2, 0.28)
        assert sum(both) > 0


def test_the_phases_of_a_step_are_apart_and_add_up_to_it(tmp_path):
    trainer = small_trainer(tmp_path)
    metrics = trainer.train_step()
    phases = {k: v for k, v in metrics.items() if k.startswith("time/")}
    assert set(phases) == {"time/rollout_model", "time/rollout_environment", "time/reward", "time/update"}
    assert all(v > 0 for v in phases.values())
    actions = 8 * metrics["rollout/actions_per_episode"]
    assert metrics["speed/images_per_second"] * sum(phases.values()) == pytest.approx(actions)
    # The model's share is the model's: slow it down, and no other phase gets slower by as much.
    watch, act = Stopwatch(), trainer.policy.act

    def slow(observations):
        import time

        time.sleep(0.3)
        return act(observations)

    trainer.policy.act = slow
    groups = collect(trainer.env, trainer.policy, [3, 4], 4, watch)
    calls = int(groups.taken.any((0, 1)).sum())
    assert watch.seconds["rollout_model"] > 0.3 * calls > watch.seconds["rollout_environment"]
