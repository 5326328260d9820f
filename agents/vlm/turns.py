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


@dataclass(slots=True)
class Batch:
    """Turns side by side, right-padded, ready for one forward pass."""

    input_ids: torch.Tensor
    """(B, L)"""
    attention_mask: torch.Tensor
    """(B, L), 1 on real tokens. Never the same as the loss mask."""
    loss_mask: torch.Tensor
    """(B, L), true exactly on sampled tokens."""
    position_ids: torch.Tensor
    """(4, B, L): text position, then the three M-RoPE axes."""
    pictures: list[Picture]


def mrope_positions(ids: Sequence[int], pictures: Sequence[Picture], image_token: int, merge: int) -> np.ndarray:
    """M-RoPE positions of one sequence, (3, L); equals the model's own ``get_rope_index``.

    Text counts up on all three axes; a picture keeps its frame index on the first axis and spreads
    over rows and columns on the others, and the text after it goes on behind the longer side.
    """
    out = np.zeros((3, len(ids)), dtype=np.int64)
    at = position = 0
    queue = iter(pictures)
    while at < len(ids):
        if ids[at] != image_token:
            out[:, at] = position
            at, position = at + 1, position + 1
            continue
        _, rows, columns = next(queue).grid
        rows, columns = rows // merge, columns // merge
        cells = np.arange(rows * columns)
        out[:, at : at + len(cells)] = position + np.stack([cells * 0, cells // columns, cells % columns])
        at, position = at + len(cells), position + max(rows, columns)
    return out


def collate(turns: Sequence[Turn], pad_id: int, image_token: int, merge: int, left: bool = False) -> Batch:
    """Lay turns side by side.

    Args:
        turns: at least one.
        pad_id: fills up; masks come from lengths, never from ids.
        image_token: the id of a picture placeholder.
        merge: the vision tower's spatial merge size.
        left: pad on the left, as generation needs it.
    """
    rows = [t.prompt.ids + t.completion for t in turns]
    length = max(map(len, rows))
    shape = (len(rows), length)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    attention, loss = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
    positions = np.zeros((4, *shape), dtype=np.int64)
    for i, (turn, ids) in enumerate(zip(turns, rows, strict=True)):
        start = length - len(ids) if left else 0
        here = slice(start, start + len(ids))
        input_ids[i, here] = ids
        attention[i, here] = 1
        loss[i, start + len(turn.prompt.ids) : start + len(ids)] = True
        positions[0, i, here] = np.arange(len(ids))
        positions[1:, i, here] = mrope_positions(ids, turn.prompt.pictures, image_token, merge)
    return Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(attention),
        torch.from_numpy(loss),
        torch.from_numpy(positions),
        [p for t in turns for p in t.prompt.pictures],
    )


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
