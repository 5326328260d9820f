"""Steps per second of the environment alone, against the same loop written plainly with Pillow.

    python benchmarks/environment.py

Both ways run in turn in this process on the same photographs at 640 pixels; the ratio is what counts,
as absolute times depend on the machine.
"""

from __future__ import annotations

import time

import gymnasium as gym
import numpy as np
from PIL import Image, ImageDraw

import ivt_env  # noqa: F401  registers the ids
from ivt_env.data.photos import Photos


def plain(pictures: list[np.ndarray], boxes: np.ndarray) -> float:
    """Seconds a step: paste the picture, draw the box in RGBA, back to an array."""
    start = time.perf_counter()
    for i, box in enumerate(boxes):
        picture = Image.fromarray(pictures[i % len(pictures)])
        canvas = Image.new("RGBA", (640, 640))
        canvas.paste(picture, (0, 0))
        layer = Image.new("RGBA", (640, 640))
        corners = [float(v * s) for v, s in zip(box, picture.size * 2, strict=True)]
        ImageDraw.Draw(layer).rectangle(corners, fill=(255, 0, 0, 89))
        np.asarray(Image.alpha_composite(canvas, layer).convert("RGB"))
    return (time.perf_counter() - start) / len(boxes)


def environment(boxes: np.ndarray) -> float:
    """Seconds a step of the single environment."""
    env = gym.make("IVT-Photos-v0", max_steps=len(boxes) + 1).unwrapped
    env.reset(seed=0)
    start = time.perf_counter()
    for box in boxes:
        env.step({"box": box, "stop": 0})
    return (time.perf_counter() - start) / len(boxes)


def main() -> None:
    """Print both and their ratio, median of five rounds."""
    rng = np.random.default_rng(0)
    boxes = np.sort(rng.random((300, 2, 2)), axis=1).reshape(-1, 4).astype(np.float32)
    photos = Photos("test")
    pictures = [photos.picture(photos[i]) for i in (0, 5, 8, 10, 13)]
    rounds = [(plain(pictures, boxes), environment(boxes)) for _ in range(5)]
    a, b = np.median(np.array(rounds), axis=0)
    print(f"plain Pillow {1e3 * a:.3f} ms a step, environment {1e3 * b:.3f} ms a step, ratio {a / b:.1f}")


if __name__ == "__main__":
    main()
