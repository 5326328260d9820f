"""``ocr`` answers from what it reads on the screen, and looks closer at what it cannot read.

Silent when false: the loop is measured with an agent that reads the target, or that never looks twice.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from ivt_agents.play import ocr
from ivt_agents.play.by_name import load_agent
from ivt_agents.play.ocr import Line, OCRAgent, candidates
from ivt_env.rollouts import make_vector_env, rollout


def reading(*lines):
    """A reader that sees these lines, (text, x1, y1, x2, y2) relative to the image, whatever it is shown."""

    def read(image):
        scale = np.array(image.shape[1::-1])
        boxes = [np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]]) * scale for _, x1, y1, x2, y2 in lines]
        return SimpleNamespace(boxes=np.array(boxes) if boxes else None, txts=tuple(line[0] for line in lines) or None)

    return read


def seen(expression, box=(0, 0, 0, 0), step=0, window=(0, 0, 1, 1)):
    return {
        "image": np.zeros((1, 64, 64, 3), np.uint8) + step, "extent": np.array([[36, 64]]), "expression": [expression],
        "box": np.array([box], np.float32), "step": np.array([step]), "window": np.array([window], np.float32),
        "active": np.array([True]),
    }  # fmt: skip


def agent_that_reads(monkeypatch, reader, **options):
    monkeypatch.setattr(ocr, "_reader", lambda threads: reader)
    agent = OCRAgent(**options)
    agent.reset(np.ones(1, dtype=bool))
    return agent


def test_it_proposes_the_line_then_reads_it_close_up_and_stops(monkeypatch):
    agent = agent_that_reads(monkeypatch, reading(("Savc", 0.1, 0.1, 0.2, 0.2), ("Open", 0.5, 0.5, 0.6, 0.6)))
    first = agent.act(seen('the button "Save"'))
    assert np.allclose(first["box"][0], [0.1, 0.1, 0.2, 0.2]) and first["stop"][0] == 0
    agent._reader = reading(("Save", 0.4, 0.4, 0.6, 0.6))
    second = agent.act(seen('the button "Save"', first["box"][0], 1, (0, 0, 0.25, 0.25)))
    assert np.allclose(second["box"][0], [0.1, 0.1, 0.15, 0.15]) and second["stop"][0] == 0
    third = agent.act(seen('the button "Save"', second["box"][0], 1, (0, 0, 0.25, 0.25)))
    assert third["stop"][0] == 1


def test_a_line_that_reads_otherwise_close_up_is_given_up_for_the_next(monkeypatch):
    agent = agent_that_reads(monkeypatch, reading(("Dolete", 0.1, 0.1, 0.2, 0.2), ("Delcto", 0.7, 0.7, 0.8, 0.8)))
    first = agent.act(seen('the button "Delete"'))
    assert np.allclose(first["box"][0], [0.1, 0.1, 0.2, 0.2])
    agent._reader = reading(("Donate", 0.4, 0.4, 0.6, 0.6))
    second = agent.act(seen('the button "Delete"', first["box"][0], 1, (0, 0, 0.3, 0.3)))
    assert np.allclose(second["box"][0], [0.7, 0.7, 0.8, 0.8])


def test_where_nothing_fits_it_looks_where_it_has_not_looked(monkeypatch):
    agent = agent_that_reads(monkeypatch, reading())
    boxes = []
    for step in range(4):
        window = (0, 0, 1, 1) if not boxes else tuple(np.clip(boxes[-1] + [-0.07, -0.07, 0.07, 0.07], 0, 1))
        action = agent.act(seen('the link "Help"', boxes[-1] if boxes else (0, 0, 0, 0), step, window))
        boxes.append(action["box"][0])
        assert action["stop"][0] == 0
    assert len({tuple(box) for box in boxes}) == 4


def test_after_its_looks_it_answers_with_the_best_it_knows(monkeypatch):
    agent = agent_that_reads(monkeypatch, reading(("Hclp", 0.1, 0.1, 0.2, 0.2)), looks=1)
    assert agent.act(seen('the link "Help"', (0.5, 0.5, 0.6, 0.6), 1, (0, 0, 1, 1)))["stop"][0] == 0
    assert agent.act(seen('the link "Help"', (0.1, 0.1, 0.2, 0.2), 2, (0, 0, 1, 1)))["stop"][0] == 1


def test_without_looks_it_answers_at_once_with_its_best_guess(monkeypatch):
    lines = ("Town", 0.4, 0.05, 0.5, 0.1), ("Rcsa", 0.1, 0.3, 0.2, 0.35)
    agent = agent_that_reads(monkeypatch, reading(*lines), looks=0)
    action = agent.act(seen('the cell "Town" in the row of "Rosa"'))
    assert np.allclose(action["box"][0], [0.4, 0.3, 0.5, 0.35])
    assert agent.act(seen('the cell "Town" in the row of "Rosa"', action["box"][0], 1, (0, 0, 1, 1)))["stop"][0] == 1


LINES = [
    Line("Name", (0.1, 0.05, 0.2, 0.08), True), Line("Town", (0.4, 0.05, 0.5, 0.08), True),
    Line("State", (0.7, 0.05, 0.8, 0.08), True), Line("Chen", (0.1, 0.2, 0.2, 0.23), True),
    Line("Edit Delete", (0.8, 0.2, 0.9, 0.23), True), Line("Rosa", (0.1, 0.3, 0.2, 0.33), True),
    Line("Edit Delete", (0.8, 0.3, 0.9, 0.33), True), Line("Work", (0.1, 0.5, 0.2, 0.53), True),
    Line("Street", (0.1, 0.6, 0.2, 0.63), True),
]  # fmt: skip


@pytest.mark.parametrize(
    ("expression", "centre"),
    [
        ('the button "Edit" in the row of "Rosa"', (0.82, 0.315)),
        ('the button "Delete" in the row of "Chen"', (0.87, 0.215)),
        ('the cell "Town" in the row of "Rosa"', (0.55, 0.315)),
        ('the field "Street" under the heading "Work"', (0.15, 0.648)),
    ],
)
def test_rows_columns_headings_and_labels_lead_to_the_place(expression, centre):
    box = max(candidates(expression, LINES), key=lambda each: each.fit).box
    assert np.allclose(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), centre, atol=0.012)


def test_it_plays_the_screens_by_its_name(monkeypatch):
    monkeypatch.setattr(ocr, "_reader", lambda threads: reading(("Home", 0.1, 0.1, 0.2, 0.2)))
    agent = load_agent("ocr", looks=2)
    env = make_vector_env("IVT-Screens-v0", 1, split="val", max_steps=3, canvas=64, **agent.shown)
    episodes = rollout(env, agent, 2, 0)
    assert all(step.invalid is None for episode in episodes for step in episode.steps)


def test_without_its_package_it_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ValueError, match=r"ivt-env\[ocr\]"):
        load_agent("ocr")


def test_the_real_reader_reads_a_page_of_the_screens():
    pytest.importorskip("rapidocr")
    from ivt_env.data import load_dataset

    data = load_dataset("screens", "test")
    row = next(i for i in range(len(data)) if data[i].expression == 'the link "Home"')
    x1, y1, x2, y2 = (round(v) for v in np.multiply(data[row].box, [2560, 1440] * 2))
    near = data.image(data[row])[max(0, y1 - 40) : y2 + 40, max(0, x1 - 60) : x2 + 200]
    assert any("Home" in text for text, _ in OCRAgent()._text(near))
