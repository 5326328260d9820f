"""Chromium for the tests that look at a page, and a page open in it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ivt_env.data.render_screens import browser
from ivt_env.data.sample import DataError


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

    def drag(self, selector: str, start: tuple[float, float], end: tuple[float, float]) -> None:
        """With the mouse button held, from one place of an element to another; both relative to its size."""
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.actions.action_builder import ActionBuilder

        left, top, right, bottom = self.rect(selector)
        places = [(round(left + x * (right - left)), round(top + y * (bottom - top))) for x, y in (start, end)]
        builder = ActionBuilder(self.driver, duration=30)
        mouse = builder.pointer_action
        mouse.move_to_location(*places[0])
        mouse.pointer_down()
        mouse.move_to_location(*((a + b) // 2 for a, b in zip(*places, strict=True)))
        mouse.move_to_location(*places[1])
        mouse.pointer_up()
        builder.perform()
        ActionChains(self.driver).reset_actions()

    def choose(self, selector: str, label: str) -> None:
        from selenium.webdriver.support.ui import Select

        Select(self.driver.find_element("css selector", selector)).select_by_visible_text(label)

    def expression(self) -> str:
        return self.text("#episode-head h2")

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, "the page did not get there in 20 s"
            time.sleep(0.02)


def chromium(profile: Path) -> Iterator[Any]:
    """A headless browser with a profile of its own; skips the test where there is none, or fails it if asked to."""
    try:
        with browser(profile) as started:
            yield started
    except DataError as error:
        if os.environ.get("CI") or os.environ.get("IVT_REQUIRE_BROWSER"):
            pytest.fail(str(error))
        pytest.skip(str(error))
