"""The tiny model's pass over images of one size and questions in slots: shapes stay, nothing waits for a device.

The modules are the model's own; only their order is written down here. The library's pass calls the vision tower's
attention for one image after the other and asks the device where the image tokens are; this one does neither.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    apply_rotary_pos_emb_vision,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from ivt_agents.vlm.pretrain_pool import ANSWER, CELLS, INPUT_SIDE, NUMBERS, SLOT, Words
from ivt_agents.vlm.prompts import TINY
from ivt_agents.vlm.tiny import number_ids
from ivt_agents.vlm.turns import EncodedImage, mrope_positions
from ivt_env.data.scenes.world import COLOURS, MARKS, SHAPES, TEXTURES

GRID = INPUT_SIDE // 8
TOKENS = CELLS * CELLS


def words_of(tokenizer: PreTrainedTokenizerFast) -> Words:
    """What the processes that draw must know of a tokenizer."""

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text)["input_ids"])

    before, behind = TINY.fill("\x00", None).split("\x00")
    _, after = _chat(tokenizer, 1)
    numbers, answer = number_ids(tokenizer), ids('{"bbox_2d": [0, 0, 0, 0]}<|im_end|>')
    in_closeup = ids('{"image": 2, "bbox_2d": [')
    assert tokenizer.convert_ids_to_tokens(ids(before))[-1] == "Ġ"
    assert len(answer) == ANSWER and all(answer[place] == numbers[0] for place in NUMBERS)
    assert ids(behind + after)[: len(ids(behind))] == ids(behind) and len(in_closeup) == 1
    return Words(
        before=ids(before)[:-1],  # without the space at its end: a word is one token with the space before it
        after=ids(behind + after),
        of={piece[1:]: number for piece, number in tokenizer.get_vocab().items() if piece.startswith("Ġ")},
        answer=answer,
        numbers=tuple(numbers),
        in_closeup=in_closeup[0],
        describe=ids("Describe image 2." + after),
        pieces={piece: ids(piece) for piece in ("A", "An", ".")},
    )


def _chat(tokenizer: PreTrainedTokenizerFast, images: int) -> tuple[str, str]:
    content = [*[{"type": "image"}] * images, {"type": "text", "text": "\x00"}]
    asked = [{"role": "user", "content": content}]
    before, after = str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)).split("\x00")
    return before, after


def patchify(images: torch.Tensor) -> torch.Tensor:
    """What Qwen's image processor makes of (B, 96, 96, 3) uint8 images, for the whole batch at once.

    (B * 144, 3 * 2 * 8 * 8), patches ordered by merge block, values in [-1, 1].
    """
    x = images.float().div_(127.5).sub_(1)  # (B, H, W, 3)
    m, p = 2, 8
    x = x.view(len(images), CELLS, m, p, CELLS, m, p, 3)
    x = x.permute(0, 1, 4, 2, 5, 7, 3, 6)  # (B, block row, block column, m, m, 3, p, p)
    x = x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)  # the image stands for two frames
    return x.reshape(len(images) * GRID * GRID, 3 * 2 * p * p)


class CellHead(nn.Module):
    """Reads the labels of cells off the vision tower's merged tokens. Not part of the model that is saved."""

    PARTS = (1, len(SHAPES), len(COLOURS), len(TEXTURES), 4, len(MARKS))

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, sum(self.PARTS))

    def loss(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean loss; ``features`` (B * 36, width), ``labels`` (B * 36, 9)."""
        presence, shape, colour, texture, box, mark = self.linear(features.float()).split(self.PARTS, dim=-1)
        there, marked = labels[:, 0], (labels[:, 8] >= 0).float()
        objects, marks = there.sum().clamp(min=1), marked.sum().clamp(min=1)

        def named(scores: torch.Tensor, column: int) -> torch.Tensor:
            return (F.cross_entropy(scores, labels[:, column].long(), reduction="none") * there).sum() / objects

        apart = F.smooth_l1_loss(box, labels[:, 4:8], beta=0.02, reduction="none").mean(-1)
        read = F.cross_entropy(mark, labels[:, 8].long().clamp(min=0), reduction="none")
        return (
            F.binary_cross_entropy_with_logits(presence[:, 0], there)
            + named(shape, 1)
            + named(colour, 2)
            + named(texture, 3)
            + 10 * (apart * there).sum() / objects
            + (read * marked).sum() / marks
        )

    def read(self, features: torch.Tensor) -> torch.Tensor:
        """Scores of the kinds of marks, (B * 36, 6)."""
        return torch.Tensor(self.linear(features.float()).split(self.PARTS, dim=-1)[5])


class SlotModel:
    """The model over batches of prompts of one image or more, each with ``questions`` slots of ``SLOT`` tokens."""

    def __init__(
        self,
        model: Qwen3VLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
        questions: int,
        images: int = 1,
    ) -> None:
        """Lay out the sequence: the images first, then slots that see the images and themselves alone."""
        self.model, self.questions, self.words, device = model, questions, words_of(tokenizer), model.device
        self.numbers = torch.tensor(self.words.numbers, device=device)
        self.value_of = torch.zeros(model.config.text_config.vocab_size, dtype=torch.long, device=device)
        self.value_of[self.numbers] = torch.arange(1001, device=device)
        before, _ = _chat(tokenizer, images)
        prefix = list(tokenizer(before.replace("<|image_pad|>", "<|image_pad|>" * TOKENS))["input_ids"])
        self.prefix = torch.tensor(prefix, device=device)
        pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self.starts = [k for k, token in enumerate(prefix) if token == pad][::TOKENS]
        # Attention kernels copy masks whose rows are no multiple of 16 long.
        self.tail = torch.zeros(-(len(prefix) + questions * SLOT) % 16, dtype=torch.long, device=device)
        behind = torch.full_like(self.tail, questions + 1, device="cpu")
        slots = torch.arange(questions).repeat_interleave(SLOT) + 1
        segment = torch.cat([torch.zeros(len(prefix), dtype=torch.long), slots, behind])
        length = len(segment)
        visible = (segment[:, None] == segment) | (segment == 0)
        visible &= torch.ones(length, length, dtype=torch.bool).tril()
        self.attention = torch.zeros(1, 1, length, length).masked_fill_(~visible, -1e9).to(device)
        merge = model.config.vision_config.spatial_merge_size
        shown = [EncodedImage(torch.empty(0), (1, GRID, GRID))] * images
        asked = torch.from_numpy(mrope_positions(prefix, shown, pad, merge))  # (3, prefix)
        slot = asked[0, -1] + 1 + torch.arange(SLOT)  # every question goes on where the prefix ended
        rest = torch.cat([slot.repeat(questions), torch.zeros(len(self.tail), dtype=torch.long)])
        self.positions = torch.cat([asked, rest.expand(3, -1)], dim=1)[:, None].to(device)  # (3, 1, L)
        grid = torch.tensor([[1, GRID, GRID]])
        visual: Any = model.model.visual
        index, weight = get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=visual.num_grid_per_side,
            mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners,
            spatial_merge_size=merge,
            kwargs={},
        )
        self.interpolation = index.to(device), weight.to(device)[:, :, None]
        self.places = get_vision_position_ids(grid, merge, kwargs={}).to(device)

    def see(self, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The vision tower: merged tokens (B, 36, width), and those of the deep-stack mergers."""
        visual: Any = self.model.model.visual
        count, proj = len(images), visual.patch_embed.proj
        # A convolution whose stride is its kernel is one matrix product.
        x = F.linear(patchify(images), proj.weight.flatten(1), proj.bias).view(count, GRID * GRID, -1)
        index, weight = self.interpolation
        x = x + (visual.pos_embed(index) * weight).sum(1).to(x.dtype)
        cos, sin = visual.rotary_pos_emb(x, self.places)
        deep = []
        for number, block in enumerate(visual.blocks):
            attention = block.attn
            qkv = attention.qkv(block.norm1(x)).view(count, GRID * GRID, 3, attention.num_heads, -1)
            query, key, value = qkv.unbind(2)
            query, key = apply_rotary_pos_emb_vision(query, key, cos, sin)
            query, key, value = (t.transpose(1, 2) for t in (query, key, value))
            if self.model.config._attn_implementation == "eager":
                weights = (query @ key.transpose(2, 3) * attention.scaling).softmax(-1, dtype=torch.float32)
                mixed = weights.to(value.dtype) @ value
            else:
                mixed = F.scaled_dot_product_attention(query, key, value, scale=attention.scaling)
            x = x + attention.proj(mixed.transpose(1, 2).reshape(count, GRID * GRID, -1))
            x = x + block.mlp(block.norm2(x))
            if number in visual.deepstack_visual_indexes:
                merger = visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(number)]
                deep.append(merger(x).view(count, TOKENS, -1))
        return visual.merger(x).view(count, TOKENS, -1), deep

    def answer(
        self, merged: torch.Tensor, deep: list[torch.Tensor], slots: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states (B, questions, ANSWER, width) from which the answers' tokens are told, and these tokens.

        ``merged`` and ``deep`` are those of ``see``, the images of a prompt one after the other, ``slots`` token ids
        (B, questions, SLOT), ``lengths`` the tokens of each question without its answer (B, questions), at least 1.
        """
        language: Any = self.model.model.language_model
        count = len(slots)
        ids = torch.cat([self.prefix.expand(count, -1), slots.flatten(1), self.tail.expand(count, -1)], dim=1)
        x = language.embed_tokens(ids)
        seen = torch.cat([torch.arange(TOKENS) + start for start in self.starts]).to(x.device)
        x = x.index_copy(1, seen, merged.reshape(count, len(seen), -1).to(x.dtype))
        cos_sin = language.rotary_emb(x, self.positions)
        for number, layer in enumerate(language.layers):
            x = layer(x, attention_mask=self.attention, position_embeddings=cos_sin)
            if number < len(deep):
                x = x.index_add(1, seen, deep[number].reshape(count, len(seen), -1).to(x.dtype))
        at = lengths[..., None] - 1 + torch.arange(ANSWER, device=slots.device)  # (B, questions, ANSWER)
        told = torch.gather(slots, 2, at + 1)
        starts = torch.arange(self.questions, device=slots.device)[:, None] * SLOT + len(self.prefix)
        places = (at + starts).flatten(1)[..., None].expand(-1, -1, x.shape[-1])
        hidden = language.norm(torch.gather(x, 1, places))
        return hidden.view(count, self.questions, ANSWER, -1), told
