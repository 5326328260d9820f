"""What a policy is asked at each step, in which layout, and in which frame its boxes come back.

A prompt file holds all of it, as YAML or JSON; the ``policy.json`` of a model folder is one. ``docs/prompts.md``
explains the keys. One wording serves SFT, rollouts and evaluation. It holds the current box in the model's
own coordinates (those of the first image shown), and the images say by themselves what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml  # type: ignore[import-untyped]
from numpy.typing import NDArray
from PIL import Image

from ivt_agents.config import KeysOnce
from ivt_agents.vlm.codec import ANSWER, WHOLE, Box, BoxCodec
from ivt_env import boxes
from ivt_env.failures import reading
from ivt_env.grounding import VIEWS
from ivt_env.rendering import Overlay, Surroundings
from ivt_env.rewards import from_options

TINY_NAME = "tiny"
"""The name of the shipped model, wherever a model folder or hub name is taken."""
NO_BOX_TEXT = "none"

LAYOUTS = ("fresh", "prefix")
SHIPPED = Path(__file__).parent.parent / "prompts"
"""Folder of the shipped prompt files."""
POLICY_FILE = "policy.json"
"""In a model's folder: what the model is asked."""
DEFAULT = "qwen3-vl"
"""What models are asked that do not say."""
MOST_CANVAS = 8192
HELD = ("dtype", "quantize", "first_answers")
"""Keys of ``policy.json`` that are not about what is asked."""


class PromptError(ValueError):
    """A prompt file that cannot be used. Names the file and the key."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """The user's turn, with ``{expression}``, ``{box}`` and ``{looks}`` to be filled in."""

    text: str
    closeup: str = ""
    """Added where the only image shown is a close-up."""
    with_closeup: str = ""
    """Added where a close-up is shown beside the whole image."""
    first: str = ""
    """The question before there is a box. Empty: ``text``."""

    @property
    def counts_looks(self) -> bool:
        """Whether the question says how often the episode has looked where the current box lies."""
        return "{looks}" in self.text

    def fill(
        self,
        expression: str,
        box_text: str | None,
        windows: Sequence[Box] = (WHOLE,),
        size: Sequence[int] = (0, 0),
        looks: int = 1,
    ) -> str:
        """The user's text about the current box, ``box_text`` in the model's coordinates, or None.

        ``windows`` are what each image shows, ``size`` (height, width) that of the first one in pixels, ``looks`` how
        often the episode has looked where the box lies.
        """
        # str.replace, not str.format: an expression may hold braces.
        text = self.first if box_text is None and self.first else self.text
        filled = text.replace("{box}", box_text or NO_BOX_TEXT).replace("{looks}", str(looks))
        filled = filled.replace("{height}", str(size[0])).replace("{width}", str(size[1]))
        if len(windows) > 1:
            filled += self.with_closeup
        elif tuple(windows[0]) != WHOLE:
            filled += self.closeup
        return filled.replace("{expression}", expression)


