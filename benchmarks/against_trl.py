"""A training step of this project against one of TRL's GRPOTrainer: episodes per second and memory.

    python benchmarks/against_trl.py

Both train the same tiny model in the same environment on the same samples: groups of episodes of up to
three turns, then one optimizer step on all of them. TRL plays through its environment interface
(`agents/trl/environment.py`); its rollouts are the conversations of the `prefix` layout, token for token.
This project is measured in that layout and in its default one, `fresh`.

Each measurement is a process of its own, and sides take turns. One step warms up; each later one is timed as a whole.
Memory is what the process's peak rises by, from the loaded model and the built trainer to the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

ENV = "IVT-Scenes-v0"
SIDES = ("trl", "prefix", "fresh")
NAMES = {"trl": "TRL", "prefix": "this, prefix", "fresh": "this, fresh"}


@dataclass
class Args:
    """Options; all hold for every side unless they say otherwise."""

    prompts: int = 16
    """Samples in a step."""
    group: int = 8
    """Episodes of each sample."""
    turns: int = 3
    """Actions in an episode."""
    max_new_tokens: int = 40
    """Token limit of a turn."""
    batch: int = 16
    """Episodes in one forward and backward pass of the update (here: as many turns as they can have)."""
    lora_rank: int = 16
    """Rank of the adapters on the language model; 0 trains every weight."""
    steps: int = 2
    """Timed steps of each process, after one that warms up."""
    rounds: int = 3
    """Processes of each side."""
    threads: int = 2
    """Cores that torch may use."""
    checkpointing: bool = False
    """This side computes activations twice and keeps few of them: the same gradients in less memory."""
    trl_checkpointing: bool = False
    """TRL's default trades time for memory by computing activations twice; off is its faster way."""
    attention: Literal["eager", "sdpa"] = "eager"
    """Attention kernel, on both sides."""
    seed: int = 0
    """Decides samples and sampling."""
    json: bool = False
    """Print JSON and nothing else."""
    side: Literal["trl", "prefix", "fresh"] | None = None
    """Measure one side in this process and print JSON (used by the benchmark itself)."""


def drawn(args: Args, length: int) -> list[list[int]]:
    """Samples of each step, (steps + 1, prompts), as this project's trainer draws them."""
    import numpy as np

    rngs = [np.random.default_rng((args.seed, 21, step)) for step in range(args.steps + 1)]
    return [rng.integers(length, size=args.prompts).tolist() for rng in rngs]


class Record:
    """Seconds of each step, what came of it, and the growth of the process's peak of memory from now on."""

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew at what is resident
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.found: list[tuple[float, ...]] = []
        """Of each step: actions, tokens and reward of an episode, share of groups without variance."""
        self.memory = _status("VmRSS")

    def start(self) -> None:
        """A step begins."""
        self._begun = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """It has ended."""
        self.wall.append(time.perf_counter() - self._begun[0])
        self.cpu.append(time.process_time() - self._begun[1])

    def report(self, args: Args) -> dict[str, Any]:
        """All but the first step, which warms up."""
        names = ("turns", "tokens", "reward", "zero_variance")
        means = [statistics.mean(column) for column in zip(*self.found[1:], strict=True)]
        return dict(zip(names, means, strict=True)) | {
            "seconds": self.wall[1:],
            "cpu_seconds": self.cpu[1:],
            "episodes": args.prompts * args.group,
            "memory": _status("VmHWM") - self.memory,
            "start": self.memory,
        }


def _status(name: str) -> int:
    """A line of /proc/self/status in bytes; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def model_of(args: Args, layout: str) -> Any:
    """The policy on every side: the tiny model in float32 with a fresh adapter, or with every weight trained."""
    import torch

    from ivt_agents.vlm.adapters import add_lora
    from ivt_agents.vlm.load import load_policy

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    loaded: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": args.max_new_tokens, "layout": layout}
    policy = load_policy("tiny", seed=args.seed, attention=args.attention, **loaded)
    policy.model.requires_grad_(args.lora_rank == 0)
    if args.lora_rank:
        policy.model = add_lora(policy.model, args.lora_rank)
    return policy


LEARNING_RATE = 1e-5
"""Small, so that every side plays the same policy in every step."""


def measure_ours(args: Args, layout: str) -> dict[str, Any]:
    """Steps of this project's trainer."""
    from accelerate import Accelerator

    from ivt_agents.grpo import train as train_grpo
    from ivt_agents.grpo.trainer import GRPOTrainer
    from ivt_agents.training.run import MetricsLog
    from ivt_agents.vlm.load import checkpoint_layers
    from ivt_env.rollouts import make_vector_env

    policy = model_of(args, layout)
    if args.checkpointing:
        checkpoint_layers(policy.model)
    env = make_vector_env(ENV, args.prompts * args.group, split="train", max_steps=args.turns)
    config = train_grpo.Args(
        steps=args.steps + 1,
        prompts=args.prompts,
        num_generations=args.group,
        learning_rate=LEARNING_RATE,
        warmup_steps=1,
        advantage="trajectory",
        beta=0.0,
        per_device_train_batch_size=args.batch * args.turns,
        mask_truncated_completions=False,
        seed=args.seed,
        save_steps=args.steps + 2,
    )
    with tempfile.TemporaryDirectory() as folder:
        log = MetricsLog(Path(folder), enabled=False)
        trainer = GRPOTrainer(policy, env, config, Accelerator(cpu=True), log, Path(folder))
        record = Record()
        for samples in drawn(args, len(env.dataset)):
            record.start()
            metrics = trainer.train_step()
            record.stop()
            trainer.step += 1
            played = [s.sample_id for s in env.samples[:: args.group]]
            assert played == [env.dataset[i].sample_id for i in samples], "the two sides would play other samples"
            actions = metrics["rollout/actions_per_episode"]
            tokens = actions * metrics["rollout/tokens_per_action"]
            record.found.append(
                (actions, tokens, metrics["rollout/final_iou"], metrics["rollout/zero_variance_groups"])
            )
    return record.report(args)


