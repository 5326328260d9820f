"""Referring expressions over a scene, each true of exactly one object, with room to spare.

An expression is made from a ``Phrase`` (which objects the noun phrase fits) and a *kind* that picks
one of them. Comparisons demand a margin, so that no pixel decides who is leftmost or largest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

from ivt_env.data.scenes.world import Recipe, Thing

PLACE_MARGIN = 0.05
"""Smallest difference in centre position that an expression may rely on, relative to the image."""
SIZE_RATIO = 1.25
"""Smallest ratio of sides that *largest*, *smallest* and *closest* may rely on."""

_AXES = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}
_RELATIONS = {"to the left of": (0, -1), "to the right of": (0, 1), "above": (1, -1), "below": (1, 1)}
_ORDINALS = ("second", "third")
_EXTREME_WORDS = {"left": "leftmost", "right": "rightmost", "top": "topmost", "bottom": "bottommost"}


@dataclass(frozen=True, slots=True)
class Phrase:
    """A noun phrase: None means that the attribute is not mentioned."""

    shape: str | None = None
    colour: str | None = None
    texture: str | None = None
    size: str | None = None

    def fits(self, thing: Thing) -> bool:
        """Whether the thing has every attribute mentioned."""
        return (
            self.shape in (None, thing.shape)
            and self.colour in (None, thing.colour)
            and self.texture in (None, thing.texture)
            and self.size in (None, thing.size_word)
        )

    def __str__(self) -> str:
        """English, without an article: ``small striped red ring``."""
        return " ".join(w for w in (self.size, self.texture, self.colour, self.shape or "object") if w)

    @property
    def words(self) -> int:
        """How many attributes are mentioned."""
        return sum(w is not None for w in (self.shape, self.colour, self.texture, self.size))


@dataclass(frozen=True, slots=True)
class Expression:
    """English, the kind it belongs to, and the index of the one object it fits."""

    text: str
    kind: str
    target: int


def phrases_for(thing: Thing) -> list[Phrase]:
    """Every noun phrase that mentions one to three true attributes of the thing (*plain* is not one)."""
    texture = None if thing.texture == "plain" else thing.texture
    options = product((None, thing.shape), (None, thing.colour), (None, texture), (None, thing.size_word))
    return sorted({p for o in options if 1 <= (p := Phrase(*o)).words <= 3}, key=str)


def expressions(things: list[Thing], kind: str, target: int) -> Iterator[Expression]:
    """Every expression of ``kind`` that singles out ``things[target]``."""
    wanted = things[target]
    for phrase in phrases_for(wanted):
        rivals = [t for i, t in enumerate(things) if i != target and phrase.fits(t)]
        for text in _KINDS[kind](phrase, wanted, rivals, things):
            yield Expression(text, kind, target)


def marked(things: list[Thing], target: int) -> Expression:
    """The expression that names an object by its mark: ``the blue circle marked with a plus``."""
    thing = things[target]
    assert thing.mark is not None
    return Expression(f"the {thing.colour} {thing.shape} marked with a {thing.mark.kind}", "mark", target)


def ask(things: list[Thing], recipe: Recipe, rng: np.random.Generator, targets: list[int]) -> Expression | None:
    """One random expression about one of ``targets``; None if no kind has any.

    Kinds are tried in a random order weighted by the recipe, so that rare ones are not drowned by the
    many relations; among the expressions of one kind, short and specific ones are preferred, as people do.
    """
    kinds, chances = list(recipe.kinds), list(recipe.kinds.values())
    for kind in rng.choice(kinds, size=len(kinds), replace=False, p=chances):
        for target in rng.permutation(targets):
            found = list(expressions(things, str(kind), int(target)))
            if recipe.names_shape:
                found = [e for e in found if things[target].shape in e.text.split()[:5]]
            if found:
                length = np.array([e.text.count(" ") + 2.0 * ("object" in e.text) for e in found])
                weights = np.exp(-0.5 * length)
                return found[int(rng.choice(len(found), p=weights / weights.sum()))]
    return None


def _attributes(phrase: Phrase, wanted: Thing, rivals: list[Thing], things: list[Thing]) -> Iterator[str]:
    if not rivals:
        yield f"the {phrase}"


def _extreme(phrase: Phrase, wanted: Thing, rivals: list[Thing], things: list[Thing]) -> Iterator[str]:
    if not rivals:
        return
    for name, (axis, sign) in _AXES.items():
        if all(sign * (t.centre[axis] - wanted.centre[axis]) >= PLACE_MARGIN for t in rivals):
            yield f"the {_EXTREME_WORDS[name]} {phrase}"


def _ordinal(phrase: Phrase, wanted: Thing, rivals: list[Thing], things: list[Thing]) -> Iterator[str]:
    if len(rivals) < 2:
        return
    for name, (axis, sign) in _AXES.items():
        order = sorted([wanted, *rivals], key=lambda t: sign * t.centre[axis])
        gaps = np.diff([sign * t.centre[axis] for t in order])
        rank = order.index(wanted)
        if 1 <= rank <= len(_ORDINALS) and (gaps[: rank + 1] >= PLACE_MARGIN).all():
            yield f"the {_ORDINALS[rank - 1]} {phrase} from the {name}"


def _size(phrase: Phrase, wanted: Thing, rivals: list[Thing], things: list[Thing]) -> Iterator[str]:
    if not rivals or phrase.size:
        return
    if all(wanted.side >= SIZE_RATIO * t.side for t in rivals):
        yield f"the largest {phrase}"
    if all(t.side >= SIZE_RATIO * wanted.side for t in rivals):
        yield f"the smallest {phrase}"


def _anchors(wanted: Thing, things: list[Thing]) -> Iterator[tuple[Thing, Phrase]]:
    """Other things with a noun phrase of at most two attributes that fits nothing else."""
    for anchor in things:
        if anchor is not wanted:
            for phrase in phrases_for(anchor):
                if phrase.words <= 2 and phrase.shape and sum(phrase.fits(t) for t in things) == 1:
                    yield anchor, phrase


def _relation(phrase: Phrase, wanted: Thing, rivals: list[Thing], things: list[Thing]) -> Iterator[str]:
    if not rivals:
        return
    for anchor, anchor_phrase in _anchors(wanted, things):
        for words, (axis, sign) in _RELATIONS.items():
            ahead = [sign * (t.centre[axis] - anchor.centre[axis]) for t in rivals if t is not anchor]
            here = sign * (wanted.centre[axis] - anchor.centre[axis])
            if here >= PLACE_MARGIN and all(d <= -PLACE_MARGIN for d in ahead):
                yield f"the {phrase} {words} the {anchor_phrase}"


def _closest(phrase: Phrase, wanted: Thing, rivals: list[Thing], things: list[Thing]) -> Iterator[str]:
    for anchor, anchor_phrase in _anchors(wanted, things):
        others = [t for t in rivals if t is not anchor]
        if others and all(_distance(t, anchor) >= SIZE_RATIO * _distance(wanted, anchor) for t in others):
            yield f"the {phrase} closest to the {anchor_phrase}"


def _negation(phrase: Phrase, wanted: Thing, rivals: list[Thing], things: list[Thing]) -> Iterator[str]:
    if not rivals:
        return
    for attribute in ("colour", "shape", "texture"):
        values = {getattr(t, attribute) for t in rivals}
        mentioned = getattr(phrase, attribute) is not None
        if len(values) != 1 or mentioned or getattr(wanted, attribute) in values or values == {"plain"}:
            continue
        value = values.pop()
        yield f"the {phrase} that is not " + (f"a {value}" if attribute == "shape" else value)


def _distance(a: Thing, b: Thing) -> float:
    return float(np.hypot(a.centre[0] - b.centre[0], a.centre[1] - b.centre[1]))


_KINDS = {
    "attributes": _attributes,
    "extreme": _extreme,
    "ordinal": _ordinal,
    "size": _size,
    "relation": _relation,
    "closest": _closest,
    "negation": _negation,
}
