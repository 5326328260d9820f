"""Box arithmetic on arrays of any leading shape.

A box is ``(x1, y1, x2, y2)``: left, top, right, bottom. Unless a name says ``_px``, coordinates
are relative to the image (0 = left or top edge, 1 = right or bottom edge). Areas are
continuous: a box has width ``x2 - x1``, never ``x2 - x1 + 1``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

NO_BOX = np.zeros(4, dtype=np.float32)
"""The box observation before the first proposal."""


FRAMES = {
    "px": "pixels of the original image",
    "relative": "0 to 1, relative to the image",
    "thousandths": "0 to 1000, relative to the image",
}
"""What the numbers of a box can be measured in; beside these, a whole number N stands for 0 to N, relative to the
image (999, 1024, ...)."""


def frame_unit(frame: str | int) -> int | None:
    """What the width and the height of an image are in a frame (of ``FRAMES``, or N); None for pixels.

    Raises:
        ValueError: for a frame that there is not.
    """
    known = {"px": None, "relative": 1, "thousandths": 1000}
    if isinstance(frame, str) and frame in known:
        return known[frame]
    digits = str(frame).removesuffix("ths")
    if isinstance(frame, str | int) and digits.isascii() and digits.isdecimal() and 2 <= int(digits[:9]) <= 10**6:
        return int(digits[:9])
    raise ValueError(f"choose one of {', '.join(FRAMES)}, or a whole number N for 0 to N (999, 1024, ...)")


def area(boxes: ArrayLike) -> Array:
    """Area of boxes of shape (..., 4); a reversed or empty box has area 0. Shape (...)."""
    b = np.asarray(boxes, dtype=np.float64)
    return np.clip(b[..., 2] - b[..., 0], 0, None) * np.clip(b[..., 3] - b[..., 1], 0, None)


def _shared(a: ArrayLike, b: ArrayLike) -> tuple[Array, Array]:
    """The areas of intersection and union of boxes that broadcast to (..., 4)."""
    a_, b_ = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    width = np.minimum(a_[..., 2], b_[..., 2]) - np.maximum(a_[..., 0], b_[..., 0])
    height = np.minimum(a_[..., 3], b_[..., 3]) - np.maximum(a_[..., 1], b_[..., 1])
    intersection = np.clip(width, 0, None) * np.clip(height, 0, None)
    return intersection, area(a_) + area(b_) - intersection


def _ratio(part: Array, whole: Array) -> Array:
    """``part / whole``; 0 where the whole is empty."""
    return np.divide(part, whole, out=np.zeros_like(whole), where=whole > 0)


def iou(a: ArrayLike, b: ArrayLike) -> Array:
    """Intersection over union of boxes that broadcast to (..., 4); 0 where the union is empty.

    Continuous convention, the only one this package rewards and scores with.
    """
    return _ratio(*_shared(a, b))


def miss(box: ArrayLike, target: ArrayLike) -> Array:
    """How far the centre of a box lies from the target: 0 inside, in relative coordinates, shape (...)."""
    b, t = np.asarray(box, dtype=np.float64), np.asarray(target, dtype=np.float64)
    centre = (b[..., :2] + b[..., 2:]) / 2
    return np.linalg.norm(np.maximum(np.maximum(t[..., :2] - centre, centre - t[..., 2:]), 0), axis=-1)


def hit(box: ArrayLike, target: ArrayLike) -> NDArray[np.bool_]:
    """Whether the centre of a box lies in the target, as a click is scored; False for no box. Shape (...)."""
    return np.asarray((miss(box, target) == 0) & ~is_no_box(box))


def giou(a: ArrayLike, b: ArrayLike) -> Array:
    """Generalised IoU (Rezatofighi et al., arXiv 1902.09630, eq. 1) in [-1, 1], shape (...)."""
    a_, b_ = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    intersection, union = _shared(a_, b_)
    sides = np.maximum(a_[..., 2:], b_[..., 2:]) - np.minimum(a_[..., :2], b_[..., :2])
    hull = np.prod(np.clip(sides, 0, None), axis=-1)
    return _ratio(intersection, union) - _ratio(hull - union, hull)


def invalid_reason(box: ArrayLike) -> str | None:
    """Why a single proposed box (4,) cannot be used, or None when it can.

    The environment turns the reason into ``info["invalid"]``; nothing is repaired silently.
    """
    b = np.asarray(box, dtype=np.float64)
    if b.shape != (4,):
        return f"a box has 4 numbers, this one has shape {b.shape}"
    x1, y1, x2, y2 = b.tolist()  # plain floats: at every step, arrays of four numbers would take longer
    if 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1:
        return None
    if not np.isfinite(b).all():
        return f"not finite: {b.tolist()}"
    outside = min(x1, y1, x2, y2) < 0 or max(x1, y1, x2, y2) > 1
    return f"{'outside [0, 1]' if outside else 'x2 <= x1' if x2 <= x1 else 'y2 <= y1'}: {b.round(4).tolist()}"


def looks_at(box: ArrayLike, earlier: ArrayLike) -> int:
    """How often an episode has looked where ``box`` (4,) lies: itself and the ``earlier`` boxes (n, 4) that overlap it.

    Boxes overlap if their IoU is at least 0.5. Rows of zeros are ignored.
    """
    return 1 + int((np.asarray(iou(box, np.asarray(earlier).reshape(-1, 4))) >= 0.5).sum())


def is_no_box(boxes: ArrayLike) -> NDArray[np.bool_]:
    """True where a box of shape (..., 4) is all zeros: nothing has been proposed yet."""
    return np.asarray(~np.asarray(boxes).any(axis=-1))


def to_relative(boxes_px: ArrayLike, size: Sequence[int]) -> Array:
    """Pixels to relative coordinates; ``size`` is (height, width) in pixels."""
    height, width = size
    return np.asarray(boxes_px, dtype=np.float64) / np.array([width, height, width, height])


def clip(boxes: ArrayLike) -> Array:
    """Boxes clipped to the image, shape (..., 4)."""
    return np.clip(np.asarray(boxes, dtype=np.float64), 0.0, 1.0)


def visible_part(box: Sequence[float]) -> tuple[float, float, float, float]:
    """What of a single box lies inside the image: all that a proposal can reach of a target that goes beyond it.

    Of a box that lies outside altogether, a sliver at the nearest edge: it has an area, as every proposal must.
    """
    x1, y1, x2, y2 = box
    if 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1:
        return x1, y1, x2, y2
    left, top = min(max(x1, 0.0), 1 - 1e-3), min(max(y1, 0.0), 1 - 1e-3)
    return left, top, min(max(x2, left + 1e-3), 1.0), min(max(y2, top + 1e-3), 1.0)


def into_window(boxes: ArrayLike, window: ArrayLike) -> Array:
    """Relative to the whole image -> relative to ``window`` (itself relative to the image)."""
    origin, extent = _place(window)
    return (np.asarray(boxes, dtype=np.float64) - origin) / extent


def out_of_window(boxes: ArrayLike, window: ArrayLike) -> Array:
    """Relative to ``window`` -> relative to the whole image; undoes ``into_window``."""
    origin, extent = _place(window)
    return origin + np.asarray(boxes, dtype=np.float64) * extent


def _place(window: ArrayLike) -> tuple[Array, Array]:
    """Left, top, left, top of a window, and width, height, width, height."""
    w = np.asarray(window, dtype=np.float64)
    return w[..., [0, 1, 0, 1]], np.concatenate([w[..., 2:] - w[..., :2]] * 2, axis=-1)
