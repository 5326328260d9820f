"""What the shell and the user get when a command fails.

If one of these is false, a script takes a failure for success, or a full disk shows forty lines of Python.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import pytest

from ivt_env import failures

ROOT = Path(__file__).resolve().parent.parent


def raising(error):
    def command():
        raise error

    return command


def wrapped(kind, cause):
    error = kind("of a library")
    error.__context__ = cause
    return error


SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("file.json, row 3: 'x'; correct it"), "error: file.json, row 3: 'x'; correct it\n"),
        (ValueError("two\nlines  \x1b[31m"), "error: two lines \\x1b[31m\n"),
        (ValueError("\ud800"), "error: \\ud800\n"),
        (ValueError(), "error: ValueError\n"),
        (ValueError("x" * 10**6), "error: xxxxx"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a"), "error: a: No such file or directory\n"),
        (SPACE, "error: runs/x: No space left on device; free some space or choose another folder\n"),
        (wrapped(RuntimeError, SPACE), "error: runs/x: No space left on device; free some space or choose another"),
        (gym.error.NameNotFound("no environment X"), "error: no environment X\n"),
        (MemoryError(), "error: not enough memory\n"),
        (ModuleNotFoundError("No module named 'tyro'", name="tyro"), 'error: tyro is not installed: pip install "ivt'),
        (SystemExit("error of a parser"), "error: error of a parser\n"),
    ],
)
def test_what_a_user_can_fix_is_status_2_and_one_line(error, line, capsys):
    assert failures.run(raising(error)) == 2
    said = capsys.readouterr().err
    assert said.startswith(line) and said.count("\n") == 1 and len(said) < 2100


@pytest.mark.parametrize(
    "error",
    [ZeroDivisionError(), KeyError("x"), wrapped(RuntimeError, KeyError()), ModuleNotFoundError(name="ivt_env.x")],
)
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        failures.run(raising(error))


def test_a_status_of_a_command_is_its_own():
    given = (None, 0, 1, Path("x"), True)
    assert [failures.run(lambda done=done: done) for done in given] == [0, 0, 1, 0, 0]
    assert failures.run(raising(SystemExit(3))) == 3 and failures.run(raising(SystemExit())) == 0
    assert failures.run(raising(KeyboardInterrupt())) == 130 and failures.run(raising(BrokenPipeError())) == 141


@pytest.mark.parametrize(
    "content", ["{", "[" * 100_000, '{"a": ' * 100_000, "9" * 5000, "\x00", "[]", "3", '{"b": 1}', b"\xff\xfe{}"]
)
def test_broken_content_is_an_error_of_its_file(content, tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"x\.json: cannot be read \(.+\); write it again") as caught:
        with failures.reading(path, "write it again"):
            json.loads(path.read_bytes())["a"]
    assert len(str(caught.value)) < 400


def test_an_error_that_says_enough_passes_a_reader():
    class OwnError(ValueError):
        pass

    for error in (OwnError("row 3"), MemoryError()):
        with pytest.raises(type(error)) as caught, failures.reading("x", kind=OwnError):
            raise error
        assert caught.value is error


SLEEPER = """
import os, pathlib, signal, sys, time
from ivt_env import failures
class Held:
    def __del__(self):
        os.kill(os.getpid(), signal.Signals[sys.argv[2]])
def command():
    try:
        if sys.argv[3] == "in a finalizer":
            Held()
        else:
            os.kill(os.getpid(), signal.Signals[sys.argv[2]])
        time.sleep(20)
    finally:
        pathlib.Path(sys.argv[1]).write_text("cleaned up")
sys.exit(failures.run(command))
"""


@pytest.mark.parametrize("where", ["in the command", "in a finalizer"])
@pytest.mark.parametrize(("number", "status", "said"), [("SIGINT", 130, "\ninterrupted\n"), ("SIGTERM", 143, "")])
def test_a_signal_cleans_up_and_is_quiet_and_is_never_lost(number, status, said, where, tmp_path):
    words = [sys.executable, "-c", SLEEPER, str(tmp_path / "note"), number, where]
    done = subprocess.run(words, capture_output=True, text=True, timeout=15)
    assert (done.returncode, done.stderr) == (status, said)
    assert (tmp_path / "note").read_text() == "cleaned up"


INTERRUPTS = """
import importlib.abc, os, signal, sys
class Interrupt(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == os.environ.get("INTERRUPT_AT"):
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
"""


@pytest.mark.parametrize(
    ("words", "at"),
    [
        (["evaluate.py"], "matplotlib"),
        (["train_sft.py"], "accelerate"),
        (["train_grpo.py"], "tyro"),
        (["-m", "ivt_agents.cli", "data", "check", "photos"], "numpy"),
        (["-m", "ivt_agents.evaluation.swaps"], "gymnasium"),
        (["-m", "ivt_agents.sb3.train"], "torch"),
        (["-m", "experiments.study"], "numpy"),
        (["-m", "ivt_env.server"], "websockets"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_ctrl_c_is_quiet_while_a_command_is_still_being_imported(words, at, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTS)
    environment = os.environ | {"INTERRUPT_AT": at, "PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode in (130, -signal.SIGINT)  # a shell says 130 for both
    assert (ended.stdout, ended.stderr) == ("", "\ninterrupted\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has /dev/full")
@pytest.mark.parametrize("where", ["stdout", "both"])
def test_an_output_that_is_full_is_one_line(where):
    code = "import sys; from ivt_env import failures; sys.exit(failures.run(lambda: print('x' * 100000)))"
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=full if where == "both" else subprocess.PIPE, text=True
        )
    assert ended.returncode == 2
    if where == "stdout":
        assert ended.stderr.startswith("error: No space left on device") and ended.stderr.count("\n") == 1
