"""M-RoPE: where each token of a sequence lies in time, row and column."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ivt_agents.vlm.turns import EncodedImage


def mrope_positions(ids: Sequence[int], images: Sequence[EncodedImage], image_token: int, merge: int) -> np.ndarray:
    """M-RoPE positions of one sequence, (3, L); equals the model's own ``get_rope_index``.

    Text counts up on all three axes; an image keeps its frame index on the first axis and spreads
    over rows and columns on the others, and the text after it goes on behind the longer side.
    """
    array = np.asarray(ids)
    out = np.empty((3, len(array)), dtype=np.int64)
    placeholders = np.flatnonzero(array == image_token)
    at = position = used = 0
    for image in images:
        start = int(placeholders[used])
        out[:, at:start] = position + np.arange(start - at)
        position += start - at
        _, rows, columns = image.grid
        rows, columns = rows // merge, columns // merge
        cells = np.arange(rows * columns)
        at = start + len(cells)
        out[:, start:at] = position + np.stack([cells * 0, cells // columns, cells % columns])
        position, used = position + max(rows, columns), used + len(cells)
    if used != len(placeholders):
        raise ValueError(f"{len(placeholders)} image placeholders for {len(images)} images of {used} tokens")
    out[:, at:] = position + np.arange(len(array) - at)
    return out
