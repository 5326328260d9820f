"""Draws a scene: background, textures, shapes. Deterministic for a generator's state."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from ivt_env.data.sample import ImageArray
from ivt_env.data.scenes.world import SIDE, Thing

_RGB = {
    "red": (214, 40, 40),
    "orange": (240, 130, 25),
    "yellow": (245, 215, 45),
    "green": (45, 150, 60),
    "cyan": (60, 205, 215),
    "blue": (40, 75, 205),
    "purple": (135, 55, 165),
    "black": (22, 22, 26),
    "white": (246, 246, 244),
}
_STAR_RADII = (1.0, 0.45)
_STAR = [(np.sin(k * np.pi / 5) * _STAR_RADII[k % 2], -np.cos(k * np.pi / 5) * _STAR_RADII[k % 2]) for k in range(10)]
_CROSS = [(1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1)]
_POLYGONS: dict[str, list[tuple[float, float]]] = {
    "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
    "triangle": [(0.5, 0), (1, 1), (0, 1)],
    "diamond": [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)],
    "star": _STAR,
    "cross": [(a / 3, b / 3) for a, b in _CROSS],
}
_OVERSAMPLING = 2
_MARK_OVERSAMPLING = 8


def draw(things: list[Thing], rng: np.random.Generator, side: int = SIDE) -> ImageArray:
    """The image of ``things``, RGB uint8 (side, side, 3)."""
    image = _background(rng, side)
    for thing in things:
        x1, y1, x2, y2 = thing.box_px
        fill, mask = _fill(thing, rng), shape_mask(thing.shape, x2 - x1, y2 - y1)
        image.paste(fill, (x1, y1), mask)
        if thing.mark is not None:
            left, top, right, _ = thing.mark.box_px
            ink = 245 if np.mean(_RGB[thing.colour]) < 120 else 20
            image.paste((ink, ink, ink), (left, top), mark_mask(thing.mark.kind, right - left))
    return np.asarray(image).copy()


def mark_mask(kind: str, side: int) -> Image.Image:
    """The mark as an 'L' image of (side, side) pixels. All kinds cover three tenths of it, give or take little.

    Equal ink: shrunk to a blot, the kinds do not differ in darkness.
    """
    n = side * _MARK_OVERSAMPLING
    mask = Image.new("L", (n, n), 0)
    pen = ImageDraw.Draw(mask)

    def disc(radius: float, fill: int) -> None:
        low, high = (0.5 - radius) * n, (0.5 + radius) * n - 1
        pen.ellipse((low, low, high, high), fill=fill)

    def stroke(x: float, y: float, width: float, height: float) -> None:
        pen.rectangle((x * n, y * n, (x + width) * n - 1, (y + height) * n - 1), fill=255)

    if kind == "dot":
        disc(0.31, 255)
    elif kind == "hoop":
        disc(0.44, 255)
        disc(0.312, 0)
    elif kind == "bar":
        stroke(0, 0.35, 1, 0.3)
    elif kind == "pipe":
        stroke(0.35, 0, 0.3, 1)
    elif kind == "plus":
        stroke(0, 0.4185, 1, 0.163)
        stroke(0.4185, 0, 0.163, 1)
    else:
        for flipped in (False, True):
            points = [(0.0, 0.085), (0.085, 0.0), (1.0, 0.915), (0.915, 1.0)]
            pen.polygon([((1 - x if flipped else x) * (n - 1), y * (n - 1)) for x, y in points], fill=255)
    return mask.resize((side, side), Image.Resampling.BOX)


def shape_mask(shape: str, width: int, height: int) -> Image.Image:
    """The shape as an 'L' image of (width, height) pixels, touching all four sides."""
    k = _OVERSAMPLING
    w, h = width * k, height * k
    mask = Image.new("L", (w, h), 0)
    pen = ImageDraw.Draw(mask)
    if shape in ("circle", "ring"):
        pen.ellipse((0, 0, w - 1, h - 1), fill=255)
        if shape == "ring":
            t = round(0.27 * min(w, h))
            pen.ellipse((t, t, w - 1 - t, h - 1 - t), fill=0)
    else:
        points = np.array(_POLYGONS[shape], dtype=float)
        points = (points - points.min(0)) / (points.max(0) - points.min(0))
        pen.polygon([(float(x) * (w - 1), float(y) * (h - 1)) for x, y in points], fill=255)
    return mask.resize((width, height), Image.Resampling.BOX)


def _fill(thing: Thing, rng: np.random.Generator) -> Image.Image:
    """The object's colour and texture as an RGB tile of its box's size."""
    x1, y1, x2, y2 = thing.box_px
    width, height = x2 - x1, y2 - y1
    base = np.clip(np.array(_RGB[thing.colour]) + rng.integers(-14, 15, 3), 0, 255)
    # The second tone is far lighter or far darker, so that the texture survives downscaling.
    second = base * 0.45 if base.mean() > 120 else base + (255 - base) * 0.6
    tile = Image.new("RGB", (width, height), tuple(int(v) for v in base))
    if thing.texture == "plain":
        return tile
    mask = Image.new("L", (width, height), 0)
    pen = ImageDraw.Draw(mask)
    period = max(width, height) / 3.5
    if thing.texture == "striped":
        slant = float(rng.choice([-1.0, 0.0, 1.0]))
        reach = height * abs(slant)
        for x in np.arange(-reach, width + reach, period):
            pen.polygon(
                [
                    (x, 0),
                    (x + period * 0.45, 0),
                    (x + period * 0.45 + slant * height, height),
                    (x + slant * height, height),
                ],
                fill=255,
            )
    else:
        radius = period * 0.27
        for row, y in enumerate(np.arange(period * 0.35, height, period * 0.8)):
            for x in np.arange(period * (0.3 + 0.5 * (row % 2)), width, period):
                pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    tile.paste(tuple(int(v) for v in second), mask=mask)
    return tile


def _background(rng: np.random.Generator, side: int) -> Image.Image:
    """A muted gradient, sometimes with a grid or bars, always with soft noise."""
    lightness = rng.uniform(105, 190)
    corners = np.clip(lightness + rng.normal(0, 14, (2, 2, 3)), 80, 215)
    small = Image.fromarray(corners.astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    style = rng.random()
    if style < 0.45:
        pen = ImageDraw.Draw(small)
        tone = tuple(int(v) for v in np.clip(corners.mean((0, 1)) + rng.choice([-16, 16]), 0, 255))
        step = int(rng.integers(24, 80))
        for at in range(int(rng.integers(0, step)), side, step):
            if style < 0.3:
                pen.line((at, 0, at, side), fill=tone, width=2)
            if style < 0.15 or style >= 0.3:
                pen.line((0, at, side, at), fill=tone, width=2 if style < 0.3 else 10)
    cells = int(rng.choice([24, 48, 96]))
    noise = Image.fromarray(rng.integers(108, 149, (cells, cells), dtype=np.uint8))
    noise = noise.resize((side, side), Image.Resampling.BILINEAR)
    return ImageChops.add(small, Image.merge("RGB", [noise] * 3), scale=1.0, offset=-128)
