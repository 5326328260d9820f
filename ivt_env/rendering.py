"""Images on a canvas, overlays, close-ups and captioned frames. NumPy and Pillow only."""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from ivt_env import boxes
from ivt_env.data.sample import ImageArray


@dataclass(frozen=True, slots=True)
class Overlay:
    """How the current box is drawn into the observation."""

    style: str = "fill"
    """``fill`` (the paper's translucent rectangle), ``outline``, or ``both``."""
    colour: tuple[int, int, int] = (255, 0, 0)
    """RGB, 0..255."""
    opacity: float = 0.35
    """Of the fill and of the trail, in (0, 1]. Our choice: the paper does not give its value."""
    width: int = 3
    """Of the outline, in pixels of the canvas."""
    trail: bool = False
    """Draw the episode's earlier boxes, too, filled grey, and give them as ``history``."""

    def __post_init__(self) -> None:
        """Refuse values that would draw nothing, or nonsense."""
        if self.style not in ("fill", "outline", "both"):
            raise ValueError(f"overlay style {self.style!r}: choose fill, outline or both")
        levels = self.colour if isinstance(self.colour, tuple) else ()
        if len(levels) != 3 or not all(isinstance(c, int) and 0 <= c <= 255 for c in levels):
            raise ValueError(f"overlay colour {self.colour!r}: give three integers 0..255")
        if not isinstance(self.opacity, int | float) or not 0 < self.opacity <= 1:
            raise ValueError(f"overlay opacity {self.opacity!r}: give a number in (0, 1]")
        if not isinstance(self.width, int) or self.width < 1:
            raise ValueError(f"overlay width {self.width!r}: give an integer of at least 1 pixel")
        if not isinstance(self.trail, bool):
            raise ValueError(f"overlay trail {self.trail!r}: give true or false")


@dataclass(frozen=True, slots=True)
class Surroundings:
    """How much around the current box a close-up shows."""

    margin: float = 0.5
    """On each side, as a share of the box's own size; 0: the box alone."""
    smallest: float = 0.25
    """Side of the smallest window, relative to the image."""
    square: bool = False
    """A window as high as it is wide in pixels, so that a model of square images wastes none of its input."""
    drawn: bool = True
    """Draw the current box on the close-up, too. False leaves its pixels as they are: a line on an edge hides where the
    edge is, and the close-up lies around the box anyway."""

    def __post_init__(self) -> None:
        """Refuse windows that would be empty or larger than the image."""
        for name, value, most in (("margin", self.margin, 10), ("smallest", self.smallest, 1)):
            if not isinstance(value, int | float) or not 0 <= value <= most:
                raise ValueError(f"closeup {name} {value!r}: give a number from 0 to {most}")
        for name, flag in (("square", self.square), ("drawn", self.drawn)):
            if not isinstance(flag, bool):
                raise ValueError(f"closeup {name} {flag!r}: give true or false")

    def window(self, box: ArrayLike, size: Sequence[int]) -> NDArray[np.float64]:
        """The region shown around a box (4,), relative to an image of ``size`` (height, width) in pixels.

        It is shifted so that it stays inside the image.
        """
        b = np.asarray(box, dtype=np.float64)
        sides = np.maximum((b[2:] - b[:2]) * (1 + 2 * self.margin), self.smallest)
        if self.square:
            pixels = np.array([size[1], size[0]])
            sides = (sides * pixels).max() / pixels
        sides = np.minimum(sides, 1.0)
        low = np.clip((b[:2] + b[2:]) / 2 - sides / 2, 0.0, 1.0 - sides)
        return np.concatenate([low, low + sides])


_TRAIL = (128, 128, 128)


