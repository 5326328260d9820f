"""Made-up episodes on the photographs, with every awkward case, for a page to show."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import ivt_env
from ivt_env import boxes
from ivt_env.data.sample import ImageArray
from ivt_env.episodes import Box, Episode, Step

PHOTOS = Path(ivt_env.__path__[0]) / "assets" / "photos"
HOSTILE = "</script><img src=x onerror=\"window.ran=1;document.title='ran'\"><script>window.ran=1</script>"
SEPARATORS = "a\u2028b\u2029c & <b>bold</b> <!-- "


@cache
def photo(name: str) -> ImageArray:
    if name.startswith("portrait-"):  # the photographs are square or wide; this is a tall piece of one
        return np.ascontiguousarray(photo(name.removeprefix("portrait-"))[:, 100:330])
    return np.asarray(Image.open(PHOTOS / name).convert("RGB"))


def photo_of(episode: Episode) -> ImageArray:
    return photo(episode.image_id)


def play(target: Box, proposals: list[Box | None], **fields: Any) -> Episode:
    """An episode whose steps put forward ``proposals``; None is text without a usable action."""
    initial = fields.get("initial_box")
    current: Box | None = initial
    steps: list[Step] = []
    before = float(boxes.iou(initial, target)) if initial else 0.0
    for proposal in proposals:
        current = proposal or current
        overlap = float(boxes.iou(current, target)) if current else 0.0
        steps.append(Step(proposal, False, current, overlap, overlap - before, parse_failure=proposal is None))
        before = overlap
    defaults: dict[str, Any] = {
        "sample_id": "s0", "image_id": "coffee.jpg", "dataset": "photos", "split": "all",
        "expression": "the cup", "agent": "made-up",
    }  # fmt: skip
    defaults |= fields
    if "size" not in defaults:
        defaults["size"] = photo(defaults["image_id"]).shape[:2]
    return Episode(target=target, steps=steps, truncated=True, **defaults)


def stopping(episode: Episode, probability: float = 0.9) -> Episode:
    """The same episode, ended by a stop."""
    box = episode.steps[-1].box if episode.steps else episode.initial_box
    text = 'The box fits the object on all four sides. {"stop": true}'
    episode.steps.append(Step(None, True, box, episode.final_iou, 0.0, text=text, stop_probability=probability))
    episode.terminated, episode.truncated = True, False
    return episode


def shifted(box: Box, dx: float, dy: float, grow: float = 0.0) -> Box:
    x1, y1, x2, y2 = np.clip([box[0] + dx, box[1] + dy, box[2] + dx + grow, box[3] + dy + grow], 0, 1)
    return float(x1), float(y1), float(x2), float(y2)


def made_up_episodes(seed: int = 0) -> list[Episode]:
    """Every annotated photograph with made-up proposals, then the awkward cases."""
    rng = np.random.default_rng(seed)
    made = []
    rows = (PHOTOS / "annotations.jsonl").read_text(encoding="utf-8").splitlines()
    for number, row in enumerate(map(json.loads, rows)):
        target = tuple(boxes.to_relative(row["bbox"], (row["height"], row["width"])).tolist())
        first, last = sorted(rng.uniform(0.0, 0.25, size=2), reverse=bool(number % 4))
        path = np.linspace(first, last, 3) * rng.choice([-1, 1])
        proposals: list[Box | None] = [shifted(target, d * (target[2] - target[0]) * 2, d / 4) for d in path]
        episode = play(
            target, proposals[: 2 + number % 2],
            sample_id=f"photos-{number}", image_id=row["image"], expression=row["expression"], seed=seed,
            size=(row["height"], row["width"]),
        )  # fmt: skip
        for index, step in enumerate(episode.steps):
            box = [round(1000 * v) for v in step.box or ()]
            step.stop_probability = 0.1 + 0.3 * index
            step.text = (
                "The red box covers part of the object and too much of the background on its left. "
                f'Its right edge should move outwards.\n{{"bbox_2d": {box}}}'
            )
        made.append(stopping(episode) if number % 2 == 0 else episode)
    cup: Box = (0.29, 0.04, 0.687, 0.755)
    hostile = play(cup, [shifted(cup, 0.1, 0.1), None, cup], sample_id="hostile" + HOSTILE, expression=HOSTILE)
    for step in hostile.steps:
        step.text = HOSTILE + SEPARATORS
    long = "the cup " + "that stands on the saucer which lies on the table " * 30 + "and" + "n" * 300 + "d"
    refused = play(cup, [shifted(cup, 0.05, 0.0)], sample_id="refused", expression="the cup, refused once")
    refused.steps.append(
        Step(None, False, refused.steps[0].box, refused.final_iou, 0.0, invalid="x2 <= x1: [0.5, 0.1, 0.4, 0.9]")
    )
    return [
        *made,
        hostile,
        play(cup, [cup], sample_id="long", expression=long),
        play(cup, [None, None], sample_id="no-box", expression="nothing was ever proposed"),
        play(cup, [], sample_id="no-step", expression="no step was taken"),
        refused,
        stopping(play(cup, [cup], sample_id="started", expression="given a box", initial_box=(0.5, 0.5, 0.9, 0.9))),
        play(
            (0.3, 0.15, 0.85, 0.9), [(0.1, 0.1, 0.6, 0.5), (0.3, 0.2, 0.9, 0.9)],
            sample_id="tall", image_id="portrait-astronaut.jpg", expression="the tall image",
        ),
    ]  # fmt: skip
