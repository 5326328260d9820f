"""Decoding in buffers that never move, so that a CUDA graph replays the pass of one token.

A decoder of 36 layers launches thousands of small kernels for every token, and the GPU waits for the
processor that launches them. Here keys, values, masks, positions and samples are held in tensors of fixed
size and place: the pass of one token is recorded once and then replayed with a single launch. Attention
reads all columns and masks out those that are still empty, so the log-probabilities are those of the
growing loop in ``ivt_agents.vlm.generation``, up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ivt_agents.vlm.cache import Memory, RoomyLayer, remember
from ivt_agents.vlm.generation import Decode, Sampling, invert, log_softmax, uniform
from ivt_agents.vlm.turns import Turn

COLUMNS = 64
"""Keys are padded to a multiple of this: attention kernels want aligned masks."""
LOOK = 8
"""Tokens between two looks at whether every answer has ended; each look waits for the GPU."""


def fixed_decoder(model: Any) -> Decode | None:
    """``decode_fixed`` for a model that can use it: on a GPU, with attention that takes any mask; else None."""
    return decode_fixed if model.device.type == "cuda" and model.config._attn_implementation == "sdpa" else None


def decode_fixed(
    model: Any,
    cache: DynamicCache,
    logits: torch.Tensor,
    rows: torch.Tensor,
    mask: torch.Tensor,
    last: torch.Tensor,
    turns: Sequence[Turn],
    sampling: Sampling,
    generator: torch.Generator | None,
    memories: list[Memory | None] | None,
) -> None:
    """Grow one completion for each of ``turns``; see ``ivt_agents.vlm.generation.generate``.

    ``cache`` holds the distinct prompts and is emptied; ``rows`` (B,) says for each turn which of them is its own.
    ``logits`` (B, vocabulary), ``mask`` (B, columns of the cache) and ``last`` (4, B), the position of the last token,
    are those behind the prompts. ``memories`` is filled where it is a list.
    """
    decoder = _Decoder(model, cache, rows, mask, last, sampling, generator)
    count = decoder.run(logits, capture=logits.is_cuda)
    decoder.write(turns, count, memories)


class FixedLayer(DynamicLayer):
    """Keys and values (B, heads, columns, head width) that are written in place."""

    def __init__(self, filled: RoomyLayer, rows: torch.Tensor, columns: int, column: torch.Tensor) -> None:
        """Take over what a prefill computed, spread to ``rows`` (B,) and ``columns``, and free it there.

        ``column`` (1,) is the next one to write; shared by all layers, moved by whoever decodes.
        """
        super().__init__()
        self.column = column
        # Zeros, not just any bytes: a masked column still takes part, with weight 0, and 0 times NaN is NaN.
        shape = (len(rows), filled.keys.shape[1], columns, filled.keys.shape[3])
        self.keys, self.values = filled.keys.new_zeros(shape), filled.values.new_zeros(shape)
        length = filled.keys.shape[2]
        self.keys[:, :, :length], self.values[:, :, :length] = filled.keys[rows], filled.values[rows]
        self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True
        filled.release()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one column; returns all of them."""
        self.keys.index_copy_(2, self.column, key_states)
        self.values.index_copy_(2, self.column, value_states)
        return self.keys, self.values


