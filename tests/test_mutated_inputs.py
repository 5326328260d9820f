"""Changed policy folders, runs and configurations: status 2 and one line, whatever the change.

If this is false, a file that a full disk cut short ends in forty lines of Python, or takes the machine with it.
A few changes of each family are made here; ``IVT_MUTATIONS=3000 pytest -q tests/test_mutated_inputs.py`` makes as many.
Each runs the command itself, in a forked child.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from changes import copied, forked, mutate_folder, number

from ivt_agents import cli
from ivt_agents.evaluation import evaluate  # noqa: F401  what the children need is imported once
from ivt_agents.grpo import train  # noqa: F401
from ivt_agents.vlm.load import load_policy
from ivt_agents.vlm.tiny import weights_folder

torch.set_num_threads(1)

SMALL = "--model tiny --prompts 1 --num-generations 2 --max-completion-length 14 --lora-r 4".split()
SMALL += ["--eval-samples", "0", "--report-to", "none", "--save-steps", "1", "--episode-steps", "1"]

BATCH = "--per-device-train-batch-size 2 --gradient-accumulation-steps 1".split()

CONFIGURATION = """\
sft: {model: tiny, samples: 4, steps: 1, per_device_train_batch_size: 2, learning_rate: 1.0e-4, lessons: looks}
grpo:
  model: tiny
  prompts: 1
  num_generations: 2
  max_completion_length: 14
  lora_r: 4
  learning_rate: 1.0e-3
  view: overlay
  image: [480, 640]
  beta: 0.04
  dtype: null
rollout: {agent: centre, episodes: 1, seed: 3, episode_steps: 2, json: true}
evaluate:
  policies: [a=random, b=centre]
  samples: 3
  forced: false
  num_envs: 2
"""
CAPS = {
    "rollout": ["--episodes", "1", "--episode-steps", "2"],
    "evaluate": ["--samples", "3", "--episode-steps", "2", "--num-envs", "3", "--page-episodes", "2"],
    "train-sft": [*"--samples 4 --steps 1 --eval-samples 0 --report-to none".split(), *BATCH],
    "train-grpo": ["--steps", "0", *SMALL],
}
"""What would take long if a configuration could say it."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of one step, a policy, an adapter and a configuration, each as the project writes them."""
    root = tmp_path_factory.mktemp("made")
    # In a child, too: the threads of a backward pass do not survive a fork.
    ended = forked(lambda: cli.main(["train-grpo", *SMALL, "--steps", "1", "--out", str(root / "run")]))
    assert ended.status == 0, ended
    (root / "configurations").mkdir()
    (root / "configurations" / "c.yaml").write_text(CONFIGURATION)
    shutil.copytree(weights_folder(), root / "policies")
    shutil.copytree(root / "run" / "adapter", root / "adapters")
    # Everything is imported before the first fork: by a policy, and by a run that has nothing left to do.
    load_policy(root / "policies")
    assert cli.main(command("runs", root / "run", random.Random(0))) == 0
    return root


def command(family, folder, rng, what=""):
    """The words of the command that reads ``folder``, the one whose part of a configuration was changed."""
    if family in ("policies", "adapters"):
        return ["rollout", "--agent", f"vlm:{folder}", "--episode-steps", "1", "--out", str(folder.parent / "out")]
    if family == "runs":
        return ["train-grpo", "--out", str(folder), *SMALL, "--steps", "1", "--resume"]
    part = re.match(r"c\.yaml: /(sft|grpo|rollout|evaluate)\b", what)
    name = {"sft": "train-sft", "grpo": "train-grpo"}.get(part[1], part[1]) if part else rng.choice(list(CAPS))
    return [name, "--config", str(folder / "c.yaml"), *CAPS[name], "--out", str(folder.parent / "out")]


@pytest.mark.parametrize(("family", "few"), [("policies", 4), ("adapters", 2), ("runs", 3), ("configurations", 6)])
def test_a_changed_input_is_refused_in_one_line_or_read(family, few, made, tmp_path):
    source = made / ("run" if family == "runs" else family)
    broken, statuses, peak = [], Counter(), 0
    first = int(os.environ.get("IVT_FIRST", 0))
    for seed in range(first, first + number(few)):
        rng = random.Random(f"{family} {seed}")
        folder = copied(source, tmp_path / "changed")
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        pattern = "**/*" if family != "runs" else rng.choice(("checkpoints/*/*", "*.json*"))
        what = mutate_folder(folder, rng, pattern)
        words = command(family, folder, rng, what)
        ended = forked(lambda words=words: cli.main(words), tmp_path)
        statuses[ended.status] += 1
        peak = max(peak, ended.peak_bytes)
        if not ended.promised:
            broken.append(
                f"{family} {seed}: {what}: {' '.join(words)}\n{ended.status} {ended.killed_by}\n{ended.errors[-1500:]}"
            )
        if target := os.environ.get("IVT_REPORT"):
            told = f"{dict(statuses)} peak {peak / 1e6:.0f} MB\n"
            Path(target, family).write_text(told + ("\n" + "=" * 80 + "\n").join(broken))
    print(family, dict(statuses), f"peak {peak / 1e6:.0f} MB")
    assert not broken, f"{len(broken)} of {sum(statuses.values())}:\n" + "\n".join(broken[:5])
