"""The measurement on screens compares the same samples, and its tables say what the answers say.

Silent when false: the loop is set against another page, or wins by pixels that are not counted.
"""

from __future__ import annotations

import json
from functools import cache
from types import SimpleNamespace

import pytest

from experiments import screens
from experiments.screens import LOOP, SAME, TIMES, Answer, plot, report, way
from ivt_agents.play import ocr

WAYS = (*map(way, TIMES), SAME, LOOP)


def made(name, page, number, hit):
    return Answer(name, f"{page}-{number}", page, "link", 1000, hit, 0.9 * hit, True, True, 2)


def test_the_tables_count_what_was_corrected_and_what_regressed():
    answers = []
    for page in map(str, range(30)):
        for name in WAYS:
            answers += [made(name, page, 0, name != way(1)), made(name, page, 1, name != LOOP)]
    text = report(answers)
    assert "n = 60 expressions on 30 pages" in text
    assert "| wrong in one look, corrected | 30 of 30 (100.0 %) |" in text
    assert "| right in one look, regressed | 30 of 30 (100.0 %) |" in text
    assert f"| {way(8)} | 0.00 | 100.0 | 100.0 | -50.0 [-50.0, -50.0] | -50.0 [-50.0, -50.0] |" in text


def test_it_measures_a_page_counts_every_pixel_and_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(ocr, "_reader", lambda threads: lambda image: SimpleNamespace(boxes=None, txts=None))
    monkeypatch.setattr(screens, "_agent", cache(screens._agent.__wrapped__))
    numbers = [n for n, page in enumerate(screens._dataset().image_ids()) if page == "sqlite-json1"][:2]
    path = screens.measure("sqlite-json1", numbers, tmp_path)
    answers = [Answer(**each) for each in json.loads(path.read_text())["answers"]]
    assert sorted({each.way for each in answers}) == sorted(WAYS)
    pixels = {each.way: each.pixels for each in answers}
    assert pixels[way(1)] == 640 * 360 and pixels[way(4)] == 1280 * 720
    loop = next(each for each in answers if each.way == LOOP)
    assert loop.pixels == 640 * 360 + (loop.looks - 1) * 640 * 640
    assert pixels[SAME] == pytest.approx(loop.pixels, rel=0.01)
    monkeypatch.setattr(screens, "_play", lambda *_, **__: pytest.fail("measured again"))
    assert screens.measure("sqlite-json1", numbers, tmp_path) == path
    plot(answers, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
