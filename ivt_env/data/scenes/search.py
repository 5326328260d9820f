"""Search scenes: objects alike in all but a small mark, on images so large that a first look cannot read it.

Whether a second look pays depends on the size of the mark, so the size is part of a split's name: ``test_search``
has marks of 12 pixels, ``test_search_16`` the same scenes with marks of 16.
"""

from __future__ import annotations

import re

import numpy as np

from ivt_env.data.scenes.world import COLOURS, MARKS, Mark, Thing

SEARCH_SIDE = 768
"""Side of a search scene's image in pixels: eight times what the tiny model takes in at once."""
MARK_SIDE = 12
"""Side of a mark in pixels where the split does not say."""
MARK_SIDES = (6, 48)
"""Smallest and largest side of a mark."""
_COUNT = (3, 6)
_LONGEST = (0.09, 0.13)
"""Of an object's longer side, relative to the image."""
_GAP = 0.03
"""Smallest distance of two boxes, relative to the image."""
# Their middle is filled, and no mark is called as they are.
_SHAPES = ("circle", "square", "triangle", "diamond", "star")


def search_split(split: str) -> tuple[str, int] | None:
    """The split without a size, and the side of its marks in pixels; None where it holds no search scenes."""
    match = re.fullmatch(r"(\w+_search)(?:_([1-9]\d?))?", split)
    if match is None:
        return None
    side = int(match[2] or MARK_SIDE)
    return (match[1], side) if MARK_SIDES[0] <= side <= MARK_SIDES[1] else None


def place_alike(rng: np.random.Generator, mark_side: int) -> list[Thing] | None:
    """Objects of one shape and colour, each with another mark; None if they do not fit.

    Nothing that is drawn at random depends on the size of the marks.
    """
    count = int(rng.integers(_COUNT[0], _COUNT[1] + 1))
    shape, colour = str(rng.choice(_SHAPES)), str(rng.choice(COLOURS))
    kinds = rng.permutation(MARKS)[:count]
    gap = round(_GAP * SEARCH_SIDE)
    things: list[Thing] = []
    for kind in kinds:
        for _ in range(50):
            longest, stretch = rng.uniform(*_LONGEST) * SEARCH_SIDE, rng.uniform(0.85, 1.0)
            width, height = (longest, longest * stretch) if rng.random() < 0.5 else (longest * stretch, longest)
            w, h = round(width), round(height)
            x, y = int(rng.integers(2, SEARCH_SIDE - w - 2)), int(rng.integers(2, SEARCH_SIDE - h - 2))
            if all(_apart((x, y, x + w, y + h), t.box_px, gap) for t in things):
                # Triangles have their room below the middle.
                centre = x + w // 2, y + round((0.62 if shape == "triangle" else 0.5) * h)
                left, top = (c - mark_side // 2 for c in centre)
                mark = Mark(str(kind), (left, top, left + mark_side, top + mark_side))
                things.append(Thing(shape, colour, "plain", (x, y, x + w, y + h), mark, SEARCH_SIDE))
                break
        else:
            return None
    return things


def _apart(a: tuple[int, ...], b: tuple[int, ...], gap: int) -> bool:
    return max(a[0], b[0]) - min(a[2], b[2]) >= gap or max(a[1], b[1]) - min(a[3], b[3]) >= gap
