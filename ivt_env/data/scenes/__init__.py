"""The embedded data set: procedural images of coloured shapes, and English about them.

A sample is made from the split's name and its index alone, so nothing is stored and the training
split has no practical end. Splits draw from disjoint seed sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ivt_env.data.checked import closest
from ivt_env.data.sample import DataError, ImageArray, Sample
from ivt_env.data.scenes.drawing import draw
from ivt_env.data.scenes.language import Expression, ask, marked
from ivt_env.data.scenes.search import place_alike, search_split
from ivt_env.data.scenes.world import DISTRACTORS, SMALL, STANDARD, Recipe, Thing, place_things

SPLITS = {
    "train": 10_000_000,
    "val": 10_000,
    "test": 10_000,
    "test_distractors": 10_000,
    "test_small": 10_000,
    # Later ones come last: a split's place decides its images.
    "val_distractors": 10_000,
    "val_small": 10_000,
    "train_search": 10_000_000,
    "val_search": 10_000,
    "test_search": 10_000,
}
"""Samples of each split, each with an image of its own; a third of ``train`` are those of ``train_search``.
``search.py`` says which others there are: the size of a mark in the name."""
_SPLIT_CODE = {name: code for code, name in enumerate(SPLITS)}
_SALT = 20260
# The training split holds some of every difficulty.
_DIFFICULTY = {"distractors": DISTRACTORS, "small": SMALL}
"""Of the splits whose names end so; the others are of the standard one."""
_TRAIN_MIXTURE = ((STANDARD, 0.75), (DISTRACTORS, 0.15), (SMALL, 0.10))


@dataclass(frozen=True, slots=True)
class Scene:
    """Objects and the seed of their image."""

    things: tuple[Thing, ...]
    recipe: Recipe
    expression: Expression
    seed: tuple[int, ...]

    @property
    def side(self) -> int:
        """Of the image in pixels: 384, in search scenes 768."""
        return self.things[0].image_side

    def image(self) -> ImageArray:
        """RGB uint8 (side, side, 3)."""
        return draw(list(self.things), np.random.default_rng((*self.seed, 1)), self.side)

    def questions(self, count: int) -> list[Expression]:
        """The scene's own expression first, then up to ``count - 1`` different others about any object."""
        rng = np.random.default_rng((*self.seed, 2))
        found = {self.expression.text: self.expression}
        if self.expression.kind == "mark":
            found |= {e.text: e for e in (marked(list(self.things), i) for i in range(len(self.things)))}
        for _ in range(3 * count):
            if len(found) >= count:
                break
            # Each object in turn: asking about all of them is worth more than rewording one.
            target = int(rng.integers(len(self.things)))
            other = ask(list(self.things), STANDARD, rng, [target])
            if other is not None:
                found.setdefault(other.text, other)
        return list(found.values())


@lru_cache(maxsize=4096)  # a sample and its image are asked for one after the other
def make_scene(split: str, index: int) -> Scene:
    """The scene at ``index`` of ``split``; the same on every machine."""
    search = search_split(split)
    code = _SPLIT_CODE[search[0] if search else split]
    for attempt in range(1000):
        seed = (_SALT, code, index, attempt)
        rng = np.random.default_rng((*seed, 0))
        if search:
            alike = place_alike(rng, search[1])
            if alike is not None:
                return Scene(tuple(alike), STANDARD, marked(alike, int(rng.integers(len(alike)))), seed)
            continue
        recipe = _recipe(split, rng)
        things = place_things(rng, recipe)
        if things is None:
            continue
        targets = [i for i, t in enumerate(things) if _may_be_asked(t, things, recipe)]
        expression = ask(things, recipe, rng, targets) if targets else None
        if expression is not None:
            return Scene(tuple(things), recipe, expression, seed)
    raise AssertionError(f"no scene for {split} {index} in 1000 attempts")


def _recipe(split: str, rng: np.random.Generator) -> Recipe:
    if split == "train":
        return _TRAIN_MIXTURE[int(rng.choice(len(_TRAIN_MIXTURE), p=[p for _, p in _TRAIN_MIXTURE]))][0]
    return _DIFFICULTY.get(split.partition("_")[2], STANDARD)


def _may_be_asked(thing: Thing, things: list[Thing], recipe: Recipe) -> bool:
    siblings = sum(t.shape == thing.shape for t in things) - 1
    tiny_enough = recipe.target_band is None or thing.side <= 0.1
    return siblings >= recipe.siblings and tiny_enough


class Scenes:
    """``Dataset`` over the procedural scenes. See the module's docstring."""

    name = "scenes"

    def __init__(self, split: str = "train") -> None:
        """Open a split.

        Args:
            split: one of ``SPLITS``.

        Raises:
            DataError: for an unknown split, listing the known ones.
        """
        search = search_split(split)
        if (search[0] if search else split) not in SPLITS:
            raise DataError(
                f"scenes has no split {split!r}{closest(split, SPLITS)}; it has {', '.join(SPLITS)}, and those with"
                " marks of another size (val_search_16)"
            )
        self.split = split
        self._length = SPLITS[search[0] if search else split]

    def __len__(self) -> int:
        """Number of samples, each with its own image."""
        return self._length

    def sample_id(self, index: int) -> str:
        """That of the sample at ``index``, without making its scene."""
        return f"{self.split}-{index}"

    def __getitem__(self, index: int) -> Sample:
        """The sample at ``index``; IndexError outside the range."""
        if not 0 <= index < len(self):
            raise IndexError(f"scenes/{self.split} has {len(self)} samples, index {index} is outside")
        drawn, number = self._place(int(index))
        scene = make_scene(drawn, number)
        expression = scene.expression
        target = scene.things[expression.target]
        siblings = [t for i, t in enumerate(scene.things) if i != expression.target and t.shape == target.shape]
        return Sample(
            sample_id=self.sample_id(index),
            image_id=f"scenes-{drawn}-{number}",
            expression=expression.text,
            box=target.box,
            size=(scene.side, scene.side),
            dataset=self.name,
            split=self.split,
            siblings=tuple(t.box for t in siblings),
            meta={
                "kind": expression.kind,
                "index": int(index),
                "things": len(scene.things),
                "looks": [t.looks for t in (target, *siblings)],
            },
        )

    def image(self, sample: Sample) -> ImageArray:
        """The sample's image, drawn anew, RGB uint8 (384, 384, 3), in search scenes 768 pixels a side."""
        drawn, number = self._place(sample.meta["index"])
        return make_scene(drawn, number).image()

    def _place(self, index: int) -> tuple[str, int]:
        """The split and index that a sample's scene is drawn from."""
        return ("train_search", index) if self.split == "train" and index % 3 == 2 else (self.split, index)
