"""A key-value cache with room to grow, and conversations kept between turns.

The library's dynamic cache copies everything at every token. Here room for the whole answer is set
aside once, and a token is written in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


@dataclass(slots=True, eq=False)
class Memory:
    """Keys and values of the beginning of one conversation."""

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    """For each layer: keys and values, both (heads, length, head width)."""
    length: int


class RoomyLayer(DynamicLayer):
    """Keys and values (B, heads, length, head width) as views of larger blocks."""

    def __init__(self, room: int) -> None:
        """Set nothing aside yet; ``room`` columns are kept free behind the first ones that are written."""
        super().__init__()
        self.room = room
        self._blocks: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new columns behind the old ones; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.get_seq_length()
        length = old + key_states.shape[-2]
        if self._blocks is None or self._blocks[0].shape[-2] < length:
            shape = (*key_states.shape[:2], length + self.room, key_states.shape[-1])
            blocks = key_states.new_empty(shape), value_states.new_empty(shape)
            if old:
                blocks[0][..., :old, :], blocks[1][..., :old, :] = self.keys, self.values
            self._blocks = blocks
        self._blocks[0][..., old:length, :], self._blocks[1][..., old:length, :] = key_states, value_states
        self._show(length)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the given rows, in the given order; a row may be given many times."""
        if self._blocks is not None:
            length = self.get_seq_length()
            self._blocks = self._blocks[0][indices], self._blocks[1][indices]
            self._show(length)

    def release(self) -> None:
        """Give the memory back; somebody else holds what was in it."""
        nothing: Any = None
        self._blocks = self.keys = self.values = nothing

    def _show(self, length: int) -> None:
        assert self._blocks is not None
        self.keys, self.values = self._blocks[0][..., :length, :], self._blocks[1][..., :length, :]


def make_cache(model: Any, room: int) -> DynamicCache:
    """An empty cache for a model, with room for ``room`` sampled tokens in every layer that keeps all of them."""
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def refuse_inexact_cache(model: Any) -> None:
    """A cache may be continued where every layer keeps every position.

    Raises:
        ValueError: for a model with sliding-window or recurrent layers, whose cache has forgotten a part.
    """
    kinds = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers} - {DynamicLayer.__name__}
    if kinds:
        raise ValueError(
            f"{model.config.model_type}: its cache has {sorted(kinds)}, which forget early positions; a conversation"
            " cannot be continued on it. Build the policy with reuse=False"
        )


def recall(cache: DynamicCache, past: Sequence[Memory | None], length: int) -> None:
    """Fill an empty cache with memories side by side, padded on the left to ``length`` columns."""
    example = next(m for m in past if m is not None)
    for layer, (keys, _) in enumerate(example.layers):
        stacked = keys.new_zeros(2, len(past), keys.shape[0], length, keys.shape[2])
        for i, memory in enumerate(past):
            if memory is not None:
                start = length - memory.length
                stacked[0, i, :, start:], stacked[1, i, :, start:] = memory.layers[layer]
        cache.update(stacked[0], stacked[1], layer)


def remember(cache: DynamicCache, row: int, mask: torch.Tensor) -> Memory:
    """A copy of one row's keys and values, padding left out; ``mask`` (columns,) is 1 on real tokens."""
    columns = mask.nonzero()[:, 0]
    layers = [(layer.keys[row][:, columns], layer.values[row][:, columns]) for layer in cache.layers]
    return Memory(layers, len(columns))
