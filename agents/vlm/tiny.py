"""The tiny model: a real ``Qwen3VLForConditionalGeneration`` small enough for two CPU cores.

Its tokenizer knows the scenes' and the teacher's words whole, every integer 0..1000 as one token
(boxes are four tokens, as the policy's coordinates are 0..1000), and everything else byte by byte. Tokenizer, image
processor and architecture are those of the shipped folder; how the weights begin is written here.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


def weights_folder() -> Path:
    """Folder of the shipped tiny model."""
    return Path(__file__).parent / "tiny_qwen3vl"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Specials, 256 bytes, words with and without a space before them, literals of answers, and 0..1000."""
    return AutoTokenizer.from_pretrained(weights_folder())


def tiny_image_processor() -> Qwen2VLImageProcessorPil:
    """Qwen's own image processor at the tiny model's patch size and pixel budget."""
    return Qwen2VLImageProcessorPil.from_pretrained(weights_folder())


def number_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Token ids of the integers 0..1000, in order."""
    return [int(i) for i in tokenizer.convert_tokens_to_ids([str(n) for n in range(1001)])]


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Qwen3VLForConditionalGeneration:
    """The untrained tiny model, initialised so that it learns quickly at this width.

    Matrices have standard deviation 1/sqrt(fan-in) (half of it where they write to the residual stream), the vision
    position embedding is 2-D sinusoids, and the numbers are Fourier features of their value.
    """
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_pretrained(weights_folder()))
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