def size_on_canvas(size: Sequence[int], side: int) -> tuple[int, int]:
    """(height, width) that an image of that size has on a canvas of ``side`` pixels; never enlarged."""
    height, width = size
    scale = min(1.0, side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def place_on_canvas(image: ImageArray, side: int) -> tuple[ImageArray, tuple[int, int]]:
    """The image (height, width, 3) at the top left of a black canvas (S, S, 3), and its extent (height, width) there.

    It is scaled down to fit if it is larger than the canvas of ``side`` S, and never enlarged.
    """
    height, width = size_on_canvas(image.shape[:2], side)
    if (height, width) != image.shape[:2]:
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    canvas = np.zeros((side, side, 3), dtype=np.uint8)
    canvas[:height, :width] = image
    return canvas, (height, width)


def pixel_rectangle(box: ArrayLike, extent: Sequence[int]) -> tuple[int, int, int, int]:
    """Integer pixels (x1, y1, x2, y2) of a relative box on an image, within it; at least one pixel each way."""
    # Plain floats: at every step of an episode, arrays of four numbers would take longer than drawing.
    x1, y1, x2, y2 = np.asarray(box, dtype=np.float64).tolist()
    height, width = extent
    left, top = max(0, min(round(x1 * width), width - 1)), max(0, min(round(y1 * height), height - 1))
    return left, top, min(width, max(left + 1, round(x2 * width))), min(height, max(top + 1, round(y2 * height)))


def draw_overlay(canvas: ImageArray, extent: Sequence[int], box: ArrayLike, overlay: Overlay) -> None:
    """Draw a relative box into ``canvas`` in place. Only the box's rectangle is touched."""
    x1, y1, x2, y2 = pixel_rectangle(box, extent)
    if overlay.style in ("fill", "both"):
        region = canvas[y1:y2, x1:x2]
        # 8.8 fixed point: exact to half a grey level and several times faster than floats.
        alpha = round(overlay.opacity * 256)
        blended = region.astype(np.uint16)
        blended *= np.uint16(256 - alpha)
        # A row of colours instead of one: NumPy's inner loop is then a row and not the three numbers of a pixel.
        row = np.array([c * alpha + 128 for c in overlay.colour] * (x2 - x1), dtype=np.uint16)
        blended += row.reshape(-1, 3)
        blended >>= 8
        region[...] = blended
    if overlay.style in ("outline", "both"):
        _frame(canvas, (x1, y1, x2, y2), overlay.colour, overlay.width)


class Sheet:
    """An image on its canvas, ready to be shown with one box after another.

    Where many boxes are drawn, the fill is blended once for the whole image, and a box is then a copy of its
    rectangle: the same pixels, several times as fast.
    """

    _BLENDED_SINGLY = 6
    """With more boxes (each a ninth of the image on average), blending the whole image once is cheaper."""

    def __init__(self, canvas: ImageArray, extent: tuple[int, int], overlay: Overlay) -> None:
        """Hold a canvas (S, S, 3) with an image of ``extent`` (height, width); neither is ever changed."""
        self.canvas, self.extent, self.overlay = canvas, extent, overlay
        self._drawn = 0
        self._filled: ImageArray | None = None

    def draw(self, target: ImageArray, box: ArrayLike) -> None:
        """Draw a relative box into ``target`` (S, S, 3), a copy of the canvas, as ``draw_overlay`` does."""
        overlay, self._drawn = self.overlay, self._drawn + 1
        if overlay.style == "outline" or self._drawn <= self._BLENDED_SINGLY:
            draw_overlay(target, self.extent, box, overlay)
            return
        if self._filled is None:
            self._filled = self.canvas.copy()
            draw_overlay(self._filled, self.extent, (0, 0, 1, 1), replace(overlay, style="fill"))
        rectangle = x1, y1, x2, y2 = pixel_rectangle(box, self.extent)
        target[y1:y2, x1:x2] = self._filled[y1:y2, x1:x2]
        if overlay.style == "both":
            _frame(target, rectangle, overlay.colour, overlay.width)

    def with_trail(self, earlier: Sequence[ArrayLike]) -> Sheet:
        """The same with earlier boxes on the image, filled grey; the current one is drawn over them."""
        canvas, looked_at = self.canvas.copy(), replace(self.overlay, style="fill", colour=_TRAIL)
        for box in earlier:
            draw_overlay(canvas, self.extent, box, looked_at)
        return Sheet(canvas, self.extent, self.overlay)


def _frame(canvas: ImageArray, rectangle: tuple[int, int, int, int], colour: Sequence[int], width: int) -> None:
    x1, y1, x2, y2 = rectangle
    w, region = min(width, max(1, (x2 - x1) // 2), max(1, (y2 - y1) // 2)), canvas[y1:y2, x1:x2]
    region[:w] = region[-w:] = region[:, :w] = region[:, -w:] = colour


def closeup(
    image: ImageArray, box: ArrayLike, side: int, overlay: Overlay, around: Surroundings
) -> tuple[ImageArray, tuple[int, int], NDArray[np.float32]]:
    """The region around a box, cut from the full-resolution image and enlarged, with the box drawn on it if asked for.

    Returns:
        canvas (S, S, 3), the extent (height, width) of the region on it, and the window: the
        region's box relative to the whole image, (4,).
    """
    window = around.window(box, image.shape[:2])
    x1, y1, x2, y2 = pixel_rectangle(window, image.shape[:2])
    region = Image.fromarray(image[y1:y2, x1:x2])
    scale = side / max(x2 - x1, y2 - y1)
    width, height = max(1, round((x2 - x1) * scale)), max(1, round((y2 - y1) * scale))
    canvas = np.zeros((side, side, 3), dtype=np.uint8)
    canvas[:height, :width] = np.asarray(region.resize((width, height), Image.Resampling.BICUBIC))
    # The window is what was really cut, after rounding to pixels.
    window = boxes.to_relative([x1, y1, x2, y2], image.shape[:2])
    if around.drawn:
        draw_overlay(canvas, (height, width), boxes.clip(boxes.into_window(box, window)), overlay)
    return canvas, (height, width), window.astype(np.float32)


def frame(
    canvas: ImageArray, extent: Sequence[int], box: ArrayLike | None, target: ArrayLike, lines: Sequence[str]
) -> ImageArray:
    """A frame for people: proposal (red, filled), target (green outline) and a caption below.

    Returns:
        RGB uint8 (S + caption, S, 3), rounded up to even sides: most video players refuse others. The size
        depends on S and the number of lines only; long lines are cut with an ellipsis.
    """
    side = canvas.shape[1]
    image = canvas.copy()
    if box is not None:
        draw_overlay(image, extent, box, Overlay(style="both", width=2))
    _frame(image, pixel_rectangle(target, extent), (0, 220, 90), 2)
    size = max(11, side // 32)
    font = caption_font(size)
    line_height = round(size * 1.45)
    width, height = (v + v % 2 for v in (side, side + line_height * len(lines) + size // 2))
    page = Image.new("RGB", (width, height), (24, 26, 30))
    page.paste(Image.fromarray(image), (0, 0))
    pen = ImageDraw.Draw(page)
    for number, line in enumerate(lines):
        shown = _cut(" ".join(line.split()), side - size, lambda text: pen.textlength(text, font=font))
        pen.text((size // 2, side + size // 4 + number * line_height), shown, font=font, fill=(235, 235, 235))
    return np.asarray(page).copy()


@lru_cache(maxsize=16)
def caption_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu Sans where the system or matplotlib has it, else Pillow's own font, which knows ASCII only.

    Args:
        size: in pixels.
    """
    places = ["DejaVuSans.ttf"]
    matplotlib = find_spec("matplotlib")  # looked for, not imported: it is large
    if matplotlib is not None and matplotlib.origin is not None:
        places.append(str(Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"))
    for place in places:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(place, size)
    return ImageFont.load_default(size)


def _cut(text: str, room: float, length: Callable[[str], float]) -> str:
    """The text, or as much of its beginning as fits into ``room`` with an ellipsis behind it."""
    if length(text) <= room:
        return text
    fitting = bisect_right(range(len(text)), room, key=lambda n: length(text[:n] + "…")) - 1
    return text[: max(fitting, 0)].rstrip() + "…"
