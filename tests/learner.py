"""A tiny untrained policy and a small trainer, shared by the learners' tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ivt_agents.grpo.train import Args
from ivt_agents.grpo.trainer import GRPOTrainer
from ivt_agents.training.run import MetricsLog
from ivt_agents.vlm.adapters import add_lora
from ivt_agents.vlm.load import load_policy
from ivt_agents.vlm.policy import VLMPolicy
from ivt_agents.vlm.prompts import load_prompts
from ivt_env.rollouts import make_vector_env


def small_config(**changes: object) -> Args:
    values = {"steps": 4, "prompts": 2, "num_generations": 4, "warmup_steps": 1, "save_steps": 2, "beta": 0.0}
    return Args(**({"epsilon": 0.2, "epsilon_high": 0.28} | values | changes))  # type: ignore[arg-type]


def base_policy(**options: Any) -> VLMPolicy:
    """The shipped model, asked in the one question that it knows: in that of taught policies it writes no box."""
    policy, asked = load_policy("tiny", **options), load_prompts("tiny-base")
    policy.dialogue.prompts, policy.shown = asked.prompts, asked.shown
    return policy


def small_policy(lora: bool = True) -> VLMPolicy:
    policy = base_policy(temperature=1.0, max_new_tokens=14)
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
    env = make_vector_env(
        "IVT-Scenes-v0", config.prompts // accelerator.num_processes * config.num_generations, split="train"
    )
    log = MetricsLog(folder, accelerator.is_main_process, keep_until=keep_until)
    return GRPOTrainer(policy or small_policy(), env, config, accelerator, log, folder)


def with_out(options: dict[str, Any], out: Path, **changes: Any) -> dict[str, Any]:
    return options | {"out": out} | changes


def trl_config(folder: Path, **options: Any) -> Any:
    """TRL's configuration for groups of 4 on a CPU, which writes nothing."""
    from trl import GRPOConfig

    settings: dict[str, Any] = {"output_dir": str(folder), "num_generations": 4, "bf16": False, "use_cpu": True}
    settings |= {"gradient_checkpointing": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    return GRPOConfig(**(settings | options))
