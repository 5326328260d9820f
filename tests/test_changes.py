"""The mutator itself: without it, "no traceback in 3,000 changed files" would say nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import pytest
from changes import copied, forked, mutate, mutate_folder

CONTENT = {
    "json": json.dumps({"a": [1, 2.5, {"b": "text"}], "c": None}).encode(),
    "jsonl": b'{"a": 1}\n{"b": [1, 2]}\n',
    "yaml": b"sft:\n  steps: 3\n  model: tiny\n",
    "bytes": bytes(range(256)) * 4,
}


@pytest.mark.parametrize("kind", CONTENT)
def test_changes_are_seeded_varied_and_nearly_always_change_something(kind):
    first, again = ([mutate(CONTENT[kind], random.Random(seed), kind) for seed in range(150)] for _ in range(2))
    assert first == again
    assert sum(changed != CONTENT[kind] for _, changed in first) > 140
    assert len({changed for _, changed in first}) > 70


def test_a_folder_gets_every_kind_of_fault(tmp_path):
    (tmp_path / "made").mkdir()
    for kind, content in CONTENT.items():
        (tmp_path / "made" / f"x.{kind}").write_bytes(content)
    found = set()
    for seed in range(200):
        folder = copied(tmp_path / "made", tmp_path / "changed")
        found.add(mutate_folder(folder, random.Random(seed)).split(": ")[1].split(" ")[0])
    assert {"removed", "a", "of", "empty", "cut", "bits", "NUL", "as"} <= found


def fail():
    raise KeyError("a bug")


def hog():
    return len([bytes(10**8) for _ in range(40)])


@pytest.mark.parametrize(
    ("command", "promised"),
    [
        (lambda: None, True),
        (lambda: 1, True),
        (lambda: print("error: x", file=__import__("sys").stderr) or 2, True),
        (lambda: 2, False),
        (lambda: 3, False),
        (fail, False),
        (hog, False),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), False),
    ],
    ids=["done", "unfit", "one line", "no line", "other", "traceback", "memory", "crash"],
)
def test_a_child_that_breaks_the_promise_is_seen(command, promised):
    before = time.monotonic()
    ended = forked(command)
    assert ended.promised == promised, ended
    assert time.monotonic() - before < 30
