"""The table that people will quote. Every column must be what its name says, and the page must open."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from agents.vlm.load import load_policy
from agents.vlm.policy import VLMPolicy
from evaluate import Args, main

ROOT = Path(__file__).parent.parent


def evaluate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "evaluate.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=280
    )


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation")
    done = evaluate(
        "--policies",
        "base=tiny",
        "floor=centre",
        "ceiling=oracle",
        "--samples",
        "40",
        "--split",
        "val",
        "--out",
        str(out),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done.stdout


def test_the_table_holds_every_policy_and_column(evaluated):
    out, printed = evaluated
    for word in ("base", "floor", "ceiling", "step_0", "last_step", "learned_stop", "random_step", "oracle_best"):
        assert word in printed
    assert (out / "table.txt").read_text().strip() in printed
    results = json.loads((out / "results.json").read_text())
    assert results["served"] == "scenes/val" and {r["policy"] for r in results["rows"]} == {"base", "floor", "ceiling"}


def test_agents_order_as_they_must(evaluated):
    rows = json.loads((evaluated[0] / "results.json").read_text())["rows"]
    score = {(r["policy"], r["column"]): r["scores"]["mIoU"]["value"] for r in rows}
    assert score["ceiling", "learned_stop"] > score["base", "step_0"] > score["floor", "step_0"]
    for policy in ("base", "floor", "ceiling"):
        assert score[policy, "oracle_best"] >= score[policy, "last_step"]


def test_page_plots_and_episodes_are_written(evaluated):
    out, _ = evaluated
    page = (out / "episodes.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and len(page) > 10_000
    assert (out / "accuracy_by_step.png").stat().st_size > 10_000
    assert (out / "episodes" / "base" / "episodes.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "tiny"], "name=policy"),
        (["--policies", "a=tiny", "a=tiny"], "given once"),
        (["--policies", "a=./nowhere"], "nowhere"),
        (["--split", "tset"], "tset"),
        (["--env", "IVT-RefCOCOg-v0", "--data-root", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_end_with_one_clear_line(tmp_path, arguments, message):
    done = evaluate(*arguments, "--samples", "4", "--out", str(tmp_path))
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_each_policy_is_shown_what_it_was_trained_for(tmp_path):
    policy = load_policy("tiny", view="both")
    policy.save(tmp_path / "policy")
    assert load_policy(tmp_path / "policy").view == "both"
    seen: dict[str, set[bool]] = {}
    act = VLMPolicy.act

    def watching(self, observations):
        seen.setdefault(self.view, set()).add("closeup" in observations)
        return act(self, observations)

    arguments = {"samples": 3, "split": "val", "out": tmp_path / "out", "page_episodes": 1, "num_envs": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VLMPolicy, "act", watching)
        main(Args(policies=["base=tiny", f"close={tmp_path / 'policy'}"], **arguments))
    assert seen == {"overlay": {False}, "both": {True}}
