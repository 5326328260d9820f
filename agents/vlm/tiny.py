"""The tiny model: a real ``Qwen3VLForConditionalGeneration`` small enough for two CPU cores.

Its tokenizer knows the scenes' and the teacher's words whole, every integer 0..1000 as one token
(boxes are four tokens, as the policy's coordinates are 0..1000), and everything else byte by byte.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ivt_agents.sft.teacher.template import teacher_words
from ivt_agents.vlm.prompts import NO_BOX_TEXT, TINY
from ivt_env.data.scenes.language import search_vocabulary, vocabulary

INPUT_SIDE = 96
"""A square image reaches the model as 96 x 96 pixels: 36 merged tokens."""

SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_LITERALS = ('{"bbox_2d": [', "]}", '{"stop": true}', ", ", "\n", ".", ";", ":", ",", " [", "].", "]", " ")
_CLOSEUP_BOX = '{"image": 2, "bbox_2d": ['
_WORDS_ABOUT_MARKS = ("mark", "Mark", "Marked", "This", "Not", "Next")
"""That a reasoning text may use, in an order that stays."""
_SPLIT = (
    r'\{"image": 2, "bbox_2d": \[|\{"bbox_2d": \[|\{"stop": true\}|\]\}|\p{N}+|, | ?\p{L}+|\n| ?[^\s\p{L}\p{N}]+|\s+'
)
# The turn layout of the Qwen family; written for this tokenizer, images in content order.
_CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, made in code: specials, 256 bytes, words, literals, 0..1000, and the words of search scenes."""
    words = {"user", "assistant", "system", NO_BOX_TEXT, *re.findall(r"[A-Za-z]+", TINY.first)}
    words |= {*vocabulary(), *teacher_words()} - {"expression", "box}"}
    pieces = list(SPECIALS) + sorted(pre_tokenizers.ByteLevel.alphabet())
    # Byte-level BPE writes a space as "Ġ" and a newline as "Ċ".
    byte_level = [w.replace(" ", "Ġ").replace("\n", "Ċ") for w in _LITERALS]
    byte_level += [f"{space}{w}" for w in sorted(words) for space in ("", "Ġ")]
    byte_level += [str(n) for n in range(1001)]
    pieces += [w for w in dict.fromkeys(byte_level) if w not in set(pieces)]
    # The order is that of the shipped weights: what came later stands last, so that no other id moved.
    pieces.append(_CLOSEUP_BOX.replace(" ", "Ġ"))
    more = [*search_vocabulary(), *_WORDS_ABOUT_MARKS]
    pieces += [f"{space}{w}" for w in more for space in ("", "Ġ") if f"{space}{w}" not in set(pieces)]
    # ignore_merges: a pre-token in the vocabulary is one token; anything else falls into bytes.
    tokenizer = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_image_processor() -> Qwen2VLImageProcessorPil:
    """Qwen's own image processor at the tiny model's patch size and pixel budget."""
    return Qwen2VLImageProcessorPil(
        patch_size=8,
        merge_size=2,
        temporal_patch_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size={"shortest_edge": 48 * 48, "longest_edge": INPUT_SIDE * INPUT_SIDE},
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLConfig:
    """Architecture of the shipped model (about 2 million parameters)."""
    ids = {s: tokenizer.convert_tokens_to_ids(s) for s in SPECIALS}
    return Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "max_position_embeddings": 4096,
            "pad_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 4,
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_heads": 4,
            "patch_size": 8,
            "out_hidden_size": 128,
            "num_position_embeddings": 144,
            "deepstack_visual_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def number_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Token ids of the integers 0..1000, in order."""
    return [int(i) for i in tokenizer.convert_tokens_to_ids([str(n) for n in range(1001)])]


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Qwen3VLForConditionalGeneration:
    """The untrained tiny model, initialised so that it learns quickly at this width.

    Matrices have standard deviation 1/sqrt(fan-in) (half of it where they write to the residual stream), the vision
    position embedding is 2-D sinusoids, and the numbers are Fourier features of their value.
    """
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(build_config(tokenizer))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "embed_tokens" not in name and "pos_embed" not in name:
                fan_in = parameter[0].numel()
                gain = 0.5 if name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight")) else 1.0
                parameter.normal_(0, gain / math.sqrt(fan_in), generator=generator)
        embeddings = model.get_input_embeddings().weight
        embeddings.normal_(0, 0.06, generator=generator)
        embeddings[number_ids(tokenizer)] = _number_features(embeddings.shape[1])
        positions = model.model.visual.pos_embed
        assert isinstance(positions, nn.Embedding)
        positions.weight.copy_(_sinusoids(12, positions.weight.shape[1]))
    return model


def _number_features(width: int) -> torch.Tensor:
    """Fourier features of value/1000, shape (1001, width): near numbers get near embeddings."""
    pairs = width // 2
    cycles = torch.logspace(math.log10(0.25), math.log10(40), pairs)
    weight = torch.exp(-torch.linspace(0, 1.5, pairs))
    phase = 2 * math.pi * torch.linspace(0, 1, 1001)[:, None] * cycles
    return 0.12 * torch.cat([phase.sin() * weight, phase.cos() * weight], dim=1)


def _sinusoids(side: int, width: int) -> torch.Tensor:
    """2-D sinusoids over a grid of side x side patches, shape (side * side, width)."""
    bands = width // 4
    cycles = torch.logspace(math.log10(0.5), math.log10(side / 2), bands)
    at = (torch.arange(side) + 0.5) / side
    phase = 2 * math.pi * at[:, None] * cycles  # (side, bands)
    one = torch.cat([phase.sin(), phase.cos()], dim=1)  # (side, width / 2)
    rows = one[:, None].expand(side, side, -1)
    columns = one[None].expand(side, side, -1)
    return 0.3 * torch.cat([rows, columns], dim=-1).reshape(side * side, width)


def weights_folder() -> Path:
    """Folder of the shipped tiny model."""
    return Path(__file__).parent / "tiny_qwen3vl"
