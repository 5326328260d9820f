"""The GPU script, shrunken on a CPU: every part runs to its end, and a part that fails stops no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import PARTS, Args, main

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    for part in PARTS:
        assert main(Args(part, out=folder, small=True)) == 0, part
    return folder


def test_every_part_runs_on_a_cpu_and_the_table_has_its_figures(out, capsys):
    assert main(Args("table", out=out)) == 0
    said = capsys.readouterr().out
    found = json.loads((out / "gpu.json").read_text())
    assert list(found) == list(PARTS)
    for words in ("sdpa, fixed, prefix", "utilisation of update", "growing / fixed", "images a second", "Acc@0.5"):
        assert words in said
    assert found["step"]["peak_gb"] > 0 and found["step"]["estimated_gb"] > 0
    for row in found["agreement"]["rows"]:
        assert 0 < row["max"] < 1e-3
    for way in ("growing", "fixed"):
        assert found["decode"][way]["mean"] < 1e-2, "decoding and scoring are different policies"


def test_a_difference_that_is_no_rounding_fails_the_part(tmp_path, monkeypatch):
    from benchmarks import gpu

    monkeypatch.setitem(gpu.LIMITS, "float32", (1e-12, 1e-12))
    assert main(Args("agreement", out=tmp_path, small=True)) == 1
    assert len(json.loads((tmp_path / "agreement.json").read_text())["wrong"]) == 2
    assert main(Args("table", out=tmp_path)) == 1


def test_a_part_that_fails_keeps_its_error_and_the_next_one_runs(tmp_path):
    # Without --small both ask for a GPU, which is hidden here.
    run = subprocess.run(
        ["bash", "benchmarks/gpu.sh", "card", "decode"],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path), "BUDGET": "400", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "card: status 1" in run.stdout and "decode: status 1" in run.stdout and "failed" in run.stdout
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert set(found) == {"card", "decode"} and all("error" in part for part in found.values())


def test_a_script_out_of_time_says_which_parts_it_left_out(tmp_path):
    run = subprocess.run(
        ["bash", "benchmarks/gpu.sh", "--small", "card", "tiny"],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path), "BUDGET": "10"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1 and run.stdout.count("no time was left") == 2
