"""PPO of Stable-Baselines3 on easy scenes: what reinforcement learning reaches without a language model.

    python -m ivt_agents.sb3.train                       # a few minutes on two cores
    python -m ivt_agents.sb3.train --no-easy --steps 400000 --out runs/sb3-all
    ivt evaluate --policies random=random centre=centre ppo=sb3:runs/sb3

It ends with the final IoU beside those of the random and the centre agent on held-out samples, with paired
intervals, and writes `results.json`. `docs/sb3.md` gives the reasons for the defaults, and what came of them.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv

from ivt_agents.command import run_command
from ivt_agents.sb3.easy import SmallImages, compare, easy_indices, table
from ivt_agents.sb3.load import CONFIG_FILE, WEIGHTS_FILE, SB3Agent, save_sb3
from ivt_agents.sb3.network import POLICY_OPTIONS, begin_with_what_is_seen
from ivt_agents.training.finite import unusable_weight
from ivt_env.data import load_dataset
from ivt_env.data.sample import Dataset
from ivt_env.env import GroundingEnv
from ivt_env.files import forget, lock_folder, write_whole
from ivt_env.rollouts import first_samples
from ivt_env.wrappers import SB3Wrapper

UPDATES_A_LINE = 4
"""Updates between two lines of output; the policy as it is then is what an interrupted run leaves."""


@dataclass
class Args:
    """Train PPO on scenes and compare it with agents that look at nothing."""

    out: Path = Path("runs/sb3")
    """Folder for the policy, `config.json` and `results.json`."""
    overwrite: bool = False
    """Begin anew where `out` already holds a policy, which is lost."""
    steps: int = 50_000
    """Actions in the environment."""
    easy: bool = True
    """Train on two objects and expressions that compare nothing; else on the training split as it is."""
    samples: int = 1000
    """Training samples; their images are held in memory, 4 kB each."""
    side: int = 36
    """Of the image that the policy sees, pixels."""
    episode_steps: int = 3
    """Actions in an episode."""
    potential: Literal["iou", "iou_squared", "giou"] = "giou"
    """What a step is paid the gain of."""
    gamma: float = 0.0
    """0: each action is credited with its own gain; 1: with all that follows as well."""
    learning_rate: float = 3e-3
    """Of Adam at the beginning; it falls in a line to a tenth."""
    num_envs: int = 32
    """Episodes played side by side."""
    rollout: int = 32
    """Actions in each environment between two updates."""
    batch: int = 256
    """Actions in a gradient step."""
    epochs: int = 6
    """Passes over what was played."""
    entropy: float = 0.0
    """Weight of the entropy bonus."""
    held_out: int = 300
    """Samples of each table at the end; 0: none is made."""
    splits: tuple[str, ...] = ("val", "test")
    """What the tables are made of."""
    seed: int = 0
    """Decides weights, samples and draws."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, PyTorch computes in one thread, unless the user has chosen a number: more would wait for each other."""
    before = torch.get_num_threads()
    if not {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys():
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def main(args: Args) -> dict[str, Any]:
    """Train, save, compare; returns what `results.json` holds."""
    _check(args)
    with lock_folder(args.out):
        if not args.overwrite and (args.out / CONFIG_FILE).exists():
            raise ValueError(f"{args.out} holds a policy: add --overwrite to lose it, or give another --out")
        return _train(args)


def _train(args: Args) -> dict[str, Any]:
    started, computed = time.perf_counter(), time.process_time()
    dataset = load_dataset("scenes", "train")
    indices = easy_indices(dataset, args.samples) if args.easy else list(first_samples(dataset, args.samples))
    small = SmallImages(dataset, indices, args.side)
    envs = DummyVecEnv([partial(make_env, small, args)] * args.num_envs)
    model = PPO(
        "MultiInputPolicy",
        envs,
        learning_rate=lambda left: args.learning_rate * (0.1 + 0.9 * left),
        n_steps=args.rollout,
        batch_size=args.batch,
        n_epochs=args.epochs,
        gamma=args.gamma,
        ent_coef=args.entropy,
        policy_kwargs=POLICY_OPTIONS,
        seed=args.seed,
        device="cpu",
    )
    begin_with_what_is_seen(model.policy)
    for name in ("results.json", CONFIG_FILE, WEIGHTS_FILE):
        forget(args.out / name)
    wrapper = envs.envs[0].env  # type: ignore[attr-defined]  # behind _LimitIsEnd
    assert isinstance(wrapper, SB3Wrapper)
    shape: dict[str, Any] = {"side": wrapper.side, "text_size": wrapper.text.size, "text_seed": wrapper.text.seed}
    shape |= {"stop_above": wrapper.stop_above, "max_steps": args.episode_steps}

    def save() -> dict[str, Any]:
        if name := unusable_weight(model.policy.named_parameters()):
            told = f"after {model.num_timesteps} actions; give a lower learning rate"
            raise ValueError(f"weight {name} is not finite {told}")
        record = asdict(args) | {"out": str(args.out), "actions": model.num_timesteps}
        record["seconds"] = round(time.perf_counter() - started, 1)
        record["cpu_seconds"] = round(time.process_time() - computed, 1)
        save_sb3(args.out, model.policy, shape, record)
        return record

    model.learn(args.steps, callback=_Report(args.steps, args.episode_steps, save))
    record = save()
    print(f"{record['actions']} actions, {record['seconds']} s ({record['cpu_seconds']} s of CPU); saved to {args.out}")
    results: dict[str, Any] = {"trained": record, "tables": []}
    if args.held_out:
        agent = SB3Agent(model.policy, shape)
        played: dict[str, Any] = {"samples": args.held_out, "max_steps": args.episode_steps, "seed": args.seed}
        for split, easy in itertools.product(args.splits, (True, False) if args.easy else (False,)):
            results["tables"].append(compare(agent, split, easy=easy, **played))
            print(f"\n{table(results['tables'][-1])}", flush=True)
        write_whole(args.out / "results.json", json.dumps(results, indent=1) + "\n")
    return results


class _Report(BaseCallback):
    """A line for every few updates: what the episodes since the last one came to. Saves the policy as well."""

    def __init__(self, steps: int, max_steps: int, save: Callable[[], Any]) -> None:
        super().__init__()
        self._steps, self._max_steps, self._save, self._updates = steps, max_steps, save, 0
        self._final: list[float] = []
        self._stopped: list[bool] = []

    def _on_step(self) -> bool:
        for info, done in zip(self.locals["infos"], self.locals["dones"], strict=True):
            if done:
                self._final.append(info["iou"])
                # A stop makes no step, so only the limit is met at the last one.
                self._stopped.append(bool(not info["terminal_observation"]["step"][self._max_steps]))
        return True

    def _on_rollout_end(self) -> None:
        self._updates += 1
        if self._updates % UPDATES_A_LINE or not self._final:
            return
        self._save()
        sampled = f"sampled final IoU {np.mean(self._final):.3f}   stopped {np.mean(self._stopped):.2f}"
        print(f"{self.num_timesteps:>8} of {self._steps} actions   {sampled}", flush=True)
        self._final.clear()
        self._stopped.clear()


class _LimitIsEnd(gym.Wrapper[dict[str, Any], np.ndarray, dict[str, Any], np.ndarray]):
    """The limit of actions as a termination.

    Stable-Baselines3 adds the value of what would follow to a truncated episode's last reward. Here nothing
    follows, the observation holds the step, and the value of the last one is never learned.
    """

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated or truncated, False, info


def make_env(dataset: Dataset, args: Args) -> gym.Env[Any, Any]:
    """At the size that is seen: a box drawn on the small image instead of shrunk with the large one."""
    reward = {"potential": args.potential}
    env = GroundingEnv(dataset, max_steps=args.episode_steps, canvas=args.side, reward=reward)
    return _LimitIsEnd(SB3Wrapper(env, side=args.side))


def _check(args: Args) -> None:
    least = dict.fromkeys(("steps", "samples", "episode_steps", "num_envs", "rollout", "epochs"), 1) | {"side": 16}
    for name, number in least.items():
        if getattr(args, name) < number:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: give an integer of at least {number}")
    if not 0 <= args.gamma <= 1:
        raise ValueError(f"--gamma {args.gamma}: give a number from 0 to 1")
    if args.batch < 2 or args.num_envs * args.rollout % args.batch:
        raise ValueError(
            f"--batch {args.batch}: give a number that divides the {args.num_envs * args.rollout} actions of a"
            " rollout (num-envs times rollout), so that no action counts less than the others"
        )
    if args.held_out and args.held_out < 2:
        raise ValueError(f"--held-out {args.held_out}: give 0, or at least 2 samples for an interval")


if __name__ == "__main__":
    run_command(main, Args)
