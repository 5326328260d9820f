"""The study runs commands: what is done stays done, what fails is named, and every command is one that exists."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tyro

from experiments.study import SPLITS, Args, Job, _playing, _policy, _scoring, run_jobs
from experiments.study_tables import CONTROLS, best_control, summary
from ivt_agents.evaluation import evaluate, swaps
from ivt_agents.training.run import RunError


def write(tmp_path, name: str, status: int = 0) -> Job:
    """A command that appends a line to its file, and may fail."""
    made = tmp_path / f"{name}.txt"
    code = f"open({str(made)!r}, 'a').write('x'); print('said {name}'); raise SystemExit({status})"
    return Job(name, (sys.executable, "-c", code), made)


def test_what_is_done_is_not_done_again(tmp_path):
    jobs = [write(tmp_path, name) for name in ("a", "b", "c")]
    jobs[1].made.write_text("done before")
    for _ in range(2):
        run_jobs(jobs, tmp_path, 2)
    assert [job.made.read_text() for job in jobs] == ["x", "done before", "x"]
    assert "said a" in (tmp_path / "a.log").read_text()
    assert set(json.loads((tmp_path / "minutes.json").read_text())) == {"a", "c"}
    assert len((tmp_path / "commands.txt").read_text().splitlines()) == 2


def test_a_command_that_fails_is_named_with_its_log_and_the_others_are_finished(tmp_path):
    jobs = [write(tmp_path, "bad", status=3), write(tmp_path, "good")]
    with pytest.raises(RunError, match=r"bad failed; its log: .*bad\.log"):
        run_jobs(jobs, tmp_path, 1)
    assert jobs[1].made.exists()


def test_what_is_scored_is_what_was_played_and_seeds_share_a_name(tmp_path):
    args = Args(out=tmp_path, seeds=3, large=True, alone=True)
    played = {job.made.parent for job in _playing(args)}
    for split, job in zip(SPLITS, _scoring(args), strict=True):
        parsed = tyro.cli(evaluate.Args, args=list(job.command[3:]))
        names = [text.partition("=")[0] for text in parsed.episodes]
        assert [names.count(name) for name in ("base", "control", "loop", "alone", "large")] == [1, 3, 3, 3, 1]
        assert names[0] == "base", "what the others are compared with"
        for text in parsed.episodes:
            folder = Path(text.partition("=")[2])
            # The folder of the episodes has the name under which the policy was played.
            assert folder.parts[-2:] == ("episodes", folder.parts[-3]) and folder.parent.parent in played
            assert folder.parts[-4] == split


def test_the_loop_goes_on_from_the_first_box_of_the_base(tmp_path):
    played = {
        job.name: tyro.cli(evaluate.Args, args=list(job.command[3:]))
        for job in _playing(Args(out=tmp_path, alone=True))[1:]
    }
    for split in SPLITS:
        (loop,), (alone,) = (played[f"played-{split}-{name}-1"].policies for name in ("loop", "alone"))
        assert (
            loop == f"loop-1=relay:vlm:tiny,vlm:{tmp_path}/loop-1/policy"
            and alone == f"alone-1={tmp_path}/loop-1/policy"
        )


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A study's folder, played by scripted agents under the names of the study: two seeds of loop and control."""
    out = tmp_path_factory.mktemp("study")
    agents = {"base-0": "centre", "control-0": "random", "control-1": "centre", "loop-0": "oracle", "loop-1": "random"}
    agents |= {"large-0": "random", "medoid-8": "centre", "best-of-8": "random", "second-shot": "random"}
    for name, spec in agents.items():
        folder = out / "played" / "val" / name
        options = {"split": "val", "samples": 40, "episode_steps": 2, "page_episodes": 1, "seed": len(name)}
        evaluate.main(evaluate.Args(policies=[f"{name}={spec}"], out=folder, **options))
    episodes = [f"{_policy(name)}={out}/played/val/{name}/episodes/{name}" for name in agents if name != "base-0"]
    base = f"base={out}/played/val/base-0/episodes/base-0"
    evaluate.main(evaluate.Args(episodes=[base, *episodes], out=out / "val"))
    swaps.main(swaps.Args(policies=["loop-0=oracle"], samples=10, split="val", steps=[1], out=out / "swaps"))
    # Costs are of models alone; one stands for all.
    path = out / "played" / "val" / "loop-0" / "results.json"
    costs = {"loop-0": [{"answers": 2.0, "images": 2.0}]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"costs": costs}))
    return out


def test_the_summary_says_what_the_results_say_and_finds_the_strongest_control(scored):
    results, text = json.loads((scored / "val" / "results.json").read_text()), summary(scored, ["val"])
    lines = {tuple(cell.strip() for cell in line.split("|")[1:3]): line for line in text.splitlines()}
    for metric, factor, digits in (("Acc@0.5", 100, 1), ("mIoU", 1, 3)):
        policy, column = best_control(results, metric)
        rows = {(r["policy"], r["column"]): r["scores"][metric]["value"] for r in results["rows"]}
        assert rows[policy, column] == max(rows[control] for control in CONTROLS)
        line = lines[metric, f"{policy} {column} (the best control)"]
        expected = rows["loop", "learned_stop"] - rows[policy, column]
        cells = [cell.strip() for cell in line.split("|")]
        assert cells[3].startswith(f"{factor * expected:+.{digits}f}")
        assert len(cells[-2].split()) == 2, "two seeds"
    assert "| sibling" in text and "| loop-0 |     2.0 |" in text
