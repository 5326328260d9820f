"""What the file of an episode page holds.

If one of these is false, nothing crashes: a model's output leaves its place in the page, an image
is inlined a thousand times, or the page names another data set than the one that was served.
"""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from shown_episodes import HOSTILE, PHOTOS, SEPARATORS, made_up_episodes, photo_of, play

from ivt_env.data.sample import DataError, ImageArray
from ivt_env.episodes import Box, Episode
from ivt_env.viewer import write_page


def content_of(page: Path) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="content">(.*?)</script>', page.read_text("utf-8"), re.S)
    assert match
    content = json.loads(match[1])
    for number, run in enumerate(content["runs"]):
        for chunk in range(0, len(run["episodes"]), content["chunk"]):
            name = f"details-{number}-{chunk // content['chunk']}"
            block = re.search(
                rf'<script type="application/json" id="{name}">(.*?)</script>', page.read_text("utf-8"), re.S
            )
            assert block
            for row, more in zip(run["episodes"][chunk:], json.loads(block[1]), strict=False):
                assert not row.keys() & more.keys()
                row |= more
    return content


def images_of(page: Path) -> list[str]:
    found = re.findall(r'<script type="application/json" id="image-\d+">(.*?)</script>', page.read_text("utf-8"))
    return [json.loads(source) for source in found]


def test_hostile_text_cannot_leave_its_script_block(tmp_path: Path) -> None:
    hostile = [e for e in made_up_episodes() if HOSTILE in e.expression]
    hostile[0].dataset, hostile[0].agent = HOSTILE, HOSTILE
    page = write_page(tmp_path / "p.html", {HOSTILE: hostile}, photo_of, title=HOSTILE)
    text = page.read_text("utf-8")
    assert text.count("<script") == text.count("</script>") == 4  # content, details, program, one image
    assert "<img" not in text and "\u2028" not in text and "\u2029" not in text
    read = content_of(page)["runs"][0]
    assert read["name"] == HOSTILE
    assert read["episodes"][0]["expression"] == HOSTILE
    assert read["episodes"][0]["steps"][0]["text"] == HOSTILE + SEPARATORS


def test_text_that_is_no_valid_unicode_is_written_and_read_back(tmp_path: Path) -> None:
    episode = play((0.1, 0.1, 0.5, 0.5), [None], expression="cut \ud83d off \x00")
    page = write_page(tmp_path / "p.html", [episode], photo_of, title="cut \ud83d off {{content}}")
    assert content_of(page)["runs"][0]["episodes"][0]["expression"] == "cut \ud83d off \x00"
    assert "<title>cut &#55357; off {{content}}</title>" in page.read_text("utf-8")


def test_each_distinct_image_is_inlined_once(tmp_path: Path) -> None:
    episodes, asked = made_up_episodes(), []

    def counted(episode: Episode) -> ImageArray:
        asked.append(episode.image_id)
        return photo_of(episode)

    page = write_page(tmp_path / "p.html", {"one": episodes, "two": made_up_episodes(1)}, counted, title="t")
    distinct = {e.image_id for e in episodes}
    assert sorted(asked) == sorted(distinct) and len(distinct) == 6
    sources = images_of(page)
    assert len(sources) == len(set(sources)) == len(distinct)
    order = list(dict.fromkeys(e.image_id for e in episodes))
    for run in content_of(page)["runs"]:
        assert all(order[row["image"]] == row["imageId"] for row in run["episodes"])
    # Two data sets may use one id for two images.
    box: Box = (0.1, 0.1, 0.5, 0.5)
    served = [("scenes", "test", "1"), ("scenes", "test", "2"), ("photos", "all", "1"), ("photos", "all", "1")]
    fields = [{"dataset": d, "split": s, "sample_id": i, "image_id": "1", "size": (4, 4)} for d, s, i in served]
    shades = {"photos": 0, "scenes": 255}
    episodes = [play(box, [box], **field) for field in fields]
    episodes[0].steps[0].iou = 0.4999999  # not to be rounded up to a right box
    page = write_page(tmp_path / "q.html", episodes, lambda e: np.full((4, 4, 3), shades[e.dataset], np.uint8), "t")
    assert len(set(images_of(page))) == 2
    assert "photos / all (1 sample), scenes / test (2 samples)" in page.read_text("utf-8")
    assert content_of(page)["runs"][0]["episodes"][0]["steps"][0]["iou"] == 0.4999999


