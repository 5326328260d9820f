"""What a person at the page of ``ivt play`` can do, in Chromium: with the mouse, and without.

If one of these is false, nothing crashes: the box that is scored is not the one that was drawn, a
person without a mouse cannot play, or the page shows the target too early.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from browser import Page, chromium
from shown_episodes import HOSTILE
from test_viewer_server import served

from ivt_env.data.sample import Sample
from ivt_env.env import GroundingEnv
from ivt_env.episodes import load_episodes
from ivt_env.viewer.play import PlayApp

LEFT, UP, RIGHT, DOWN, ENTER, TAB = "\ue012", "\ue013", "\ue014", "\ue015", "\ue007", "\ue004"
SHIFT, CONTROL, NO_KEYS = "\ue008", "\ue009", "\ue000"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    yield from chromium(tmp_path_factory.mktemp("browser"))


class OneImage:
    """A data set of one image, 200 wide and 100 high, under a hostile expression."""

    name, split = "scenes", "val"

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Sample:
        return Sample("s" + HOSTILE, "p", HOSTILE, (0.25, 0.25, 0.75, 0.75), (100, 200), "scenes", "val")

    def image(self, sample: Sample) -> Any:
        return np.full((100, 200, 3), 128, np.uint8)


@pytest.fixture
def open_play(driver: Any, tmp_path: Path) -> Iterator[Callable[..., Page]]:
    driver.get_log("browser")
    running = []

    def opened(total: int = 2, dataset: Any = None) -> Page:
        options = {"split": "val", "disable_env_checker": True}
        env = gym.make("IVT-Scenes-v0", **(options if dataset is None else {**options, "dataset": dataset})).unwrapped
        assert isinstance(env, GroundingEnv)
        server = served(PlayApp(env, tmp_path, total, seed=5, title=HOSTILE if dataset else "Play"))
        running.append(server)
        driver.get("about:blank")
        driver.get(server.__enter__().url)
        page = Page(driver)
        page.until(lambda: page.text("#play-expression") != "")
        return page

    yield opened
    complaints = [entry["message"] for entry in driver.get_log("browser")]
    for server in running:
        server.__exit__(None, None, None)
    assert not complaints


def left(page: Page, count: int) -> None:
    page.until(lambda: f"{count} of 3 proposals left" in page.text("#play-place"))


def test_a_dragged_box_is_the_one_that_is_scored(open_play: Callable[..., Page], tmp_path: Path) -> None:
    page = open_play()
    page.drag("#board", (0.2, 0.3), (0.6, 0.8))
    drawn, board = page.rect("rect.draft"), page.rect("#board")
    page.click("#play-propose")
    left(page, 2)
    np.testing.assert_allclose(page.rect("#board rect.current"), drawn, atol=1)
    page.drag("#board", (0.7, 0.9), (0.1, 0.2))  # upwards and to the left
    second = page.rect("rect.draft")
    page.click("#play-propose")
    left(page, 1)
    assert page.run("return document.querySelectorAll('rect.target').length") == 0
    assert page.run("return document.querySelectorAll('#board rect.earlier').length") == 1
    page.click("#play-stop")
    page.until(lambda: page.run("return !byId('play-after').hidden"))
    (episode,) = load_episodes(tmp_path)
    size = board[2:] - board[:2]
    for step, rect in zip(episode.steps, (drawn, second), strict=False):
        np.testing.assert_allclose(step.proposal, (rect - np.tile(board[:2], 2)) / np.tile(size, 2), atol=2 / min(size))
    assert [s.stop for s in episode.steps] == [False, False, True] and episode.agent == "human"
    # The same page now shows the episode, with the target and what the environment made of it.
    assert page.texts(".strip .iou") == [f"{s.iou:.3f}" for s in episode.steps]
    assert page.run("return document.querySelectorAll('#panels rect.target').length") == 1
    assert page.expression() == episode.expression and "1 of 2 played" in page.text("#play-so-far")


class LargeImage(OneImage):
    """One that no window shows pixel by pixel."""

    def __getitem__(self, index: int) -> Sample:
        return Sample("s", "p", "the button", (0.5, 0.5, 0.51, 0.51), (1440, 2560), "scenes", "val")

    def image(self, sample: Sample) -> Any:
        return np.full((1440, 2560, 3), 128, np.uint8)


def test_a_small_target_can_be_drawn_pixel_by_pixel(open_play: Callable[..., Page], tmp_path: Path) -> None:
    page = open_play(dataset=LargeImage())
    whole = page.rect("#board")
    page.drag("#board", (0.5, 0.5), (0.55, 0.55))  # where the mouse is then
    page.click("#play-zoom")
    width = page.run("return byId('board').offsetWidth")
    assert whole[2] - whole[0] < 1000 and width == 2560
    board, stage = page.rect("#board"), page.rect(".play .stage")
    assert board[0] < stage[0] and board[2] > stage[2], "it scrolls to where the mouse was, not to a corner"
    pixels = page.run("return play.draft.map((v, i) => v * [2560, 1440][i % 2])")
    np.testing.assert_allclose(page.rect("rect.draft") - np.tile(board[:2], 2), pixels, atol=2)
    page.click("#play-zoom")
    np.testing.assert_allclose(page.rect("#board"), whole, atol=1)


def test_the_whole_game_can_be_played_without_a_mouse(open_play: Callable[..., Page], tmp_path: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    page = open_play()
    assert page.run("return document.activeElement.id") == "board"
    page.press(RIGHT)  # puts a box in the middle and moves it
    start = page.run("return play.draft")
    page.press(LEFT, DOWN)
    moved = page.run("return play.draft")
    assert moved[0] < start[0] and moved[1] > start[1]
    assert moved[2] - moved[0] == pytest.approx(start[2] - start[0])
    ActionChains(page.driver).key_down(SHIFT).send_keys(RIGHT, RIGHT, UP).key_up(SHIFT).perform()
    wider = page.run("return play.draft")
    assert wider[:2] == moved[:2] and wider[2] > moved[2] and wider[3] < moved[3]
    ActionChains(page.driver).key_down(CONTROL).send_keys(LEFT).key_up(CONTROL).perform()
    far = page.run("return play.draft")
    assert wider[0] - far[0] == pytest.approx(10 * (start[0] - moved[0]), rel=1e-6)
    assert page.text("#said").startswith("Box from ")
    page.press(ENTER)
    left(page, 2)
    page.press(TAB)  # to the first of the four numbers
    assert page.run("return document.activeElement.id") == "edge-0"
    page.press("1", "0", TAB, "2", "0", TAB, "1", "0", "0", TAB, "1", "2", "0", ENTER)
    left(page, 1)
    page.run("board.focus()")
    page.press("s")
    page.until(lambda: page.run("return document.activeElement.id") == "play-next")
    (episode,) = load_episodes(tmp_path)
    height, width = episode.size
    np.testing.assert_allclose(episode.steps[0].proposal, far, atol=1e-6)
    np.testing.assert_allclose(
        episode.steps[1].proposal, np.array([10, 20, 100, 120]) / [width, height, width, height], atol=1e-6
    )
    page.press("n")
    page.until(lambda: "Image 2 of 2" in page.text("#play-place"))
    page.press("s")
    page.until(lambda: "That was the last one" in page.text("#play-so-far"))
    assert len(load_episodes(tmp_path)) == 2


def test_hostile_text_is_shown_and_not_run(open_play: Callable[..., Page]) -> None:
    page = open_play(total=1, dataset=OneImage())
    assert page.text("#play-expression") == HOSTILE and page.text("h1") == HOSTILE
    page.drag("#board", (0.25, 0.25), (0.75, 0.75))
    page.click("#play-propose")
    left(page, 2)
    page.press("s")
    page.until(lambda: page.run("return !byId('play-after').hidden"))
    assert page.expression() == HOSTILE
    assert page.run("return window.ran === undefined && document.images.length") == 2


def test_a_click_draws_no_box_and_one_without_area_is_refused_and_explained(open_play: Callable[..., Page]) -> None:
    page = open_play()
    page.drag("#board", (0.5, 0.5), (0.502, 0.502))
    assert page.run("return play.draft") is None
    assert page.run("return byId('play-propose').getAttribute('aria-disabled')") == "true"
    page.click("#play-propose")
    assert "3 of 3" in page.text("#play-place")
    page.run("play.draft = [0.5, 0.5, 0.5, 0.9]")
    page.click("#play-propose")
    page.until(lambda: "Refused: x2 <= x1" in page.text("#play-problem"))
    left(page, 2)


@pytest.mark.parametrize("width", [1280, 360])
def test_the_board_keeps_the_shape_of_its_image_and_fits(
    open_play: Callable[..., Page], driver: Any, width: int
) -> None:
    page = open_play(dataset=OneImage())
    override = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", override)
    try:
        x1, y1, x2, y2 = page.rect("#board")
        assert (x2 - x1) / (y2 - y1) == pytest.approx(2, rel=0.01)
        assert page.run("return document.documentElement.scrollWidth") <= width
        np.testing.assert_allclose(page.rect("#board-image"), [x1, y1, x2, y2], atol=0.5)
        np.testing.assert_allclose(page.rect("#board-boxes"), [x1, y1, x2, y2], atol=0.5)
        assert page.run("return document.querySelector('.side').offsetParent !== null") == (width > 800)
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
