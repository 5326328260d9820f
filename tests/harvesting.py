"""What the tests of teachers harvest; without torch, because a test starts it in a process of its own."""

from __future__ import annotations

import numpy as np

from ivt_agents.sft.demonstrations import teach_as_the_paper
from ivt_env import boxes


def make_drafts(dataset, count):
    """A first answer and a walk of two steps for each sample."""
    students = []
    for i in range(count):
        x1, y1, x2, y2 = dataset[i].box
        shift = 0.3 * np.array([x2 - x1, y2 - y1, x2 - x1, y2 - y1])
        moved = np.array([x1, y1, x2, y2]) + shift
        students.append(tuple(boxes.clip(moved if moved.max() <= 1 else moved - 2 * shift)))
    made = teach_as_the_paper(dataset, range(count), students)
    assert len(made) == 3 * count and sum(bool(d.trace) for d in made) == 2 * count
    return made
