"""A tiny untrained policy and a small trainer, shared by the learners' tests."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator

from ivt_agents.grpo.trainer import GRPOConfig, GRPOTrainer
from ivt_agents.training.run import MetricsLog
from ivt_agents.vlm.adapters import add_lora
from ivt_agents.vlm.load import load_policy
from ivt_agents.vlm.policy import VLMPolicy
from ivt_env.rollouts import make_vector_env


def small_config(**changes: object) -> GRPOConfig:
    values = {
        "steps": 4,
        "prompts": 2,
        "group": 4,
        "lr": 1e-3,
        "warmup": 1,
        "advantage": "return_to_go",
        "iterations": 1,
        "clip_low": 0.2,
        "clip_high": 0.28,
        "beta": 0.0,
        "micro_batch": 64,
        "max_grad_norm": 1.0,
        "mask_truncated": True,
        "seed": 0,
        "save_every": 2,
    }
    return GRPOConfig(**(values | changes))  # type: ignore[arg-type]


def small_policy(lora: bool = True) -> VLMPolicy:
    policy = load_policy("tiny", temperature=1.0, max_new_tokens=14)
    policy.model.requires_grad_(not lora)
    if lora:
        torch.manual_seed(0)
        policy.model = add_lora(policy.model, 4)
    return policy


def small_trainer(
    folder: Path, policy: VLMPolicy | None = None, keep_until: int | None = None, **changes: object
) -> GRPOTrainer:
    config = small_config(**changes)
    accelerator = Accelerator(cpu=True)
    env = make_vector_env("IVT-Scenes-v0", config.prompts // accelerator.num_processes * config.group, split="train")
    log = MetricsLog(folder, accelerator.is_main_process, keep_until=keep_until)
    return GRPOTrainer(policy or small_policy(), env, config, accelerator, log, folder)