@dataclass(frozen=True, slots=True)
class ImageSize:
    """The size at which a served model is sent an image; the aspect ratio is kept as nearly as that allows."""

    multiple: int = 1
    """Height and width are multiples of it."""
    min_pixels: int = 1
    """Smaller images are enlarged."""
    max_pixels: int = 2**31
    """Larger ones are scaled down."""

    def __post_init__(self) -> None:
        values = multiple, least, most = (self.multiple, self.min_pixels, self.max_pixels)
        if not all(type(v) is int and v >= 1 for v in values) or most < max(least, multiple**2):
            raise ValueError(f"image: multiple, min_pixels and max_pixels are {values}; give whole numbers that fit")

    def of(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels at which an image of that size is sent: the rule of Qwen's processors."""
        unit = self.multiple
        rows, columns = (max(unit, round(side / unit) * unit) for side in (height, width))
        if rows * columns > self.max_pixels:
            scale = math.sqrt(height * width / self.max_pixels)
            rows, columns = (max(unit, math.floor(side / scale / unit) * unit) for side in (height, width))
        elif rows * columns < self.min_pixels:
            scale = math.sqrt(self.min_pixels / (height * width))
            rows, columns = (math.ceil(side * scale / unit) * unit for side in (height, width))
        return rows, columns

    def resize(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """An RGB image (height, width, 3) at the size at which it is sent."""
        rows, columns = self.of(*image.shape[:2])
        if (rows, columns) == image.shape[:2]:
            return image
        return np.asarray(Image.fromarray(image).resize((columns, rows), Image.Resampling.BICUBIC))


@dataclass(frozen=True, slots=True)
class Question:
    """What one observation asks, and how an answer to it is read."""

    text: str
    images: list[NDArray[np.uint8]]
    """RGB (height, width, 3), at the size at which they are sent."""
    windows: list[Box]
    """What each of them shows."""
    codec: BoxCodec

    def read(self, answer: str) -> tuple[list[float] | None, bool]:
        """The box of an answer, relative to the whole image (None: there is none), and whether it is a stop."""
        action = self.codec.parse(answer)
        return self.codec.box_of(action, [image.shape[:2] for image in self.images], self.windows), action.stop


@dataclass(frozen=True, slots=True)
class PromptFile:
    """What a prompt file says."""

    prompts: Prompts
    codec: BoxCodec = field(default_factory=BoxCodec)
    layout: str = "fresh"
    """``fresh``, a prompt of its own each step, or ``prefix``, one growing conversation."""
    view: str = "overlay"
    """What a box is shown on."""
    overlay: Mapping[str, Any] | None = None
    """How a box is drawn: options of ``Overlay``; None: its defaults."""
    around: Mapping[str, Any] | None = None
    """How much a close-up shows: options of ``Surroundings``; None: its defaults."""
    canvas: int | None = None
    """Side in pixels of the images that the environment makes; None: its default."""
    system: str = ""
    image: ImageSize = field(default_factory=ImageSize)
    max_tokens: int = 160
    """Limit of an answer; one that runs into it has no action."""
    request: Mapping[str, Any] = field(default_factory=dict)
    """Added to what a server is sent; a null takes a key out."""

    @property
    def shown(self) -> dict[str, Any]:
        """Keywords of the environment that shows what the model is to see."""
        found = {"view": self.view, "overlay": self.overlay, "closeup": self.around, "canvas": self.canvas}
        return {key: value for key, value in found.items() if value is not None}

    def question(self, observations: Mapping[str, Any], row: int) -> Question:
        """What the environment ``row`` of a batch of observations asks of a served model."""
        views = [(self.image.resize(image), window) for image, window in images_of(observations, row)]
        images, windows = [image for image, _ in views], [window for _, window in views]
        box, size, shown = observations["box"][row], images[0].shape[:2], None
        if box.any():
            shown = self.codec.box_text(boxes.clip(boxes.into_window(box, windows[0])).tolist(), size)
        text = self.prompts.fill(
            str(observations["expression"][row]), shown, windows, size, looks_of(observations, row)
        )
        return Question(text, images, windows, self.codec)

    def settings(self) -> dict[str, Any]:
        """Those keys that a model on this machine has in its ``policy.json``."""
        texts = {"prompt": self.prompts.text} | ({"first": self.prompts.first} if self.prompts.first else {})
        texts |= {"closeup": self.prompts.closeup, "with_closeup": self.prompts.with_closeup}
        shown = {"around" if key == "closeup" else key: value for key, value in self.shown.items()}
        return texts | {"frame": self.codec.frame, "layout": self.layout} | shown


def shipped_prompts() -> list[str]:
    """Names of the shipped prompt files."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def find_prompts(name: str | Path) -> Path:
    """The prompt file that is shipped under ``name``, or the file of that name; PromptError where there is neither."""
    shipped, path = SHIPPED / f"{name}.yaml", Path(name)
    if str(name) in shipped_prompts():
        return shipped
    if not path.is_file():
        raise PromptError(f"no prompts {str(name)!r}: give one of {', '.join(shipped_prompts())}, or a file")
    return path


def load_prompts(name: str | Path) -> PromptFile:
    """Read a shipped prompt file by its name, or a file; PromptError for one that cannot be used."""
    path = find_prompts(name)
    with reading(path, kind=PromptError):
        found = yaml.load(path.read_text(encoding="utf-8"), KeysOnce)
        if not isinstance(found, dict):
            raise ValueError(f"holds a {type(found).__name__}, not keys and values")
        return prompt_file(found)


def prompt_file(found: Mapping[str, Any]) -> PromptFile:
    """What the keys of a prompt file say; ValueError names the key that cannot be meant."""
    found = {key: value for key, value in found.items() if key not in HELD}
    words = ("prompt", "first", "closeup", "with_closeup", "system", "layout", "view", "frame", "answer")
    kinds: dict[str, type] = dict.fromkeys(words, str) | dict.fromkeys(("max_tokens", "canvas"), int)
    kinds |= dict.fromkeys(("overlay", "around", "image", "request"), dict)
    for key, value in found.items():
        if key not in kinds:
            raise ValueError(f"unknown key {key!r}; there are {', '.join(kinds)}")
        if not isinstance(value, kinds[key]) or isinstance(value, bool):
            raise ValueError(f"{key} is {value!r:.80}, expected a {kinds[key].__name__}")
    for key in ("prompt", "first"):
        if "{expression}" not in found.get(key, "") and (key == "prompt" or found.get(key)):
            raise ValueError(f"{key} is {found.get(key, '')!r:.80}, expected a text that asks for {{expression}}")
    for key, known in (("layout", LAYOUTS), ("view", VIEWS)):
        if found.get(key, known[0]) not in known:
            raise ValueError(f"{key} is {found[key]!r}, expected one of {', '.join(known)}")
    if found.get("max_tokens", 1) < 1:
        raise ValueError(f"max_tokens is {found['max_tokens']}, expected at least 1")
    if "frame" not in found:
        raise ValueError("frame is not declared, and it is never guessed: relative_1000, resized_pixels, ...")
    overlay = from_options(Overlay, "overlay", found.get("overlay"))
    if "{looks}" in found["prompt"] and not overlay.trail:
        raise ValueError("prompt counts {looks}, which are known with overlay: {trail: true} only")
    from_options(Surroundings, "closeup", found.get("around"))
    if not 16 <= found.get("canvas", 16) <= MOST_CANVAS:
        raise ValueError(f"canvas is {found['canvas']!r}, expected 16 to {MOST_CANVAS} pixels")
    image = found.get("image", {})
    if strange := set(image) - {"multiple", "min_pixels", "max_pixels"}:
        raise ValueError(f"image has the unknown key {min(strange)!r}; there are multiple, min_pixels, max_pixels")
    texts = {key: found.get(key, "") for key in ("closeup", "with_closeup", "first")}
    same = ("layout", "view", "overlay", "around", "canvas", "system", "max_tokens", "request")
    return PromptFile(
        Prompts(found["prompt"], **texts),
        BoxCodec(found["frame"], found.get("answer", ANSWER)),
        image=ImageSize(**image),
        **{key: found[key] for key in same if key in found},
    )


def looks_of(observations: Mapping[str, Any], row: int) -> int:
    """How often one environment's episode has looked where its current box lies; 1 where it keeps no trail."""
    if "history" not in observations:
        return 1
    return boxes.looks_at(observations["box"][row], observations["history"][row])


def images_of(observations: Mapping[str, Any], row: int) -> list[tuple[NDArray[np.uint8], Box]]:
    """What one environment shows: images (height, width, 3) and their windows.

    The close-up of ``view="both"`` counts once there is a box; before that it is the image again.
    """
    height, width = observations["extent"][row]
    window: Box = WHOLE
    if "window" in observations:
        x1, y1, x2, y2 = (float(v) for v in observations["window"][row])
        window = (x1, y1, x2, y2)
    image = observations["image"][row][:height, :width]
    if "closeup" not in observations:
        return [(image, window)]
    if not observations["box"][row].any():
        return [(image, WHOLE)]
    height, width = observations["closeup_extent"][row]
    return [(image, WHOLE), (observations["closeup"][row][:height, :width], window)]


TINY = load_prompts("tiny").prompts
QWEN = load_prompts(DEFAULT).prompts
