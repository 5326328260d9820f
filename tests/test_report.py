"""The report page says what the tables say, shows every outcome, and runs nothing."""

from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from browser import Page, chromium
from shown_episodes import HOSTILE

from experiments.study import Args, _reporting
from ivt_agents.command import parse
from ivt_agents.evaluation import evaluate, report, swaps
from ivt_agents.evaluation.report import COLUMNS, KINDS
from ivt_env.data.sample import DataError, DataMissingError
from ivt_env.episodes import load_episodes, save_episodes


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    out = tmp_path_factory.mktemp("played") / "evaluation"
    # "noise" breaks and corrects; "oracle" has no wrong boxes.
    policies = ["floor=random", "ceiling=oracle"]
    evaluate.main(evaluate.Args(policies=policies, samples=40, split="val", out=out))
    return out


def page_of(folder) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_verdict_is_the_difference_of_the_tables(played):
    results, page = json.loads((played / "results.json").read_text()), page_of(played)
    gain = next(
        c["difference"]
        for c in results["comparisons"]
        if (c["a"], c["b"], c["metric"]) == ("floor learned_stop", "floor step_0", "mIoU")
    )
    row = page[page.index('<td class="text">floor</td>') :]
    row = row[: row.index("</tr>")]
    value = f"{gain['diff']:+.3f}" if gain["shown"] else "not shown"
    assert f"{value} <small>[{gain['low']:+.3f}, {gain['high']:+.3f}]</small>" in row


def test_every_column_of_the_tables_is_explained_and_the_oracle_is_marked(played):
    results, page = json.loads((played / "results.json").read_text()), page_of(played)
    assert {row["column"] for row in results["rows"]} <= set(COLUMNS)
    methods = (evaluate.Path(evaluate.__file__).parent / "docs" / "methods.md").read_text()
    listed = set(re.findall(r"^\| `(\w+)` ?\*? \|", methods, re.M))
    assert set(COLUMNS) == listed, "docs/methods.md and the page explain different columns"
    assert "oracle_best *" in page and "never a result" in page


def test_outcomes_count_every_episode_that_is_of_them(played):
    page, episodes = page_of(played), load_episodes(played / "episodes" / "floor")
    for kind, _, is_of in KINDS:
        count = sum(map(is_of, episodes))
        assert (f"<h4>{kind}: {count} of 40</h4>" in page) == (count > 0)


def test_swaps_and_saved_episodes_make_a_page_by_command(played, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(played, folder)
    (folder / "report.html").unlink()
    swaps.main(swaps.Args(policies=["ceiling=oracle"], samples=12, split="val", steps=[1], out=tmp_path / "swaps"))
    page = report.main(report.Args(folder=folder, swaps=tmp_path / "swaps", examples=1, out=tmp_path / "page.html"))
    assert not (folder / "report.html").exists()
    with_swaps = page.read_text(encoding="utf-8")
    assert "Overlay swaps" in with_swaps and "sibling" in with_swaps and "Overlay swaps" not in page_of(played)
    assert with_swaps.count("data:image/jpeg") < page_of(played).count("data:image/jpeg")


def test_the_command_takes_the_folder_without_a_flag(played, tmp_path):
    words = [str(played), "--swaps", "x", "--out", str(tmp_path / "page.html")]
    args = parse(report.Args, words)
    assert (args.folder, args.swaps) == (played, Path("x"))
    assert _reporting(Args(out=tmp_path))[0].command[3] == str(tmp_path / "test"), "as the study gives it"


def test_missing_and_broken_results_are_told(tmp_path):
    with pytest.raises(DataError, match=r"results.json is not there: give a folder that evaluate.py has written"):
        report.main(report.Args(folder=tmp_path))
    (tmp_path / "results.json").write_text('{"rows": [')
    with pytest.raises(DataError, match="was evaluate.py cut off"):
        report.main(report.Args(folder=tmp_path))


def test_text_of_a_data_set_is_text_and_a_missing_picture_is_told(played, tmp_path):
    folder = tmp_path / "hostile"
    shutil.copytree(played, folder)
    episodes = load_episodes(folder / "episodes" / "floor")
    for episode in episodes:
        episode.expression = HOSTILE
    save_episodes(folder / "episodes" / "floor", episodes)

    def nowhere(episode):
        raise DataMissingError(f"no picture {HOSTILE}")

    blank = np.zeros((*episodes[0].size, 3), np.uint8)
    for picture_of in (nowhere, lambda episode: blank):
        report.write_report(folder, {"floor": episodes}, picture_of)
        page = page_of(folder)
        assert "<script" not in page and "<img src=x" not in page
        assert "&lt;/script&gt;" in page


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    yield from chromium(tmp_path_factory.mktemp("profile"))


def test_in_a_browser_pictures_are_drawn_and_boxes_lie_where_they_belong(driver, played):
    page = Page(driver)
    driver.get(f"file://{played}/report.html")
    assert [e for e in driver.get_log("browser") if e["level"] == "SEVERE"] == []
    assert page.run("return [...document.images].every(i => i.complete && i.naturalWidth > 100)")
    assert page.run("return document.documentElement.scrollWidth <= window.innerWidth")
    page.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    episodes = load_episodes(played / "episodes" / "floor")
    first = next(e for _, _, is_of in KINDS for e in episodes if is_of(e))
    left, top, right, bottom = page.rect(".panel svg")
    height, width = first.size
    assert (right - left) / (bottom - top) == pytest.approx(width / height, rel=0.02)
    sides = np.array([right - left, bottom - top] * 2)
    expected = np.array([left, top] * 2) + np.array(first.target) * sides
    # A rectangle's own box holds half of its line of three pixels on each side, or none.
    assert np.abs(page.rect(".panel rect.target") - expected).max() < 3
    # Every panel shows the picture, the first as itself and the others by reference.
    assert page.run("return [...document.querySelectorAll('.panel svg')].every(s => s.querySelector('image, use'))")
    names = page.run("return [...document.querySelectorAll('.panel image')].map(i => i.id)")
    assert len(names) == len(set(names))


def test_a_jpeg_of_the_page_is_the_picture_that_was_played(played):
    from io import BytesIO

    from PIL import Image

    encoded = re.search(r"data:image/jpeg;base64,([A-Za-z0-9+/=]+)", page_of(played))
    assert encoded is not None
    with Image.open(BytesIO(base64.b64decode(encoded[1]))) as image:
        height, width = load_episodes(played / "episodes" / "floor")[0].size
        assert image.width / image.height == pytest.approx(width / height, rel=0.02)
