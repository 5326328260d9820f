"""A tracker that is not there must stop the run before it starts: hours later there would be no curve.
What a tracker shows must be what the JSON lines hold, a resumed run included.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
from test_resume import TINY, with_out

from ivt_agents.command import parse
from ivt_agents.grpo import train as train_grpo
from ivt_agents.grpo.train import Args, check_options
from ivt_agents.sft import train as train_sft
from ivt_agents.training.folder import read_metrics
from ivt_agents.training.run import MetricsLog
from ivt_agents.training.tracking import TRACKERS, TrackerError, check_tracker

ROOT = Path(__file__).parent.parent

FAKE = '''
"""Stands in for a tracker's package: it writes down what it is given."""
import json, pathlib
calls = []
class Config(dict):
    def update(self, values, allow_val_change=False):
        calls.append(["config", dict(values)])
config = Config()
class Run:
    def log(self, values, step=None, **_):
        calls.append(["log", step, dict(values)])
    def finish(self):
        calls.append(["finish"])
def init(**options):
    if FAILS:
        raise RuntimeError("no key configured,\\nlog in first")
    calls.append(["init", options])
    return Run()
'''


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Makes a package of that name that can be found and imported, and gives it back."""

    replaced: list[tuple[str, dict]] = []

    def make(name: str, fails: bool = False):
        folder = tmp_path / "packages"
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(FAKE.replace("FAILS", str(fails)))
        monkeypatch.syspath_prepend(str(folder))
        kept = {n: sys.modules.pop(n) for n in list(sys.modules) if n == name or n.startswith(name + ".")}
        module = importlib.import_module(name)
        replaced.append((name, kept))
        return module

    yield make
    for name, kept in replaced:
        del sys.modules[name]
        sys.modules.update(kept)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_of_accelerate_gets_what_the_json_lines_hold(tmp_path, fake, name):
    calls = fake(name).calls
    train_grpo.main(Args(**with_out(TINY, tmp_path / "run", steps=2, report_to=name)))
    train_grpo.main(Args(**with_out(TINY, tmp_path / "run", steps=3, report_to=name, resume=True)))
    starts = [c[1] for c in calls if c[0] == "init"]
    assert [(s["project"], s["name"], s["group"]) for s in starts] == [
        ("ivt-env", "run", "run"),
        ("ivt-env", "run+2", "run"),
    ]
    assert [c[1]["lora_r"] for c in calls if c[0] == "config"] == [4, 4]
    logged = {c[1]: c[2] for c in calls if c[0] == "log"}
    rows = {row.pop("step"): row for row in read_metrics(tmp_path / "run" / "metrics.jsonl")}
    assert sorted(logged) == [1, 2, 3] and logged == rows
    assert calls.count(["finish"]) == 2 and calls[-1] == ["finish"]


def test_tensorboard_shows_the_json_lines_and_nothing_of_steps_that_were_made_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, tracker="tensorboard")
    for step in range(1, 5):
        log.write(step, {"train/loss": float(step), "rollout/stop_precision": None})
    log.close()
    log = MetricsLog(tmp_path, tracker="tensorboard", keep_until=2)  # killed behind the checkpoint of step 2
    for step in range(3, 6):
        log.write(step, {"train/loss": 10.0 * step})
    log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert board.Tags()["scalars"] == ["train/loss"], "what was not measured is not drawn"
    shown = [(e.step, e.value) for e in board.Scalars("train/loss")]
    rows = [(row["step"], row["train/loss"]) for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert shown == rows == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]


def test_without_a_tracker_there_are_the_json_lines_alone(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(1, {"train/loss": 1.0})
    log.write(2, {})
    log.close()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "train/loss": 1.0}\n', "no line without a value"


@pytest.mark.parametrize("name", [t for t in TRACKERS if t != "none"])
def test_a_missing_package_is_refused_at_the_start_with_the_command_that_installs_it(monkeypatch, tmp_path, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    for refuse in (
        lambda: check_options(Args(report_to=name)),
        lambda: train_grpo.main(Args(model="./no/such/model", report_to=name, out=tmp_path / "run")),
        lambda: train_sft.main(train_sft.Args(model="./no/such/model", report_to=name, out=tmp_path / "run")),
    ):
        with pytest.raises(TrackerError, match=rf'{name}: its package is not installed; pip install "ivt-env\['):
            refuse()
    assert not (tmp_path / "run").exists()


def test_a_folder_of_that_name_is_not_taken_for_the_package(monkeypatch, tmp_path):
    """wandb makes one where it runs, and Python would import it as an empty package."""
    (tmp_path / "swanlake").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("ivt_agents.training.tracking.TRACKERS", (*TRACKERS, "swanlake"))
    monkeypatch.setattr("ivt_agents.training.tracking._EXTRA", {"swanlake": "trackers"})
    assert importlib.util.find_spec("swanlake") is not None
    with pytest.raises(TrackerError, match="not installed"):
        check_tracker("swanlake")


def test_a_tracker_that_does_not_start_is_one_line(tmp_path, fake):
    fake("wandb", fails=True)
    with pytest.raises(
        TrackerError, match="tracker wandb did not start: no key configured, log in first; `wandb login`"
    ):
        MetricsLog(tmp_path, tracker="wandb")


def test_an_unknown_tracker_is_refused_by_both_commands():
    with pytest.raises(TrackerError, match="'mlflow': choose one of tensorboard, wandb, trackio, none"):
        check_tracker("mlflow")
    for args in (Args, train_sft.Args):
        assert tyro.cli(args, args=[]).report_to == "tensorboard"
        for name in TRACKERS:
            assert parse(args, ["--report-to", name]).report_to == name


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_real_package_takes_a_run_without_a_network(tmp_path, name):
    """Runs where the extra ``trackers`` is installed."""
    pytest.importorskip(name)
    home = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio"), "HOME": str(tmp_path)}
    options = "--model tiny --prompts 1 --num-generations 2 --steps 2 --eval-samples 0".split()
    command = [sys.executable, "train_grpo.py", *options, "--report-to", name, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | home, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [json.loads(x)["step"] for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    if name == "wandb":
        (written,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    else:
        (written,) = (tmp_path / "trackio").glob("ivt-env*.db")
    assert written.stat().st_size > 1000
    assert not (ROOT / "wandb").exists()
