"""The report page says what the tables say, shows every outcome, and runs nothing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from browser import Page, chromium
from shown_episodes import HOSTILE

import ivt_env
from ivt_agents.evaluation import evaluate, report, swaps
from ivt_agents.evaluation.plots import plot_training
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


@pytest.fixture(scope="module")
def swapped(tmp_path_factory):
    out = tmp_path_factory.mktemp("swapped") / "swaps"
    swaps.main(swaps.Args(policies=["ceiling=oracle"], samples=12, split="val", steps=[1], out=out))
    return out


def page_of(folder) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_page_says_what_the_tables_say_and_where_they_come_from(played):
    page, results = page_of(played), json.loads((played / "results.json").read_text())
    wanted = ("floor learned_stop", "floor step_0", "mIoU")
    gain = next(c["difference"] for c in results["comparisons"] if (c["a"], c["b"], c["metric"]) == wanted)
    row = page[page.index('<td class="text" data-name="policy">floor</td>') :]
    row = row[: row.index("</tr>")]
    value = f"{gain['diff']:+.3f}{'' if gain['shown'] else ' n.s.'}"
    assert f"{value} <small>[{gain['low']:+.3f}, {gain['high']:+.3f}]</small>" in row
    provenance = re.sub(r"<[^>]+>", "|", page[page.index("Provenance") : page.index("Every rule")])
    for name, value in {
        "policy floor": "random",
        "policy ceiling": "oracle",
        "environment": "IVT-Scenes-v0, split val, at most 3 actions, view own",
        "served": "scenes/val",
        "samples": "40",
        "seed": "0",
        "version": f"ivt-env {ivt_env.__version__}",
        "date": results["date"],
    }.items():
        assert re.search(rf"\|{name}\|+{re.escape(value)}\|", provenance), name
    # Agents without probabilities get no empty diagram.
    assert not (played / "reliability.png").exists() and page.count("<figure>") == 3


def test_whatever_a_results_file_holds_is_text(played, swapped, tmp_path):
    folder, hostile = tmp_path / "hostile", "<b class=element>x</b>"

    def spoil(value):
        if isinstance(value, dict):
            return {k: v if k in ("metric", "column", "a", "b") else spoil(v) for k, v in value.items()}
        if isinstance(value, list):
            return [spoil(v) for v in value]
        return hostile if isinstance(value, str) else value

    for place in (played, swapped):
        results = json.loads((place / "results.json").read_text())
        args = results.pop("args")
        results = spoil(results) | {"args": args | {"env": hostile}}
        for row in results.get("variants", []) + results.get("dependence", []):
            row |= {"step": hostile, "num": hostile} if "num" in row else {"step": hostile}
        (folder / place.name).mkdir(parents=True)
        (folder / place.name / "results.json").write_text(json.dumps(results))
    page = report.write_report(folder / "evaluation", {}, lambda _: None, swaps=folder / "swaps")
    text = page.read_text(encoding="utf-8")
    assert "<b " not in text and text.count("&lt;b class=element&gt;") > 50


def test_every_column_of_the_tables_is_explained_and_the_oracle_is_marked(played):
    results, page = json.loads((played / "results.json").read_text()), page_of(played)
    assert {row["column"] for row in results["rows"]} <= set(COLUMNS)
    methods = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
    listed = set(re.findall(r"^\| `(\w+)` ?\*? \|", methods, re.M))
    assert set(COLUMNS) == listed, "docs/methods.md and the page explain different columns"
    assert "oracle_best *" in page and "never a result" in page
    episodes = load_episodes(played / "episodes" / "floor")
    for kind, _, is_of in KINDS:
        count = sum(map(is_of, episodes))
        assert (f"<h4>{kind}: {count} of 40</h4>" in page) == (count > 0)


def test_swaps_and_saved_episodes_make_a_page_by_command(played, swapped, tmp_path):
    page = report.main(report.Args(folder=played, swaps=swapped, examples=1, out=tmp_path / "page.html"))
    with_swaps = page.read_text(encoding="utf-8")
    assert "Overlay swaps" in with_swaps and "sibling" in with_swaps and "Overlay swaps" not in page_of(played)
    assert with_swaps.count("data:image/jpeg") < page_of(played).count("data:image/jpeg")


def test_missing_and_broken_results_are_told(tmp_path):
    with pytest.raises(DataError, match=r"results.json is not there: give a folder that evaluate.py has written"):
        report.main(report.Args(folder=tmp_path))
    (tmp_path / "results.json").write_text('{"rows": [')
    with pytest.raises(DataError, match="was evaluate.py cut off"):
        report.main(report.Args(folder=tmp_path))


def test_text_of_a_data_set_is_text_and_a_missing_image_is_told(played, tmp_path):
    folder = tmp_path / "hostile"
    shutil.copytree(played, folder)
    episodes = load_episodes(folder / "episodes" / "floor")
    for episode in episodes:
        episode.expression = HOSTILE
    save_episodes(folder / "episodes" / "floor", episodes)

    def nowhere(episode):
        raise DataMissingError(f"no image {HOSTILE}")

    blank = np.zeros((*episodes[0].size, 3), np.uint8)
    for image_of in (nowhere, lambda episode: blank):
        report.write_report(folder, {"floor": episodes}, image_of)
        page = page_of(folder)
        assert "<script" not in page and "<img src=x" not in page
        assert "&lt;/script&gt;" in page


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    yield from chromium(tmp_path_factory.mktemp("profile"))


def test_in_a_browser_images_are_drawn_and_boxes_lie_where_they_belong(driver, played):
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
    # Every panel shows the image, the first as itself and the others by reference.
    assert page.run("return [...document.querySelectorAll('.panel svg')].every(s => s.querySelector('image, use'))")
    names = page.run("return [...document.querySelectorAll('.panel image')].map(i => i.id)")
    assert len(names) == len(set(names))


@pytest.mark.parametrize("dark", [False, True])
def test_on_a_phone_nothing_is_cut_without_a_sign(driver, played, dark):
    page = Page(driver)
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        driver.get(f"file://{played}/report.html")
        page.run("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.run("return document.documentElement.scrollWidth") <= 400
        key = page.run("const k = document.querySelector('.key'); return [k.scrollWidth, k.clientWidth]")
        assert key[0] <= key[1], "the key table is cut"
        assert page.run("return [...document.querySelectorAll('.key td')].every(d => d.dataset.name)")
        script = "return [...document.querySelectorAll('.wide')].filter(w => w.scrollWidth > w.clientWidth)"
        script += ".map(w => getComputedStyle(w, '::before').content)"
        hints = page.run(script)
        assert len(hints) > 5 and all("scroll sideways" in hint for hint in hints)
        assert "hover" not in page.text("body").lower()
        assert page.run("return document.querySelectorAll('body [title]').length") == 0
        inverted = page.run("return getComputedStyle(document.querySelector('figure img')).filter")
        assert ("invert" in inverted) == dark
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_killed_runs_half_written_line_does_not_stop_the_plot(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    rows = [{"step": k, "rollout/final_iou": 0.1 * k} for k in range(4)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "rollo')
    plot_training([run], tmp_path / "training.png")
    assert (tmp_path / "training.png").stat().st_size > 1000
