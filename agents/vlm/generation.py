"""Batched sampling with a key-value cache, and scoring of what was sampled.

The sampler and the scorer see the same distribution: temperature ``T``, no top-k or top-p, the same
suppressed tokens, log-softmax in float32. Positions are always passed explicitly, so the model's
mutable ``rope_deltas`` is never relied on, and a cache may be continued with another image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from ivt_agents.vlm.cache import Memory, make_cache, recall, refuse_inexact_cache, remember
from ivt_agents.vlm.packing import break_even, pack
from ivt_agents.vlm.turns import EncodedImage, Prompt, Turn, images_in, mrope_positions


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn."""

    max_new_tokens: int = 48
    temperature: float = 1.0
    """0 takes the most probable token each time; log-probabilities are then those at temperature 1."""
    suppressed: tuple[int, ...] = ()
    """Ids that can never be sampled: image placeholders would break the scoring pass."""
    end_ids: tuple[int, ...] = ()
    """Every id that ends a turn."""
    pad_id: int = 0
    stop_id: int | None = None
    """The id of the stop action, where it is one token."""


Decode = Callable[..., None]
"""Grows the completions of a batch whose prompts are computed; see ``ivt_agents.vlm.decode.decode_fixed``."""


def log_softmax(logits: torch.Tensor, temperature: float, suppressed: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """Log-probabilities (..., vocabulary) in float32 of the distribution that is sampled from."""
    logits = logits.float()
    if len(suppressed):
        ids = torch.as_tensor(suppressed, dtype=torch.long, device=logits.device)
        logits = logits.index_fill(-1, ids, -torch.inf)
    return torch.log_softmax(logits / temperature if temperature > 0 else logits, dim=-1)


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    generator: torch.Generator | None,
    keep: bool,
    memories: list[Memory | None] | None = None,
    decode: Decode | None = None,
) -> list[Turn]:
    """One completion for each prompt.

    Args:
        model: the Qwen-VL model for conditional generation, in eval mode.
        prompts: may repeat the same object; the prefill is then done once.
        sampling: how to draw.
        generator: source of randomness (None: torch's own).
        keep: keep image encodings on the prompts (frozen vision tower only).
        memories: for each prompt what is already computed of it, or None. Only the rest is run through
            the model, and the list is filled with memories of prompt and completion. None: nothing is
            continued and nothing kept.
        decode: what samples behind the prompts. None: the loop below, whose cache grows and whose finished
            rows are freed.
    """
    if memories is not None:
        refuse_inexact_cache(model)
    past = memories or [None] * len(prompts)
    distinct = list({id(p): k for k, p in enumerate(prompts)}.values())
    row_of = {id(prompts[k]): r for r, k in enumerate(distinct)}
    turns = [Turn(p) for p in prompts]
    device = model.device
    rows = torch.tensor([row_of[id(p)] for p in prompts], device=device)
    space = 0 if decode is not None else sampling.max_new_tokens
    cache, hidden, mask, last = _prefill(
        model, [prompts[k] for k in distinct], [past[k] for k in distinct], keep, space
    )
    logits = model.lm_head(hidden[:, -1])[rows]  # (B, vocabulary)
    mask, last = mask[rows], last[:, rows]
    if decode is not None:
        decode(model, cache, logits, rows, mask, last, turns, sampling, generator, memories)
        return turns
    if len(distinct) < len(prompts):
        cache.batch_select_indices(rows)
    alive = list(range(len(prompts)))  # turns that still grow; row k of the tensors is turn alive[k]
    ends = set(sampling.end_ids)
    for step in range(sampling.max_new_tokens):
        log_probs = log_softmax(logits, sampling.temperature, sampling.suppressed)
        if sampling.stop_id is not None:
            # A policy may write down what it sees before it decides, so a stop can come at any place.
            for k, p in enumerate(log_probs[:, sampling.stop_id].exp().tolist()):
                turns[alive[k]].stop_probability = max(p, turns[alive[k]].stop_probability or 0.0)
        if sampling.temperature > 0:
            chosen = sample(log_probs.exp(), generator)
        else:
            chosen = log_probs.argmax(-1)
        values = log_probs.gather(1, chosen[:, None])[:, 0].tolist()
        going: list[int] = []
        ended: list[int] = []
        for k, (token, value) in enumerate(zip(chosen.tolist(), values, strict=True)):
            turn = turns[alive[k]]
            turn.completion.append(token)
            turn.log_probs.append(value)
            turn.finished = token in ends
            (ended if turn.finished else going).append(k)
        final = not going or step + 1 == sampling.max_new_tokens
        if memories is not None:
            # The last sampled token has not been run through the model: the next turn begins with it.
            for k in range(len(alive)) if final else ended:
                memories[alive[k]] = remember(cache, k, mask[k])
        if final:
            break
        if ended:  # finished turns free their rows at once
            select = torch.tensor(going, device=device)
            cache.batch_select_indices(select)
            mask, chosen, last = mask[select], chosen[select], last[:, select]
            alive = [alive[k] for k in going]
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
        last = last + 1
        hidden = model.model(
            input_ids=chosen[:, None],
            attention_mask=mask,
            position_ids=last[:, :, None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        logits = model.lm_head(hidden[:, -1])
    return turns


def sample(probabilities: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """One draw from each row of ``probabilities`` (B, vocabulary), (B,)."""
    return invert(probabilities, uniform(len(probabilities), probabilities.device, generator))


def uniform(count: int, device: torch.device, generator: torch.Generator | None) -> torch.Tensor:
    """Random numbers (count, 1) in [0, 1), in float64."""
    return torch.rand(count, 1, dtype=torch.float64, device=device, generator=generator)


def invert(probabilities: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """The entry at which the cumulative sum of each row of ``probabilities`` (B, vocabulary) passes ``at``, (B,).

    One random number a row, where ``torch.multinomial`` draws one for every entry. In float64, as a float32
    sum over a large vocabulary loses the small probabilities.
    """
    cumulative = probabilities.double().cumsum(-1)
    # To the right of equal sums: an entry of probability 0 is never hit.
    chosen = torch.searchsorted(cumulative, at * cumulative[:, -1:], right=True)[:, 0]
    return chosen.clamp(max=probabilities.shape[1] - 1)


def _prefill(
    model: Any, prompts: Sequence[Prompt], past: Sequence[Memory | None], keep: bool, room: int
) -> tuple[DynamicCache, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run what is not yet remembered of each prompt through the model.

    The cache, hidden states (B, tail, width), the mask of its columns (B, past + tail), the last positions (4, B).
    """
    config, device = model.config, model.device
    image_token, merge = config.image_token_id, config.vision_config.spatial_merge_size
    known = [0 if m is None else m.length for m in past]
    tails = [np.array(p.ids[n:], dtype=np.int64) for p, n in zip(prompts, known, strict=True)]
    before, width = max(known), max(map(len, tails))
    shape = (len(prompts), width)
    input_ids, mask = np.zeros(shape, dtype=np.int64), np.zeros((len(prompts), before + width), dtype=np.int64)
    positions = np.zeros((4, *shape), dtype=np.int64)
    images: list[EncodedImage] = []
    for i, (prompt, n, tail) in enumerate(zip(prompts, known, tails, strict=True)):
        start = width - len(tail)  # padded on the left, between what is remembered and the tail
        input_ids[i, start:] = tail
        mask[i, before - n : before] = 1
        mask[i, before + start :] = 1
        positions[0, i, start:] = np.arange(n, len(prompt.ids))
        positions[1:, i, start:] = mrope_positions(prompt.ids, prompt.images, image_token, merge)[:, n:]
        images += prompt.images[images_in(prompt, n, image_token, merge) :]
    cache = make_cache(model, room)
    if before:
        recall(cache, past, before)
    where = torch.from_numpy(positions).to(device)
    columns = torch.from_numpy(mask).to(device)
    features = encode_images(model, images, keep) if images else None
    hidden = forward(model, torch.from_numpy(input_ids).to(device), columns, where, features, cache)
    return cache, hidden, columns, where[:, :, -1]


def encode_images(model: Any, images: Sequence[EncodedImage], keep: bool) -> BaseModelOutputWithDeepstackFeatures:
    """The vision tower's output for a batch's images, in order; each distinct object is encoded once.

    ``keep`` stores the result on the images and uses what is stored: right only while the vision tower is frozen.
    """
    distinct = list({id(p): p for p in images}.values())
    missing = [p for p in distinct if not (keep and p.features is not None)]
    made: dict[int, tuple[torch.Tensor, list[torch.Tensor]]] = {}
    if missing:
        device = model.device
        patches = torch.cat([p.patches for p in missing]).to(device)
        grids = torch.tensor([p.grid for p in missing], device=device)
        out = model.get_image_features(patches, grids, return_dict=True)
        layers = getattr(out, "deepstack_features", None) or []
        for k, image in enumerate(missing):
            made[id(image)] = (out.pooler_output[k], [layer[k] for layer in layers])
            if keep:
                image.features = out.pooler_output[k].detach()
                image.deepstack = [layer[k].detach() for layer in layers]
    for image in distinct:
        if id(image) not in made:
            assert image.features is not None and image.deepstack is not None
            made[id(image)] = (image.features, image.deepstack)
    rows = [made[id(p)] for p in images]
    depth = len(rows[0][1])
    return BaseModelOutputWithDeepstackFeatures(
        pooler_output=[features for features, _ in rows],
        deepstack_features=[[layers[d] for _, layers in rows] for d in range(depth)],
    )


def forward(
    model: Any, input_ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, features: Any, cache: Any
) -> torch.Tensor:
    """Hidden states (B, L, width) of a batch ``input_ids`` (B, L) whose images are already encoded.

    ``mask`` is (B, past + L) of 1 and 0, or (B, 1, L, L) added to the attention scores; ``positions`` (4, B, L).
    """
    return model.model(  # type: ignore[no-any-return]
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=positions,
        mm_encoder_outputs=None if features is None else {"image": features},
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state


class TokenScorer(nn.Module):
    """A model as a function from turns to log-probabilities of their sampled tokens.

    What turns share is computed once (``ivt_agents.vlm.packing``), and logits at sampled positions only.
    This is the module that is wrapped for several processes, so that every gradient passes through it.
    """

    def __init__(self, model: nn.Module, sampling: Sampling, frozen_vision: bool, packing: bool = True) -> None:
        """Wrap Qwen-VL for conditional generation, or a peft model around one.

        ``frozen_vision``: image encodings may be kept on the images and used again. Without ``packing`` each turn has
        a row of its own, as flash attention needs it.
        """
        super().__init__()
        self.model = model
        self.sampling = sampling
        self.frozen_vision = frozen_vision
        self.worth = break_even(core_of(model).config) if packing else None
        """What sharing is worth, see ``ivt_agents.vlm.packing.plan_rows``."""

    def forward(self, turns: Sequence[Turn]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities, and entropies without gradient, of the sampled tokens (N,), turn after turn."""
        log_probs = self.distributions(turns)
        ids = torch.tensor([i for t in turns for i in t.completion], device=log_probs.device)
        chosen = log_probs.gather(1, ids[:, None])[:, 0]
        with torch.no_grad():  # reported, never trained on
            # Suppressed tokens have probability 0 and log-probability -inf; their product is 0.
            entropy = -(log_probs.exp() * log_probs.clamp(min=-1e4)).sum(-1)
        return chosen, entropy

    def distributions(self, turns: Sequence[Turn]) -> torch.Tensor:
        """Log-probabilities (number of sampled tokens, vocabulary), turn after turn."""
        core = core_of(self.model)
        config, device = core.config, core.device
        merge = config.vision_config.spatial_merge_size
        packed = pack(turns, self.sampling.pad_id, config.image_token_id, merge, self.worth)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_vision):
            features = encode_images(core, packed.images, keep=self.frozen_vision)
        mask = packed.attention_mask.to(device)
        if mask.ndim == 4:
            mask = mask.to(core.dtype)
        hidden = forward(core, packed.input_ids.to(device), mask, packed.position_ids.to(device), features, None)
        # The logits at a position speak about the token behind it.
        logits = core.lm_head(hidden[packed.rows.to(device), packed.columns.to(device)])
        return log_softmax(logits, self.sampling.temperature, self.sampling.suppressed)


def core_of(model: Any) -> Any:
    """The Qwen-VL model itself, adapters still in place."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
