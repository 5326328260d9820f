"""What ``ivt view`` finds, and what it says about what it does not.

If one of these is false, a person looks at boxes over the wrong image, or at no image and no reason.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from shown_episodes import made_up_episodes, photo_of, play
from test_viewer import content_of, images_of

from ivt_agents import cli
from ivt_agents.play.by_name import load_agent
from ivt_env.data import load_dataset
from ivt_env.data.sample import DataMissingError
from ivt_env.episodes import Episode, image_file, save_episodes
from ivt_env.rollouts import make_vector_env, rollout
from ivt_env.viewer.images import ImageFinder


def scenes_played(agent: str = "random", seed: int = 3) -> list[Episode]:
    env = make_vector_env("IVT-Scenes-v0", num_envs=2, split="val")
    return rollout(env, load_agent(agent, env=env, seed=seed), 4, seed=seed, agent_name=agent)


def test_one_command_writes_a_page_with_the_images_of_the_run(tmp_path: Path, capsys: Any) -> None:
    episodes = made_up_episodes()
    save_episodes(tmp_path / "run", episodes, photo_of)
    assert cli.main(["view", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr()
    assert re.match(rf"{tmp_path}/run/view.html: 23 episodes, 6 images, [\d.]+ MB\n$", printed.out) and not printed.err
    page = tmp_path / "run" / "view.html"
    assert content_of(page)["runs"][0]["name"] == "run"
    assert all(source.startswith("data:image/jpeg") for source in images_of(page)) and len(images_of(page)) == 6
    # Several are named by what tells them apart.
    save_episodes(tmp_path / "b" / "run", episodes, photo_of)
    words = ["view", str(tmp_path / "run"), str(tmp_path / "b/run/episodes.jsonl"), "--limit", "3", "--out", str(page)]
    assert cli.main(words) == 0
    runs = content_of(page)["runs"]
    assert [(run["name"], len(run["episodes"])) for run in runs] == [(f"{tmp_path.name}/run", 3), ("b/run", 3)]


def test_images_that_a_run_did_not_save_come_from_its_data_set(tmp_path: Path) -> None:
    episodes = scenes_played()
    save_episodes(tmp_path, episodes)
    finder = ImageFinder({"a": episodes}, {"a": tmp_path})
    dataset = load_dataset("scenes", "val")
    for episode in episodes:
        sample = dataset[int(episode.sample_id.removeprefix("val-"))]
        assert np.array_equal(finder(episode), dataset.image(sample))
    assert cli.main(["view", str(tmp_path), "--out", str(tmp_path / "p.html")]) == 0
    assert all(source.startswith("data:image/jpeg") for source in images_of(tmp_path / "p.html"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"expression": "another"}, "its expression is .* in the run 'another'"),
        ({"image_id": "other"}, "its image_id is .* in the run 'other'"),
        ({"sample_id": "val-x"}, "has no sample 'val-x'"),
        ({"sample_id": "val-99999999"}, "has no sample"),
        ({"split": "no-such"}, "has no split 'no-such'"),
        ({"dataset": "refcocog"}, "refcocog: not on this machine; looked for"),
        ({"dataset": "mine"}, "no data set 'mine'"),
    ],
)
def test_a_image_is_never_taken_from_another_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], says: str
) -> None:
    monkeypatch.setenv("IVT_DATA", str(tmp_path / "none"))
    monkeypatch.setattr("ivt_env.data.scenes.Scenes.__len__", lambda self: 300)  # the whole split takes minutes
    (episode, *_) = scenes_played()
    for name, value in changes.items():
        setattr(episode, name, value)
    with pytest.raises(DataMissingError, match=says):
        ImageFinder({"a": [episode]}, {"a": tmp_path})(episode)


def test_what_is_missing_is_said_on_the_page_and_on_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("IVT_DATA", str(tmp_path / "none"))
    named = [{"image_id": name, "sample_id": name, "dataset": "refcocog", "split": "val"} for name in "ab"]
    episodes = [play((0.1, 0.1, 0.5, 0.5), [None], size=(10, 10), **fields) for fields in named]
    save_episodes(tmp_path / "run", episodes)
    assert cli.main(["view", str(tmp_path / "run")]) == 0
    errors = capsys.readouterr().err
    assert errors.startswith("warning: 2 image(s) are not on the page: The run saved no images, and refcocog: not on")
    assert "ivt data fetch refcocog" in errors and errors.count("\n") == 1
    sources = images_of(tmp_path / "run" / "view.html")
    assert all("ivt data fetch refcocog" in source["missing"] for source in sources) and len(sources) == 2  # type: ignore[index]


def test_a_saved_image_that_is_broken_is_named_and_one_of_another_shape_refused(tmp_path: Path, capsys: Any) -> None:
    save_episodes(tmp_path, made_up_episodes()[:1], photo_of)
    broken = tmp_path / "images" / image_file("astronaut.jpg")
    broken.write_bytes(b"no image")
    assert cli.main(["view", str(tmp_path)]) == 0
    assert f"not on the page: {broken}: not a whole image" in capsys.readouterr().err
    (tmp_path / "view.html").unlink()
    Image.new("RGB", (10, 30)).save(broken)
    assert cli.main(["view", str(tmp_path)]) == 2
    assert "the shapes differ" in capsys.readouterr().err
    assert not (tmp_path / "view.html").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("view HERE/nowhere", "no episodes at"),
        ("view HERE", "give one or more of: HERE/cut, HERE/empty, HERE/one"),
        ("view HERE/cut", "episodes.jsonl:1: not an episode"),
        ("view HERE/empty", "no episodes to show"),
        ("view HERE/one HERE/two", "they are not the same sample"),
        ("view HERE/one HERE/one", "given twice"),
        ("view HERE/one --side 0", "--side 0: give 1 or more"),
        ("view HERE/one --limit 0", "--limit 0: give 1 or more"),
        ("view HERE/one --out HERE/one/episodes.jsonl/x.html", "episodes.jsonl"),
        ("view HERE/one --serve --out x.html", "give one of the two"),
        ("view HERE/one --serve --port 99999", "--port 99999: cannot listen"),
        ("play --env IVT-RefCOCOg-v0", "refcocog: not on this machine"),
        ("play --env IVT-Scene-v0", "no environment 'IVT-Scene-v0'"),
        ("play --split vall", "no split 'vall' (did you mean 'val'?)"),
        ("play --episodes 0", "--episodes 0: give 1 or more"),
        ("play --seed -1", "--seed -1: give 0 or more"),
        ("play --episode-steps 0", "max_steps 0"),
        ("play --out HERE/one", "give another --out"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path: Path, monkeypatch: Any, capsys: Any, words: str, says: str) -> None:
    monkeypatch.setenv("IVT_DATA", str(tmp_path / "none"))
    save_episodes(tmp_path / "one", made_up_episodes()[:1], photo_of)
    other = made_up_episodes()[:1]
    other[0].expression = "something else"
    save_episodes(tmp_path / "two", other)
    for name, content in (("cut", '{"sample_id": '), ("empty", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "episodes.jsonl").write_text(content)
    assert cli.main(words.replace("HERE", str(tmp_path)).split()) == 2
    printed = capsys.readouterr()
    assert says.replace("HERE", str(tmp_path)) in printed.err and printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1


def started(words: list[str], cwd: Path) -> tuple[subprocess.Popen[str], str]:
    """The command running, and the address that it printed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ivt_agents.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parent.parent)},
        cwd=cwd,
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


