"""Renders HTML pages to screenshots with expressions and exact boxes: a data set of one's own (``custom``).

Two routines that share no code decide. The first, a script in the page, takes names and boxes from the DOM and keeps
what can be named by one expression. The second (``_Tree``) reads each expression and looks for it in Chromium's
accessibility tree: where that holds not exactly one such element, or another box, the expression is left out.
"""

from __future__ import annotations

import base64
import contextlib
import io
import random
import re
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ivt_env.data.checked import BadRows
from ivt_env.data.custom import Declared
from ivt_env.data.custom_writer import Converted, Splits, Writer
from ivt_env.data.sample import DataError
from ivt_env.files import whole_file

SHARES = {"train": 0.4, "val": 0.2, "test": 0.4}
PER_PAGE = 60
"""Expressions of a page, at most; kinds of elements take turns, so that a table does not crowd out the rest."""
_LONGEST = 48
_REMEDY = "give a folder of HTML pages with links, buttons, fields or tables"

Box = tuple[float, float, float, float]

_COLLECT = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")
_STILL = (
    "const s = document.createElement('style'); s.textContent = '*, *::before, *::after {animation: none !important; "
    "transition: none !important; caret-color: transparent !important}'; document.head.append(s)"
)

_NOUNS = {
    "link": ("link",), "button": ("button",), "icon": ("button", "link"), "tab": ("tab",), "menu item": ("menuitem",),
    "switch": ("switch",), "checkbox": ("checkbox",), "radio button": ("radio",), "cell": ("cell", "gridcell"),
    "list": ("combobox",), "search field": ("searchbox",), "field": ("textbox", "spinbutton", "Date"),
}  # fmt: skip
"""What an expression calls an element, and the roles that it may have in the accessibility tree."""
_EXPRESSION = re.compile(
    rf'the (?P<noun>{"|".join(sorted(_NOUNS, key=len, reverse=True))})(?: "(?P<name>[^"]+)")?'
    r'(?: in the row of "(?P<row>[^"]+)"| under the heading "(?P<heading>[^"]+)")?'
)


