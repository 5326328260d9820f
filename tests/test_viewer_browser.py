"""What an episode page does in a browser.

If one of these is false, nothing crashes: boxes sit a little off and mislead whoever looks, a
filter counts the wrong episodes, or a model's output runs as a program in the reader's browser.

These tests use Chromium. Without one they are skipped, unless ``CI`` or ``IVT_REQUIRE_BROWSER`` is
set: then they fail.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Page, chromium
from PIL import Image
from shown_episodes import HOSTILE, SEPARATORS, made_up_episodes, photo, photo_of, play, shifted
from test_viewer_server import served

from ivt_env.data.sample import DataMissingError, ImageArray
from ivt_env.episodes import Box, Episode
from ivt_env.viewer import write_page
from ivt_env.viewer.server import ViewApp


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    yield from chromium(tmp_path_factory.mktemp("browser"))


@pytest.fixture
def open_page(driver: Any, tmp_path: Path) -> Iterator[Callable[..., Page]]:
    driver.get_log("browser")

    def open_episodes(
        episodes: Any, fragment: str = "", image_of: Callable[[Episode], ImageArray] = photo_of, **options: Any
    ) -> Page:
        path = write_page(tmp_path / "page.html", episodes, image_of, title="Episodes", **options)
        driver.get("about:blank")  # else a new fragment alone would not load the file again
        driver.get(path.as_uri() + fragment)
        return Page(driver)

    yield open_episodes
    complaints = [entry["message"] for entry in driver.get_log("browser")]
    assert not complaints  # errors of the script and refusals by the page's own policy end up here


@pytest.mark.parametrize(
    ("image_id", "width"), [("coffee.jpg", 1400), ("portrait-astronaut.jpg", 1400), ("camera.jpg", 700)]
)
def test_boxes_are_drawn_where_they_belong(
    open_page: Callable[..., Page], driver: Any, image_id: str, width: int
) -> None:
    target, first, second = (0.3, 0.04, 0.7, 0.75), (0.1, 0.2, 0.45, 0.6), (0.25, 0.0, 1.0, 0.8)
    driver.set_window_size(width, 900)
    page = open_page([play(target, [first, second], image_id=image_id)], max_image_side=200)
    page.press("\ue014")
    left, top, right, bottom = page.rect(".image img")
    height_px, width_px = photo(image_id).shape[:2]
    assert (right - left) / (bottom - top) == pytest.approx(width_px / height_px, rel=0.005)
    origin, extent = np.array([left, top, left, top]), np.array([right - left, bottom - top] * 2)
    for name, box in {"target": target, "current": second, "earlier": first}.items():
        np.testing.assert_allclose(page.rect(f"rect.{name}"), origin + extent * np.array(box), atol=0.75, err_msg=name)
    driver.set_window_size(1400, 900)


def test_zoom_shows_every_pixel_of_a_large_image_at_the_place_that_was_clicked(
    open_served: Callable[..., Page], driver: Any
) -> None:
    """Stripes of two pixels on a screen of 2560: grey in the whole image, black and white in the zoom."""
    image = np.zeros((1440, 2560, 3), np.uint8)
    image[:, np.arange(2560) % 4 < 2] = 255
    image[700:740, 1900:1940] = (0, 0, 255)
    episode = play((0.7, 0.4, 0.8, 0.6), [None], size=(1440, 2560), image_id="screen")
    page = open_served({"run": [episode]}, lambda _: image)

    def seen() -> np.ndarray:
        left, top, right, bottom = page.rect(".stage").round().astype(int)
        shot = np.asarray(Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")).astype(int)
        return shot[top:bottom, left:right][40:-40, 40:-40]

    page.until(lambda: page.run("return document.querySelector('.image img').complete"))
    assert seen()[..., 1].std() < 40
    left, top, right, bottom = page.rect(".image")
    place = [left + 0.75 * (right - left), top + 0.5 * (bottom - top)]
    page.run(
        "document.elementFromPoint(...arguments).dispatchEvent(new MouseEvent('click',"
        " {bubbles: true, clientX: arguments[0], clientY: arguments[1]}))",
        *place,
    )
    assert page.run("return document.querySelector('.image').offsetWidth") == 2560
    near = seen()
    assert near[..., 1].std() > 90 and (near[..., 2] - near[..., 0] > 127).sum() > 1000, "the patch that was clicked"
    page.press("z")
    assert page.run("return document.querySelector('.image').offsetWidth") < 1400 and seen()[..., 1].std() < 40


def test_keys_step_through_an_episode(open_page: Callable[..., Page]) -> None:
    left, up, right, down, escape = "\ue012", "\ue013", "\ue014", "\ue015", "\ue00c"
    episodes = made_up_episodes()[:4]
    page = open_page(episodes)
    for keys, episode, step in (
        ("", 0, "Step 0"),
        (right, 0, "Step 1"),
        (right * 3, 0, "Stop"),
        (left, 0, "Step 1"),
        (down, 1, "Step 0"),
        ("jjjj", 3, "Step 0"),
        ("k" + up, 1, "Step 0"),
        (up + right, 0, "Step 1"),
    ):
        if keys:
            page.press(*keys)
        assert page.expression() == episodes[episode].expression
        assert page.text(".strip button[aria-current] .name") == step
    assert page.text(".words") == episodes[0].steps[1].text
    page.press("/", *"helmetj")  # in the search field, letters are letters
    page.until(lambda: page.texts(".row") == [])
    assert page.expression() == "No episode to show"
    page.press("\ue003")
    page.until(lambda: page.texts(".row .expression") == ["the helmet with the black visor"])
    page.press(escape, right)
    assert page.expression() == "the helmet with the black visor"


def expected_filters(episodes: list[Episode]) -> dict[str, set[str]]:
    """What each filter must show, worked out from the records."""
    found: dict[str, set[str]] = {"corrected": set(), "broken": set(), "right": set(), "wrong": set()}
    for e in episodes:
        before, after = bool(e.steps) and e.steps[0].iou >= 0.5, e.final_iou >= 0.5
        name = {(0, 1): "corrected", (1, 0): "broken", (1, 1): "right", (0, 0): "wrong"}[before, after]
        found[name].add(e.sample_id)
    found["never"] = {e.sample_id for e in episodes if all(s.iou < 0.5 for s in e.steps)}
    found["early"] = {e.sample_id for e in episodes if e.steps and e.steps[-1].stop and e.final_iou < 0.5}
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


def test_a_link_leads_back_to_episode_step_and_rollout(open_page: Callable[..., Page]) -> None:
    episodes = made_up_episodes()
    page = open_page(episodes)
    page.press("j", "j", "\ue014")
    page.until(lambda: page.run("return location.hash") == "#sample=photos-2&step=1")
    assert page.run("return byId('said').getAttribute('aria-live')") == "polite"
    assert page.text("#said") == f"Episode 3 of 23, Step 1, IoU {episodes[2].steps[1].iou:.3f}"
    page = open_page(episodes, "#sample=photos-2&step=1")
    assert page.expression() == episodes[2].expression
    assert page.text(".strip button[aria-current] .name") == "Step 1"
    for nonsense in ("#sample=absent&step=9", "#sample=photos-2&step=99", "#%%%", "#step=NaN&sample=photos-1&copy=x"):
        page = open_page(episodes, nonsense)
        assert page.expression() in {e.expression for e in episodes}
    box: Box = (0.1, 0.1, 0.5, 0.5)  # several rollouts of one sample are matched in order
    shifts = {"a": (0.0, 0.1, 0.2), "b": (0.3, 0.02)}
    runs = {name: [play(box, [shifted(box, d, 0)], seed=n) for n, d in enumerate(s)] for name, s in shifts.items()}
    for copy in (1, 3):
        page = open_page(runs, f"#run=a&beside=b&sample=s0&copy={copy}&step=0")
        shown = [run[copy - 1].final_iou for run in runs.values() if copy <= len(run)]
        assert page.texts(".strip .iou") == [f"{overlap:.3f}" for overlap in shown]


def test_an_initial_box_is_shown_as_the_start(open_page: Callable[..., Page]) -> None:
    episode = next(e for e in made_up_episodes() if e.initial_box)
    page = open_page([episode])
    assert page.texts(".strip .name") == ["Start", "Step 0", "Stop"]
    assert page.text(".strip button[aria-current] .name") == "Step 0"
    page.press("\ue012")
    assert page.text(".strip button[aria-current] .name") == "Start"
    origin, extent = (page.rect(".image img")[[0, 1, 0, 1]], np.ptp(page.rect(".image img").reshape(2, 2), axis=0))
    assert episode.initial_box is not None
    np.testing.assert_allclose(
        page.rect("rect.current"), origin + np.tile(extent, 2) * np.array(episode.initial_box), atol=0.75
    )
    assert "1 began from a given box" in page.text("#started")


@pytest.mark.parametrize("from_server", [False, True], ids=["file", "server"])
def test_a_long_list_stays_fast(
    open_page: Callable[..., Page], open_served: Callable[..., Page], from_server: bool
) -> None:
    """10,000 episodes; the limits are loose, for a busy machine, the list must merely not freeze."""
    few, count = made_up_episodes(), 10_000
    episodes = []
    for number in range(count):
        model = few[number % len(few)]
        fields = {name: getattr(model, name) for name in Episode.__slots__}
        episodes.append(Episode(**fields | {"sample_id": f"{number}"}))
    page = open_served({"one": episodes}) if from_server else open_page(episodes)
    paint = page.run("return performance.getEntriesByName('first-contentful-paint')[0].startTime")
    assert paint < (20_000 if from_server else 5000)  # a server has yet to put the page together
    assert len(page.texts(".row")) < 60
    measured = "const t = performance.now(); document.querySelector(arguments[0]).click(); return performance.now() - t"
    for name in ("corrected", "stopped", "all"):
        assert page.run(measured, f"#filter-{name}") < 1000
    page.run("document.getElementById('list').scrollTop = 1e9")
    page.until(lambda: page.run("return document.getElementById('row-9999') !== null"))
    page.press("j")
    page.until(lambda: "2 of 10,000" in page.text("#episode-head .place"))


@pytest.mark.parametrize("width", [1400, 320])
def test_nothing_runs_over_the_edge(open_page: Callable[..., Page], driver: Any, width: int) -> None:
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    episodes = made_up_episodes()
    long_name = "a policy with quite a long name, checkpoint 1200"
    page = open_page({"warm-up": episodes, long_name: made_up_episodes(1)[:9] + episodes[9:]})
    try:
        for _ in episodes:
            assert page.run("return document.documentElement.scrollWidth") <= width
            page.press("j")
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


# ---- from a server ---------------------------------------------------------------------------


@pytest.fixture
def open_served(driver: Any) -> Iterator[Callable[..., Page]]:
    driver.get_log("browser")
    running: list[Any] = []

    def opened(runs: Any, image_of: Callable[[Episode], ImageArray] = photo_of) -> Page:
        running.append(served(ViewApp(runs, image_of, "Episodes")))
        driver.get("about:blank")
        driver.get(running[-1].__enter__().url)
        page = Page(driver)
        page.until(lambda: page.run("return byId('panels').getAttribute('aria-busy') === 'false'"))
        return page

    yield opened
    for server in running:
        server.__exit__(None, None, None)


def test_a_served_page_shows_and_finds_what_the_file_does(
    open_page: Callable[..., Page], open_served: Callable[..., Page]
) -> None:
    runs = {"one": made_up_episodes(), "two": made_up_episodes(1)[::-1]}
    drawn = "return [...document.querySelectorAll('.image img')].every(i => i.complete && i.naturalWidth > 0)"
    shown = []
    expected = [e.sample_id for e in runs["one"] if any("object on all four" in s.text for s in e.steps)]
    assert 0 < len(expected) < len(runs["one"])
    for opened in (open_page, open_served):
        page = opened(runs)
        seen = [page.texts("#summary td .value")]
        for episode in runs["one"]:
            page.until(lambda e=episode: page.expression() == e.expression)  # noqa: B023
            page.until(lambda: page.run(drawn))  # noqa: B023
            page.press("\ue014")
            seen.append([page.texts(s) for s in (".strip", ".words", ".measures", ".curve", ".row .facts")])
            page.press("j")
        shown.append(seen)
        page.press("/", *"OBJECT on all four")
        page.until(lambda: page.run("return state.visible.map(e => e.sample)") == expected)  # noqa: B023
    assert shown[0] == shown[1] and len(shown[0]) == 24


@pytest.mark.parametrize("from_server", [False, True], ids=["file", "server"])
def test_a_missing_image_is_named_and_the_boxes_stay(
    open_page: Callable[..., Page], open_served: Callable[..., Page], driver: Any, from_server: bool
) -> None:
    def nowhere(episode: Episode) -> ImageArray:
        raise DataMissingError(f"<b>{episode.image_id}</b> is not on this machine")

    episodes = made_up_episodes()
    page = open_served({"a": episodes}, nowhere) if from_server else open_page(episodes, image_of=nowhere)
    page.until(lambda: page.run("return document.querySelector('.absent') !== null"))
    assert page.text(".absent") == "The image is not here. <b>astronaut.jpg</b> is not on this machine"
    assert page.run("return document.querySelectorAll('rect.target').length") == 1
    driver.get_log("browser")  # of the server's 404
    if from_server:
        page.run("window.fetch = () => Promise.reject(new TypeError('gone'))")
        page.run("select(state.visible[9])")
        page.until(lambda: "does not answer" in page.text("#panels"))


@pytest.mark.parametrize("from_server", [False, True], ids=["file", "server"])
def test_text_from_a_model_is_never_executed(
    open_page: Callable[..., Page], open_served: Callable[..., Page], driver: Any, from_server: bool
) -> None:
    hostile = [e for e in made_up_episodes() if HOSTILE in e.expression]
    hostile[0].dataset = hostile[0].split = hostile[0].agent = HOSTILE
    hostile[0].steps[0].invalid = HOSTILE
    page = (open_served if from_server else open_page)({HOSTILE: hostile, "other" + HOSTILE: hostile})
    page.until(lambda: page.expression() == HOSTILE)
    for _ in hostile[0].steps:
        assert page.text(".words") == HOSTILE + SEPARATORS
        assert page.texts(".row .expression") == [HOSTILE]
        page.press("\ue014")
    page.press("/", *"onerror", "\ue007")
    page.until(lambda: page.texts(".row .expression") == [HOSTILE])
    assert page.run("return window.ran === undefined && document.title === 'Episodes'")
    assert page.run("return document.querySelectorAll('img').length") == 2  # the image in two panels
    assert not [entry["message"] for entry in driver.get_log("browser")]
    page.run(  # what gets in all the same is stopped by the policy of the page
        "const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s);"
        "const i = document.createElement('div'); i.innerHTML = '<img src=x onerror=\"window.ran = 1\">';"
        "document.body.append(i)"
    )
    time.sleep(0.3)
    assert page.run("return window.ran === undefined")
    assert any("Content Security Policy" in entry["message"] for entry in driver.get_log("browser"))


# ---- for everyone ----------------------------------------------------------------------------


def test_every_control_is_reached_by_tab_has_a_name_and_shows_its_focus(
    open_page: Callable[..., Page], driver: Any
) -> None:
    page = open_page({"one": made_up_episodes(), "two": made_up_episodes(1)})
    wanted = page.run(
        "return [...document.querySelectorAll('button, select, input, [tabindex=\"0\"]')]"
        ".filter(n => n.checkVisibility()).map((n, i) => { n.dataset.n = i; return i })"
    )
    reached, unnamed, unseen = set(), [], []
    for _ in range(len(wanted) + 2):
        page.press("\ue004")
        here = page.run(
            "const n = document.activeElement, s = getComputedStyle(n);"
            "return [n.dataset.n, n.id, s.outlineStyle, parseFloat(s.outlineWidth), s.outlineColor]"
        )
        if here[0] is None:
            continue
        reached.add(int(here[0]))
        if here[2] == "none" or here[3] < 2:
            unseen.append(here)
    tree = driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = "button combobox searchbox listbox img image table navigation main region option".split()
    for node in tree:
        role = node.get("role", {}).get("value")
        if role in roles and not node.get("ignored") and not node.get("name", {}).get("value"):
            unnamed.append((role, node))
    assert reached == set(wanted) and len(wanted) > 15
    assert not unseen and not unnamed
    assert {"listbox", "option", "navigation", "main", "searchbox"} <= {n.get("role", {}).get("value") for n in tree}