@pytest.mark.parametrize("side", [512, 100, 4096])
def test_images_are_scaled_down_and_never_enlarged(tmp_path: Path, side: int) -> None:
    box: Box = (0.1, 0.1, 0.5, 0.5)
    page = write_page(tmp_path / "p.html", [play(box, [box])], photo_of, "t", max_image_side=side)
    image = Image.open(io.BytesIO(base64.b64decode(images_of(page)[0].split(",")[1])))
    size = (600, 400)
    scale = min(1.0, side / max(size))
    assert image.format == "JPEG"
    assert image.size == tuple(round(v * scale) for v in size)


def test_the_page_asks_for_nothing_from_elsewhere(tmp_path: Path) -> None:
    page = write_page(tmp_path / "p.html", made_up_episodes(), photo_of, "t")
    text = re.sub(r'<script type="application/json".*?</script>', "", page.read_text("utf-8"), flags=re.S)
    addresses = set(re.findall(r"""(?:https?:|//)[^\s"'`)]+""", text.split("<script>")[0]))
    assert not addresses
    assert re.findall(r'(?:src|href)="([^"]*)"', text) == ["data:,"]
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy and "default-src 'none'" in policy[1] and "unsafe" not in policy[1]


def _with(**changes: Any) -> Episode:
    box: Box = (0.1, 0.1, 0.5, 0.5)
    episode = play(box, [box])
    for name, value in changes.items():
        setattr(episode if hasattr(episode, name) else episode.steps[0], name, value)
    return episode


@pytest.mark.parametrize(
    ("episode", "message"),
    [
        (_with(iou=float("nan")), r"'s0' of photos/all, step 0: iou is nan"),
        (_with(reward=float("inf")), r"step 0: reward is inf"),
        (_with(target=(0.1, 0.1, float("nan"), 0.5)), r"target is nan"),
        (_with(initial_box=(0.1, 0.2, 0.3)), r"initial box is \(0\.1, 0\.2, 0\.3\), a box has 4 numbers"),
        (_with(stop_probability=float("nan")), r"stop_probability is nan"),
        (_with(size=(0, 600)), r"size is \(0, 600\)"),
        (_with(size=(600, 400)), r"'coffee.jpg'.* is 600x400 pixels, the episode says 400x600"),
    ],
)
def test_an_episode_that_cannot_be_shown_is_named(tmp_path: Path, episode: Episode, message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_page(tmp_path / "p.html", [episode], photo_of, "t")
    assert not (tmp_path / "p.html").exists()


@pytest.mark.parametrize(
    "changes", [{"expression": "another"}, {"target": (0.1, 0.1, 0.5, 0.6)}, {"image_id": "rocket.jpg"}]
)
def test_runs_that_disagree_about_a_sample_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=f"'s0'.*{next(iter(changes))} is .*in run 'b' and .*in run 'a'"):
        write_page(tmp_path / "p.html", {"a": [_with()], "b": [_with(**changes)]}, photo_of, "t")


def test_nothing_to_show_and_what_is_no_image_are_errors(tmp_path: Path) -> None:
    for nothing in ([], {}, {"a": []}):
        with pytest.raises(ValueError, match="no episodes to show"):
            write_page(tmp_path / "p.html", nothing, photo_of, "t")
    with pytest.raises(ValueError, match="max_image_side is 0"):
        write_page(tmp_path / "p.html", [_with()], photo_of, "t", max_image_side=0)
    with pytest.raises(DataError, match=r"'coffee.jpg'.* is float64 \(400, 600\)"):
        write_page(tmp_path / "p.html", [_with()], lambda _: np.zeros((400, 600)), "t")  # type: ignore[arg-type,return-value]


def _contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio of two ``#rrggbb`` colours."""

    def luminance(colour: str) -> float:
        v = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return float(np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_has_the_contrast_of_wcag_aa_in_light_and_dark() -> None:
    style = (PHOTOS.parents[1] / "viewer" / "viewer.css").read_text("utf-8")
    themes = [dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)]
    assert len(themes) == 2
    grounds = ("page", "card", "sunk", "selected")
    pairs = [(text, ground) for text in ("ink", "soft") for ground in grounds]
    pairs += [(f"{text}-ink", ground) for text in ("good", "bad", "warn") for ground in grounds]
    pairs += [(f"{text}-ink", text) for text in ("good", "bad", "calm", "dull", "warn")]
    for theme in themes:
        for text, ground in pairs:
            assert _contrast(theme[text], theme[ground]) >= 4.5, (text, ground)
