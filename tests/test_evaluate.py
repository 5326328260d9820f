"""The table that people will quote. Every column must be what its name says, and the page must open."""

from __future__ import annotations

import contextlib
import io
import json
import re
from dataclasses import replace

import pytest
from learner import base_policy

from ivt_agents import cli
from ivt_agents.evaluation.evaluate import Args, main
from ivt_agents.vlm.load import load_policy
from ivt_agents.vlm.policy import VLMPolicy

POLICIES = {"base": "{base}", "floor": "centre", "ceiling": "oracle"}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    out, printed = tmp_path_factory.mktemp("evaluation"), io.StringIO()
    base = tmp_path_factory.mktemp("policies") / "base"
    base_policy().save(base)
    policies = [f"{name}={spec.format(base=base)}" for name, spec in POLICIES.items()]
    with contextlib.redirect_stdout(printed):
        assert cli.main(["evaluate", "--policies", *policies, *f"--samples 30 --split val --out {out}".split()]) == 0
    return out, printed.getvalue()


def results_in(folder):
    return json.loads((folder / "results.json").read_text())


def test_the_command_ends_with_an_answer_and_the_files_hold_every_policy_and_column(evaluated):
    out, printed = evaluated
    screen, table, results = printed.splitlines(), (out / "table.txt").read_text(), results_in(out)
    assert len(screen) <= 15 and max(len(line.replace(str(out), "runs")) for line in screen) <= 100
    assert "refinement hurts" in next(line for line in screen if line.startswith("base"))
    assert f"report: {out / 'report.html'}" in screen
    for word in (*POLICIES, "step_0", "last_step", "learned_stop", "random_step", "oracle_best"):
        assert word in table
    assert results["served"] == "scenes/val" and {r["policy"] for r in results["rows"]} == set(POLICIES)
    page = (out / "episodes.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and len(page) > 10_000
    assert (out / "episodes" / "base" / "episodes.jsonl").exists()
    for name in ("accuracy_by_step", "before_after", "reliability", "groups"):
        assert (out / f"{name}.png").stat().st_size > 10_000, name


def test_agents_order_as_they_must(evaluated):
    score = {(r["policy"], r["column"]): r["scores"]["Acc@0.5"]["value"] for r in results_in(evaluated[0])["rows"]}
    assert score["ceiling", "learned_stop"] >= score["base", "step_0"] > score["floor", "step_0"]
    assert all(score[policy, "oracle_best"] >= score[policy, "last_step"] for policy in POLICIES)


def test_saved_episodes_give_the_same_scores_without_a_model(evaluated, tmp_path):
    out, _ = evaluated
    main(Args(episodes=[f"{name}={out / 'episodes' / name}" for name in POLICIES], out=tmp_path))
    fresh, again = results_in(out), results_in(tmp_path)
    for key in ("rows", "comparisons", "audits", "served"):
        assert again[key] == fresh[key], key
    for page in ("episodes.html", "report.html"):
        found, made = (
            re.sub(r"<section><h2>Provenance.*?</section>", "", (folder / page).read_text(), flags=re.S)
            for folder in (tmp_path, out)
        )
        assert found == made, "images are found again; only where the figures come from differs"
    first, second = ((folder / "table.txt").read_text() for folder in (out, tmp_path))
    scores, _, cost = first.partition("\nwhat an episode cost")
    assert second.splitlines()[1:] == scores.splitlines()[1:], "the first line says what was read"
    # The base answers three actions, two of them with a close-up; a centre box is scripted, so nothing is counted.
    assert fresh["costs"].keys() == {"base"} and fresh["costs"]["base"][0]["images"] == 5.0
    assert "prefilled" in cost and again["costs"] == {}


def test_a_name_given_again_is_another_seed(evaluated, tmp_path):
    saved = evaluated[0] / "episodes"
    seeds = [f"both={saved / 'floor'}", f"both={saved / 'ceiling'}"]
    played = main(Args(episodes=[f"base={saved / 'floor'}", *seeds], out=tmp_path))
    assert len(played["both"].runs) == 2 and len(played["both"].stopping) == 60
    rows = {(r["policy"], r["column"]): r for r in results_in(tmp_path)["rows"]}
    both, base = rows["both", "last_step"], rows["base", "last_step"]
    assert both["by_seed"]["mIoU"][0] == base["scores"]["mIoU"]["value"]
    assert both["scores"]["mIoU"]["value"] == pytest.approx(sum(both["by_seed"]["mIoU"]) / 2)
    assert "each seed" in (tmp_path / "table.txt").read_text()
    with pytest.raises(ValueError, match="both: only some of the seeds state a stop probability"):
        main(Args(episodes=[f"both={saved / 'base'}", seeds[0]], out=tmp_path / "mixed"))


def test_policies_of_several_seeds_are_played_and_saved_apart_and_need_not_be_forced(tmp_path):
    arguments = {"samples": 12, "split": "val", "out": tmp_path, "page_episodes": 2, "num_envs": 6}
    played = main(Args(policies=["a=centre", "b=centre", "b=random"], forced=False, **arguments))
    names = sorted(f.name for f in (tmp_path / "episodes").iterdir())
    assert names == ["a", "b-seed0", "b-seed1"]
    assert set(played["b"].audit.columns) == {"step_0", "learned_stop"} and len(played["b"].audit.runs) == 2
    assert (tmp_path / "episodes.html").exists() and not (tmp_path / "accuracy_by_step.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--policies tiny", "name=policy"),
        ("--policies a=tiny a=tiny", "given once"),
        ("--policies a=centre a=random a-seed0=centre", "would be saved as 'a-seed0'"),
        ("--policies a=tiny --episodes a=runs", "give one of them"),
        ("--episodes runs", "name=folder"),
        ("--episodes a=runs/nowhere", "no episodes at runs/nowhere"),
        ("--policies a=./nowhere", "nowhere"),
        ("--split tset", "tset"),
        ("--env IVT-RefCOCOg-v0 --data-root nowhere", "nowhere"),
    ],
)
def test_mistakes_end_with_one_clear_line(tmp_path, capsys, arguments, message):
    assert cli.main(["evaluate", *arguments.split(), "--samples", "4", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_each_policy_is_shown_what_it_was_trained_for(tmp_path, monkeypatch):
    policy = load_policy("tiny", view="overlay")
    policy.shown |= {"canvas": 128, "overlay": {"style": "fill"}}
    policy.dialogue.prompts = replace(policy.dialogue.prompts, text=policy.dialogue.prompts.first)
    policy.save(tmp_path / "policy")
    assert load_policy(tmp_path / "policy").shown == policy.shown
    seen: dict[str, set[object]] = {}
    act = VLMPolicy.act

    def watching(self, observations):
        what = ("closeup" in observations, "history" in observations, observations["image"].shape[1])
        seen.setdefault(self.view, set()).add(what)
        return act(self, observations)

    monkeypatch.setattr(VLMPolicy, "act", watching)
    arguments = {"samples": 3, "split": "val", "out": tmp_path / "out", "page_episodes": 1, "num_envs": 3}
    main(Args(policies=["base=tiny", f"plain={tmp_path / 'policy'}"], **arguments))
    assert seen == {"overlay": {(False, False, 128)}, "both": {(True, True, 288)}}
