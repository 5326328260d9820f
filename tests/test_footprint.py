"""A dry run that is wrong sends someone to rent the wrong GPU: what is called exact is compared with the real thing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ivt_agents.grpo import train as train_grpo
from ivt_agents.sft import train as train_sft
from ivt_agents.vlm.adapters import add_lora
from ivt_agents.vlm.dry_run import (
    PIXELS,
    Plan,
    build_without_weights,
    dry_run,
    find_config,
    shipped_config,
)
from ivt_agents.vlm.footprint import (
    NF4_BYTES,
    Shape,
    Workload,
    activation_bytes,
    cache_bytes,
    count_parts,
    largest_batch,
    layer_bytes,
    lora_parameters,
    resized,
    rollout_bytes,
    room,
    training_bytes,
    visual_tokens,
    weight_bytes,
)
from ivt_agents.vlm.generation import TokenScorer, generate
from ivt_agents.vlm.load import PolicyError, load_policy
from ivt_agents.vlm.turns import WHOLE, Turn

TOTALS = {
    "Qwen/Qwen3-VL-2B-Instruct": 2_127_532_032,
    "Qwen/Qwen3-VL-4B-Instruct": 4_437_815_808,
    "Qwen/Qwen3-VL-8B-Instruct": 8_767_123_696,
    "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
}
"""What the shipped widths give."""

SIZES = [(480, 640), (427, 640), (741, 1024), (96, 96), (30, 50), (17, 900), (3000, 4000), (33, 48)]


@pytest.fixture(scope="module")
def policy():
    return load_policy("tiny")


@pytest.fixture(scope="module")
def tiny_shape(policy):
    return Shape.of(policy.model.config)


WORK = Workload(image_tokens=300, text_tokens=160, new_tokens=160, turns=3)


# --- Counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOTALS)
def test_parts_add_up_to_the_real_models_parameters(name):
    model = build_without_weights(shipped_config(name))
    assert all(p.is_meta for p in model.parameters()), "no weight takes memory"
    parts = count_parts(model)
    assert parts.total == sum(p.numel() for _, p in model.named_parameters()) == TOTALS[name]
    assert min(parts.vision, parts.text, parts.embeddings) > 0


def test_adapters_are_as_many_as_peft_makes():
    model = load_policy("tiny").model.requires_grad_(False)
    expected, adapted = lora_parameters(model, 4), add_lora(model, 4)
    assert expected == sum(p.numel() for p in adapted.parameters() if p.requires_grad) > 0


# --- Bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weight_format", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_weights_take_as_many_bytes_as_the_real_tensors(weight_format, dtype):
    model = load_policy("tiny", dtype=dtype).model
    assert weight_bytes(count_parts(model), weight_format) == sum(p.nbytes for p in model.parameters())


def test_nf4_counts_four_bits_and_scales_for_matrices_and_bf16_for_the_rest(policy):
    parts = count_parts(policy.model)
    linear = [(n, m) for n, m in policy.model.named_modules() if isinstance(m, torch.nn.Linear)]
    matrices = [m.weight for n, m in linear if "language_model.layers" in n]
    assert parts.quantisable == sum(w.numel() for w in matrices)
    rest = sum(p.numel() for p in policy.model.parameters()) - parts.quantisable
    assert weight_bytes(parts, "nf4") == parts.quantisable * NF4_BYTES + 2 * rest
    assert NF4_BYTES == pytest.approx((4 + 0.127) / 8, abs=1e-3), "QLoRA: 0.127 bits of scales a parameter"


@pytest.mark.parametrize("rank", [0, 8])
def test_gradients_and_adamw_take_as_many_bytes_as_the_real_ones(rank):
    model = load_policy("tiny").model
    parts, lora = count_parts(model), lora_parameters(model, rank)
    model.requires_grad_(rank == 0)
    model = add_lora(model, rank) if rank else model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moments = sum(s[k].nbytes for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq"))
    own = sum(p.nbytes for p in trained) if rank else 0
    assert training_bytes(parts, lora) == own + sum(p.grad.nbytes for p in trained) + moments


def test_the_cache_takes_as_many_bytes_as_the_real_one(policy, tiny_shape, monkeypatch):
    made = []
    import ivt_agents.vlm.generation as generation

    real = generation.make_cache
    monkeypatch.setattr(generation, "make_cache", lambda *given: made.append(real(*given)) or made[-1])
    (image,) = policy.dialogue.process([np.zeros((96, 96, 3), np.uint8)])
    prompt = policy.dialogue.prompt("the small red ring", None, [(image, WHOLE)])
    sampling = replace(policy.sampling, max_new_tokens=5, end_ids=())
    generate(policy.model, [prompt, prompt, prompt], sampling, None, keep=False)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in made[0].layers)
    # The last sampled token is never fed back.
    tokens = visual_tokens(96, 96, 8, 2, (48 * 48, 96 * 96))
    work = Workload(tokens, len(prompt.ids) - tokens, 5 - 1, turns=3)
    assert cache_bytes(tiny_shape, work, 3, element=4) == held
    assert cache_bytes(tiny_shape, work, 1, "prefix") == 3 * cache_bytes(tiny_shape, work, 1, "fresh")


class Kept:
    """Bytes that autograd keeps for the backward pass, each storage once, parameters left out."""

    def __init__(self, model):
        self.skip = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.storages: dict[int, torch.UntypedStorage] = {}

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.skip:
            self.storages[storage.data_ptr()] = storage
        return tensor

    def bytes(self, run):
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t):
            out = run()  # held until the sum is made: freed storages would be counted twice or not at all
        total = sum(s.nbytes() for s in self.storages.values())
        del out
        return total


def kept_bytes(rows, checkpointing=False, completion=20):
    policy = load_policy("tiny")
    policy.model.requires_grad_(False)
    policy.model.set_attn_implementation("sdpa")
    model = add_lora(policy.model, 4)
    if checkpointing:
        model.enable_input_require_grads()
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    (image,) = policy.dialogue.process([np.zeros((96, 96, 3), np.uint8)])
    prompt = policy.dialogue.prompt("the small red ring", None, [(image, WHOLE)])
    turns = [Turn(prompt, [30 + i for i in range(completion)]) for _ in range(rows)]
    # The estimate is of turns that share nothing; sharing only saves.
    scorer = TokenScorer(model, policy.sampling, frozen_vision=True, packing=False)
    found = Kept(model).bytes(lambda: scorer(turns))
    work = Workload(36, len(prompt.ids) - 36, completion, 1)
    return found, work, Shape.of(policy.model.config)


def test_the_estimate_of_activations_is_what_autograd_keeps_in_the_tiny_model():
    found, work, shape = kept_bytes(rows=4)
    # Logits are estimated at their peak, of which half is kept: that half is the exact part.
    logits = 4 * 4 * work.new_tokens * shape.vocabulary  # log-probabilities; entropies keep nothing
    text = 4 * work.turn_tokens * layer_bytes(shape, "float32") * shape.layers
    assert found - logits == pytest.approx(text, rel=0.05)


@pytest.mark.parametrize(
    ("dtype", "autocast", "numbers", "low"),
    [
        (torch.float32, False, "float32", 0.95),
        (torch.float32, True, "autocast", 0.7),
        (torch.bfloat16, True, "autocast", 0.95),
        (torch.bfloat16, False, "bfloat16", 0.95),
    ],
)
def test_the_estimate_of_activations_is_never_short_of_what_autograd_keeps(dtype, autocast, numbers, low):
    """A model with the proportions of the 4B one, an eighth as wide: two layers, grouped heads, LoRA."""
    config = shipped_config("Qwen/Qwen3-VL-4B-Instruct")
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 320, 1216, 2
    text.num_attention_heads, text.num_key_value_heads, text.vocab_size = 4, 1, 2000
    vision.depth, vision.hidden_size, vision.intermediate_size, vision.out_hidden_size = 2, 64, 128, 320
    vision.deepstack_visual_indexes = [0]
    config.image_token_id, config.video_token_id = 1990, 1991
    model = Qwen3VLForConditionalGeneration(config).to(dtype).requires_grad_(False)
    model.set_attn_implementation("sdpa")
    adapted, length = add_lora(model, 2), 256
    adapted.train()
    ids = torch.zeros(1, length, dtype=torch.long)
    positions = torch.arange(length).expand(4, 1, length)

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            core = adapted.get_base_model().model
            return core(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state

    found = Kept(adapted).bytes(run)
    if autocast:  # copies of the matrices, which the report counts apart
        adapters = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        layers = count_parts(model).text if dtype == torch.float32 else 0
        found -= 2 * (adapters + layers)
    shape = Shape.of(config)
    assert low < found / (length * shape.layers * layer_bytes(shape, numbers)) < 1.05


def test_checkpointing_keeps_what_the_estimate_says_beside_the_layer_computed_again():
    found, work, shape = kept_bytes(rows=4, checkpointing=True)
    logits = 4 * 4 * work.new_tokens * shape.vocabulary  # log-probabilities; entropies keep nothing
    inputs = 4 * work.turn_tokens * 4 * shape.hidden * shape.layers
    assert found - logits == pytest.approx(inputs, rel=0.5)
    assert found < kept_bytes(rows=4)[0]


# --- Images -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("patch", "limits"), [(16, PIXELS["qwen3_vl"]), (14, PIXELS["qwen2_5_vl"]), (8, (2304, 9216))])
def test_visual_tokens_are_the_image_processors(patch, limits):
    edges = {"shortest_edge": limits[0], "longest_edge": limits[1]}
    processor = Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2, size=edges)
    for size in SIZES if patch == 8 else SIZES[:-2]:
        (grid,) = processor(images=[np.zeros((*size, 3), np.uint8)], return_tensors="pt")["image_grid_thw"].tolist()
        assert visual_tokens(*size, patch, 2, limits) == int(np.prod(grid)) // 4
        assert resized(*size, patch, 2, limits) == (grid[1] * patch, grid[2] * patch)


# --- Estimates ------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(*(st.integers(1, 2000) for _ in range(3)), st.integers(1, 8)),
    st.integers(0, 3),
    st.integers(1, 50),
    st.booleans(),
    st.booleans(),
)
def test_more_of_anything_never_takes_less(numbers, which, turns, checkpointing, vision):
    shape = Shape.of(shipped_config("Qwen/Qwen3-VL-4B-Instruct"))
    name = ("image_tokens", "text_tokens", "new_tokens", "turns")[which]
    less = Workload(*numbers)
    more = replace(less, **{name: getattr(less, name) + 1})

    def sizes(work, turns):
        return (
            activation_bytes(shape, work, turns, checkpointing, vision),
            cache_bytes(shape, work, turns, "prefix"),
            rollout_bytes(shape, work, turns),
        )

    for a, b in zip(sizes(less, turns), sizes(more, turns), strict=True):
        assert a <= b
    for a, b in zip(sizes(less, turns), sizes(less, turns + 1), strict=True):
        assert a < b
    assert activation_bytes(shape, less, turns, True, vision) <= activation_bytes(shape, less, turns, False, vision)
    assert activation_bytes(shape, less, turns, checkpointing, False) <= activation_bytes(
        shape, less, turns, checkpointing, True
    )


def test_the_largest_batch_fits_and_one_more_does_not():
    one, fixed, gpu = 3e9, 11e9, 80e9
    n = largest_batch(one, fixed, gpu)
    assert n > 0 and fixed + n * one <= room(gpu) < fixed + (n + 1) * one
    assert largest_batch(one, 79e9, gpu) == 0 and largest_batch(one, 0, 1e6) == 0


# --- The report -----------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [train_sft, train_grpo])
def test_both_scripts_print_parameters_memory_and_the_largest_batch(script, tmp_path, capsys):
    args = script.Args(model="Qwen/Qwen3-VL-4B-Instruct", out=tmp_path / "run", lora_r=64, dry_run=True)
    script.main(args)
    said = capsys.readouterr().out
    for words in ("4,437,815,808", "132,120,576", "300 visual tokens", "nf4", "largest micro-batch", "80 GB"):
        assert words in said
    assert ("episodes" in said) == (script is train_grpo)
    assert not (tmp_path / "run").exists(), "nothing is written"


def test_a_larger_gpu_never_fits_less_and_small_ones_are_told_so():
    plan = Plan("Qwen/Qwen3-VL-4B-Instruct", 80.0, (480, 640), 160, 3, 96, 8, 64, autocast=True)

    def batches(gb):
        rows = [x.split() for x in dry_run(replace(plan, gpu_memory_gb=gb)).splitlines()]
        return [int(r[-3]) for r in rows if len(r) > 8 and r[1] in ("yes", "no")]

    found = [batches(gb) for gb in (8, 48, 141)]
    assert all(len(f) == 6 for f in found)
    for smaller, larger in zip(found, found[1:], strict=False):
        assert all(a <= b for a, b in zip(smaller, larger, strict=True))
    assert found[0][0] == 0 and found[-1][0] > 0


def test_the_tiny_model_is_described_from_its_own_folder(policy, capsys):
    config, source = find_config("tiny")
    assert count_parts(build_without_weights(config)) == count_parts(policy.model) and "tiny_qwen3vl" in source
    train_sft.main(train_sft.Args(dry_run=True, image=(384, 384)))
    assert "36 visual tokens" in capsys.readouterr().out


def test_a_configuration_on_disk_comes_before_the_shipped_one(tmp_path):
    config = shipped_config("Qwen/Qwen3-VL-2B-Instruct")
    config.text_config.num_hidden_layers = 3
    config.save_pretrained(tmp_path)
    found, source = find_config(str(tmp_path))
    assert found.text_config.num_hidden_layers == 3 and source == str(tmp_path)


def test_unknown_models_are_refused_with_what_is_known(tmp_path):
    with pytest.raises(PolicyError, match="Qwen/Qwen3-VL-4B-Instruct"):
        find_config("Qwen/Qwen9-VL-1B")
    with pytest.raises(PolicyError, match="neither config.json"):
        find_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(PolicyError, match="is a 'bert'"):
        find_config(str(tmp_path))


@pytest.mark.parametrize("changes", [{"gpu_memory_gb": 0.0}, {"image": (0, 10)}])
def test_senseless_numbers_are_refused(changes):
    with pytest.raises(ValueError, match="give"):
        train_sft.main(train_sft.Args(dry_run=True, **changes))
