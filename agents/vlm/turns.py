"""Turns: what was shown to the model and what it sampled, as token ids.

A turn is token-in, token-out. The ids that were sampled are the ids that are scored; nothing is
decoded and tokenised again, and the loss mask is laid down as the ids are appended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(slots=True, eq=False)
class Picture:
    """One picture as the image processor hands it to the model, and its encoding once there is one."""

    patches: torch.Tensor
    """(patches, channels * temporal * p * p)"""
    grid: tuple[int, int, int]
    """(frames, rows, columns) in patches."""
    features: torch.Tensor | None = None
    """(merged tokens, width); kept when the vision tower is frozen, so that it runs once a picture."""
    deepstack: list[torch.Tensor] | None = None

    def resized(self, patch_size: int) -> tuple[int, int]:
        """(height, width) in pixels after the processor's resizing."""
        return self.grid[1] * patch_size, self.grid[2] * patch_size


@dataclass(slots=True, eq=False)
class Prompt:
    """Token ids of one prompt, picture placeholders expanded, and its pictures in order."""

    ids: list[int]
    pictures: list[Picture]
    windows: list[Box] = field(default_factory=lambda: [WHOLE])
    """What each picture of the *current* step shows, relative to the whole picture; they come last in ``pictures``."""

    def shown(self, number: int) -> tuple[Picture, Box] | None:
        """The current step's picture ``number`` (from 1) and its window; None where there is no such picture."""
        if not 1 <= number <= len(self.windows):
            return None
        return self.pictures[len(self.pictures) - len(self.windows) + number - 1], self.windows[number - 1]


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


def mrope_positions(ids: Sequence[int], pictures: Sequence[Picture], image_token: int, merge: int) -> np.ndarray:
    """M-RoPE positions of one sequence, (3, L); equals the model's own ``get_rope_index``.

    Text counts up on all three axes; a picture keeps its frame index on the first axis and spreads
    over rows and columns on the others, and the text after it goes on behind the longer side.
    """
    array = np.asarray(ids)
    out = np.empty((3, len(array)), dtype=np.int64)
    placeholders = np.flatnonzero(array == image_token)
    at = position = used = 0
    for picture in pictures:
        start = int(placeholders[used])
        out[:, at:start] = position + np.arange(start - at)
        position += start - at
        _, rows, columns = picture.grid
        rows, columns = rows // merge, columns // merge
        cells = np.arange(rows * columns)
        at = start + len(cells)
        out[:, start:at] = position + np.stack([cells * 0, cells // columns, cells % columns])
        position, used = position + max(rows, columns), used + len(cells)
    if used != len(placeholders):
        raise ValueError(f"{len(placeholders)} picture placeholders for {len(pictures)} pictures of {used} tokens")
    out[:, at:] = position + np.arange(len(array) - at)
    return out


def pictures_in(prompt: Prompt, length: int, image_token: int, merge: int) -> int:
    """How many of a prompt's pictures stand, whole, in its first ``length`` ids."""
    left, count = int((np.asarray(prompt.ids[:length]) == image_token).sum()), 0
    for picture in prompt.pictures:
        left -= int(np.prod(picture.grid)) // merge**2
        if left < 0:
            break
        count += 1
    return count


def encode_pictures(model: Any, pictures: Sequence[Picture], keep: bool) -> BaseModelOutputWithDeepstackFeatures:
    """The vision tower's output for a batch's pictures; each distinct picture is encoded once.

    Args:
        model: a Qwen-VL model for conditional generation (adapters allowed).
        pictures: in the order of the batch; an object may stand there many times.
        keep: store the result on the pictures and use what is stored. Right only while the vision
            tower is frozen.
    """
    distinct = list({id(p): p for p in pictures}.values())
    missing = [p for p in distinct if not (keep and p.features is not None)]
    made: dict[int, tuple[torch.Tensor, list[torch.Tensor]]] = {}
    if missing:
        device = model.device
        patches = torch.cat([p.patches for p in missing]).to(device)
        grids = torch.tensor([p.grid for p in missing], device=device)
        out = model.get_image_features(patches, grids, return_dict=True)
        layers = getattr(out, "deepstack_features", None) or []
        for k, picture in enumerate(missing):
            made[id(picture)] = (out.pooler_output[k], [layer[k] for layer in layers])
            if keep:
                picture.features = out.pooler_output[k].detach()
                picture.deepstack = [layer[k].detach() for layer in layers]
    for picture in distinct:
        if id(picture) not in made:
            assert picture.features is not None and picture.deepstack is not None
            made[id(picture)] = (picture.features, picture.deepstack)
    rows = [made[id(p)] for p in pictures]
    depth = len(rows[0][1])
    return BaseModelOutputWithDeepstackFeatures(
        pooler_output=[features for features, _ in rows],
        deepstack_features=[[layers[d] for _, layers in rows] for d in range(depth)],
    )
