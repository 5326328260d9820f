"""Draw the gallery with the project's own renderer: ``python docs/make_gallery.py``.

Everything comes from the environment: ``render()`` of scripted episodes, observations as an agent gets them, and the
contact sheet of ``ivt data show``. The boxes of the scripted episodes are computed from the target box; they show the
loop, and measure nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ivt_env  # noqa: E402, F401  (registers the ids)
from ivt_agents.command import run_command  # noqa: E402
from ivt_env.data import load_dataset  # noqa: E402
from ivt_env.data.sample import ImageArray  # noqa: E402
from ivt_env.data.sheet import contact_sheet  # noqa: E402
from ivt_env.env import GroundingEnv  # noqa: E402
from ivt_env.rendering import caption_font  # noqa: E402

EYE = 11
"""A sample of the photographs: the cat's eye on the left."""
SCENE = 0
"""A sample of the scenes' test split."""
_BACKGROUND, _INK = (24, 26, 30), (235, 235, 235)


@dataclass
class Args:
    """Draw the images of the gallery."""

    out: Path = Path(__file__).parent / "gallery"
    """Folder of the images."""


def main(args: Args) -> None:
    """Draw and write every image."""
    args.out.mkdir(parents=True, exist_ok=True)
    photo = dict(env_id="IVT-Photos-v0", index=EYE, canvas=451)
    corrected = [near(photo, (-0.45, -0.5, 0.15, -0.1)), near(photo, (-0.06, -0.06, 0.05, 0.06)), None]
    write_gif(args.out / "episode.gif", episode(photo, corrected, crop=300), milliseconds=1500)
    scene = dict(env_id="IVT-Scenes-v0", index=SCENE, canvas=384)
    closer = [near(scene, (-0.5, -0.7, -0.3, -0.2)), near(scene, (-0.03, -0.05, 0.02, 0.04)), None]
    write_gif(args.out / "episode_scenes.gif", episode(scene, closer), milliseconds=1500)
    write_png(args.out / "steps.png", row(episode(scene, closer)[1:], ["step 0", "step 1", "stop"]))
    write_png(args.out / "views.png", views())
    write_png(args.out / "overlays.png", overlays())
    write_png(args.out / "splits.png", splits())
    write_png(args.out / "photos.png", contact_sheet(load_dataset("photos", "all"), range(0, 16, 2), 4, 220))


def make(env_id: str, index: int, **kwargs: Any) -> tuple[GroundingEnv, dict[str, Any]]:
    """An environment at the start of the episode of one sample, and its first observation."""
    env = gym.make(env_id, split="test", **kwargs).unwrapped
    assert isinstance(env, GroundingEnv)
    return env, env.reset(options={"index": index})[0]


def near(where: Mapping[str, Any], by: Sequence[float]) -> list[float]:
    """A sample's target with each edge moved, ``by`` in widths and heights of the target."""
    env, _ = make(where["env_id"], where["index"])
    box = np.array(env.sample.box)
    return np.clip(box + np.array(by) * np.tile(box[2:] - box[:2], 2), 0, 1).tolist()


def episode(
    where: Mapping[str, Any], actions: Sequence[list[float] | None], crop: int | None = None
) -> list[ImageArray]:
    """The frames of an episode, the one before the first action included.

    Args:
        where: ``env_id``, ``index`` and ``canvas``.
        actions: boxes; None is a stop.
        crop: rows of the image on the canvas, where there is an empty margin below it.
    """
    env, _ = make(**where, render_mode="rgb_array")
    frames = [env.render()]
    for box in actions:
        env.step({"box": box or [0, 0, 0, 0], "stop": int(box is None)})
        frames.append(env.render())
    if crop is not None:
        side = where["canvas"]
        frames = [np.concatenate([frame[:crop], frame[side:]]) for frame in frames]
    return frames


def views() -> ImageArray:
    """What an agent sees of one box with each view: the image, and the region around the box."""
    env, _ = make("IVT-Photos-v0", EYE, view="both", canvas=451)
    box = near({"env_id": "IVT-Photos-v0", "index": EYE}, (0.2, -0.1, 0.15, 0.2))
    observation = env.step({"box": box, "stop": 0})[0]
    shown = []
    for image, extent in (("image", "extent"), ("closeup", "closeup_extent")):
        height, width = observation[extent]
        shown.append(scaled(observation[image][:height, :width], 300))
    return row(shown, ["overlay (the default)", 'closeup; "both" shows the two'])


def overlays() -> ImageArray:
    """The styles in which a box can be drawn for an agent."""
    options: list[dict[str, Any]] = [
        {},
        {"style": "outline"},
        {"style": "both", "colour": [40, 110, 255], "opacity": 0.2},
    ]
    shown = []
    for overlay in options:
        env, _ = make("IVT-Scenes-v0", SCENE, overlay=overlay, canvas=256)
        box = near({"env_id": "IVT-Scenes-v0", "index": SCENE}, (-0.1, 0.1, 0.1, 0.2))
        shown.append(env.step({"box": box, "stop": 0})[0]["image"])
    return row(shown, ["default: style fill, opacity 0.35", "style outline", "style both, another colour"])


def splits() -> ImageArray:
    """A sample of each kind of scene with its target."""
    shown = []
    for split, index in (("test", 0), ("test_distractors", 1), ("test_small", 2)):
        env = gym.make("IVT-Scenes-v0", split=split, canvas=256, render_mode="rgb_array")
        env.reset(options={"index": index})
        # Without the lines about steps and boxes: nothing has been played.
        shown.append(np.asarray(env.render())[: 256 + 18])
    return row(shown, ["test", "test_distractors", "test_small"])


def scaled(image: ImageArray, height: int) -> ImageArray:
    """An image at another height."""
    width = round(image.shape[1] * height / image.shape[0])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def row(images: Sequence[ImageArray], names: Sequence[str], gap: int = 8, line: int = 24) -> ImageArray:
    """Images of one height side by side, a name above each."""
    height = images[0].shape[0]
    width = sum(image.shape[1] + gap for image in images) + gap
    page = Image.new("RGB", (width, height + line + 2 * gap), _BACKGROUND)
    pen, left = ImageDraw.Draw(page), gap
    for image, name in zip(images, names, strict=True):
        pen.text((left, gap // 2 + 2), name, font=caption_font(14), fill=_INK)
        page.paste(Image.fromarray(image), (left, line + gap))
        left += image.shape[1] + gap
    return np.asarray(page)


def write_png(path: Path, pixels: ImageArray) -> None:
    """Write a PNG of 256 colours: a third of the size, and nothing that matters here is lost."""
    image = Image.fromarray(pixels).quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    image.save(path, optimize=True)
    print(path)


def write_gif(path: Path, frames: Sequence[ImageArray], milliseconds: int) -> None:
    """Write a moving image that repeats; its last frame stays twice as long."""
    # One palette for all frames, so that colours do not flicker.
    strip = Image.fromarray(np.concatenate(list(frames)))
    palette = strip.quantize(256, method=Image.Quantize.MEDIANCUT)
    images = [Image.fromarray(f).quantize(palette=palette, dither=Image.Dither.NONE) for f in frames]
    times = [milliseconds] * (len(images) - 1) + [2 * milliseconds]
    images[0].save(path, save_all=True, append_images=images[1:], duration=times, loop=0, optimize=True)
    print(path)


if __name__ == "__main__":
    run_command(main, Args)
