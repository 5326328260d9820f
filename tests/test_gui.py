"""The public sets of screens are read as they are published, boxes and all, and what is broken is named.

Silent when false: a box in another convention or frame, which looks like a bad model.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from gui_layouts import BOX, FOLDERS, HEIGHT, WIDTH, write_gui

from ivt_agents.cli import main
from ivt_env.data import GUI, load_dataset
from ivt_env.data.gui import LAYOUTS
from ivt_env.data.sample import DataError, DataMissingError

ROWS = {"screenspot": 3, "screenspotv2": 3, "screenspotpro": 3, "uivision": 2, "uivisionlayout": 2, "mmbenchgui": 2,
        "osworldg": 2}  # fmt: skip
JSON = sorted(set(GUI) - {"screenspot"})


@pytest.fixture
def root(tmp_path):
    write_gui(tmp_path)
    return tmp_path


def annotations(root, name):
    return next(iter((root / FOLDERS.get(name, name)).glob(LAYOUTS[name].files)))


def edited(root, name, **values):
    """The first row of a set changed so; None takes a key away."""
    path = annotations(root, name)
    rows = json.loads(path.read_text())
    rows[0] = {key: value for key, value in (rows[0] | values).items() if value is not None}
    path.write_text(json.dumps(rows))


@pytest.mark.parametrize("name", GUI)
def test_every_row_is_served_with_its_box_and_its_image(root, name):
    data = load_dataset(name, "test", root, strict=True)
    assert (data.name, len(data)) == (name, ROWS[name])
    for i in range(len(data)):
        sample = data[i]
        assert sample.expression == (f"tools: holds tool {'ab'[i]}" if name == "uivisionlayout" else "close")
        assert sample.size == (HEIGHT, WIDTH)
        assert np.allclose(np.multiply(sample.box, [WIDTH, HEIGHT] * 2), BOX)
        x1, y1, x2, y2 = BOX
        image = data.image(sample)
        assert (image[y1:y2, x1:x2] > 128).all() and (image[: y1 - 1] < 128).all()
    assert len({data[i].image_id for i in range(len(data))}) == 2


def test_meta_holds_what_scores_are_broken_down_by_and_refusals_are_left_out_and_counted(root, caplog):
    assert load_dataset("screenspotpro", "test", root)[0].meta["application"] == "blender"
    assert load_dataset("uivision", "test", root)[0].meta["part"] == "element_grounding_basic"
    assert load_dataset("osworldg", "test", root)[1].meta["box_type"] == "polygon"
    assert "1 expressions that name nothing (refusals) are left out" in caplog.text


@pytest.mark.parametrize("name", GUI)
def test_an_absent_set_says_where_it_was_looked_for_and_how_to_get_it(tmp_path, name):
    for other in {"uivision": "layout", "uivisionlayout": "element"}.get(name, ""), "images":
        (tmp_path / "uivision" / "annotations" / f"{other}_grounding").mkdir(parents=True)
    with pytest.raises(DataMissingError, match=f"To get it: `ivt data fetch {name}`"):
        load_dataset(name, "test", tmp_path, strict=True)


@pytest.mark.parametrize("content", ["", "{", "{}", "[1, 2]", '"x"', "[]"])
@pytest.mark.parametrize("name", JSON)
def test_a_broken_file_is_an_error_that_names_it(root, name, content):
    path = annotations(root, name)
    path.write_text(content)
    with pytest.raises(DataError, match=path.name):
        load_dataset(name, "test", root, strict=True)


@pytest.mark.parametrize("bad", [[1, 2, 3], [0, 0, 0, 0], ["a", 0, 1, 1], [float("nan")] * 4, {}, "../../secret.png"])
@pytest.mark.parametrize("name", JSON)
def test_a_row_with_an_unusable_box_or_image_is_left_out_and_the_others_are_served(root, name, bad):
    edited(root, name, **{LAYOUTS[name].image if isinstance(bad, str) else LAYOUTS[name].box: bad})
    data = load_dataset(name, "test", root, strict=True)
    assert (len(data), data.skipped) == (ROWS[name] - 1, 1)


def test_a_polygon_of_two_corners_and_an_unknown_kind_are_no_targets(root):
    edited(root, "osworldg", box_type="polygon", box_coordinates=[1, 2, 3, 4])
    assert load_dataset("osworldg", "test", root).skipped == 1
    edited(root, "osworldg", box_type="circle", box_coordinates=[1, 2, 3, 4])
    assert load_dataset("osworldg", "test", root).skipped == 1


def test_check_reads_all_of_them(root, capsys):
    assert main(["data", "check", *GUI, "--data-root", str(root)]) == 1
    said = capsys.readouterr().out
    assert said.count("2 image files read") == 7
    assert said.count("ERROR") == said.count("published are") == 5, "small sets have other counts, and no other fault"


@pytest.mark.parametrize(("points", "hit"), [([[64, 40]] * 3, 100.0), ([[64, 40], [96, 60], [97, 60]], 66.67)])
def test_published_points_are_scored_by_the_click(root, tmp_path, capsys, points, hit):
    lines = [{"sample_id": f"blender_{n}", "box": point} for n, point in enumerate(points)]
    path = tmp_path / "points.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    words = ["score", str(path), "--dataset", "screenspotpro", "--split", "test", "--data-root", str(root)]
    words += ["--format", "xy", "--frame", "px", "--json"]
    assert main(words) == 0
    rules = {rule["name"]: rule for rule in json.loads(capsys.readouterr().out)["rules"].values()}
    assert rules["hit"]["rows"][0]["value"] * 100 == pytest.approx(hit, abs=0.01)
    path.write_text(path.read_text().replace("]", ", 70, 80]"))
    assert main(words) == 2 and "no row has two numbers" in capsys.readouterr().err