def render(
    folder: Path,
    out: Path,
    name: str,
    *,
    size: tuple[int, int] = (2560, 1440),
    scale: float = 1.25,
    split: Splits | None = None,
    seed: int = 0,
) -> Converted:
    """Screenshots of all HTML files below ``folder``, as a data set of one's own in ``out``; splits are by page.

    Args:
        folder: with what the pages need (styles, scripts, images).
        out: a new folder for ``dataset.json``, SPLIT.jsonl and images/ (lossless WebP).
        name: the data set's label.
        size: width and height of a screenshot in pixels.
        scale: pixels of the screenshot for one pixel of the page, as on a screen of high resolution.
        split: as in ``Writer.write``; None: ``SHARES``.
        seed: of the choice of expressions, and of the split.

    Raises:
        DataError: for a folder without pages, pages without anything to name, or a browser that is not there.
    """
    pages = sorted(path for path in folder.rglob("*.html") if path.is_file())
    if not pages:
        raise DataError(f"{folder}: holds no file that ends in .html; {_REMEDY}")
    if not (320 <= min(size) and max(size) <= 8000 and 0.5 <= scale <= 4):
        raise DataError(f"a page of {size[0]} x {size[1]} pixels at scale {scale}: give 320 to 8000, and 0.5 to 4")
    writer = Writer(out, Declared(name, "xyxy", "px"), copy=True)
    notes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as held, browser(Path(held) / "profile") as driver:
        view = {"width": round(size[0] / scale), "height": round(size[1] / scale)}
        driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", view | {"deviceScaleFactor": scale, "mobile": False}
        )
        for page in pages:
            image_id = "-".join(page.relative_to(folder).with_suffix("").parts)
            driver.get(page.resolve().as_uri())
            driver.execute_script(_STILL)
            driver.execute_async_script("document.fonts.ready.then(arguments[0])")
            screenshot = Path(held) / f"{image_id}.webp"
            shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"]
            with Image.open(io.BytesIO(base64.b64decode(shot))) as image, whole_file(screenshot) as file:
                image.convert("RGB").save(file, "WEBP", lossless=True, quality=100, method=6)
                width, height = image.size
            named = _expressions(driver.execute_script(_COLLECT), scale)
            tree = _Tree(driver, scale)
            confirmed = []
            for expression, noun, box, siblings in named:
                if why := tree.objection(expression, box):
                    notes[f"left out, {why}"] += 1
                else:
                    confirmed.append((expression, noun, box, siblings))
            for number, (expression, noun, box, siblings) in enumerate(_some(confirmed, f"{seed} {image_id}")):
                writer.add(
                    f"{image_id}-{number}", [expression], screenshot.name, screenshot, (height, width), box,
                    image_id=image_id, category=noun, siblings=siblings or None,
                )  # fmt: skip
        return writer.write(split or SHARES, seed, BadRows(str(folder), _REMEDY), notes, _REMEDY)


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Any]:
    """Headless Chromium with a profile of its own; DataError where it, its driver or selenium is not there."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    chromedriver = shutil.which("chromedriver")
    missing = [command for command, path in (("chromium", found), ("chromedriver", chromedriver)) if not path]
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        missing.append("the Python package selenium")
    if missing:
        remedy = 'apt-get install chromium chromium-driver; pip install "ivt-env[screens]"'
        raise DataError(f"a browser is needed, and there is no {', no '.join(missing)}: {remedy}")
    options = webdriver.ChromeOptions()
    options.binary_location = found or ""
    for flag in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        "--disable-dev-shm-usage", "--force-device-scale-factor=1", "--window-size=1400,900",
        f"--user-data-dir={profile}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(chromedriver))
    try:
        yield driver
    finally:
        driver.quit()


_Named = tuple[str, str, list[float], list[list[float]]]
"""Expression, noun, box in pixels of the screenshot, and those of other elements with that noun and name."""


def _expressions(found: Sequence[dict[str, Any]], scale: float) -> list[_Named]:
    """One expression for each element that is seen whole and can be told from all others of the page."""
    forms = [list(_forms(element)) for element in found]
    counts = Counter(form.casefold() for each in forms for form in each)
    alike: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, element in enumerate(found):
        alike[element["noun"], element["name"].casefold()].append(number)
    boxes = [None if e["box"] is None else [round(value * scale, 2) for value in e["box"]] for e in found]
    named = []
    for number, (element, each, box) in enumerate(zip(found, forms, boxes, strict=True)):
        fitting = next((form for form in each if counts[form.casefold()] == 1), None)
        if fitting and box is not None:
            others = [o for n in alike[element["noun"], element["name"].casefold()] if n != number and (o := boxes[n])]
            named.append((fitting, element["noun"], box, others))
    return named


def _forms(element: dict[str, Any]) -> Iterator[str]:
    """The expressions that may name an element, the shortest first."""
    noun, name, row = element["noun"], element["name"], element["row"]
    usable = [2 <= len(text) <= _LONGEST and '"' not in text for text in (name, row, element["heading"])]
    if noun == "search field":
        yield "the search field"
    if not usable[0]:
        return
    if noun != "cell":
        yield f'the {noun} "{name}"'
    if usable[1] and row.casefold() != name.casefold():
        yield f'the {noun} "{name}" in the row of "{row}"'
    if usable[2] and noun != "cell":
        yield f'the {noun} "{name}" under the heading "{element["heading"]}"'


def _some(named: list[_Named], seed: str) -> list[_Named]:
    """At most ``PER_PAGE``, in the page's order; kinds of elements take turns."""
    kinds: dict[str, list[int]] = defaultdict(list)
    for number, (_, noun, _, _) in enumerate(named):
        kinds[noun].append(number)
    for numbers in kinds.values():
        random.Random(seed).shuffle(numbers)
    turns = sorted((turn, number) for numbers in kinds.values() for turn, number in enumerate(numbers))
    return [named[number] for number in sorted(number for _, number in turns[:PER_PAGE])]


