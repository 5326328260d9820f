"""``ivt`` answers for itself: help that fits a terminal, one line for a wrong word, no torch to look at data."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

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