@pytest.mark.parametrize("command", ["view", "play"])
def test_a_server_prints_its_address_answers_and_ends_with_ctrl_c(tmp_path: Path, command: str) -> None:
    save_episodes(tmp_path / "run", made_up_episodes(), photo_of)
    words = {"view": ["view", "run", "--serve"], "play": ["play", "--episodes", "2", "--out", "mine"]}[command]
    process, address = started(words, tmp_path)
    try:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address), process.communicate()
        with urllib.request.urlopen(address, timeout=30) as reply:
            page = reply.read().decode()
        assert ("Propose this box" in page) == (command == "play")
        content = json.loads(re.search(r'id="content">(.*?)</script>', page)[1])  # type: ignore[index]
        assert len(content["runs"][0]["episodes"]) == {"view": 23, "play": 0}[command]
    finally:
        process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in errors and output == ""
    assert "Ctrl-C ends" in errors


def test_a_data_set_of_ones_own_is_found_by_its_name(tmp_path: Path) -> None:
    image = np.full((20, 30, 3), 77, np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(image).save(tmp_path / "images" / "a.png")
    (tmp_path / "dataset.json").write_text('{"name": "my-set", "box": "xyxy", "frame": "px", "description": "one"}')
    row = {"image": "images/a.png", "expression": "it", "bbox": [3, 2, 15, 10]}
    (tmp_path / "val.jsonl").write_text(json.dumps(row) + "\n")
    dataset = load_dataset("custom", "val", tmp_path)
    sample = dataset[0]
    fields = {k: getattr(sample, k) for k in ("sample_id", "image_id", "dataset", "split", "expression", "size")}
    episode = Episode(target=sample.box, steps=[], **fields)
    found = ImageFinder({"a": [episode]}, {"a": tmp_path / "run"}, tmp_path)(episode)
    assert sample.dataset == "my-set" and np.array_equal(found, image)
