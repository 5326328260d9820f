"""The benchmark of a true-sized model is run on a GPU that no test has: what it counts is held here, small."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks.large_model import Args, Counter, Phases, architecture, main, make_policy, random_model
from ivt_agents.vlm.generation import core_of
from ivt_agents.vlm.tiny import tiny_tokenizer
from ivt_env.rollouts import make_vector_env


def small(**changes) -> Args:
    values = {"size": "tiny", "device": "cpu", "prompts": 2, "group": 2, "turns": 2, "tokens": 6, "pixels": 128 * 128}
    return Args(**(values | {"steps": 1, "micro_batch": 4, "lora_rank": 4} | changes))


@pytest.mark.parametrize(
    "options", [{}, {"layout": "prefix", "checkpointing": True, "beta": 0.0}], ids=["fresh", "prefix, checkpointed"]
)
def test_it_runs_to_its_end_on_a_cpu_and_every_phase_has_a_time(options, tmp_path, capsys):
    found = main(small(out=tmp_path / "found.json", **options))
    assert json.loads((tmp_path / "found.json").read_text()) == json.loads(json.dumps(found, default=str))
    wanted = {"environment", "image processing", "vision tower", "prefill", "decode", "output head"}
    wanted |= {"sampling, parsing", "update forward", "update backward", "optimizer"}
    assert wanted <= found["seconds"].keys() and all(found["seconds"][k] > 0 for k in wanted)
    assert sum(found["seconds"].values()) == pytest.approx(found["step_seconds"])
    said = capsys.readouterr().out
    for words in ("peak memory", "utilisation", "the paper's GRPO stage", *wanted):
        assert words in said
    assert found["skipped_groups"] == 0, "a skipped group would make the update look cheap"


def test_every_answer_has_the_same_length_and_every_box_is_valid_and_fresh():
    policy = make_policy(small(tokens=7))
    env = make_vector_env("IVT-Photos-v0", 3, split="train")
    seen, _ = env.reset(seed=0)
    first, second = policy.act(seen)["box"], policy.act(seen)["box"]
    assert {len(t.completion) for t in policy.turns} == {7} and all(t.finished for t in policy.turns)
    assert (first[:, :2] < first[:, 2:]).all() and (first != second).all()
    assert "invalid" not in env.step({"box": first, "stop": np.zeros(3, dtype=np.int64)})[4]


def test_operations_of_the_decoder_agree_with_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    policy = make_policy(small(lora_rank=4))
    core = core_of(policy.model)
    core.set_attn_implementation("eager")  # counted in full: both halves of the L x L matrix
    phases, length = Phases("cpu"), 96
    counter = Counter(phases, policy.model, policy.sampling.pad_id)
    ids = torch.full((2, length), 20)
    counter.decoder("prefill", input_ids=ids)
    with FlopCounterMode(display=False) as torchs, torch.no_grad():
        core.model(input_ids=ids, position_ids=torch.arange(length).expand(4, 2, length), use_cache=False)
    shape = counter.shape
    attention = 2 * shape.layers * shape.query * 2 * length**2
    norms = 2 * sum(p.numel() for n, p in core.model.language_model.named_parameters() if "norm" in n) * 2 * length
    assert phases.flops["prefill"] + attention - norms == pytest.approx(torchs.get_total_flops(), rel=1e-3)


def test_a_true_size_has_its_true_number_of_parameters():
    model = random_model(architecture("4b", tiny_tokenizer()), "meta", torch.bfloat16, 2)
    assert sum(p.numel() for p in model.parameters()) == 4_437_815_808
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_phases_are_exclusive():
    import time

    phases = Phases("cpu")
    with phases("outer"):
        time.sleep(0.02)
        with phases("inner"):
            time.sleep(0.05)
    assert 0.015 < phases.seconds["outer"] < phases.seconds["inner"]


def test_without_a_gpu_the_true_size_says_what_runs_instead(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--size tiny --device cpu"):
        main(Args())
