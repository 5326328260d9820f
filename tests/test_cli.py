"""``ivt`` answers for itself: help that fits a terminal, one line for a wrong word, no torch to look at data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from eval_layouts import write_ref_l4

from agents import cli
from ivt_env import __version__

COMMANDS = [[], ["data"], ["score"], *(["data", name] for name in ("fetch", "check", "convert", "show", "mix"))]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_fits_eighty_columns(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--help"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and printed.startswith("usage: ivt")
    assert "``" not in printed
    assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.parametrize("words", [["nonsense"], ["data", "nonsense"], ["data"], ["score"], []])
def test_wrong_words_end_with_status_2_and_say_so(words, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"ivt-env {__version__}\n"


def test_the_installed_command_is_this_one():
    project = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["scripts"] == {"ivt": "agents.cli:main"}
    (script,) = entry_points(group="console_scripts", name="ivt")
    assert script.load() is cli.main


def test_looking_at_data_needs_no_torch():
    code = "import sys; from agents.cli import build_parser; build_parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_terminal_without_the_letters_gets_them_escaped(tmp_path):
    folder = tmp_path / "Ünï"
    write_ref_l4(folder)
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "XDG_CACHE_HOME": str(tmp_path)}
    words = [sys.executable, "-m", "agents.cli", "data", "check", "refl4", "--data-root", str(folder)]
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert "\\xdcn\\xef" in ended.stdout and "NOT fit for use" in ended.stdout
    ended = subprocess.run([*words, "--json"], env=environment, capture_output=True, text=True, check=False)
    assert json.loads(ended.stdout)["data_sets"][0]["folder"] == str(folder / "refl4")


def test_ctrl_c_ends_every_command_with_a_word_and_status_130(monkeypatch, capsys):
    def interrupted(*words, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("ivt_env.commands.data.load_dataset", interrupted)
    monkeypatch.setattr("ivt_env.commands.score.read_predictions", interrupted)
    for words in (["data", "show", "photos"], ["score", "a.jsonl", "--dataset", "photos", "--split", "test"]):
        assert cli.main(words) == 130
        assert capsys.readouterr().err == "\ninterrupted\n"


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    write_ref_l4(tmp_path)
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-m", "agents.cli", "data", "check", "refl4", "--data-root", str(tmp_path)]
    ended = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert ended.returncode == 1 and "roken pipe" not in ended.stderr and "Traceback" not in ended.stderr
