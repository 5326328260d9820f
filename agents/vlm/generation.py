"""Batched sampling with a key-value cache, and scoring of what was sampled.

The sampler and the scorer see the same distribution: temperature ``T``, no top-k or top-p, the same
suppressed tokens, log-softmax in float32. Positions are always passed explicitly, so the model's
mutable ``rope_deltas`` is never relied on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from agents.vlm.turns import Batch, Prompt, Turn, collate, encode_pictures


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn."""

    max_new_tokens: int = 48
    temperature: float = 1.0
    """0 takes the most probable token each time; log-probabilities are then those at temperature 1."""
    suppressed: tuple[int, ...] = ()
    """Ids that can never be sampled: picture placeholders would break the scoring pass."""
    end_ids: tuple[int, ...] = ()
    """Every id that ends a turn."""
    pad_id: int = 0
    stop_id: int | None = None
    """The id of the stop action, where it is one token."""


def log_softmax(logits: torch.Tensor, temperature: float, suppressed: Sequence[int]) -> torch.Tensor:
    """Log-probabilities (..., vocabulary) in float32 of the distribution that is sampled from."""
    logits = logits.float()
    if suppressed:
        logits = logits.clone()
        logits[..., list(suppressed)] = -torch.inf
    return torch.log_softmax(logits / temperature if temperature > 0 else logits, dim=-1)


@torch.no_grad()
def generate(
    model: Any, prompts: Sequence[Prompt], sampling: Sampling, generator: torch.Generator | None, keep: bool
) -> list[Turn]:
    """One completion for each prompt.

    Args:
        model: the Qwen-VL model for conditional generation, in eval mode.
        prompts: may repeat the same object; the prefill is then done once.
        sampling: how to draw.
        generator: source of randomness (None: torch's own).
        keep: keep picture encodings on the prompts (frozen vision tower only).
    """
    distinct = list({id(p): p for p in prompts}.values())
    row_of = {id(p): k for k, p in enumerate(distinct)}
    turns = [Turn(p) for p in prompts]
    config = model.config
    batch = collate(
        [Turn(p) for p in distinct],
        sampling.pad_id,
        config.image_token_id,
        config.vision_config.spatial_merge_size,
        left=True,
    )
    device = model.device
    rows = torch.tensor([row_of[id(p)] for p in prompts], device=device)
    mask = batch.attention_mask.to(device)
    cache = DynamicCache(config=config)
    hidden = _forward(model, batch, encode_pictures(model, batch.pictures, keep), cache)
    if len(distinct) < len(prompts):
        cache.batch_select_indices(rows)
    logits = model.lm_head(hidden[:, -1])[rows]  # (B, vocabulary)
    mask = mask[rows]
    next_position = batch.position_ids[1:, :, -1].max(0).values.to(device)[rows] + 1  # (B,)
    text_position = batch.position_ids[0, :, -1].to(device)[rows] + 1
    alive = list(range(len(prompts)))  # turns that still grow; row k of the tensors is turn alive[k]
    ends = set(sampling.end_ids)
    for step in range(sampling.max_new_tokens):
        log_probs = log_softmax(logits, sampling.temperature, sampling.suppressed)
        if step == 0 and sampling.stop_id is not None:
            for k, p in enumerate(log_probs[:, sampling.stop_id].exp().tolist()):
                turns[k].stop_probability = p
        if sampling.temperature > 0:
            chosen = torch.multinomial(log_probs.exp(), 1, generator=generator)[:, 0]
        else:
            chosen = log_probs.argmax(-1)
        values = log_probs.gather(1, chosen[:, None])[:, 0].tolist()
        going = []
        for k, (token, value) in enumerate(zip(chosen.tolist(), values, strict=True)):
            turn = turns[alive[k]]
            turn.completion.append(token)
            turn.log_probs.append(value)
            if token in ends:
                turn.finished = True
            else:
                going.append(k)
        if not going or step + 1 == sampling.max_new_tokens:
            break
        if len(going) < len(alive):  # finished turns free their rows at once
            select = torch.tensor(going, device=device)
            cache.batch_select_indices(select)
            mask, chosen = mask[select], chosen[select]
            next_position, text_position = next_position[select], text_position[select]
            alive = [alive[k] for k in going]
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
        positions = torch.stack([text_position, next_position, next_position, next_position])[:, :, None]
        hidden = model.model(
            input_ids=chosen[:, None],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        logits = model.lm_head(hidden[:, -1])
        next_position, text_position = next_position + 1, text_position + 1
    return turns


def _forward(model: Any, batch: Batch, features: Any, cache: DynamicCache | None) -> torch.Tensor:
    """Hidden states (B, L, width) of a batch whose pictures are already encoded."""
    device = model.device
    return model.model(
        input_ids=batch.input_ids.to(device),
        attention_mask=batch.attention_mask.to(device),
        position_ids=batch.position_ids.to(device),
        mm_encoder_outputs={"image": features},
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state  # type: ignore[no-any-return]


class TokenScorer(nn.Module):
    """A model as a function from turns to log-probabilities of their sampled tokens.

    Logits are computed at sampled positions only. This is the module that is wrapped for several
    processes, so that every gradient passes through it.
    """

    def __init__(self, model: nn.Module, sampling: Sampling, frozen_vision: bool) -> None:
        super().__init__()
        self.model = model
        self.sampling = sampling
        self.frozen_vision = frozen_vision

    def forward(self, turns: Sequence[Turn]) -> tuple[torch.Tensor, torch.Tensor]:
        """Score sampled tokens.

        Returns:
            Log-probabilities and entropies, both (number of sampled tokens,), turn after turn.
        """
        log_probs = self.distributions(turns)
        ids = torch.tensor([i for t in turns for i in t.completion], device=log_probs.device)
        chosen = log_probs.gather(1, ids[:, None])[:, 0]
        # Suppressed tokens have probability 0 and log-probability -inf; their product is 0.
        entropy = -(log_probs.exp() * log_probs.clamp(min=-1e4)).sum(-1)
        return chosen, entropy

    def distributions(self, turns: Sequence[Turn]) -> torch.Tensor:
        """Log-probabilities (number of sampled tokens, vocabulary), turn after turn."""
        core = _core(self.model)
        config = core.config
        batch = collate(turns, self.sampling.pad_id, config.image_token_id, config.vision_config.spatial_merge_size)
        if self.frozen_vision:
            with torch.no_grad():
                features = encode_pictures(core, batch.pictures, keep=True)
        else:
            features = encode_pictures(core, batch.pictures, keep=False)
        hidden = _forward(core, batch, features, None)
        # The logits at position p speak about the token at p + 1.
        before = batch.loss_mask.roll(-1, dims=1).to(hidden.device)
        logits = core.lm_head(hidden[before])
        return log_softmax(logits, self.sampling.temperature, self.sampling.suppressed)


def _core(model: Any) -> Any:
    """The Qwen-VL model itself, adapters still in place."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
