"""Train the tiny model for two steps with TRL's ``GRPOTrainer``, in one of two ways.

    python examples/train_with_trl.py            # TRL plays the environment as a tool (environment_factory)
    python examples/train_with_trl.py --rollout  # this project's own loop plays whole episodes (rollout_func)

In the first TRL makes one environment for each rollout, generates an answer, hands it to the environment's tool and
goes on with the image that comes back. In the second ``ivt_agents.trl.rollout`` plays with the trainer's model and
hands back token ids, log-probabilities, a mask of the sampled tokens, the images and the rewards. docs/trl.md compares
them. Needs the train extra and TRL.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
warnings.filterwarnings("ignore", category=FutureWarning)

from datasets import Dataset  # noqa: E402
from transformers import PrinterCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from ivt_agents.command import run_command  # noqa: E402
from ivt_agents.trl import config_fields  # noqa: E402
from ivt_agents.trl.environment import TRLGrounding, episode_reward, processor_for, rows  # noqa: E402
from ivt_agents.trl.rollout import TRLRollout, episode_return, rollout_processor, rollout_rows  # noqa: E402
from ivt_agents.vlm.load import load_policy  # noqa: E402


@dataclass
class Args:
    """Options of the example."""

    rollout: bool = False
    """This project's loop plays, not TRL."""
    model: str = "tiny"
    """A policy's folder or a model id."""
    env: str = "IVT-Scenes-v0"
    """A registered id."""
    data_root: str | None = None
    """The folder of real data sets; where one is absent, nothing else is played."""
    split: str = "train"
    steps: int = 2
    """Optimizer steps."""
    prompts: int = 2
    """Samples in a step."""
    group: int = 4
    """Episodes of each sample."""
    turns: int = 3
    """Actions in an episode."""
    seed: int = 0
    """Decides the samples' order and what is sampled."""
    grpo: tuple[str, ...] = ()
    """Fields of GRPOConfig, name=value each, which go before those below."""


def main(args: Args) -> None:
    """Train, and print one line a step."""
    policy = load_policy(args.model, temperature=1.0, max_new_tokens=40, layout="prefix" if args.rollout else None)
    played = {"data_root": args.data_root, "strict": True, "split": args.split, "max_steps": args.turns}
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "output_dir": folder,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": args.prompts * args.group,
            "num_generations": args.group,
            "max_steps": args.steps,
            "learning_rate": 1e-4,
            "temperature": 1.0,
            "scale_rewards": "none",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "seed": args.seed,
        }
        chosen = range(args.steps * args.prompts)
        if args.rollout:
            way: dict[str, Any] = {
                "reward_funcs": episode_return,
                "processing_class": rollout_processor(policy),
                "rollout_func": TRLRollout(policy, args.env, **played),
                "train_dataset": rollout_rows(chosen),
            }
        else:
            # An answer's limit, and one that no conversation reaches; the last answer is played by the reward.
            settings |= {"generation_kwargs": {"max_new_tokens": 40}, "max_completion_length": args.turns * 440}
            settings["max_tool_calling_iterations"] = args.turns - 1
            way = {
                "reward_funcs": episode_reward,
                "processing_class": processor_for(policy),
                "environment_factory": lambda: TRLGrounding(policy, args.env, **played),
                "train_dataset": Dataset.from_list(rows(chosen)),
            }
        config = GRPOConfig(**(settings | config_fields(args.grpo, GRPOConfig)))
        trainer = GRPOTrainer(model=policy.model, args=config, **way)
        trainer.remove_callback(PrinterCallback)
        before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
        trainer.train()
    changed = sum(not weight.equal(before[name]) for name, weight in trainer.model.named_parameters())
    for logged in trainer.state.log_history:
        if "reward" in logged:
            tokens = logged["completions/mean_length"]
            print(
                f"step {logged['step']}: loss {logged['loss']:+.4f}, reward {logged['reward']:.4f}, {tokens:.1f} tokens"
            )
    print(f"{changed} of {len(before)} weights changed")


if __name__ == "__main__":
    run_command(main, Args)
