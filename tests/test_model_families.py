"""Qwen2.5-VL differs from Qwen3-VL where it hurts: boxes in pixels, window attention, no deepstack maps.

Small random models of both classes, saved and loaded as real ones are, go through loading, rollouts,
scoring and an update.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration

from ivt_agents.training.options import TrainingOptions
from ivt_agents.vlm.adapters import make_trainable
from ivt_agents.vlm.dry_run import shipped_config
from ivt_agents.vlm.generation import TokenScorer
from ivt_agents.vlm.load import load_policy
from ivt_agents.vlm.tiny import tiny_image_processor, tiny_tokenizer
from ivt_env.rollouts import make_vector_env

FAMILIES = {
    "qwen3_vl": ("Qwen/Qwen3-VL-4B-Instruct", Qwen3VLForConditionalGeneration, 16),
    "qwen2_5_vl": ("Qwen/Qwen2.5-VL-3B-Instruct", Qwen2_5_VLForConditionalGeneration, 14),
}
FORMATS = [
    pytest.param({}, id="float32"),
    pytest.param({"dtype": "bfloat16"}, id="bfloat16"),
    pytest.param(
        {"quantize": "nf4"},
        id="nf4",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("bitsandbytes") is None, reason='pip install "ivt-env[quantize]"'
        ),
    ),
]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    name, kind, patch = FAMILIES[request.param]
    tokenizer, config = tiny_tokenizer(), shipped_config(name)
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.vocab_size = 64, 128, 2, len(tokenizer)
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 4, 2, 16
    text.rope_parameters = {**text.rope_parameters, "mrope_section": [4, 2, 2]}
    text.layer_types = ["full_attention"] * 2
    vision.depth, vision.hidden_size, vision.intermediate_size, vision.num_heads = 2, 64, 128, 4
    vision.out_hidden_size = 64
    if request.param == "qwen3_vl":
        vision.deepstack_visual_indexes = [0]
    else:
        vision.fullatt_block_indexes = [1]
    config.image_token_id, config.video_token_id = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    ends = tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>"])
    config.vision_start_token_id, config.vision_end_token_id = ends
    torch.manual_seed(0)
    model = kind(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    processor = tiny_image_processor()
    processor.patch_size, processor.size = patch, {"shortest_edge": 56 * 56, "longest_edge": 160 * 160}
    path = tmp_path_factory.mktemp(request.param)
    for part in (model, tokenizer, processor):
        part.save_pretrained(path)
    return path


@pytest.mark.parametrize("options", FORMATS)
def test_a_model_of_each_family_is_loaded_played_scored_and_trained(folder, options):
    policy = load_policy(folder, temperature=1.0, max_new_tokens=8, **options)
    assert policy.codec.frame == ("relative_1000" if "qwen3_vl" in folder.name else "resized_pixels")
    env = make_vector_env("IVT-Scenes-v0", 4, split="train")
    seen, _ = env.reset(seed=0, options={"index": [0, 0, 1, 1]})
    policy.act(seen)
    turns = [t for t in policy.turns if t is not None]
    sampled = torch.tensor([v for t in turns for v in t.log_probs])
    with torch.no_grad():
        scored = TokenScorer(policy.model, policy.sampling, frozen_vision=False)(turns)[0]
    assert len(sampled) > 20
    assert (scored - sampled).abs().max() < (2e-5 if not options else 0.1)
    policy.model = make_trainable(policy.model, 4)
    TrainingOptions(gradient_checkpointing=True).prepare_update(policy.model)
    policy.model.train()
    TokenScorer(policy.model, policy.sampling, frozen_vision=True)(turns)[0].sum().backward()
    grown = [p for n, p in policy.model.named_parameters() if "lora_B" in n and p.grad is not None and p.grad.any()]
    assert len(grown) == 7 * 2, "every matrix of both layers learns"


def test_both_kinds_of_attention_agree(folder):
    found = []
    for attention in ("eager", "sdpa"):
        policy = load_policy(folder, temperature=1.0, max_new_tokens=8, attention=attention)
        env = make_vector_env("IVT-Scenes-v0", 2, split="train")
        policy.act(env.reset(seed=0)[0])
        turns = [t for t in policy.turns if t is not None]
        found.append([v for t in turns for v in t.log_probs])
    assert np.allclose(*found, atol=1e-4)
