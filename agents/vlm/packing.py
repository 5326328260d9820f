"""Turns laid out for scoring so that what they share is computed once.

Turns that begin alike, image for image and id for id, share a row: the common beginning stands
there once, and behind it each turn's own tokens, which see their own past and nothing of the others.
Eight answers to one prompt are one prompt and eight answers; the turns of a growing conversation
are one sequence. Every sampled token has exactly the context, and the position, that it has in a
row of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ivt_agents.vlm.turns import EncodedImage, Turn, images_in, mrope_positions


@dataclass(slots=True, eq=False)
class Row:
    """Turns that share a beginning, and where each of their tokens lies in the row."""

    turns: list[int] = field(default_factory=list)
    """Numbers of the turns, in the order in which they were given."""
    slots: list[NDArray[np.int64]] = field(default_factory=list)
    """For each turn (length of its sequence,): the column of each of its tokens."""
    keys: list[NDArray[np.int64]] = field(default_factory=list)
    """For each turn: its ids, image placeholders replaced by a number of their image."""
    fresh: list[int] = field(default_factory=list)
    """For each turn: how many of its first tokens an earlier turn of the row had brought."""
    length: int = 0


@dataclass(slots=True)
class Packed:
    """Rows side by side, right-padded, ready for one forward pass."""

    input_ids: torch.Tensor
    """(R, L)"""
    attention_mask: torch.Tensor
    """(R, L) of 1 and 0 where no row holds two turns; else (R, 1, L, L), added to the attention scores."""
    position_ids: torch.Tensor
    """(4, R, L): text position, then the three M-RoPE axes."""
    images: list[EncodedImage]
    """In the order of their placeholders."""
    rows: torch.Tensor
    """(N,) for each sampled token, turn after turn: the row of the token before it, whose logits speak about it."""
    columns: torch.Tensor
    """(N,) and its column."""
    sampled: torch.Tensor
    """(N,) the sampled ids."""


def break_even(config: Any) -> float:
    """Row length at which a token's attention costs as much as everything else that is done for it.

    Estimated from a layer's shape, as (parameters of its matrices) / (6 x heads x head width). Measured for
    the tiny model on two CPU cores: 60 + 0.24 L microseconds a token in a row of L, so 250; this gives 277.
    """
    text = config.text_config
    heads, kv, width = text.num_attention_heads, text.num_key_value_heads, text.hidden_size
    head = getattr(text, "head_dim", None) or width // heads
    parameters = 2 * width * heads * head + 2 * width * kv * head + 3 * width * text.intermediate_size
    return parameters / (6 * heads * head)


def plan_rows(turns: Sequence[Turn], image_token: int, worth: float | None = math.inf) -> list[Row]:
    """Which turns share a row, and which tokens they share.

    A longer row makes attention dearer: a turn joins where that costs less than computing what is shared again.
    ``worth``: see ``break_even``; infinite: share whatever can be shared; None: nothing.
    """
    images: dict[int, int] = {}
    keyed = [_keys(turn, image_token, images) for turn in turns]
    rows: list[Row] = []
    families: dict[int, list[Row]] = {}
    # The longest first: the earlier turns of a conversation then find themselves in its last one.
    for number in sorted(range(len(turns)), key=lambda k: -len(keyed[k])):
        keys = keyed[number]
        # Turns that do not even share their first image have next to nothing in common.
        family = families.setdefault(id(turns[number].prompt.images[0]), [])
        row, best, shared, gain = Row(), -1, 0, 0.0
        for candidate in family if worth is not None else ():
            member, common = max(
                ((k, _common(keys, other)) for k, other in enumerate(candidate.keys)), key=lambda pair: pair[1]
            )
            saved = _saved(len(keys), common, candidate.length, worth or 0.0)
            if common and saved > gain:
                row, best, shared, gain = candidate, member, common, saved
        slots = np.empty(len(keys), dtype=np.int64)
        if shared:
            slots[:shared] = row.slots[best][:shared]
        slots[shared:] = row.length + np.arange(len(keys) - shared)
        if not row.turns:
            rows.append(row)
            family.append(row)
        row.turns.append(number)
        row.slots.append(slots)
        row.keys.append(keys)
        row.fresh.append(shared)
        row.length += len(keys) - shared
    return sorted(rows, key=lambda row: min(row.turns))


def _saved(length: int, shared: int, row: int, worth: float) -> float:
    """What joining a row of ``row`` tokens saves, in units of one token's work outside attention."""
    if math.isinf(worth):
        return float(shared)
    alone = length + length**2 / worth
    joined = length - shared + ((row + length - shared) ** 2 - row**2) / worth
    return alone - joined


