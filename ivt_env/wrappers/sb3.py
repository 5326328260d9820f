"""The environment in the spaces that Stable-Baselines3 can take.

    env = SB3Wrapper(gym.make("IVT-Scenes-v0"))
    PPO("MultiInputPolicy", env).learn(10_000)

Nothing of Stable-Baselines3 is imported here: other libraries with one-level ``Dict`` observations and
``Box`` actions can use it as well.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from ivt_env.data.sample import ImageArray

SMALLEST = 0.04
"""Smallest width and height that an action can ask for, relative to the image."""

_IMAGES = {"image": "extent", "closeup": "closeup_extent"}
"""Keys of images and of their extents."""

PAIR_WEIGHT = 0.5
"""What a pair of neighbouring words counts for; a word counts for 1."""

# Scripts that do not part words with spaces give one word a sign.
_SIGNS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\u0e00-\u0e7f"
_WORD = re.compile(rf"[{_SIGNS}]|[^\W_{_SIGNS}]+")


class SB3Wrapper(gym.Wrapper[dict[str, Any], Any, dict[str, Any], Any], gym.utils.RecordConstructorArgs):
    """One-level observations without text, and five numbers as the action.

    ## Action space
    `Box(-1, 1, (5,), float32)`: centre x and y, width, height, stop.

    | number | meaning |
    | --- | --- |
    | 0, 1 | centre of the box: -1 is the left (top) edge of the image, 1 the right (bottom) edge |
    | 2, 3 | width and height on a logarithmic scale: -1 is 0.04 of the image, 0 is 0.2, 1 is all of it |
    | 4 | stop, if it is above `stop_above` |

    What lies outside the image is cut off, so every action is a usable box. On the logarithmic scale a step changes a
    small box and a large one by the same factor, as IoU does.

    ## Observation space
    | key | space | meaning |
    | --- | --- | --- |
    | `image` | `Box(0, 255, (3, side, side), uint8)` | the image with the box drawn, stretched to a square |
    | `box` | `Box(0, 1, (4,), float32)` | the current box; all zeros: none yet |
    | `step` | `Box(0, 1, (max_steps + 1,), float32)` | actions made so far: 1 at their number, else 0 |
    | `expression` | `Box(-1, 1, (text_size,), float32)` | `HashedText` of the expression |
    | `window` | `Box(0, 1, (4,), float32)` | only with a close-up: the region it shows |
    | `closeup` | as `image` | only with `view="both"` |

    The image fills the square, without the canvas's margin, so that its coordinates are those of the box. Channels
    come first, as torch wants them. Rewards, ends and infos are those of the environment.
    """

    def __init__(
        self, env: gym.Env[Any, Any], side: int = 48, text_size: int = 128, text_seed: int = 0, stop_above: float = 0.5
    ) -> None:
        """Wrap.

        Args:
            env: a grounding environment.
            side: of the image in pixels. Stable-Baselines3's own network needs at least 36.
            text_size: numbers in the text embedding.
            text_seed: of the text embedding.
            stop_above: see the action space. Above 0, so that a policy that has learned nothing rather looks on.

        Raises:
            ValueError: for an environment of another kind, or an option that is out of range.
        """
        gym.utils.RecordConstructorArgs.__init__(
            self, side=side, text_size=text_size, text_seed=text_seed, stop_above=stop_above
        )
        gym.Wrapper.__init__(self, env)
        given = env.observation_space
        if not isinstance(given, spaces.Dict) or not {"image", "extent", "expression", "box", "step"} <= set(given):
            raise ValueError(f"SB3Wrapper wraps a grounding environment; this one observes {given}")
        if not isinstance(side, int) or side < 1:
            raise ValueError(f"side {side!r}: give the side of the image in pixels, an integer of at least 1")
        if not isinstance(stop_above, int | float) or not -1 <= stop_above < 1:
            raise ValueError(f"stop_above {stop_above!r}: give a number from -1 to below 1")
        self.side, self.text, self.stop_above = side, HashedText(text_size, text_seed), float(stop_above)
        self.max_steps = int(given["step"].n) - 1  # type: ignore[attr-defined]
        view = "both" if "closeup" in given.spaces else "closeup" if "window" in given.spaces else "overlay"
        self.observation_space = sb3_observation_space(view, side, text_size, self.max_steps)
        self.action_space = sb3_action_space()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin an episode; options as in the environment."""
        observation, info = self.env.reset(seed=seed, options=options)
        return sb3_observation(observation, self.side, self.text, self.max_steps), info

    def step(self, action: NDArray[np.float32]) -> tuple[dict[str, Any], Any, bool, bool, dict[str, Any]]:
        """Play five numbers."""
        box, stop = decode_action(action, self.stop_above)
        observation, reward, terminated, truncated, info = self.env.step({"box": box, "stop": int(stop)})
        seen = sb3_observation(observation, self.side, self.text, self.max_steps)
        return seen, reward, terminated, truncated, info