def measure_trl(args: Args) -> dict[str, Any]:
    """Steps of TRL's trainer."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    import datasets
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from ivt_agents.trl.environment import TRLGrounding, episode_reward, processor_for, rows
    from ivt_env.rollouts import make_vector_env

    policy = model_of(args, "prefix")
    length = len(make_vector_env(ENV, 1, split="train").dataset)
    episodes = args.prompts * args.group
    if episodes % args.batch:
        raise SystemExit(f"--batch {args.batch}: {episodes} episodes of a step cannot be cut into such parts evenly")
    rewarded = []

    def reward(completions: Any, environments: Any, **_: Any) -> list[float]:
        totals = episode_reward(completions, environments)
        actions = [sum(m["role"] == "assistant" for m in messages) for messages in completions]
        rewarded.append((statistics.mean(actions), statistics.mean(totals)))
        return totals

    class Timer(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            record.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            record.stop()
            metrics = trainer._metrics["train"]
            (actions, total), tokens = rewarded[-1], metrics["completions/mean_length"][-1]
            record.found.append((actions, tokens, total, metrics["frac_reward_zero_std"][-1]))

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=args.trl_checkpointing,
            per_device_train_batch_size=args.batch,
            gradient_accumulation_steps=episodes // args.batch,
            num_generations=args.group,
            max_steps=args.steps + 1,
            # One turn's limit, and a total that no conversation of that many turns reaches.
            generation_kwargs={"max_new_tokens": args.max_new_tokens},
            max_completion_length=args.turns * (args.max_new_tokens + 400),
            # The last answer is played by the reward function.
            max_tool_calling_iterations=args.turns - 1,
            temperature=1.0,
            loss_type="dapo",
            epsilon=0.2,
            epsilon_high=0.28,
            beta=0.0,
            scale_rewards="none",
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            adam_beta2=0.95,
            max_grad_norm=1.0,
            shuffle_dataset=False,
            seed=args.seed,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = GRPOTrainer(
            model=policy.model,
            reward_funcs=reward,
            args=config,
            train_dataset=datasets.Dataset.from_list(rows(i for step in drawn(args, length) for i in step)),
            processing_class=processor_for(policy),
            environment_factory=lambda: TRLGrounding(policy, ENV, split="train", max_steps=args.turns),
            callbacks=[Timer()],
        )
        record = Record()
        trainer.train()
    return record.report(args)


def measured(args: Args) -> dict[str, dict[str, float]]:
    """Medians of every side, over all processes and their steps."""
    raw: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    root = Path(__file__).parent.parent
    environment = os.environ | {
        "OMP_NUM_THREADS": str(args.threads),
        # Else a thread that waits burns the core that other work on the machine may need, on every side.
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }
    for number in range(args.rounds):
        for side in SIDES:
            if not args.json:
                print(f"round {number + 1} of {args.rounds}: {NAMES[side]}", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{NAMES[side]} failed:\n{done.stderr[-3000:]}")
            raw[side].append(json.loads(done.stdout.splitlines()[-1]))
    return {side: summary(runs) for side, runs in raw.items()}


def summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Medians of one side."""
    seconds = statistics.median(s for run in runs for s in run["seconds"])
    cpu = statistics.median(s for run in runs for s in run["cpu_seconds"])
    episodes = runs[0]["episodes"]
    tokens = statistics.mean(run["tokens"] for run in runs)
    return {
        "episodes_per_second": episodes / seconds,
        "sampled_tokens_per_second": episodes * tokens / seconds,
        "cpu_ms_per_episode": 1e3 * cpu / episodes,
        "memory_growth_mb": statistics.median(run["memory"] for run in runs) / 1e6,
        "memory_before_mb": statistics.median(run["start"] for run in runs) / 1e6,
        "turns_per_episode": statistics.mean(run["turns"] for run in runs),
        "tokens_per_episode": tokens,
        "reward_per_episode": statistics.mean(run["reward"] for run in runs),
        "groups_without_variance": statistics.mean(run["zero_variance"] for run in runs),
    }


def table(found: dict[str, dict[str, float]]) -> str:
    """One line a quantity, one column a side, and this project's ratio to TRL."""
    lines = [f"{'':<28}" + "".join(f"{NAMES[side]:>14}" for side in SIDES) + f"{'prefix/TRL':>12}{'fresh/TRL':>11}"]
    for name in found["trl"]:
        values = [found[side][name] for side in SIDES]
        ratios = [v / values[0] if values[0] else float("nan") for v in values[1:]]
        numbers = "".join(f"{v:>14.2f}" for v in values)
        lines.append(f"{name.replace('_', ' '):<28}{numbers}{ratios[0]:>12.2f}{ratios[1]:>11.2f}")
    return "\n".join(lines)


def main(args: Args) -> None:
    """Measure every side and print the table, or one side and print JSON."""
    if args.side is not None:
        found = measure_trl(args) if args.side == "trl" else measure_ours(args, args.side)
        print(json.dumps(found))
        return
    results = measured(args)
    print(json.dumps(results) if args.json else table(results))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
