"""Write episodes as one HTML file that needs no server and no network.

The page holds everything: its style, its script, the episodes as JSON and each distinct picture
once. Boxes are drawn by the browser over the picture, so a picture is shared by all its episodes.

Expressions and model output are text of unknown origin. They reach the page as JSON in which no
character can end a script block, are shown as text only, and the page's Content-Security-Policy
lets nothing run but the one script whose hash it names.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ivt_env import boxes
from ivt_env.data.sample import DataError, Picture
from ivt_env.episodes import Episode, Step

_JPEG_QUALITY = 85
_SAME_BOX = 1e-4
"""Two runs agree on a target within this much: one of them may hold float32 numbers."""


def write_page(
    path: str | Path,
    episodes: Mapping[str, Sequence[Episode]] | Sequence[Episode],
    picture_of: Callable[[Episode], Picture],
    title: str,
    max_picture_side: int = 512,
) -> Path:
    """Write a self-contained page of ``episodes`` to ``path``; returns the path.

    Several runs, given by name, are shown two at a time, side by side. Their episodes are matched
    by data set, split and sample id; repeated episodes of one sample are matched in order. The
    file appears whole or not at all.

    Args:
        path: the HTML file to write.
        episodes: one run, or runs by name over the same samples.
        picture_of: gives the picture of an episode; called once per distinct picture.
        title: heading of the page.
        max_picture_side: larger pictures are scaled down to this many pixels; none is enlarged.

    Raises:
        ValueError: if there is nothing to show or ``max_picture_side`` is below 1.
        DataError: if an episode or picture cannot be shown, or two runs disagree about a sample.
    """
    if max_picture_side < 1:
        raise ValueError(f"max_picture_side is {max_picture_side}, it must be at least 1 pixel")
    runs = dict(episodes) if isinstance(episodes, Mapping) else {_name(episodes): episodes}
    if not any(runs.values()):
        raise ValueError(f"no episodes to show in {list(runs)}: give at least one")
    _check_runs_agree(runs)

    first_of_picture: dict[tuple[str, str], Episode] = {}
    for run in runs.values():
        for episode in run:
            first_of_picture.setdefault(_picture_key(episode), episode)
    index_of_picture = {key: index for index, key in enumerate(first_of_picture)}
    content = {
        "runs": [
            {"name": name, "episodes": [_episode_row(e, index_of_picture[_picture_key(e)]) for e in run]}
            for name, run in runs.items()
        ],
    }

    before, after = _fill_template(title, content)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    # "xmlcharrefreplace": a title may hold a lone surrogate, which has no UTF-8 form.
    with partial.open("w", encoding="utf-8", errors="xmlcharrefreplace", newline="\n") as file:
        file.write(before)
        # One picture at a time: a page can hold more pictures than memory.
        for index, episode in enumerate(first_of_picture.values()):
            source = _picture_source(picture_of(episode), episode, max_picture_side)
            file.write(f'<script type="application/json" id="picture-{index}">{script_json(source)}</script>\n')
        file.write(after)
    partial.replace(path)
    return path


def script_json(value: Any) -> str:
    """JSON that is safe inside a ``<script>`` element: pure ASCII, without ``<``, ``>`` and ``&``."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _name(run: Sequence[Episode]) -> str:
    agents = {episode.agent for episode in run}
    return (agents.pop() if len(agents) == 1 else "") or "episodes"


def _picture_key(episode: Episode) -> tuple[str, str]:
    return episode.dataset, episode.picture_id


def _where(episode: Episode) -> str:
    return f"sample {episode.sample_id!r} of {episode.dataset}/{episode.split}"


def _check_runs_agree(runs: Mapping[str, Sequence[Episode]]) -> None:
    """Side by side means the same question: same picture, expression and target."""
    seen: dict[tuple[str, str, str], tuple[str, Episode]] = {}
    for name, run in runs.items():
        for episode in run:
            key = (episode.dataset, episode.split, episode.sample_id)
            other_name, other = seen.setdefault(key, (name, episode))
            for what in ("picture_id", "expression", "size"):
                mine, theirs = getattr(episode, what), getattr(other, what)
                if mine != theirs:
                    raise DataError(
                        f"{_where(episode)}: {what} is {mine!r} in run {name!r} and {theirs!r} in run "
                        f"{other_name!r}; they are not the same sample, write one page for each run"
                    )
            if not np.allclose(episode.target, other.target, rtol=0, atol=_SAME_BOX, equal_nan=True):
                raise DataError(
                    f"{_where(episode)}: target is {episode.target} in run {name!r} and {other.target} in run "
                    f"{other_name!r}; they are not the same sample, write one page for each run"
                )