class _Tree:
    """The page as Chromium's accessibility tree has it: what expressions are checked against."""

    def __init__(self, driver: Any, scale: float) -> None:
        nodes = driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        self._driver, self._scale = driver, scale
        self._nodes = {node["nodeId"]: node for node in nodes}
        self._heading: dict[str, str] = {}
        self._line: dict[str, dict[str, Any] | None] = {}
        """Node -> the row of a table that holds it."""
        self._heads: dict[str, dict[str, Any]] = {}
        """Row -> the first row of its table."""
        self._walk(nodes[0], [""], None, {})

    def _walk(
        self, node: dict[str, Any], heading: list[str], line: dict[str, Any] | None, table: dict[str, Any]
    ) -> None:
        role, number = _role(node), node["nodeId"]
        if role == "heading":
            heading[0] = _name(node)
        elif role in ("table", "grid"):
            table = {}  # filled with its first row
        elif role == "row":
            line = node
            self._heads[number] = table.setdefault("first", node)
        self._heading[number], self._line[number] = heading[0], line
        for child in self._children(node):
            self._walk(child, heading, line, table)

    def _children(self, node: dict[str, Any]) -> list[dict[str, Any]]:
        return [self._nodes[child] for child in node.get("childIds", ()) if child in self._nodes]

    def objection(self, expression: str, box: Sequence[float]) -> str | None:
        """Why an expression is not kept; None where exactly one element fits it, and that lies in ``box``."""
        parsed = _EXPRESSION.fullmatch(expression)
        if parsed is None:
            return "not an expression of this form"
        fitting = [self._nodes[number] for number in self._heading if self._fits(number, **parsed.groupdict())]
        if len(fitting) != 1:
            return f"fits {'no element' if not fitting else 'several elements'} of the accessibility tree"
        place = {"backendNodeId": fitting[0]["backendDOMNodeId"]}
        quad = self._driver.execute_cdp_cmd("DOM.getBoxModel", place)["model"]["border"]
        corners = (quad[0], quad[1], quad[4], quad[5])
        off = max(abs(a * self._scale - b) for a, b in zip(corners, box, strict=True))
        return None if off <= 1.5 * self._scale else "lies elsewhere in the accessibility tree"

    def _fits(self, number: str, noun: str, name: str | None, row: str | None, heading: str | None) -> bool:
        node, line = self._nodes[number], self._line[number]
        if node.get("ignored") or _role(node) not in _NOUNS[noun]:
            return False
        if heading is not None and _folded(self._heading[number]) != _folded(heading):
            return False
        if row is not None and (line is None or _folded(self._row_name(line)) != _folded(row)):
            return False
        if name is None:
            return True
        return _folded(self._column(node, line) if noun == "cell" else _name(node)) == _folded(name)

    def _cells(self, line: dict[str, Any]) -> list[dict[str, Any]]:
        return [c for c in self._children(line) if _role(c) in ("cell", "gridcell", "rowheader", "columnheader")]

    def _row_name(self, line: dict[str, Any]) -> str:
        cells = self._cells(line)
        headers = [cell for cell in cells if _role(cell) == "rowheader"]
        return self._text(next(iter(headers or cells), line))

    def _column(self, node: dict[str, Any], line: dict[str, Any] | None) -> str:
        """The heading of the column in which a cell stands."""
        if line is None:
            return ""
        place, heads = self._cells(line).index(node), self._cells(self._heads[line["nodeId"]])
        return self._text(heads[place]) if place < len(heads) else ""

    def _text(self, node: dict[str, Any]) -> str:
        if _role(node) == "StaticText":
            return _name(node)
        return " ".join(filter(None, map(self._text, self._children(node)))) or _name(node)


def _role(node: dict[str, Any]) -> str:
    return str(node.get("role", {}).get("value", ""))


def _name(node: dict[str, Any]) -> str:
    return str(node.get("name", {}).get("value", ""))


def _folded(text: str) -> str:
    return "".join(text.casefold().split())
