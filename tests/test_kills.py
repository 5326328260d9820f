"""Commands that write may be ended at any moment, and disks may fill up; ``tests/kills.py`` says what must hold then.

IVT_KILLS sets how many random kills follow those below, IVT_FULL_DISKS how many full disks (hundreds at night).
"""

from __future__ import annotations

import os

from kills import COMMANDS, Trials


def test_commands_that_are_ended_or_find_the_disk_full_leave_nothing_half_written_and_lose_nothing(tmp_path):
    kills, full_disks = int(os.environ.get("IVT_KILLS", "0")), int(os.environ.get("IVT_FULL_DISKS", "0"))
    few = ["rollout", "view", "sheet", "evaluate"]
    names = list(COMMANDS) if kills else few
    # With this seed: each signal before a file operation and at some time, an evaluation new, finished and begun anew.
    trials = Trials(tmp_path, seed=1975)
    trials.prepare(names)
    order = [*"rollout evaluate view evaluate sheet evaluate rollout evaluate".split(), *[None] * kills]
    for number, name in enumerate(order):
        trials.kill(number, [name] if name else names)
    assert not trials.wrong
    assert sum(v for k, v in trials.ended.items() if k != "done") >= len(order) / 3, "else hardly anything was killed"
    trials.ended.clear()
    for number, name in enumerate([*few, *[None] * full_disks]):
        trials.full_disk(number, [name] if name else names, None)
    assert not trials.wrong
    assert trials.ended.get("status 2", 0) >= (4 + full_disks) / 2, "else hardly any disk was full"
