"""A place that cannot be written, and a disk that is full: status 2, one line, and nothing half-written.

If this is false, hours of training end in a traceback of the library that happened to write last.
"""

from __future__ import annotations

import ctypes
import resource
import struct
from pathlib import Path

import pytest
import torch
from changes import forked
from eval_layouts import write_ref_l4

from ivt_agents import cli
from ivt_agents.play import rollout as rollout_command
from ivt_agents.vlm.load import load_policy

torch.set_num_threads(1)

LIMIT = 3000
"""Bytes of a file; every command but one writes a longer one."""
SMALL = "--model tiny --prompts 1 --num-generations 2 --max-completion-length 14 --lora-r 4".split()
SMALL += ["--eval-samples", "0", "--report-to", "none", "--save-steps", "1", "--episode-steps", "1", "--steps", "1"]
LESSONS = "--samples 2 --steps 1 --per-device-train-batch-size 2 --gradient-accumulation-steps 1".split()
LESSONS += "--eval-samples 0 --report-to none".split()

COMMANDS = {
    "rollout": ["rollout", "--agent", "centre"],
    "evaluate": ["evaluate", "--policies", "a=centre", "--samples", "2"],
    "train-sft": ["train-sft", *LESSONS],
    "train-grpo": ["train-grpo", *SMALL],
    "show": ["data", "show", "photos", "--number", "1"],
    "convert": ["data", "convert", "refl4", "--split", "test", "--name", "mine", "--data-root", "DATA"],
    "view": ["view", "EPISODES"],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    write_ref_l4(root / "data")
    rollout_command.main(rollout_command.Args(agent="centre", out=root / "episodes"))
    load_policy("tiny")  # everything is imported before the first fork
    return root


def words_of(name, made, out):
    words = [
        word.replace("DATA", str(made / "data")).replace("EPISODES", str(made / "episodes")) for word in COMMANDS[name]
    ]
    return [*words, "--out", str(out)]


def refused(ended):
    """Status 2, and one line on standard error beside what a command tells while it runs."""
    assert ended.status == 2 and ended.killed_by is None, ended
    assert "Traceback" not in ended.errors and "Exception" not in ended.errors, ended.errors
    line = ended.errors.splitlines()[-1]
    assert line.startswith("error: "), ended.errors
    return line


def place(kind, folder):
    """A path that cannot be written, by kind."""
    if kind == "a file in the way":
        (folder / "file").write_text("mine")
        return folder / "file" / "below"
    if kind == "too long":
        return folder / ("x" * 300)
    if kind == "a loop of links":
        (folder / "loop").symlink_to(folder / "loop")
        return folder / "loop" / "below"
    if kind == "read-only":
        (folder / "locked").mkdir(mode=0o555)
        return folder / "locked" / "below"
    return Path("/proc/1/nothing")  # a file system that takes none


KINDS = ("a file in the way", "too long", "a loop of links", "read-only", "no such system")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("rollout", kind) for kind in KINDS] + [(name, KINDS[0]) for name in COMMANDS if name != "rollout"],
)
def test_a_place_that_cannot_be_written_is_one_line(name, kind, made, tmp_path):
    out = place(kind, tmp_path)
    out = out.with_name(out.name + (".png" if name == "show" else ".html" if name == "view" else ""))

    def command():
        if kind == "read-only":  # root may write everywhere, by virtue of capabilities
            ctypes.CDLL(None).capset(struct.pack("II", 0x20080522, 0), bytes(24))
        return cli.main(words_of(name, made, out))

    line = refused(forked(command, tmp_path))
    assert out.name[:40] in line or out.parent.name in line


@pytest.mark.parametrize("name", COMMANDS)
def test_a_limit_on_the_size_of_files_is_one_line(name, made, tmp_path):
    out = tmp_path / ("x.png" if name == "show" else "x.html" if name == "view" else "x")

    def command():
        limit = 500 if name == "convert" else LIMIT
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return cli.main(words_of(name, made, out))

    line = refused(forked(command, tmp_path))
    assert str(out) in line and "File too large" in line and "ulimit -f" in line
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".partial")]
