"""What a scene holds: objects with a shape, a colour, a texture, a size and a place."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

SIDE = 384
"""Side of every scene image in pixels: four times what the tiny model takes in at once."""

SHAPES = ("circle", "square", "triangle", "diamond", "ring", "cross", "star")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "black", "white")
TEXTURES = ("plain", "striped", "spotted")
MARKS = ("dot", "bar", "pipe", "plus", "cross", "hoop")
"""Signs on the objects of search scenes, drawn with equal amounts of ink."""

SMALL_UP_TO = 0.16
LARGE_FROM = 0.32
"""An object whose larger side (relative to the image) is at most ``SMALL_UP_TO`` is *small*, at
least ``LARGE_FROM`` *large*. The bands drawn from below stay clear of both limits."""

_BANDS = {"tiny": (0.06, 0.10), "small": (0.10, 0.15), "medium": (0.19, 0.29), "large": (0.34, 0.48)}
_TEXTURED_FROM = 0.15
_MAX_COVERED = 0.25
_KINDS = {
    "attributes": 0.40,
    "extreme": 0.22,
    "size": 0.1,
    "relation": 0.1,
    "negation": 0.06,
    "closest": 0.06,
    "ordinal": 0.06,
}


@dataclass(frozen=True, slots=True)
class Mark:
    """A small sign in the middle of an object; ``box_px`` is xyxy in whole pixels."""

    kind: str
    box_px: tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Thing:
    """One object; ``box_px`` is xyxy in whole pixels and is touched by the shape on all sides."""

    shape: str
    colour: str
    texture: str
    box_px: tuple[int, int, int, int]
    mark: Mark | None = None
    image_side: int = SIDE
    """Of the image that the object is in, in pixels."""

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The box relative to the image."""
        side = self.image_side
        x1, y1, x2, y2 = self.box_px
        return (x1 / side, y1 / side, x2 / side, y2 / side)

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y), relative."""
        x1, y1, x2, y2 = self.box
        return ((x1 + x2) / 2, (y1 + y2) / 2)

    @property
    def side(self) -> float:
        """Square root of the box's area, relative to the image's side."""
        x1, y1, x2, y2 = self.box
        return float(((x2 - x1) * (y2 - y1)) ** 0.5)

    @property
    def looks(self) -> str:
        """What a close look shows, without an article: ``striped red ring``, ``blue circle marked with a plus``."""
        words = [self.colour, self.shape] if self.texture == "plain" else [self.texture, self.colour, self.shape]
        return " ".join(words) + (f" marked with a {self.mark.kind}" if self.mark else "")

    @property
    def size_word(self) -> str | None:
        """``small``, ``large`` or None for what lies between."""
        x1, y1, x2, y2 = self.box
        longest = max(x2 - x1, y2 - y1)
        return "small" if longest <= SMALL_UP_TO else "large" if longest >= LARGE_FROM else None


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a split's scenes are made."""

    count: tuple[int, int]
    """Smallest and largest number of objects."""
    bands: dict[str, float]
    """Probability of each size band."""
    same_shape: float
    """Probability that an object takes the shape of the first one."""
    siblings: int = 0
    """At least this many other objects share the target's shape."""
    target_band: str | None = None
    """Only objects up to the tiny band's limit (square root of the area, 0.1 of the side) are asked for."""
    kinds: dict[str, float] = field(default_factory=lambda: dict(_KINDS))
    """Probability of trying each kind of expression first."""
    names_shape: bool = False
    """Whether every expression says the target's shape, so that its siblings must be told apart."""


STANDARD = Recipe(count=(2, 5), bands={"tiny": 0.03, "small": 0.2, "medium": 0.47, "large": 0.3}, same_shape=0.25)
DISTRACTORS = Recipe(
    count=(5, 8),
    bands={"tiny": 0.05, "small": 0.4, "medium": 0.5, "large": 0.05},
    same_shape=0.8,
    siblings=3,
    kinds={k: p / (1 - _KINDS["attributes"]) for k, p in _KINDS.items() if k != "attributes"},
    names_shape=True,
)
SMALL = Recipe(count=(3, 7), bands={"tiny": 0.5, "small": 0.3, "medium": 0.2}, same_shape=0.35, target_band="tiny")


def place_things(rng: np.random.Generator, recipe: Recipe) -> list[Thing] | None:
    """Objects for one scene in drawing order (later ones on top), or None if they do not fit.

    No object is covered by others on more than a quarter of its box.
    """
    count = int(rng.integers(recipe.count[0], recipe.count[1] + 1))
    names, weights = list(recipe.bands), list(recipe.bands.values())
    first_shape = str(rng.choice(SHAPES))
    things: list[Thing] = []
    for _ in range(count):
        shape = first_shape if rng.random() < recipe.same_shape else str(rng.choice(SHAPES))
        band = _BANDS[str(rng.choice(names, p=weights))]
        for _ in range(20):
            thing = _one(rng, shape, band)
            if _fits(thing, things):
                things.append(thing)
                break
        else:
            return None
    return things


def _one(rng: np.random.Generator, shape: str, band: tuple[float, float]) -> Thing:
    longest = rng.uniform(*band) * SIDE
    stretch = rng.uniform(0.72, 1.0)
    width, height = (longest, longest * stretch) if rng.random() < 0.5 else (longest * stretch, longest)
    w, h = max(8, round(width)), max(8, round(height))
    x, y = int(rng.integers(2, SIDE - w - 2)), int(rng.integers(2, SIDE - h - 2))
    plain = longest < _TEXTURED_FROM * SIDE or rng.random() < 0.5
    texture = "plain" if plain else str(rng.choice(TEXTURES[1:]))
    return Thing(shape, str(rng.choice(COLOURS)), texture, (x, y, x + w, y + h))


def _fits(new: Thing, things: list[Thing]) -> bool:
    """Whether no box would be covered by others by more than ``_MAX_COVERED`` of its area."""
    everything = [*things, new]
    for i, below in enumerate(everything):
        covered = sum(_shared(below.box_px, above.box_px) for above in everything[i + 1 :])
        x1, y1, x2, y2 = below.box_px
        if covered > _MAX_COVERED * (x2 - x1) * (y2 - y1):
            return False
        # An object that lies wholly inside a larger one's box would make the two hard to tell apart.
        if below is not new and _shared(below.box_px, new.box_px) > 0.5 * new.side**2 * SIDE**2:
            return False
    return True


def _shared(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> int:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)
