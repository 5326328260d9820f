"""The images of a batch of observations: their memory is used again, and only what has changed is painted."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ivt_env.data.sample import ImageArray
from ivt_env.rendering import Sheet, pixel_rectangle

Layer = tuple[ImageArray, Sheet | None, NDArray[np.float32] | None]
"""What a row shows: an image (S, S, 3) and, if a box (4,) is to be drawn, the sheet whose canvas that is. What was
once given is never changed: the same object looks the same."""

_SPARE = 2
"""Blocks kept for the next steps; a loop that holds one observation while it waits for the next needs two."""


class RecycledMemory:
    """Arrays whose memory is given out again once nobody holds them, or a view of them, any more.

    The allocator would return so large a batch to the system each time; fetching its pages again takes several times
    as long as writing into them.
    """

    def __init__(self) -> None:
        self._spare: list[bytearray] = []

    def array(self, shape: Sequence[int]) -> NDArray[np.uint8]:
        """An array (C-contiguous, not initialised) that shares memory with none that is still held."""
        size = prod(shape)
        block = self._spare.pop() if self._spare else bytearray(size)
        if len(block) != size:
            block = bytearray(size)
        # Not on another ndarray: every view's ``base`` would be that one, whereas on a bytearray it is the array
        # given out here, which therefore lives as long as the last view of it.
        array: NDArray[np.uint8] = np.ndarray(tuple(shape), dtype=np.uint8, buffer=block)
        weakref.finalize(array, self._take_back, block).atexit = False
        return array

    def _take_back(self, block: bytearray) -> None:
        if len(self._spare) < _SPARE:
            self._spare.append(block)

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle or a copy starts with nothing to spare."""
        return RecycledMemory, ()


class Batch:
    """Paints one image of each of N environments into an array (N, S, S, 3)."""

    def __init__(self, num_envs: int, side: int, copy: bool) -> None:
        """N environments with canvases of ``side`` pixels.

        ``copy`` gives each step an array of its own; else it is always the same one, read-only to the caller, in
        which only what has changed is painted.
        """
        self._shape, self._memory = (num_envs, side, side, 3), RecycledMemory()
        self._kept = None if copy else np.empty(self._shape, dtype=np.uint8)
        self._painted: list[Layer | None] = [None] * num_envs

    def paint(self, layers: Sequence[Layer]) -> NDArray[np.uint8]:
        """The images (N, S, S, 3) of N canvases with a box drawn on each."""
        array = self._memory.array(self._shape) if self._kept is None else self._kept
        for row, before, layer in zip(array, self._painted, layers, strict=True):
            repaint(row, before, layer)
        if self._kept is not None:
            self._painted, array = list(layers), self._kept.view()
            array.flags.writeable = False  # a caller's paint would show in all later steps
        return array


def repaint(row: ImageArray, before: Layer | None, layer: Layer) -> None:
    """Turn an image (S, S, 3) that shows ``before`` (None: anything) into one that shows ``layer``."""
    canvas, sheet, box = layer
    if before is None or before[0] is not canvas:
        row[...] = canvas
    elif before[2] is box:
        return
    elif before[2] is not None:
        assert before[1] is not None
        x1, y1, x2, y2 = pixel_rectangle(before[2], before[1].extent)
        row[y1:y2, x1:x2] = canvas[y1:y2, x1:x2]
    if sheet is not None and box is not None:
        sheet.draw(row, box)