def pack(turns: Sequence[Turn], pad_id: int, image_token: int, merge: int, worth: float | None = math.inf) -> Packed:
    """Lay at least one turn out; see ``Packed``, and ``plan_rows`` for ``worth``.

    ``pad_id`` fills up; masks come from lengths, never from ids. ``merge`` is the vision tower's spatial merge size.
    """
    plan = plan_rows(turns, image_token, worth)
    length = max(row.length for row in plan)
    shape = (len(plan), length)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    positions = np.zeros((4, *shape), dtype=np.int64)
    crowded = any(len(row.turns) > 1 for row in plan)
    visible = np.zeros((*shape, length) if crowded else shape, dtype=bool)
    images: list[EncodedImage] = []
    where: dict[int, tuple[int, NDArray[np.int64]]] = {}
    for r, row in enumerate(plan):
        if crowded:
            # Padding sees itself: GPU kernels recompute exp(score - logsumexp) backwards, and where every score is
            # masked the rounding alone overflows (NaN gradients on an H200 in bf16).
            padding = np.arange(row.length, length)
            visible[r, padding, padding] = True
        for number, slots, shared in zip(row.turns, row.slots, row.fresh, strict=True):
            turn = turns[number]
            ids = np.array(turn.prompt.ids + turn.completion)
            own = slots[shared:]
            input_ids[r, own] = ids[shared:]
            positions[0, r, own] = np.arange(shared, len(ids))
            positions[1:, r, own] = mrope_positions(ids.tolist(), turn.prompt.images, image_token, merge)[:, shared:]
            if crowded:
                visible[r][np.ix_(own, slots)] = np.tri(len(ids), dtype=bool)[shared:]
            else:
                visible[r, own] = True
            # An image is shared as a whole or not at all, so a shared beginning holds whole images.
            images += turn.prompt.images[images_in(turn.prompt, shared, image_token, merge) :]
            where[number] = (r, slots)
    rows, columns = [], []
    for number, turn in enumerate(turns):
        r, slots = where[number]
        first = len(turn.prompt.ids)
        before = slots[first - 1 : first - 1 + len(turn.completion)]
        rows.append(np.full(len(before), r))
        columns.append(before)
    return Packed(
        torch.from_numpy(input_ids),
        _additive(visible) if crowded else torch.from_numpy(visible.astype(np.int64)),
        torch.from_numpy(positions),
        images,
        torch.from_numpy(np.concatenate(rows)),
        torch.from_numpy(np.concatenate(columns)),
        torch.tensor([i for turn in turns for i in turn.completion]),
    )


def micro_batches(
    turns: Sequence[Turn], size: int, image_token: int, worth: float | None = math.inf
) -> list[list[int]]:
    """Numbers of turns, cut into parts of at most ``size``; rows of similar length together.

    Turns that share a row stay together as far as ``size`` allows. The sum of a loss over all parts does
    not depend on the cut.
    """
    plan = sorted(plan_rows(turns, image_token, worth), key=lambda row: row.length)
    parts: list[list[int]] = []
    shortest = 0
    for row in plan:
        for start in range(0, len(row.turns), size):
            piece = row.turns[start : start + size]
            # Rows half as long again would make the others carry as much padding.
            if parts and len(parts[-1]) + len(piece) <= size and row.length <= 1.5 * shortest:
                parts[-1] += piece
            else:
                parts.append(list(piece))
                shortest = row.length
    return parts


def _keys(turn: Turn, image_token: int, images: dict[int, int]) -> NDArray[np.int64]:
    """Ids with the placeholders of each image object replaced by a negative number of its own."""
    keys = np.array(turn.prompt.ids + turn.completion, dtype=np.int64)
    places = np.flatnonzero(keys == image_token)
    # Placeholders come in unbroken runs, one for each image.
    starts = np.flatnonzero(np.diff(places, prepend=-2) > 1)
    ends = [*starts[1:], len(places)]
    for image, a, b in zip(turn.prompt.images, starts, ends, strict=True):
        keys[places[a:b]] = -1 - images.setdefault(id(image), len(images))
    return keys


def _common(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """Length of the common beginning."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def _additive(visible: NDArray[np.bool_]) -> torch.Tensor:
    """(R, L, L) of who sees whom -> (R, 1, L, L) of 0 and a number that no score outweighs, in bf16 too."""
    mask = torch.zeros(visible.shape)
    mask.masked_fill_(torch.from_numpy(~visible), -1e9)
    return mask[:, None]
