"""A trained PPO as an agent of this project, and the folder that it is saved in.

The folder holds ``policy.pt`` (weights only, so that loading it calls nothing) and ``config.json`` (what is
needed to make the policy, and how it was trained).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.policies import ActorCriticPolicy

from ivt_agents.play.scripted import no_actions
from ivt_agents.sb3.network import make_policy
from ivt_env.failures import read_json, reading
from ivt_env.files import whole_file, write_whole
from ivt_env.wrappers import HashedText
from ivt_env.wrappers.sb3 import decode_action, sb3_action_space, sb3_observation, sb3_observation_space

CONFIG_FILE, WEIGHTS_FILE = "config.json", "policy.pt"
_SHAPE = {"side": int, "text_size": int, "text_seed": int, "stop_above": float, "max_steps": int}
"""What ``config.json`` must say, and its type."""


class SB3Error(ValueError):
    """A folder that holds no usable PPO. Says which file, and what to do."""


class SB3Agent:
    """Plays this project's batches of observations with a policy of Stable-Baselines3."""

    shown: Mapping[str, Any] = {"view": "overlay"}
    """What it was trained to see."""

    def __init__(self, policy: ActorCriticPolicy, shape: Mapping[str, Any], deterministic: bool = True) -> None:
        """Wrap a policy that was trained behind ``SB3Wrapper``; ``deterministic``: its most probable action.

        ``shape`` holds ``side``, ``text_size``, ``text_seed``, ``stop_above`` of the wrapper, and ``max_steps``.
        """
        self.policy, self.deterministic = policy, deterministic
        self._side, self._stop_above = int(shape["side"]), float(shape["stop_above"])
        self._max_steps = int(shape["max_steps"])
        self._text = HashedText(int(shape["text_size"]), int(shape["text_seed"]))

    def act(self, observations: Mapping[str, Any]) -> dict[str, Any]:
        """``box`` (N, 4), ``stop`` (N,); SB3Error at a step or for a view that the policy was not trained for."""
        active = np.asarray(observations["active"])
        actions = no_actions(len(active))
        if not len(rows := np.flatnonzero(active)):
            return actions
        if "window" in observations:
            raise SB3Error("this policy was trained on whole images: play it with view='overlay'")
        if (latest := int(np.asarray(observations["step"])[rows].max())) >= self._max_steps:
            raise SB3Error(
                f"action {latest + 1} of an episode: this policy was trained for at most {self._max_steps};"
                f" play with max_steps={self._max_steps}"
            )
        seen = [
            sb3_observation({k: v[i] for k, v in observations.items()}, self._side, self._text, self._max_steps)
            for i in rows
        ]
        batch = {key: np.stack([one[key] for one in seen]) for key in seen[0]}
        numbers, _ = self.policy.predict(batch, deterministic=self.deterministic)
        boxes, stops = decode_action(numbers, self._stop_above)
        actions["box"][rows], actions["stop"][rows] = boxes, stops
        return actions

    def reset(self, mask: NDArray[np.bool_]) -> None:
        """Nothing to forget."""


def save_sb3(folder: Path, policy: ActorCriticPolicy, shape: Mapping[str, Any], trained: Mapping[str, Any]) -> None:
    """Write a policy, its ``shape`` (see ``SB3Agent``) and a JSON-able record of how it was trained."""
    content = {**{key: shape[key] for key in _SHAPE}, "trained": dict(trained)}
    with whole_file(folder / WEIGHTS_FILE) as file:
        torch.save(policy.state_dict(), file)
    write_whole(folder / CONFIG_FILE, json.dumps(content, indent=2) + "\n")


def load_sb3(folder: str | Path, *, deterministic: bool = True, seed: int | None = None) -> SB3Agent:
    """The agent that ``python -m ivt_agents.sb3.train`` saved.

    With ``deterministic=False`` it samples, and ``seed``, of PyTorch's generator, decides what. SB3Error for a folder
    that cannot be used.
    """
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file():
        raise SB3Error(f"no PPO in {folder}: no {CONFIG_FILE}; `python -m ivt_agents.sb3.train --out {folder}`")
    shape = _read_shape(folder / CONFIG_FILE)
    if not (folder / WEIGHTS_FILE).is_file():
        raise SB3Error(f"{folder} has no {WEIGHTS_FILE}: its training did not come to its end; run it again")
    space = sb3_observation_space("overlay", shape["side"], shape["text_size"], shape["max_steps"])
    policy = make_policy(space, sb3_action_space())
    with reading(folder / WEIGHTS_FILE, kind=SB3Error, problem=f"does not hold the policy of {CONFIG_FILE}"):
        policy.load_state_dict(torch.load(folder / WEIGHTS_FILE, map_location="cpu", weights_only=True))
    policy.set_training_mode(False)
    if seed is not None and not deterministic:
        torch.manual_seed(seed)
    return SB3Agent(policy, shape, deterministic)


def _read_shape(path: Path) -> dict[str, Any]:
    content = read_json(path, kind=SB3Error)
    shape: dict[str, Any] = {}
    for key, kind in _SHAPE.items():
        value = content.get(key)
        if not isinstance(value, (int, float) if kind is float else int) or isinstance(value, bool):
            raise SB3Error(f"{path}: {key} is {value!r}, expected {'a number' if kind is float else 'an integer'}")
        # Limits against a file that would ask for any amount of memory.
        if kind is int and not (0 if key == "text_seed" else 1) <= value <= 4096:
            raise SB3Error(f"{path}: {key} is {value}, expected at most 4096")
        shape[key] = value
    return shape
