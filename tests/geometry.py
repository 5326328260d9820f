"""Boxes in other frames and as actions: what tests need and the package does not."""

from __future__ import annotations

import numpy as np

from ivt_env.wrappers.sb3 import SMALLEST


def to_pixels(box, size):
    """Relative to pixels, not rounded; ``size`` is (height, width)."""
    return np.asarray(box, dtype=float) * np.array([size[1], size[0]] * 2)


def xywh_to_xyxy(box):
    x, y, width, height = box
    return np.array([x, y, x + width, y + height], dtype=float)


def encode_box(box):
    """The action of ``SB3Wrapper`` that proposes a box without stopping."""
    box = np.asarray(box, dtype=float)
    size = box[2:] - box[:2]
    return np.array([*(box[:2] + box[2:] - 1), *(1 - 2 * np.log(size) / np.log(SMALLEST)), -1.0], dtype=np.float32)
