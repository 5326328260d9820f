"""Environments to test, actions to take in them, and exact comparison of what they give."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import gymnasium as gym
import numpy as np

import ivt_env
from ivt_env.data import DatasetFallbackWarning
from ivt_env.data.sample import Sample
from ivt_env.env import GroundingEnv

REAL = sorted(set(ivt_env.IDS) - {"IVT-Scenes-v0", "IVT-Photos-v0", "IVT-Screens-v0"})
NAN, INF = float("nan"), float("inf")
INVALID = {
    "NaN": ([NAN, 0.1, 0.5, 0.5], "not finite"),
    "infinite": ([0.1, 0.1, INF, 0.5], "not finite"),
    "too large for float32": ([0.1, 0.1, 1e300, 0.5], "not finite"),
    "outside": ([0.1, 0.1, 0.5, 1.2], "outside"),
    "negative": ([-0.1, 0.1, 0.5, 0.5], "outside"),
    "reversed": ([0.5, 0.1, 0.2, 0.5], "x2 <= x1"),
    "upside down": ([0.1, 0.5, 0.2, 0.2], "y2 <= y1"),
    "flat": ([0.1, 0.3, 0.2, 0.3], "y2 <= y1"),
    "a point": ([0.3, 0.3, 0.3, 0.3], "x2 <= x1"),
    "all zeros": ([0.0, 0.0, 0.0, 0.0], "x2 <= x1"),
    "flat once it is float32": ([0.5, 0.1, 0.5 + 1e-12, 0.5], "x2 <= x1"),
}


class Notes:
    """A data set in memory: two samples an image, expressions in several scripts."""

    name, split = "notes", "train"
    expressions = ("das größte Ü", "红色的圆圈", "الدائرة", "👩‍👩‍👧 left of 🟦", "nul \x00 in it", "", "x" * 1024)
    images = np.random.default_rng(0).integers(0, 256, (4, 20, 30, 3), dtype=np.uint8)
    images.setflags(write=False)

    def __init__(self) -> None:
        self.decoded: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self.expressions)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self.expressions):
            raise IndexError(index)
        name, box = f"p{index // 2}", (0.1, 0.2, 0.5 + index / 20, 0.9)
        return Sample(f"s{index}", name, self.expressions[index], box, (20, 30), self.name, self.split)

    def image(self, sample: Sample) -> Any:
        self.decoded[sample.image_id] += 1
        return self.images[int(sample.image_id[1:])]


def make(env_id: str, **kwargs: Any) -> GroundingEnv:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DatasetFallbackWarning)
        env = gym.make(env_id, **kwargs).unwrapped
    assert isinstance(env, GroundingEnv)
    return env


def scenes(**kwargs: Any) -> GroundingEnv:
    return make("IVT-Scenes-v0", **({"canvas": 64} | kwargs))


def propose(*box: float) -> dict[str, Any]:
    return {"box": np.array(box, dtype=np.float32), "stop": 0}


STOP = {"box": np.array([0.2, 0.2, 0.9, 0.9], dtype=np.float32), "stop": 1}


def random_action(rng: np.random.Generator) -> dict[str, Any]:
    """A valid box, a box that is refused, or a stop."""
    kind = rng.random()
    if kind < 0.2:
        box = np.array(list(INVALID.values())[int(rng.integers(len(INVALID)))][0])
    else:
        box = np.concatenate([rng.uniform(0, 0.5, 2), rng.uniform(0.5, 1, 2)])
    return {"box": box, "stop": int(kind > 0.85)}


def random_actions(rng: np.random.Generator, n: int) -> dict[str, Any]:
    """One of the above in each of ``n`` environments."""
    several = [random_action(rng) for _ in range(n)]
    with np.errstate(over="ignore"):
        box = np.array([one["box"] for one in several]).astype(np.float32)
    return {"box": box, "stop": np.array([one["stop"] for one in several])}


def play(env: GroundingEnv, rng: np.random.Generator, seed: int) -> tuple[list[float], list[dict[str, Any]]]:
    """Random actions to the end: the rewards, and the info at the start and at the end."""
    _, start = env.reset(seed=seed)
    rewards, over = [], False
    while not over:
        _, reward, terminated, truncated, info = env.step(random_action(rng))
        rewards.append(reward)
        over = terminated or truncated
    return rewards, [start, info]


def assert_equal(a: Any, b: Any) -> None:
    """Equal in keys, types, shapes and values; NaN does not occur."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, tuple | list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    elif isinstance(a, np.ndarray) and a.dtype == object:
        assert_equal(a.tolist(), b.tolist())
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    else:
        assert a == b
