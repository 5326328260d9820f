"""What the episode page promises.

If one of these is false, nothing crashes: boxes sit a little off and mislead whoever looks, a
filter counts the wrong episodes, or a model's output runs as a program in the reader's browser.

The browser tests use Chromium. Without one they are skipped, unless ``CI`` or
``IVT_REQUIRE_BROWSER`` is set: then they fail.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ivt_env
from ivt_env import boxes
from ivt_env.data.sample import DataError, Picture
from ivt_env.episodes import Box, Episode, Step
from ivt_env.viewer import write_page

PHOTOS = Path(ivt_env.__path__[0]) / "assets" / "photos"
HOSTILE = "</script><img src=x onerror=\"window.ran=1;document.title='ran'\"><script>window.ran=1</script>"
SEPARATORS = "a\u2028b\u2029c & <b>bold</b> <!-- "


# ---- episodes to show ------------------------------------------------------------------------


@cache
def _photo(name: str) -> Picture:
    if name.startswith("portrait-"):  # the photographs are square or wide; this is a tall piece of one
        return np.ascontiguousarray(_photo(name.removeprefix("portrait-"))[:, 100:330])
    return np.asarray(Image.open(PHOTOS / name).convert("RGB"))


def photo_of(episode: Episode) -> Picture:
    return _photo(episode.picture_id)


def play(target: Box, proposals: list[Box | None], **fields: Any) -> Episode:
    """An episode whose steps put forward ``proposals``; None is text without a usable action."""
    initial = fields.get("initial_box")
    current: Box | None = initial
    steps: list[Step] = []
    before = float(boxes.iou(initial, target)) if initial else 0.0
    for proposal in proposals:
        current = proposal or current
        overlap = float(boxes.iou(current, target)) if current else 0.0
        steps.append(Step(proposal, False, current, overlap, overlap - before, parse_failure=proposal is None))
        before = overlap
    defaults: dict[str, Any] = {
        "sample_id": "s0", "picture_id": "coffee.jpg", "dataset": "photos", "split": "all",
        "expression": "the cup", "agent": "made-up",
    }  # fmt: skip
    defaults |= fields
    if "size" not in defaults:
        defaults["size"] = _photo(defaults["picture_id"]).shape[:2]
    return Episode(target=target, steps=steps, truncated=True, **defaults)


def stopping(episode: Episode, probability: float = 0.9) -> Episode:
    """The same episode, ended by a stop."""
    box = episode.steps[-1].box if episode.steps else episode.initial_box
    text = 'The box fits the object on all four sides. {"stop": true}'
    episode.steps.append(Step(None, True, box, episode.final_iou, 0.0, text=text, stop_probability=probability))
    episode.terminated, episode.truncated = True, False
    return episode


def shifted(box: Box, dx: float, dy: float, grow: float = 0.0) -> Box:
    x1, y1, x2, y2 = np.clip([box[0] + dx, box[1] + dy, box[2] + dx + grow, box[3] + dy + grow], 0, 1)
    return float(x1), float(y1), float(x2), float(y2)


def made_up_episodes(seed: int = 0) -> list[Episode]:
    """Every annotated photograph with made-up proposals, then the awkward cases."""
    rng = np.random.default_rng(seed)
    made = []
    rows = (PHOTOS / "annotations.jsonl").read_text(encoding="utf-8").splitlines()
    for number, row in enumerate(map(json.loads, rows)):
        target = tuple(boxes.to_relative(row["bbox"], (row["height"], row["width"])).tolist())
        first, last = sorted(rng.uniform(0.0, 0.25, size=2), reverse=bool(number % 4))
        path = np.linspace(first, last, 3) * rng.choice([-1, 1])
        proposals: list[Box | None] = [shifted(target, d * (target[2] - target[0]) * 2, d / 4) for d in path]
        episode = play(
            target, proposals[: 2 + number % 2],
            sample_id=f"photos-{number}", picture_id=row["image"], expression=row["expression"], seed=seed,
            size=(row["height"], row["width"]),
        )  # fmt: skip
        for index, step in enumerate(episode.steps):
            box = [round(1000 * v) for v in step.box or ()]
            step.stop_probability = 0.1 + 0.3 * index
            step.text = (
                "The red box covers part of the object and too much of the background on its left. "
                f'Its right edge should move outwards.\n{{"bbox_2d": {box}}}'
            )
        made.append(stopping(episode) if number % 2 == 0 else episode)
    cup: Box = (0.29, 0.04, 0.687, 0.755)
    hostile = play(cup, [shifted(cup, 0.1, 0.1), None, cup], sample_id="hostile" + HOSTILE, expression=HOSTILE)
    for step in hostile.steps:
        step.text = HOSTILE + SEPARATORS
    long = "the cup " + "that stands on the saucer which lies on the table " * 30 + "and" + "n" * 300 + "d"
    refused = play(cup, [shifted(cup, 0.05, 0.0)], sample_id="refused", expression="the cup, refused once")
    refused.steps.append(
        Step(
            None,
            False,
            refused.steps[0].box,
            refused.final_iou,
            0.0,
            invalid="x2 <= x1: [0.5, 0.1, 0.4, 0.9]",
        )
    )
    return [
        *made,
        hostile,
        play(cup, [cup], sample_id="long", expression=long),
        play(cup, [None, None], sample_id="no-box", expression="nothing was ever proposed"),
        play(cup, [], sample_id="no-step", expression="no step was taken"),
        refused,
        stopping(play(cup, [cup], sample_id="started", expression="given a box", initial_box=(0.5, 0.5, 0.9, 0.9))),
        play(
            (0.3, 0.15, 0.85, 0.9), [(0.1, 0.1, 0.6, 0.5), (0.3, 0.2, 0.9, 0.9)],
            sample_id="tall", picture_id="portrait-astronaut.jpg", expression="the tall picture",
        ),
    ]  # fmt: skip


def content_of(page: Path) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="content">(.*?)</script>', page.read_text("utf-8"), re.S)
    assert match
    return json.loads(match[1])


def pictures_of(page: Path) -> list[str]:
    found = re.findall(r'<script type="application/json" id="picture-\d+">(.*?)</script>', page.read_text("utf-8"))
    return [json.loads(source) for source in found]


# ---- the file --------------------------------------------------------------------------------


def test_hostile_text_cannot_leave_its_script_block(tmp_path: Path) -> None:
    hostile = [e for e in made_up_episodes() if HOSTILE in e.expression]
    hostile[0].dataset, hostile[0].agent = HOSTILE, HOSTILE
    page = write_page(tmp_path / "p.html", {HOSTILE: hostile}, photo_of, title=HOSTILE)
    text = page.read_text("utf-8")
    assert text.count("<script") == text.count("</script>") == 3  # content, program, one picture
    assert "<img" not in text and "\u2028" not in text and "\u2029" not in text
    read = content_of(page)["runs"][0]
    assert read["name"] == HOSTILE
    assert read["episodes"][0]["expression"] == HOSTILE
    assert read["episodes"][0]["steps"][0]["text"] == HOSTILE + SEPARATORS


def test_text_that_is_no_valid_unicode_is_written_and_read_back(tmp_path: Path) -> None:
    episode = play((0.1, 0.1, 0.5, 0.5), [None], expression="cut \ud83d off \x00")
    page = write_page(tmp_path / "p.html", [episode], photo_of, title="cut \ud83d off {{content}}")
    assert content_of(page)["runs"][0]["episodes"][0]["expression"] == "cut \ud83d off \x00"
    assert "<title>cut &#55357; off {{content}}</title>" in page.read_text("utf-8")


def test_each_distinct_picture_is_inlined_once(tmp_path: Path) -> None:
    episodes, asked = made_up_episodes(), []

    def counted(episode: Episode) -> Picture:
        asked.append(episode.picture_id)
        return photo_of(episode)

    page = write_page(tmp_path / "p.html", {"one": episodes, "two": made_up_episodes(1)}, counted, title="t")
    distinct = {e.picture_id for e in episodes}
    assert sorted(asked) == sorted(distinct) and len(distinct) == 6
    sources = pictures_of(page)
    assert len(sources) == len(set(sources)) == len(distinct)
    order = list(dict.fromkeys(e.picture_id for e in episodes))
    for run in content_of(page)["runs"]:
        assert all(order[row["picture"]] == row["pictureId"] for row in run["episodes"])


def test_pictures_of_two_data_sets_with_one_id_stay_apart(tmp_path: Path) -> None:
    box: Box = (0.1, 0.1, 0.5, 0.5)
    episodes = [play(box, [box], dataset=name, picture_id="1", size=(4, 4)) for name in ("photos", "scenes")]
    shades = {"photos": 0, "scenes": 255}
    page = write_page(tmp_path / "p.html", episodes, lambda e: np.full((4, 4, 3), shades[e.dataset], np.uint8), "t")
    assert len(set(pictures_of(page))) == 2


@pytest.mark.parametrize(("side", "size"), [(512, (600, 400)), (100, (600, 400)), (4096, (600, 400))])
def test_pictures_are_scaled_down_and_never_enlarged(tmp_path: Path, side: int, size: tuple[int, int]) -> None:
    box: Box = (0.1, 0.1, 0.5, 0.5)
    page = write_page(tmp_path / "p.html", [play(box, [box])], photo_of, "t", max_picture_side=side)
    image = Image.open(io.BytesIO(base64.b64decode(pictures_of(page)[0].split(",")[1])))
    scale = min(1.0, side / max(size))
    assert image.format == "JPEG"
    assert image.size == tuple(round(v * scale) for v in size)


def test_the_page_asks_for_nothing_from_elsewhere(tmp_path: Path) -> None:
    page = write_page(tmp_path / "p.html", made_up_episodes(), photo_of, "t")
    text = re.sub(r'<script type="application/json".*?</script>', "", page.read_text("utf-8"), flags=re.S)
    addresses = set(re.findall(r"""(?:https?:|//)[^\s"'`)]+""", text.split("<script>")[0]))
    assert not addresses
    assert re.findall(r'(?:src|href)="([^"]*)"', text) == ["data:,"]
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy and "default-src 'none'" in policy[1] and "unsafe" not in policy[1]


def _contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio of two ``#rrggbb`` colours."""

    def luminance(colour: str) -> float:
        v = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return float(np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_has_the_contrast_of_wcag_aa_in_light_and_dark() -> None:
    style = (Path(ivt_env.__path__[0]) / "viewer" / "viewer.css").read_text("utf-8")
    themes = [dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)]
    assert len(themes) == 2
    grounds = ("page", "card", "sunk", "selected")
    pairs = [(text, ground) for text in ("ink", "soft") for ground in grounds]
    pairs += [(f"{text}-ink", ground) for text in ("good", "bad", "warn") for ground in grounds]
    pairs += [(f"{text}-ink", text) for text in ("good", "bad", "calm", "dull", "warn")]
    for theme in themes:
        for text, ground in pairs:
            assert _contrast(theme[text], theme[ground]) >= 4.5, (text, ground)


def test_iou_just_below_half_is_not_rounded_up(tmp_path: Path) -> None:
    box: Box = (0.1, 0.1, 0.5, 0.5)
    episode = play(box, [box])
    episode.steps[0].iou = 0.4999999
    page = write_page(tmp_path / "p.html", [episode], photo_of, "t")
    assert content_of(page)["runs"][0]["episodes"][0]["steps"][0]["iou"] == 0.4999999


def test_the_page_names_what_was_really_served(tmp_path: Path) -> None:
    box: Box = (0.1, 0.1, 0.5, 0.5)
    served = [
        ("scenes", "test", "1"),
        ("scenes", "test", "2"),
        ("photos", "all", "1"),
        ("photos", "all", "1"),
    ]
    episodes = [play(box, [box], dataset=d, split=s, sample_id=i) for d, s, i in served]
    page = write_page(tmp_path / "p.html", episodes, photo_of, "t")
    assert "photos / all (1 sample), scenes / test (2 samples)" in page.read_text("utf-8")


def _with(**changes: Any) -> Episode:
    box: Box = (0.1, 0.1, 0.5, 0.5)
    episode = play(box, [box])
    for name, value in changes.items():
        setattr(episode if hasattr(episode, name) else episode.steps[0], name, value)
    return episode


@pytest.mark.parametrize(
    ("episode", "message"),
    [
        (_with(iou=float("nan")), r"'s0' of photos/all, step 0: iou is nan"),
        (_with(reward=float("inf")), r"step 0: reward is inf"),
        (_with(target=(0.1, 0.1, float("nan"), 0.5)), r"target is nan"),
        (_with(initial_box=(0.1, 0.2, 0.3)), r"initial box is \(0\.1, 0\.2, 0\.3\), a box has 4 numbers"),
        (_with(stop_probability=float("nan")), r"stop_probability is nan"),
        (_with(size=(0, 600)), r"size is \(0, 600\)"),
        (_with(size=(600, 400)), r"'coffee.jpg'.* is 600x400 pixels, the episode says 400x600"),
    ],
)
def test_an_episode_that_cannot_be_shown_is_named(tmp_path: Path, episode: Episode, message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_page(tmp_path / "p.html", [episode], photo_of, "t")
    assert not (tmp_path / "p.html").exists()


def test_a_picture_that_is_no_rgb_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'coffee.jpg'.* is float64 \(400, 600\)"):
        write_page(tmp_path / "p.html", [_with()], lambda _: np.zeros((400, 600)), "t")  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize(
    "changes", [{"expression": "another"}, {"target": (0.1, 0.1, 0.5, 0.6)}, {"picture_id": "rocket.jpg"}]
)
def test_runs_that_disagree_about_a_sample_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=f"'s0'.*{next(iter(changes))} is .*in run 'b' and .*in run 'a'"):
        write_page(tmp_path / "p.html", {"a": [_with()], "b": [_with(**changes)]}, photo_of, "t")


def test_nothing_to_show_is_an_error(tmp_path: Path) -> None:
    for nothing in ([], {}, {"a": []}):
        with pytest.raises(ValueError, match="no episodes to show"):
            write_page(tmp_path / "p.html", nothing, photo_of, "t")
    with pytest.raises(ValueError, match="max_picture_side is 0"):
        write_page(tmp_path / "p.html", [_with()], photo_of, "t", max_picture_side=0)


# ---- in a browser ----------------------------------------------------------------------------


class Page:
    """A page open in Chromium."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def texts(self, selector: str) -> list[str]:
        return self.run("return [...document.querySelectorAll(arguments[0])].map(n => n.textContent)", selector)

    def rect(self, selector: str) -> np.ndarray:
        """Left, top, right and bottom of the first match, in page pixels."""
        script = "const r = document.querySelector(arguments[0]).getBoundingClientRect();"
        return np.array(self.run(script + "return [r.left, r.top, r.right, r.bottom]", selector))

    def click(self, selector: str) -> None:
        self.run("document.querySelector(arguments[0]).click()", selector)

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def choose(self, selector: str, label: str) -> None:
        from selenium.webdriver.support.ui import Select

        Select(self.driver.find_element("css selector", selector)).select_by_visible_text(label)

    def expression(self) -> str:
        return self.text("#episode-head h2")

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline, "the page did not get there in 10 s"
            time.sleep(0.02)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    chromedriver = shutil.which("chromedriver")
    missing = [name for name, found in (("chromium", browser), ("chromedriver", chromedriver)) if not found]
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        missing.append("the Python package selenium")
    if missing:
        remedy = "apt-get install chromium chromium-driver; pip install selenium"
        message = f"the viewer's browser tests need {', '.join(missing)}: {remedy}"
        if os.environ.get("CI") or os.environ.get("IVT_REQUIRE_BROWSER"):
            pytest.fail(message)
        pytest.skip(message)
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--disable-dev-shm-usage", "--force-device-scale-factor=1", "--window-size=1400,900",
        f"--user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(chromedriver))
    yield started
    started.quit()


@pytest.fixture
def open_page(driver: Any, tmp_path: Path) -> Iterator[Callable[..., Page]]:
    driver.get_log("browser")

    def open_episodes(
        episodes: Any, fragment: str = "", picture_of: Callable[[Episode], Picture] = photo_of, **options: Any
    ) -> Page:
        path = write_page(tmp_path / "page.html", episodes, picture_of, title="Episodes", **options)
        driver.get("about:blank")  # else a new fragment alone would not load the file again
        driver.get(path.as_uri() + fragment)
        return Page(driver)

    yield open_episodes
    complaints = [entry["message"] for entry in driver.get_log("browser")]
    assert not complaints  # errors of the script and refusals by the page's own policy end up here


def test_text_from_a_model_is_never_executed(open_page: Callable[..., Page]) -> None:
    episodes = made_up_episodes()
    hostile = [e for e in episodes if HOSTILE in e.expression]
    hostile[0].dataset = hostile[0].split = hostile[0].agent = HOSTILE
    hostile[0].steps[0].invalid = HOSTILE
    page = open_page({HOSTILE: hostile, "other" + HOSTILE: hostile})
    for _ in hostile[0].steps:
        assert page.expression() == HOSTILE
        assert page.text(".words") == HOSTILE + SEPARATORS
        assert page.texts(".row .expression") == [HOSTILE]
        page.press("\ue014")
    assert page.run("return window.ran === undefined && document.title === 'Episodes'")
    assert page.run("return document.querySelectorAll('img').length") == 2  # the picture in two panels
    assert page.run("return [...document.images].every(i => i.src.startsWith('data:image/jpeg'))")


def test_the_policy_stops_a_script_that_got_in(open_page: Callable[..., Page], driver: Any) -> None:
    page = open_page(made_up_episodes())
    page.run(
        "const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s);"
        "const i = document.createElement('div'); i.innerHTML = '<img src=x onerror=\"window.ran = 1\">';"
        "document.body.append(i)"
    )
    time.sleep(0.3)
    assert page.run("return window.ran === undefined")
    assert any("Content Security Policy" in entry["message"] for entry in driver.get_log("browser"))


@pytest.mark.parametrize("picture_id", ["coffee.jpg", "portrait-astronaut.jpg", "camera.jpg"])
@pytest.mark.parametrize("width", [1400, 700])
def test_boxes_are_drawn_where_they_belong(
    open_page: Callable[..., Page], driver: Any, picture_id: str, width: int
) -> None:
    target, first, second = (0.3, 0.04, 0.7, 0.75), (0.1, 0.2, 0.45, 0.6), (0.25, 0.0, 1.0, 0.8)
    driver.set_window_size(width, 900)
    page = open_page([play(target, [first, second], picture_id=picture_id)], max_picture_side=200)
    page.press("\ue014")
    left, top, right, bottom = page.rect(".picture img")
    height_px, width_px = _photo(picture_id).shape[:2]
    assert (right - left) / (bottom - top) == pytest.approx(width_px / height_px, rel=0.005)
    origin, extent = np.array([left, top, left, top]), np.array([right - left, bottom - top] * 2)
    for name, box in {"target": target, "current": second, "earlier": first}.items():
        np.testing.assert_allclose(page.rect(f"rect.{name}"), origin + extent * np.array(box), atol=0.75, err_msg=name)
    driver.set_window_size(1400, 900)


@pytest.mark.parametrize("size", [(300, 120), (120, 300)], ids=["tall", "wide"])
def test_a_drawn_box_meets_the_pixels_it_stands_for(
    open_page: Callable[..., Page], driver: Any, size: tuple[int, int]
) -> None:
    """On the screen itself: a blue patch painted into the picture fills the box drawn around it."""
    box: Box = (0.25, 0.4, 0.75, 0.9)
    picture = np.full((*size, 3), 255, np.uint8)
    x1, y1, x2, y2 = boxes.to_pixels(box, size).astype(int)
    picture[y1:y2, x1:x2] = (0, 0, 255)
    page = open_page([play(box, [None], size=size, picture_id="patch")], picture_of=lambda _: picture)
    page.until(lambda: page.run("return document.querySelector('.picture img').complete"))
    expected = page.rect("rect.target")
    page.run("document.querySelector('.picture svg').style.visibility = 'hidden'")
    left, top, right, bottom = page.rect(".picture img").round().astype(int)
    screen = np.asarray(Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")).astype(int)
    blue = (screen[..., 2] - screen[..., 0])[top:bottom, left:right] > 127
    rows, columns = np.flatnonzero(blue.any(axis=1)), np.flatnonzero(blue.any(axis=0))
    seen = [left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1]
    np.testing.assert_allclose(seen, expected, atol=2.0)  # the picture is enlarged two to three times


def test_keys_step_through_an_episode(open_page: Callable[..., Page]) -> None:
    left, up, right, down, escape = "\ue012", "\ue013", "\ue014", "\ue015", "\ue00c"
    episodes = made_up_episodes()[:4]
    page = open_page(episodes)

    def here() -> tuple[str, str]:
        return page.expression(), page.text(".strip button[aria-current] .name")

    names = [e.expression for e in episodes]
    assert here() == (names[0], "Step 0")
    page.press(right)
    assert here() == (names[0], "Step 1")
    assert page.text(".words") == episodes[0].steps[1].text
    page.press(right, right, right)
    assert here() == (names[0], "Stop")
    page.press(left)
    assert here() == (names[0], "Step 1")
    page.press(down)
    assert here() == (names[1], "Step 0")
    page.press("j", "j", "j", "j")
    assert here() == (names[3], "Step 0")
    page.press("k", up)
    assert here() == (names[1], "Step 0")
    page.press("/", *"helmetj")  # in the search field, letters are letters
    page.until(lambda: page.texts(".row") == [])
    assert page.expression() == "No episode to show"
    page.press("\ue003")
    page.until(lambda: page.texts(".row .expression") == ["the helmet with the black visor"])
    page.press(escape, right)
    assert here() == ("the helmet with the black visor", "Step 1")


def expected_filters(episodes: list[Episode]) -> dict[str, set[str]]:
    """What each filter must show, worked out from the records."""
    found: dict[str, set[str]] = {"corrected": set(), "broken": set(), "right": set(), "wrong": set()}
    for e in episodes:
        before, after = bool(e.steps) and e.steps[0].iou >= 0.5, e.final_iou >= 0.5
        name = {(0, 1): "corrected", (1, 0): "broken", (1, 1): "right", (0, 0): "wrong"}[before, after]
        found[name].add(e.sample_id)
    found["all"] = {e.sample_id for e in episodes}
    found["stopped"] = {e.sample_id for e in episodes if e.steps and e.steps[-1].stop}
    found["unparsable"] = {e.sample_id for e in episodes if any(s.parse_failure or s.invalid for s in e.steps)}
    return found


def test_filter_shows_only_corrected_episodes(open_page: Callable[..., Page]) -> None:
    episodes = made_up_episodes()
    page = open_page(episodes)
    expected = expected_filters(episodes)
    assert all(expected.values())  # else a filter that shows nothing would pass
    for name, samples in expected.items():
        page.click(f"#filter-{name}")
        assert set(page.run("return state.visible.map(e => e.sample)")) == samples, name
        assert page.text(f"#filter-{name} .number") == str(len(samples))
        assert set(page.texts(".row .expression")) <= {e.expression for e in episodes if e.sample_id in samples}
        chosen = [e for e in episodes if e.sample_id in samples]
        first, final = [e.steps[0].iou if e.steps else 0.0 for e in chosen], [e.final_iou for e in chosen]
        accuracy = [np.mean(np.array(ious) >= 0.5) for ious in (first, final)]
        cells = page.texts("#summary td .value")
        assert cells[0] == str(len(chosen))
        assert cells[1].startswith(f"{accuracy[0]:.3f} → {accuracy[1]:.3f}")
        assert cells[2].startswith(f"{np.mean(first):.3f} → {np.mean(final):.3f}")
        assert cells[3] == f"{np.mean([len(e.steps) for e in chosen]):.2f}"


def test_sorting_orders_the_list(open_page: Callable[..., Page]) -> None:
    episodes = made_up_episodes()
    page = open_page(episodes)
    keys: dict[str, Callable[[Episode], float]] = {
        "final IoU, best first": lambda e: -e.final_iou,
        "final IoU, worst first": lambda e: e.final_iou,
        "gain, largest first": lambda e: (e.steps[0].iou if e.steps else 0.0) - e.final_iou,
        "sample order": lambda e: 0.0,
    }
    for label, key in keys.items():
        page.choose("#sort", label)
        assert page.run("return state.visible.map(e => e.sample)") == [e.sample_id for e in sorted(episodes, key=key)]


def test_two_runs_are_matched_by_sample(open_page: Callable[..., Page]) -> None:
    first, second = made_up_episodes(0)[:6], made_up_episodes(1)[:6][::-1]
    del second[2]
    page = open_page({"before": first, "after": second, "third": made_up_episodes(2)[:6]})
    of_sample = {e.sample_id: e for e in second}
    for episode in first:
        assert page.expression() == episode.expression
        assert page.texts(".panel h3") == ["before", "after"]
        other = of_sample.get(episode.sample_id)
        if other is None:
            assert "no episode of this sample" in page.text(".panel:last-child .missing")
        else:
            expected = [[f"{s.iou:.3f}" for s in e.steps] for e in (episode, other)]
            assert [page.texts(f".panel:nth-child({n}) .strip .iou") for n in (1, 2)] == expected
        page.press("j")
    assert page.texts("#summary tbody th") == ["before", "after"]
    assert [page.texts("#summary td:nth-child(2)")[i] for i in (0, 1)] == ["6", "5"]
    page.choose("#run-b", "third")
    assert page.texts(".panel h3") == ["before", "third"]
    page.choose("#run-a", "third")
    assert page.texts(".panel h3") == ["third", "before"]
    page.choose("#run-b", "(none)")
    assert page.texts(".panel h3") == ["third"]


def test_rollouts_of_one_sample_are_matched_in_order(open_page: Callable[..., Page]) -> None:
    box: Box = (0.1, 0.1, 0.5, 0.5)
    shifts = {"a": (0.0, 0.1, 0.2), "b": (0.3, 0.02)}
    runs = {name: [play(box, [shifted(box, d, 0)], seed=n) for n, d in enumerate(s)] for name, s in shifts.items()}
    for copy in (1, 2, 3):
        page = open_page(runs, f"#run=a&beside=b&sample=s0&copy={copy}&step=0")
        shown = [run[copy - 1].final_iou for run in runs.values() if copy <= len(run)]
        assert page.texts(".strip .iou") == [f"{overlap:.3f}" for overlap in shown]


def test_a_link_leads_back_to_episode_and_step(open_page: Callable[..., Page]) -> None:
    episodes = made_up_episodes()
    page = open_page(episodes)
    page.press("j", "j", "\ue014")
    page.until(lambda: page.run("return location.hash") == "#sample=photos-2&step=1")
    page = open_page(episodes, "#sample=photos-2&step=1")
    assert page.expression() == episodes[2].expression
    assert page.text(".strip button[aria-current] .name") == "Step 1"
    for nonsense in (
        "#sample=absent&step=9",
        "#sample=photos-2&step=99",
        "#%%%",
        "#step=NaN&sample=photos-1&copy=x",
    ):
        page = open_page(episodes, nonsense)
        assert page.expression() in {e.expression for e in episodes}


def test_an_initial_box_is_shown_as_the_start(open_page: Callable[..., Page]) -> None:
    episode = next(e for e in made_up_episodes() if e.initial_box)
    page = open_page([episode])
    assert page.texts(".strip .name") == ["Start", "Step 0", "Stop"]
    assert page.text(".strip button[aria-current] .name") == "Step 0"
    page.press("\ue012")
    assert page.text(".strip button[aria-current] .name") == "Start"
    origin, extent = (
        page.rect(".picture img")[[0, 1, 0, 1]],
        np.ptp(page.rect(".picture img").reshape(2, 2), axis=0),
    )
    assert episode.initial_box is not None
    np.testing.assert_allclose(
        page.rect("rect.current"), origin + np.tile(extent, 2) * np.array(episode.initial_box), atol=0.75
    )
    assert "1 began from a given box" in page.text("#started")


def test_a_long_list_stays_fast(open_page: Callable[..., Page]) -> None:
    """10,000 episodes; the limits are loose, for a busy machine, the list must merely not freeze."""
    few, count = made_up_episodes(), 10_000
    episodes = []
    for number in range(count):
        model = few[number % len(few)]
        fields = {name: getattr(model, name) for name in Episode.__slots__}
        episodes.append(Episode(**fields | {"sample_id": f"{number}"}))
    page = open_page(episodes)
    paint = page.run("return performance.getEntriesByName('first-contentful-paint')[0].startTime")
    assert paint < 5000
    assert len(page.texts(".row")) < 60
    measured = "const t = performance.now(); document.querySelector(arguments[0]).click(); return performance.now() - t"
    for name in ("corrected", "stopped", "all"):
        assert page.run(measured, f"#filter-{name}") < 1000
    page.run("document.getElementById('list').scrollTop = 1e9")
    page.until(lambda: page.run("return document.getElementById('row-9999') !== null"))
    page.press("j")
    assert "2 of 10,000" in page.text("#episode-head .place")


@pytest.mark.parametrize("width", [1400, 480, 320])
def test_nothing_runs_over_the_edge(open_page: Callable[..., Page], driver: Any, width: int) -> None:
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    episodes = made_up_episodes()
    page = open_page(
        {
            "warm-up": episodes,
            "a policy with quite a long name, checkpoint 1200": made_up_episodes(1)[:9] + episodes[9:],
        }
    )
    try:
        for _ in episodes:
            assert page.run("return document.documentElement.scrollWidth") <= width
            page.press("j")
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
