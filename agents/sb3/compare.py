"""Final IoU of a policy beside agents that look at nothing, on the same held-out samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from ivt_agents.play.on_split import play
from ivt_agents.play.scripted import CentreAgent, RandomAgent
from ivt_agents.sb3.easy import easy_indices
from ivt_env.data import load_dataset
from ivt_env.metrics.statistics import bootstrap_mean, paired_bootstrap
from ivt_env.rollouts import Agent, first_samples

ENV_ID = "IVT-Scenes-v0"


def compare(agent: Agent, split: str, *, easy: bool, samples: int, max_steps: int = 3, seed: int = 0) -> dict[str, Any]:
    """Play an agent (``ppo``), the random and the centre agent on the first (easy) samples of a split of the scenes.

    Returns:
        JSON-able: mean final IoU with 95 % intervals, share with IoU of at least 0.5, proposals an episode,
        and paired differences in final IoU of the agent with the two others.
    """
    dataset = load_dataset("scenes", split)
    indices = easy_indices(dataset, samples) if easy else list(first_samples(dataset, samples))
    agents: dict[str, Agent] = {"ppo": agent, "random": RandomAgent(seed), "centre": CentreAgent()}
    played = {name: play(one, ENV_ID, split, indices, seed=seed, max_steps=max_steps) for name, one in agents.items()}
    images = [e.image_id for e in played["ppo"]]
    final = {name: [e.final_iou for e in episodes] for name, episodes in played.items()}
    return {
        "split": split,
        "easy": easy,
        "samples": len(indices),
        "mean_final_iou": {k: asdict(bootstrap_mean(v, images)) for k, v in final.items()},
        "acc50": {k: float((np.array(v) >= 0.5).mean()) for k, v in final.items()},
        "proposals": {k: float(np.mean([sum(not s.stop for s in e.steps) for e in v])) for k, v in played.items()},
        "ppo_minus": {k: asdict(paired_bootstrap(final["ppo"], v, images)) for k, v in final.items() if k != "ppo"},
    }


def table(found: Mapping[str, Any]) -> str:
    """What ``compare`` found, for a terminal."""
    name = f"scenes/{found['split']}, {'easy' if found['easy'] else 'as they are'}, n = {found['samples']}"
    lines = [name, f"{'':8}{'final IoU':>28}{'Acc@0.5':>9}{'proposals':>11}{'ppo minus it':>36}"]
    for agent, mean in found["mean_final_iou"].items():
        difference = found["ppo_minus"].get(agent)
        said = "" if difference is None else _interval(difference["diff"], difference, "+")
        said += "" if difference is None or difference["shown"] else " not shown"
        lines.append(
            f"{agent:8}{_interval(mean['value'], mean):>28}{100 * found['acc50'][agent]:>9.1f}"
            f"{found['proposals'][agent]:>11.2f}{said:>36}"
        )
    return "\n".join(lines)


def _interval(value: float, bounds: Mapping[str, float], sign: str = "") -> str:
    return f"{value:{sign}.3f} [{bounds['low']:{sign}.3f}, {bounds['high']:{sign}.3f}]"
