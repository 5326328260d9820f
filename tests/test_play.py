"""What ``ivt play`` records and what it tells the player.

If one of these is false, nothing crashes: a player who is told the score wins every time and is no
baseline, a record differs from what an agent with the same boxes would get, or an hour's work is lost.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from PIL import Image

from ivt_agents.sft.demonstrations import load_demonstrations
from ivt_env.data import load_dataset
from ivt_env.data.sample import DataError
from ivt_env.env import GroundingEnv
from ivt_env.episodes import image_file, load_episodes
from ivt_env.metrics.columns import outcomes
from ivt_env.rollouts import make_vector_env, rollout
from ivt_env.viewer.images import ImageFinder
from ivt_env.viewer.play import PlayApp
from ivt_env.viewer.server import Refused

SCRIPT = [
    [[0.1, 0.1, 0.6, 0.7], [0.2, 0.2, 0.5, 0.6], None],
    [[0.3, 0.1, 0.9, 0.9], [0.9, 0.1, 0.3, 0.9], [0.3, 0.2, 0.8, 0.8]],  # the second is refused
    [None],
    [[0.4, 0.4, 0.6, 0.6], [0.1, 0.4, 0.6, 0.6], [0.2, 0.4, 0.6, 0.6]],
]
"""Four episodes: boxes, and None where the player stops."""


def app_in(folder: Path, total: int = 4, seed: int = 5, **options: Any) -> PlayApp:
    env = gym.make("IVT-Scenes-v0", split="val", disable_env_checker=True, **options).unwrapped
    assert isinstance(env, GroundingEnv)
    return PlayApp(env, folder, total, seed)


def tell(app: PlayApp, path: str, message: Any, token: str | None = None) -> Any:
    return json.loads(app.post(path, app.token if token is None else token, message).body)


def play_one(app: PlayApp, boxes: list[Any]) -> list[dict[str, Any]]:
    said = [tell(app, "/start", {})]
    for step, box in enumerate(boxes):
        action = {"stop": True} if box is None else {"box": box}
        said.append(tell(app, "/act", {"number": said[0]["number"], "step": step, **action}))
    return said


class Scripted:
    """Does what the player did."""

    def __init__(self) -> None:
        self.episode = -1

    def reset(self, mask: Any) -> None:
        self.episode, self.step = self.episode + 1, 0

    def act(self, observations: Any) -> Any:
        box = SCRIPT[self.episode][self.step]
        self.step += 1
        return {"box": np.array([box or [0, 0, 0, 0]], np.float32), "stop": np.array([box is None], np.int64)}


def test_a_played_episode_is_what_rollout_records_of_an_agent_with_the_same_boxes(tmp_path: Path) -> None:
    app = app_in(tmp_path)
    for boxes in SCRIPT:
        play_one(app, boxes)
    env = make_vector_env("IVT-Scenes-v0", num_envs=1, split="val")
    expected = rollout(env, Scripted(), len(SCRIPT), seed=5, agent_name="human")
    assert load_episodes(tmp_path) == expected
    assert {len(e.steps) for e in expected} == {1, 3} and any(s.invalid for e in expected for s in e.steps)
    assert any(e.final_iou > 0 for e in expected)


def test_the_player_learns_neither_target_nor_score_before_the_end(tmp_path: Path) -> None:
    app = app_in(tmp_path)
    said = play_one(app, SCRIPT[0])
    *before, after = said
    assert after["over"] and after["short"]["final"] == load_episodes(tmp_path)[0].final_iou
    (episode,) = load_episodes(tmp_path)
    known = {"number", "total", "expression", "dataset", "split", "size", "image", "max_steps", "step", "box"}
    assert set(before[0]) == known | {"earlier"}
    for message in before[1:]:
        assert set(message) == {"over", "invalid", "step", "box", "earlier"}
    secret = [f"{v:.5f}"[:6] for v in episode.target] + [f"{s.iou:.4f}" for s in episode.steps if s.iou]
    second = app_in(tmp_path / "other")
    tell(second, "/start", {})
    everything = json.dumps(before) + second.page()
    assert not [number for number in secret if number in everything]
    for place in range(3):  # nor through the addresses that a page to look at has
        with pytest.raises(Refused):
            second.get("/episode", {"run": "0", "index": str(place)})
    assert json.loads(second.get("/search", {"run": "0", "query": ""}).body) == []


def test_the_second_click_of_a_double_click_is_no_second_step_and_a_reload_goes_on(tmp_path: Path) -> None:
    app, box = app_in(tmp_path, canvas=64), [0.1, 0.1, 0.5, 0.5]
    for token in ("", "guess", "é", "\ud800"):
        with pytest.raises(Refused, match="not the page") as refused:
            tell(app, "/start", {}, token=token)
        assert refused.value.status == 403, "another page cannot play"
    with pytest.raises(Refused, match="No episode is running"):
        tell(app, "/act", {"number": 1, "step": 0, "stop": True})
    first = tell(app, "/start", {})
    shown = Image.open(io.BytesIO(app.get(f"/image/{first['image']}", {}).body))
    assert max(shown.size) == 384, "the image itself: an agent that is shown close-ups sees as much"
    tell(app, "/act", {"number": 1, "step": 0, "box": box})
    with pytest.raises(Refused, match="another step") as refused:
        tell(app, "/act", {"number": 1, "step": 0, "box": box})
    again = tell(app, "/start", {})
    assert refused.value.status == 409 and again["expression"] == first["expression"]
    assert again["step"] == 1 and again["box"] == pytest.approx(box)


@pytest.mark.parametrize(
    "message",
    [
        [], "act", None, 3, {"box": "all"}, {"box": [0.1, 0.1, 0.5]}, {"box": ["0.1", 0.1, 0.5, 0.5]},
        {"box": [True, False, 1, 1]}, {"box": [float("nan"), 0, 1, 1]}, {"box": [0, 0, float("inf"), 1]}, {},
        {"stop": "yes"}, {"box": {"x1": 0}}, {"box": [[0, 0, 1, 1]] * 4}, {"box": [10**400, 0, 1, 1]},
    ],
)  # fmt: skip
def test_a_bad_action_is_refused_and_uses_up_no_step(tmp_path: Path, message: Any) -> None:
    app = app_in(tmp_path)
    tell(app, "/start", {})
    sent = {"number": 1, "step": 0, **message} if isinstance(message, dict) else message
    with pytest.raises(Refused) as refused:
        tell(app, "/act", sent)
    assert refused.value.status == 400 and "\n" not in str(refused.value) and len(str(refused.value)) < 200
    assert tell(app, "/start", {})["step"] == 0


def test_a_session_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    play_one(app_in(tmp_path), SCRIPT[0])
    play_one(app_in(tmp_path), SCRIPT[1])
    later = app_in(tmp_path, total=2)
    assert tell(later, "/start", {}) == {"finished": True, "played": 2, "total": 2, "folder": str(tmp_path)}
    together = app_in(tmp_path / "one")
    for boxes in SCRIPT[:2]:
        play_one(together, boxes)
    for name in ("episodes.jsonl", "demonstrations.jsonl"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert later.get("/image/0", {}).body[:2] == b"\xff\xd8"


def test_a_folder_with_other_episodes_is_left_alone(tmp_path: Path) -> None:
    play_one(app_in(tmp_path), SCRIPT[0])
    before = (tmp_path / "episodes.jsonl").read_bytes()
    with pytest.raises(DataError, match="give another --out"):
        app_in(tmp_path, seed=6)
    assert (tmp_path / "episodes.jsonl").read_bytes() == before


def test_an_episode_that_cannot_be_saved_waits_for_room(tmp_path: Path) -> None:
    app = app_in(tmp_path / "out")
    tell(app, "/start", {})
    (tmp_path / "out").write_text("a file where the folder should be")
    with pytest.raises(Refused, match="not saved yet") as refused:
        tell(app, "/act", {"number": 1, "step": 0, "stop": True})
    assert refused.value.status == 500
    (tmp_path / "out").unlink()
    assert tell(app, "/act", {"number": 1, "step": 0, "stop": True})["over"]
    (episode,) = load_episodes(tmp_path / "out")
    assert len(episode.steps) == 1


def test_metrics_sft_and_the_viewer_read_what_was_played(tmp_path: Path) -> None:
    app = app_in(tmp_path)
    for boxes in SCRIPT:
        play_one(app, boxes)
    episodes = load_episodes(tmp_path)
    assert len(outcomes(episodes).image_ids) == 4
    found = load_demonstrations(tmp_path / "demonstrations.jsonl", load_dataset("scenes", "val"))
    assert [d.answer is None for d in found] == [False, False, True, False, False, True, False, False, False]
    assert [len(d.before) for d in found] == [0, 0, 1, 0, 0, 0, 0, 0, 1]
    assert found[1].shown == found[0].answer and found[2].shown == found[1].answer
    refused = episodes[1].steps[1]
    assert refused.invalid and refused.proposal not in [d.answer for d in found]
    for episode in episodes:
        assert (tmp_path / "images" / image_file(episode.image_id)).is_file()
    finder = ImageFinder({"human": episodes}, {"human": tmp_path})
    dataset = load_dataset("scenes", "val")
    sample = dataset[int(episodes[0].sample_id.split("-")[1])]
    assert np.array_equal(finder(episodes[0]), dataset.image(sample))