def sb3_action_space() -> spaces.Box:
    """See ``SB3Wrapper``."""
    return spaces.Box(-1.0, 1.0, (5,), np.float32)


def sb3_observation_space(view: str, side: int, text_size: int, max_steps: int) -> spaces.Dict:
    """See ``SB3Wrapper``; ``view`` is that of the environment."""
    image = spaces.Box(0, 255, (3, side, side), np.uint8)
    relative_box = spaces.Box(0.0, 1.0, (4,), np.float32)
    parts: dict[str, spaces.Space[Any]] = {
        "image": image,
        "box": relative_box,
        "step": spaces.Box(0.0, 1.0, (max_steps + 1,), np.float32),
        "expression": spaces.Box(-1.0, 1.0, (text_size,), np.float32),
    }
    if view != "overlay":
        parts["window"] = relative_box
    if view == "both":
        parts["closeup"] = image
    return spaces.Dict(parts)


def sb3_observation(observation: Mapping[str, Any], side: int, text: HashedText, max_steps: int) -> dict[str, Any]:
    """One observation of the environment, without a leading axis, as the wrapper gives it."""
    seen: dict[str, Any] = {
        "box": observation["box"],
        "step": np.eye(max_steps + 1, dtype=np.float32)[int(observation["step"])],
        "expression": text.embed(observation["expression"]),
    }
    if "window" in observation:
        seen["window"] = observation["window"]
    for key, extent_key in _IMAGES.items():
        if key in observation:
            seen[key] = square_image(observation[key], observation[extent_key], side)
    return seen


def square_image(canvas: ImageArray, extent: ArrayLike, side: int) -> ImageArray:
    """The image of ``extent`` (height, width) at the top left of a canvas (S, S, 3), stretched to a square.

    Returns:
        uint8 (3, side, side); each pixel is the mean of those that fall on it.
    """
    height, width = (int(v) for v in np.asarray(extent))
    image = canvas[:height, :width]
    if (height, width) != (side, side):
        image = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BOX))
    return np.ascontiguousarray(image.transpose(2, 0, 1))


def decode_action(action: ArrayLike, stop_above: float) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Boxes and stops of actions of shape (..., 5).

    Returns:
        xyxy relative to the image, (..., 4) float32, and whether to stop, (...). Every action within
        [-1, 1] gives a usable box; one with a NaN gives a box with a NaN, which the environment refuses.
    """
    numbers = np.asarray(action, dtype=np.float64)
    centre = (numbers[..., :2] + 1) / 2
    size = SMALLEST ** ((1 - numbers[..., 2:4]) / 2)
    edges = np.concatenate([np.maximum(centre - size / 2, 0), np.minimum(centre + size / 2, 1)], axis=-1)
    return edges.astype(np.float32), np.asarray(numbers[..., 4] > stop_above)


@dataclass(frozen=True, slots=True)
class HashedText:
    """Feature hashing of words and of pairs of neighbouring words (Weinberger et al., arXiv 0902.2206).

    A hash sends each word, and each ordered pair of neighbours, to one of ``size`` places and to a sign; what falls
    on one place is added up, and the sum is scaled to length 1. It knows word order in pairs only and no meanings:
    *red* is as far from *orange* as from *ring*. Case and punctuation do not count.
    """

    size: int = 128
    """Numbers in a vector."""
    seed: int = 0
    """Of the hash."""

    def __post_init__(self) -> None:
        """Refuse sizes and seeds that cannot be used."""
        if not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"size {self.size!r} of the text embedding: give an integer of at least 1")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**64:
            raise ValueError(f"seed {self.seed!r} of the text embedding: give an integer of at least 0, below 2**64")

    def embed(self, text: str) -> NDArray[np.float32]:
        """The vector of a text, shape (size,), of length 1; zeros for a text without a word."""
        words = _WORD.findall(text.casefold())
        vector = np.zeros(self.size)
        pairs = (f"{first} {second}" for first, second in pairwise(words))
        for term, weight in (*((word, 1.0) for word in words), *((pair, PAIR_WEIGHT) for pair in pairs)):
            place, sign = _place(term, self.size, self.seed)
            vector[place] += weight * sign
        length = float(np.linalg.norm(vector))
        return (vector / length if length > 0 else vector).astype(np.float32)


@lru_cache(maxsize=65536)
def _place(term: str, size: int, seed: int) -> tuple[int, int]:
    """Place 0..size-1 and sign of a term. Python's own ``hash`` differs from process to process."""
    digest = hashlib.blake2b(term.encode("utf-8", "surrogatepass"), digest_size=9, key=seed.to_bytes(8, "little"))
    number = digest.digest()
    return int.from_bytes(number[:8], "little") % size, 1 if number[8] & 1 else -1
