"""Easy scenes (few objects, asked for by what they look like), and a policy beside agents that look at nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from ivt_agents.play.on_split import play
from ivt_agents.play.scripted import CentreAgent, RandomAgent
from ivt_env.data import load_dataset
from ivt_env.data.sample import Dataset, ImageArray, Sample
from ivt_env.metrics.statistics import bootstrap_mean, paired_bootstrap
from ivt_env.rollouts import Agent, first_samples

MAX_THINGS = 2
"""Objects in an easy scene."""
KIND = "attributes"
"""Its expressions name a colour, a shape, a texture or a size, and compare nothing."""


def easy_indices(dataset: Dataset, count: int) -> list[int]:
    """The first ``count`` easy samples of a split of the scenes; ValueError where there are not as many."""
    if dataset.name != "scenes":
        raise ValueError(f"easy scenes are picked from the scenes, not from {dataset.name}: use --no-easy there")
    metas = ((index, dataset[index].meta) for index in range(len(dataset)))
    easy = (index for index, meta in metas if meta["things"] <= MAX_THINGS and meta["kind"] == KIND)
    found = list(islice(easy, count))
    if len(found) < count:
        raise ValueError(f"{dataset.name} {dataset.split} has {len(found)} easy samples, {count} were asked for")
    return found


class SmallImages:
    """``Dataset`` of some samples of another, whose images are scaled to a square once and then held.

    To draw a scene takes longer than to play it. Boxes are relative, so they hold for the small image.
    """

    def __init__(self, dataset: Dataset, indices: list[int], side: int) -> None:
        """Hold nothing yet. ``indices`` of the samples give their order here; images are ``side`` pixels square."""
        self.name, self.split = dataset.name, dataset.split
        self._dataset, self._indices, self._side = dataset, indices, side
        self._images: dict[str, ImageArray] = {}

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}/{self.split}: {len(self)} samples are held, index {index} is outside")
        return replace(self._dataset[self._indices[index]], size=(self._side, self._side))

    def image(self, sample: Sample) -> ImageArray:
        """RGB uint8 (side, side, 3)."""
        if sample.image_id not in self._images:
            full = Image.fromarray(self._dataset.image(sample))
            held = np.asarray(full.resize((self._side, self._side), Image.Resampling.BOX))
            held.setflags(write=False)
            self._images[sample.image_id] = held
        return self._images[sample.image_id]


ENV_ID = "IVT-Scenes-v0"


def compare(agent: Agent, split: str, *, easy: bool, samples: int, max_steps: int = 3, seed: int = 0) -> dict[str, Any]:
    """Play an agent (``ppo``), the random and the centre agent on the first (easy) samples of a split of the scenes.

    JSON-able: mean final IoU with 95 % intervals, share with IoU of at least 0.5, proposals an episode, and paired
    differences in final IoU of the agent with the two others.
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
        said = ""
        if difference := found["ppo_minus"].get(agent):
            said = _interval(difference["diff"], difference, "+") + ("" if difference["shown"] else " not shown")
        lines.append(
            f"{agent:8}{_interval(mean['value'], mean):>28}{100 * found['acc50'][agent]:>9.1f}"
            f"{found['proposals'][agent]:>11.2f}{said:>36}"
        )
    return "\n".join(lines)


def _interval(value: float, bounds: Mapping[str, float], sign: str = "") -> str:
    return f"{value:{sign}.3f} [{bounds['low']:{sign}.3f}, {bounds['high']:{sign}.3f}]"