class _Decoder:
    """One batch of completions that grow in place."""

    def __init__(
        self,
        model: Any,
        cache: DynamicCache,
        rows: torch.Tensor,
        mask: torch.Tensor,
        last: torch.Tensor,
        sampling: Sampling,
        generator: torch.Generator | None,
    ) -> None:
        self.model, self.sampling, self.cache = model, sampling, cache
        device, (batch, self.past), steps = mask.device, mask.shape, sampling.max_new_tokens
        columns = -(-(self.past + steps) // COLUMNS) * COLUMNS
        self.column = torch.tensor([self.past], device=device)
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        self.positions = last[:, :, None] + 1  # (4, B, 1)
        self.visible = torch.zeros(batch, 1, 1, columns, dtype=torch.bool, device=device)
        self.visible[:, 0, 0, : self.past] = mask.bool()
        self.suppressed = torch.tensor(sampling.suppressed, dtype=torch.long, device=device)
        # Drawn ahead, token by token: the numbers that the growing loop draws while no row has ended.
        count = steps if sampling.temperature > 0 else 0
        drawn = [uniform(batch, device, generator) for _ in range(count)]
        self.uniform = torch.stack(drawn) if drawn else None  # (T, B, 1)
        self.chosen = torch.zeros(batch, dtype=torch.long, device=device)
        self.ids = torch.zeros(steps, batch, dtype=torch.long, device=device)
        self.log_probs = torch.zeros(steps, batch, device=device)
        self.stops = torch.zeros(steps, batch, device=device)
        for number, layer in enumerate(cache.layers):
            assert isinstance(layer, RoomyLayer)
            cache.layers[number] = FixedLayer(layer, rows, columns, self.column)

    def run(self, logits: torch.Tensor, capture: bool) -> int:
        """Decode behind ``logits`` (B, vocabulary) until every completion has ended; returns the number of tokens.

        ``capture``: record the pass of one token as a CUDA graph, instead of running it anew each time.
        """
        ends = torch.tensor(self.sampling.end_ids, dtype=torch.long, device=self.ids.device)
        graph = None
        self._choose(logits)
        for done in range(1, self.sampling.max_new_tokens):
            if done % LOOK == 0 and bool(torch.isin(self.ids[:done], ends).any(0).all()):
                return done
            if graph is not None:
                graph.replay()
            else:
                # The first one is not recorded: libraries set themselves up in it.
                self._advance()
                if capture and done + 1 < self.sampling.max_new_tokens:
                    graph = torch.cuda.CUDAGraph()
                    # Other threads prepare the next images meanwhile.
                    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                        self._advance()
        return self.sampling.max_new_tokens

    def _choose(self, logits: torch.Tensor) -> None:
        """Sample one token a row and write it down."""
        sampling = self.sampling
        log_probs = log_softmax(logits, sampling.temperature, self.suppressed)
        if self.uniform is not None:
            chosen = invert(log_probs.exp(), self.uniform.index_select(0, self.step)[0])
        else:
            chosen = log_probs.argmax(-1)
        self.chosen.copy_(chosen)
        self.ids.index_copy_(0, self.step, chosen[None])
        self.log_probs.index_copy_(0, self.step, log_probs.gather(1, chosen[:, None])[:, 0][None])
        if sampling.stop_id is not None:
            self.stops.index_copy_(0, self.step, log_probs[:, sampling.stop_id].exp()[None])
        self.step.add_(1)

    def _advance(self) -> None:
        """Run the sampled tokens through the model and sample the next ones; nothing here waits for the GPU."""
        self.visible.index_fill_(3, self.column, True)
        hidden = self.model.model.language_model(
            inputs_embeds=self.model.get_input_embeddings()(self.chosen[:, None]),
            attention_mask=self.visible,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        self.column.add_(1)
        self.positions.add_(1)
        self._choose(self.model.lm_head(hidden[:, -1]))

    def write(self, turns: Sequence[Turn], count: int, memories: list[Memory | None] | None) -> None:
        """Hand ``count`` tokens a row over to the turns, cut behind the one that ends each, and its memory."""
        ids, values, stops = (t[:count].T.tolist() for t in (self.ids, self.log_probs, self.stops))
        ends = set(self.sampling.end_ids)
        for row, turn in enumerate(turns):
            length = next((k + 1 for k, token in enumerate(ids[row]) if token in ends), count)
            turn.completion, turn.log_probs = ids[row][:length], values[row][:length]
            turn.finished = turn.completion[-1] in ends
            if self.sampling.stop_id is not None:
                turn.stop_probability = max(stops[row][:length])
            if memories is not None:
                # The last sampled token has not been run through the model: the next turn begins with it.
                mask = self.visible[row, 0, 0].clone()
                mask[self.past + length - 1 :] = False
                memories[row] = remember(self.cache, row, mask)
