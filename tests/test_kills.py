"""Commands that write may be ended at any moment, and disks may fill up; ``tests/kills.py`` says what must hold then.

IVT_KILLS sets how many kills, IVT_FULL_DISKS how many full disks (a few here; hundreds by hand or at night).
"""

from __future__ import annotations

import os

from kills import COMMANDS, Trials


def test_commands_that_are_ended_or_find_the_disk_full_leave_nothing_half_written_and_lose_nothing(tmp_path):
    kills, full_disks = int(os.environ.get("IVT_KILLS", "12")), int(os.environ.get("IVT_FULL_DISKS", "6"))
    names = list(COMMANDS) if kills > 50 else ["rollout", "view", "sheet", "evaluate"]
    trials = Trials(tmp_path, seed=0)
    trials.prepare(names)
    for number in range(kills):
        trials.kill(number, names)
    assert not trials.wrong
    assert sum(v for k, v in trials.ended.items() if k != "done") >= kills / 3, "else hardly anything was killed"
    trials.ended.clear()
    for number in range(full_disks):
        trials.full_disk(number, names, None)
    assert not trials.wrong
    assert trials.ended.get("status 2", 0) >= full_disks / 2, "else hardly any disk was full"
