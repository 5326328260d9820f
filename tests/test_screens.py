"""Every expression of the screens fits exactly one element, in the box that the browser gives it.

Silent when false: a right answer counts as wrong, or a box lies beside its element.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections import Counter

import numpy as np
import pytest
from browser import chromium

from ivt_agents.cli import main
from ivt_env.data import custom, load_dataset, render_screens
from ivt_env.data.images import read_image
from ivt_env.data.sample import DataError
from ivt_env.data.table import open_table

SPLITS = ("train", "val", "test")
PAGE = """<!doctype html><html lang="en"><title>t</title><style>body {margin: 20px; font: 16px sans-serif}</style>
<a href="#a">Alpha</a> <a href="#b">Beta</a> <a href="#c">Beta</a> <button aria-label="Close">&#10006;</button>
<a href="#h" style="display: none">Hidden</a> <a href="#q">say "so"</a> <p style="height: 3000px"></p>
<a href="#f">Far below</a>"""
TABLE = """<!doctype html><html lang="en"><title>t</title><input type="search"><h2>Users</h2><table>
<thead><tr><th>Name</th><th>Town</th><th></th></tr></thead>
<tr><th scope="row">Chen</th><td>Oslo</td><td><button>Edit</button></td></tr>
<tr><th scope="row">Rosa</th><td>Lyon</td><td><button>Edit</button></td></tr></table>
<h2>Home</h2><label>Street <input></label><h2>Work</h2><label>Street <input></label>"""


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    for _ in chromium(tmp_path_factory.mktemp("profile")):  # skips where there is no browser
        break
    folder = tmp_path_factory.mktemp("pages")
    (folder / "deep").mkdir()
    (folder / "deep" / "page.html").write_text(PAGE, encoding="utf-8")
    (folder / "table.html").write_text(TABLE, encoding="utf-8")
    out = folder / "out"
    words = ["data", "render-screens", str(folder), "--out", str(out), "--name", "mine", "--split", "test"]
    assert main([*words, "--size", "800", "600", "--scale", "2"]) == 0
    return {line["expression"]: line for line in map(json.loads, (out / "test.jsonl").read_text("utf-8").splitlines())}


def test_there_are_1500_expressions_on_40_pages_and_each_page_is_in_one_split():
    served = {split: load_dataset("screens", split) for split in SPLITS}
    assert sum(map(len, served.values())) >= 1500
    pages = [page for data in served.values() for page in set(data.image_ids())]
    assert len(pages) == len(set(pages)) >= 40
    assert {data.name for data in served.values()} == {"screens"}


def test_nothing_is_written_into_the_package(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_dataset("screens", "val")
    assert not (custom.EMBEDDED / "screens" / ".ivt_index").exists()
    assert list(tmp_path.rglob("screens-custom.arrow"))


def test_no_expression_is_used_twice_on_a_page_and_every_box_lies_on_it():
    for split in SPLITS:
        data = load_dataset("screens", split)
        samples = [data[i] for i in range(len(data))]
        assert max(Counter((s.image_id, s.expression.casefold()) for s in samples).values()) == 1
        boxes = np.array([s.box for s in samples])
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= 1).all() and (boxes[:, 2:] > boxes[:, :2]).all()
        assert {s.size for s in samples} == {(1440, 2560)}
        for s in samples:
            assert not {s.box} & set(s.siblings)


def test_boxes_hold_what_differs_from_the_ground_around_it():
    """A box beside its element would mostly hold one colour."""
    data = load_dataset("screens", "test")
    for i in random.Random(0).sample(range(len(data)), 30):
        height, width = data[i].size
        x1, y1, x2, y2 = (round(v) for v in np.multiply(data[i].box, [width, height] * 2))
        assert data.image(data[i])[y1:y2, x1:x2].std() > 2, data[i].expression


def test_embedded_screens_that_are_damaged_are_never_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(custom, "EMBEDDED", tmp_path)
    with pytest.raises(DataError, match=r"dataset\.json"):
        load_dataset("screens", "test")


def test_what_one_expression_names_is_kept_and_nothing_else(rendered):
    assert set(rendered) >= {
        'the link "Alpha"',
        'the icon "Close"',
        "the search field",
        'the button "Edit" in the row of "Chen"',
        'the cell "Town" in the row of "Rosa"',
        'the field "Street" under the heading "Home"',
    }
    for absent in ("Beta", "Hidden", "Far below", "say"):
        assert not [expression for expression in rendered if absent in expression]


def test_boxes_are_those_of_the_screenshot(rendered):
    line = rendered['the icon "Close"']
    assert (line["width"], line["height"]) == (800, 600)
    x1, y1, x2, y2 = line["bbox"]
    assert y1 == pytest.approx(40, abs=12) and 20 < x2 - x1 < 120 and 20 < y2 - y1 < 60
    assert rendered['the button "Edit" in the row of "Chen"']["bbox"][1] < line["bbox"][3] * 9
    edits = [rendered[f'the button "Edit" in the row of "{name}"'] for name in ("Chen", "Rosa")]
    assert edits[0]["siblings"] == [edits[1]["bbox"]]


def test_the_second_routine_refuses_what_fits_several_elements_or_lies_elsewhere(tmp_path):
    (tmp_path / "page.html").write_text(PAGE, encoding="utf-8")
    for driver in chromium(tmp_path / "profile"):
        driver.get((tmp_path / "page.html").as_uri())
        tree = render_screens._Tree(driver, 1.0)
        assert "several" in tree.objection('the link "Beta"', [0, 0, 1, 1])
        assert "no element" in tree.objection('the link "Gamma"', [0, 0, 1, 1])
        assert "elsewhere" in tree.objection('the link "Alpha"', [500, 500, 510, 510])
        assert "form" in tree.objection("Alpha", [0, 0, 1, 1])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--size", "10", "10"], "give 320 to 8000"),
        (["--scale", "nan"], "give 320"),
        ([], "holds no file that ends in .html"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, options, said):
    if options:
        (tmp_path / "page.html").write_text(PAGE)
    assert (
        main(["data", "render-screens", str(tmp_path), "--out", str(tmp_path / "o"), "--name", "mine", *options]) == 2
    )
    assert re.search(re.escape(said), capsys.readouterr().err)


def test_the_format_is_that_of_ones_own_data_and_images_are_lossless(tmp_path):
    shutil.copytree(custom.EMBEDDED / "screens", tmp_path / "mine")
    found = custom.find(tmp_path / "mine", "custom")
    assert found is not None and found.name == "web-pages"
    table = open_table(found, "test")
    assert len(table) == len(load_dataset("screens", "test"))
    for path in sorted((custom.EMBEDDED / "screens" / "images").iterdir())[:3]:
        assert path.read_bytes()[12:16] == b"VP8L", "lossless WebP"
        assert read_image(path, str(path)).shape == (1440, 2560, 3)
    assert sum(p.stat().st_size for p in (custom.EMBEDDED / "screens").rglob("*") if p.is_file()) < 12e6
