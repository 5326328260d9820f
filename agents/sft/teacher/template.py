"""The template teacher: geometry into plain English. Needs no model and no network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from ivt_env import boxes

FITS = "The box fits."
MISSES = "Wrong place; look again."
WRONG_OBJECT = "Wrong object; look again."

_SHIFT = (("too far left", "right"), ("too far right", "left"), ("too high", "down"), ("too low", "up"))
_SIZE = (("too wide", "narrower"), ("too narrow", "wider"), ("too tall", "shorter"), ("too short", "taller"))

TOLERANCE = 0.02
"""Errors below this share of the image's side are not worth a word."""


def critique(box: ArrayLike, target: ArrayLike, siblings: Sequence[Sequence[float]] = ()) -> str:
    """What is wrong with ``box`` and how to correct it, in one sentence; ``siblings`` are others of the target's class.

    All are xyxy relative to the image.
    """
    overlap = float(boxes.iou(box, target))
    if overlap < 0.1:
        on_sibling = len(siblings) > 0 and float(boxes.iou(box, np.asarray(siblings)).max()) >= 0.5
        return WRONG_OBJECT if on_sibling else MISSES
    b, t = np.asarray(box, dtype=float), np.asarray(target, dtype=float)
    shift = (t[:2] + t[2:] - b[:2] - b[2:]) / 2  # positive: the target lies further right or down
    growth = (t[2:] - t[:2]) - (b[2:] - b[:2])  # positive: the target is wider or taller
    found: list[tuple[float, str, str, str]] = []
    for axis in (0, 1):
        found.append((abs(float(shift[axis])), *_SHIFT[2 * axis + (0 if shift[axis] > 0 else 1)], "move"))
        found.append((abs(float(growth[axis])) / 2, *_SIZE[2 * axis + (1 if growth[axis] > 0 else 0)], "make it"))
    # The two largest errors only: a short trace that names the point is what a reader wants.
    worst = [f for f in sorted(found, key=lambda f: -f[0]) if f[0] >= TOLERANCE][:2]
    if not worst:
        return FITS
    problems = " and ".join(wrong for _, wrong, _, _ in worst)
    remedies = " and ".join(f"{verb} {way}" for _, _, way, verb in worst)
    return f"{problems[0].upper()}{problems[1:]}; {remedies}."