def _episode_row(episode: Episode, picture: int) -> dict[str, Any]:
    where = _where(episode)
    height, width = (int(side) for side in episode.size)
    if height < 1 or width < 1:
        raise DataError(f"{where}: the picture's size is {episode.size}, it must be (height, width) in pixels")
    row = {
        "sample": episode.sample_id,
        "pictureId": episode.picture_id,
        "picture": picture,
        "dataset": episode.dataset,
        "split": episode.split,
        "expression": episode.expression,
        "target": _box_row(episode.target, f"{where}: target"),
        "size": [height, width],
        "steps": [_step_row(step, f"{where}, step {n}") for n, step in enumerate(episode.steps)],
        "agent": episode.agent or None,
        "seed": None if episode.seed is None else int(episode.seed),
    }
    if episode.initial_box is not None:
        row["initial"] = _box_row(episode.initial_box, f"{where}: initial box")
        row["initialIou"] = float(boxes.iou(episode.initial_box, episode.target))
    return _without_none(row)


def _step_row(step: Step, where: str) -> dict[str, Any]:
    # The IoU stays exact: rounding 0.49999 to 0.5 would change the outcome that the page shows.
    return _without_none(
        {
            "box": None if step.box is None else _box_row(step.box, f"{where}: box"),
            "iou": _finite(step.iou, f"{where}: iou"),
            "reward": round(_finite(step.reward, f"{where}: reward"), 5),
            "stop": True if step.stop else None,
            "invalid": step.invalid,
            "text": step.text or None,
            "parseFailure": True if step.parse_failure else None,
            "stopProbability": _finite_or_none(step.stop_probability, f"{where}: stop_probability"),
            "confidence": _finite_or_none(step.confidence, f"{where}: confidence"),
        }
    )


def _without_none(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if value is not None}


def _box_row(box: Sequence[float], where: str) -> list[float]:
    if len(box) != 4:
        raise DataError(f"{where} is {box}, a box has 4 numbers")
    return [round(_finite(v, where), 5) for v in box]


def _finite(value: float, where: str) -> float:
    if not math.isfinite(value):
        raise DataError(f"{where} is {value}, it must be a finite number")
    return float(value)


def _finite_or_none(value: float | None, where: str) -> float | None:
    return None if value is None else round(_finite(value, where), 4)


def _picture_source(picture: Picture, episode: Episode, max_side: int) -> str:
    """The picture as a JPEG data URL, at most ``max_side`` pixels on its longer side."""
    where = f"picture {episode.picture_id!r} of {_where(episode)}"
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise DataError(f"{where} is {picture.dtype} {picture.shape}, it must be uint8 (height, width, 3)")
    shown_height, shown_width = picture.shape[:2]
    height, width = episode.size
    # A picture scaled to whole pixels is off by less than one pixel a side; more is another picture.
    if abs(shown_width * height - width * shown_height) > width + height:
        raise DataError(
            f"{where} is {shown_width}x{shown_height} pixels, the episode says {width}x{height}: "
            "the shapes differ, so its boxes would be drawn in the wrong place"
        )
    image = Image.fromarray(picture)
    image.thumbnail((max_side, max_side))
    encoded = io.BytesIO()
    # 4:4:4, because shared colour samples smear the edges of small coloured shapes.
    image.save(encoded, format="JPEG", quality=_JPEG_QUALITY, subsampling=0, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode("ascii")


def _fill_template(title: str, content: dict[str, Any]) -> tuple[str, str]:
    """The page before and after its pictures."""
    folder = files("ivt_env.viewer")
    # splitlines: the hashes below must match the text after the browser has normalised line ends.
    template, script, style = (
        "\n".join(folder.joinpath(name).read_text(encoding="utf-8").splitlines()) + "\n"
        for name in ("template.html", "viewer.js", "viewer.css")
    )
    policy = (
        f"default-src 'none'; img-src data:; script-src '{_hash_source(script)}'; "
        f"style-src '{_hash_source(style)}'; base-uri 'none'; form-action 'none'"
    )
    fields = {
        "policy": policy,
        "title": html.escape(title),
        "style": style,
        "served": html.escape(_served(content)),
        "content": script_json(content),
        "script": script,
    }
    before, after = template.split("{{pictures}}")

    def fill(part: str) -> str:
        # One pass, so that a field's own text is never taken for a placeholder.
        return re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match[1]], part)

    return fill(before), fill(after)


def _hash_source(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def _served(content: dict[str, Any]) -> str:
    """Which data sets were really read, and how many samples of each."""
    samples = {(e["dataset"], e["split"], e["sample"]) for run in content["runs"] for e in run["episodes"]}
    counts = Counter((dataset, split) for dataset, split, _ in samples)
    return ", ".join(
        f"{dataset} / {split} ({n:,} sample{'s' if n > 1 else ''})" for (dataset, split), n in sorted(counts.items())
    )
