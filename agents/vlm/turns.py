"""Turns: what was shown to the model and what it sampled, as token ids, and where each token lies (M-RoPE).

The ids that were sampled are the ids that are scored; nothing is decoded and tokenised again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ivt_agents.vlm.codec import WHOLE, Box


@dataclass(slots=True, eq=False)
class EncodedImage:
    """One image as the image processor hands it to the model, and its encoding once there is one."""

    patches: torch.Tensor
    """(patches, channels * temporal * p * p)"""
    grid: tuple[int, int, int]
    """(frames, rows, columns) in patches."""
    features: torch.Tensor | None = None
    """(merged tokens, width); kept when the vision tower is frozen, so that it runs once an image."""
    deepstack: list[torch.Tensor] | None = None

    def resized(self, patch_size: int) -> tuple[int, int]:
        """(height, width) in pixels after the processor's resizing."""
        return self.grid[1] * patch_size, self.grid[2] * patch_size


@dataclass(slots=True, eq=False)
class Prompt:
    """Token ids of one prompt, image placeholders expanded, and its images in order."""

    ids: list[int]
    images: list[EncodedImage]
    windows: list[Box] = field(default_factory=lambda: [WHOLE])
    """What each image of the *current* step shows, relative to the whole image; they come last in ``images``."""

    opening: bool = False
    """There is no current box: what is asked for is a first answer."""


@dataclass(slots=True, eq=False)
class Turn:
    """A prompt and what the model made of it."""

    prompt: Prompt
    completion: list[int] = field(default_factory=list)
    """Sampled ids, the end-of-turn token included where it was sampled."""
    log_probs: list[float] = field(default_factory=list)
    """Of each sampled id, under the distribution that it was sampled from."""
    finished: bool = False
    """The model ended its turn; false: it ran into the token limit."""
    stop_probability: float | None = None
    """The highest probability that the stop had at any place of the answer; None where it is not one token."""


def images_in(prompt: Prompt, length: int, image_token: int, merge: int) -> int:
    """How many of a prompt's images stand, whole, in its first ``length`` ids."""
    left, count = int((np.asarray(prompt.ids[:length]) == image_token).sum()), 0
    for image in prompt.images:
        left -= int(np.prod(image.grid)) // merge**2
        if left < 0:
            break
        count += 1
    return count


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
