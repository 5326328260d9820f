"""A rollout records what was played, whatever the number of environments, and reads back the same.

Silent when false: scores that depend on the batch size, a forced refinement that stops after all,
records whose rewards are another episode's, or a file that was cut off and is scored as if whole.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from PIL import Image

from ivt_env import boxes
from ivt_env.data.sample import DataError
from ivt_env.episodes import Episode, image_file, load_episodes, save_episodes
from ivt_env.rollouts import make_vector_env, rollout
from ivt_env.vector_env import GroundingVectorEnv

NAN = float("nan")


class Reader:
    """Acts on what it sees alone: the expression, the image, the box and the step."""

    def act(self, observations: Mapping[str, Any]) -> dict[str, Any]:
        rows = [self._one(observations, i) for i in range(len(observations["expression"]))]
        return {key: np.array([row[key] for row in rows]) for key in rows[0]}

    def reset(self, mask: np.ndarray) -> None:
        assert mask.dtype == bool

    def _one(self, observations: Mapping[str, Any], i: int) -> dict[str, Any]:
        seen = observations["expression"][i].encode() + observations["image"][i].tobytes()
        rng = np.random.default_rng([zlib.crc32(seen), int(observations["step"][i])])
        box = np.concatenate([rng.uniform(0, 0.5, 2), rng.uniform(0.5, 1, 2)]).astype(np.float32)
        if rng.random() < 0.3:
            box = box[[2, 1, 0, 3]]
        chance = rng.random()
        return {
            "box": box,
            "stop": int(chance > 0.7),
            "text": f"step {observations['step'][i]} of {observations['expression'][i]}",
            "parse_failure": bool(rng.random() < 0.1),
            "stop_probability": chance,
            "confidence": rng.random(),
        }


class Fixed:
    """Always the same action, and a record of what it was shown."""

    def __init__(self, box: Any, stop: int = 0) -> None:
        self.box, self.stop = box, stop
        self.active: list[list[bool]] = []
        self.resets: list[list[bool]] = []

    def act(self, observations: Mapping[str, Any]) -> dict[str, Any]:
        self.active.append(observations["active"].tolist())
        n = len(observations["active"])
        return {"box": np.array([self.box] * n), "stop": np.full(n, self.stop)}

    def reset(self, mask: np.ndarray) -> None:
        self.resets.append(mask.tolist())


def scenes(num_envs: int, **kwargs: Any) -> GroundingVectorEnv:
    return make_vector_env("IVT-Scenes-v0", num_envs, **({"canvas": 32} | kwargs))


@cache
def played() -> tuple[Episode, ...]:
    """Eleven episodes, played one at a time."""
    return tuple(rollout(scenes(1), Reader(), 11, seed=100, agent_name="reader"))


def test_a_rollout_does_not_depend_on_the_number_of_environments():
    for num_envs in (4, 16):
        assert rollout(scenes(num_envs), Reader(), 11, seed=100, agent_name="reader") == list(played())
    steps = [step for episode in played() for step in episode.steps]
    assert len({e.sample_id for e in played()}) == 11
    assert any(s.stop for s in steps) and any(s.invalid for s in steps), "nothing special happened"
    assert any(e.terminated for e in played()) and any(e.truncated for e in played())


def test_the_total_reward_is_the_final_iou():
    for episode in played():
        assert episode.total_reward == pytest.approx(episode.final_iou, abs=1e-12)
        last = episode.steps[-1]
        assert last.iou == (0 if last.box is None else boxes.iou(last.box, episode.target))
    started = rollout(
        scenes(3), Reader(), 7, seed=0, initial_boxes=[(0.1, 0.2, 0.8, 0.9), None, (0.0, 0.0, 1.0, 1.0)] * 2 + [None]
    )
    for number, episode in enumerate(started):
        first = 0.0 if episode.initial_box is None else boxes.iou(episode.initial_box, episode.target)
        assert (episode.initial_box is None) == (number % 3 == 1 or number == 6)
        assert episode.total_reward == pytest.approx(episode.final_iou - first, abs=1e-12)


def test_a_record_says_what_the_single_environment_says():
    env = gym.make("IVT-Scenes-v0", canvas=32).unwrapped
    for number, episode in enumerate(played()):
        observation, info = env.reset(seed=100 + number)
        assert (episode.seed, episode.agent, episode.sample_id) == (100 + number, "reader", info["sample_id"])
        assert episode.expression == observation["expression"]
        assert (episode.dataset, episode.split, episode.size) == ("scenes", "train", env.sample.size)
        assert episode.target == env.sample.box and tuple(episode.siblings) == env.sample.siblings
        terminated = truncated = False
        for step in episode.steps:
            assert not (terminated or truncated)
            box = np.full(4, NAN) if step.proposal is None else np.float32(step.proposal)
            _, reward, terminated, truncated, info = env.step({"box": box, "stop": int(step.stop)})
            assert (step.reward, step.iou, step.invalid) == (reward, info["iou"], info.get("invalid"))
            now = env.game.box
            assert step.box == (None if now is None else tuple(now.tolist()))
            assert step.text.endswith(episode.expression)
            assert step.stop == (step.stop_probability > 0.7)
        assert (episode.terminated, episode.truncated) == (terminated, truncated)
        assert terminated or truncated


def test_indices_choose_the_samples_and_need_no_seed():
    indices = [5, 3, 3, 8, 1]
    first = rollout(scenes(2), Reader(), 5, indices=indices)
    assert [e.sample_id for e in first] == [f"train-{i}" for i in indices]
    assert [e.seed for e in first] == [None] * 5
    assert first[1] == first[2]
    assert rollout(scenes(3), Reader(), 5, indices=indices) == first


def test_every_wave_resets_the_agent_and_spare_environments_are_not_active():
    agent, waves = Fixed([0.1, 0.1, 0.5, 0.5]), []
    episodes = rollout(scenes(4, max_steps=2), agent, 6, seed=0, on_progress=waves.append)
    assert waves == [4, 2] and len(episodes) == 6
    assert agent.resets == [[True] * 4] * 2
    assert agent.active == [[True] * 4] * 2 + [[True, True, False, False]] * 2


def test_ignore_stop_plays_every_step_and_a_stop_becomes_the_current_box_again():
    forced = rollout(scenes(4), Reader(), 11, seed=100, ignore_stop=True)
    wishes = 0
    for episode, free in zip(forced, played(), strict=True):
        assert len(episode.steps) == 3 and episode.truncated and not episode.terminated
        before = None
        for number, step in enumerate(episode.steps):
            assert not step.stop
            if step.stop_probability > 0.7:
                wishes += 1
                assert step.box == before and step.reward == 0
                if before is not None:
                    assert step.proposal == before and step.invalid is None
            before = step.box
            if number < len(free.steps) and not free.steps[number].stop:
                assert step == free.steps[number]
    assert wishes > 3
    (episode,) = rollout(scenes(1), Fixed([0.1, 0.1, 0.5, 0.5], stop=1), 1, seed=0, ignore_stop=True)
    assert all(step.box is None and "x2 <= x1" in step.invalid for step in episode.steps), "there is none to repeat"


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_an_agent_that_proposes_no_numbers_finishes_with_every_step_explained(bad, tmp_path):
    episodes = rollout(scenes(2), Fixed([bad, 0.1, 0.5, 0.5]), 3, seed=0)
    for episode in episodes:
        assert episode.truncated and len(episode.steps) == 3
        assert (episode.total_reward, episode.final_iou) == (0, 0)
        for step in episode.steps:
            assert (step.proposal, step.box) == (None, None)
            assert step.invalid.startswith("not finite")
    save_episodes(tmp_path, episodes)
    assert load_episodes(tmp_path) == episodes


def test_a_rollout_refuses_what_would_mix_up_episodes():
    env = gym.make_vec("IVT-Scenes-v0", 2, "vector_entry_point").unwrapped
    with pytest.raises(ValueError, match="Disabled"):
        rollout(env, Reader(), 2)
    with pytest.raises(ValueError, match="2 indices for 3 episodes"):
        rollout(scenes(2), Reader(), 3, indices=[0, 1])
    with pytest.raises(ValueError, match="1 initial boxes for 3 episodes"):
        rollout(scenes(2), Reader(), 3, initial_boxes=[None])


# ---- files -----------------------------------------------------------------------------------


def image_of(episode: Episode) -> np.ndarray:
    from ivt_env.data import load_dataset

    dataset = load_dataset(episode.dataset, episode.split)
    return dataset.image(dataset[int(episode.sample_id.split("-")[1])])


def test_episodes_and_their_images_are_read_back_as_they_were(tmp_path):
    episodes = [*played()[:4], played()[0]]
    path = save_episodes(tmp_path / "new" / "folder", episodes, image_of)
    assert load_episodes(path) == load_episodes(path.parent) == episodes
    images = sorted((path.parent / "images").iterdir())
    assert [p.name for p in images] == sorted({image_file(e.image_id) for e in episodes})
    for episode in episodes:
        saved = Image.open(path.parent / "images" / image_file(episode.image_id))
        np.testing.assert_array_equal(np.asarray(saved), image_of(episode))
    assert {p.name for p in path.parent.iterdir()} == {"episodes.jsonl", "images"}


def test_text_in_any_script_and_with_line_breaks_is_read_back_as_it_was(tmp_path):
    for words in ("das größte Ü", "红色的圆圈", "a\u2028b\nc\r\x85d", '{"bbox_2d": [1]}', "\ud800"):
        episode = dataclasses.replace(played()[0], expression=words, agent=words)
        save_episodes(tmp_path, [episode, episode])
        assert load_episodes(tmp_path) == [episode, episode]


def test_a_file_that_could_not_be_written_whole_leaves_the_old_one(tmp_path):
    save_episodes(tmp_path, played()[:2])
    broken = dataclasses.replace(played()[0], target=(NAN, 0.0, 1.0, 1.0))
    with pytest.raises(ValueError):
        save_episodes(tmp_path, [played()[3], broken])
    assert load_episodes(tmp_path) == list(played()[:2])


CUT_OFF: tuple[Callable[[bytes], bytes], ...] = (
    lambda line: line[: len(line) // 5],
    lambda line: line[: len(line) // 2],
    lambda line: line[:-2],
    lambda line: line.replace(b'"agent": "reader"', b'"agent": "\xff"'),
)


def _without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda row: {k: v for k, v in row.items() if k != key}


def _step(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda row: row | {"steps": [row["steps"][0] | changes, *row["steps"][1:]]}


@pytest.mark.parametrize(
    "edit",
    [
        *CUT_OFF,
        _without("target"),
        _without("steps"),
        _without("size"),
        _step(iou=NAN),
        _step(iou=None),
        _step(iou="0.5"),
        _step(reward=float("inf")),
        _step(box=[0.1, 0.2, 0.3]),
        _step(proposal="none"),
        _step(score=3),
        lambda row: row | {"target": [0.1, 0.2, 0.3, NAN]},
        lambda row: row | {"target": "abcd"},
        lambda row: row | {"siblings": [[0.1, 0.2]]},
        lambda row: row | {"size": 384},
        lambda row: row | {"steps": 3},
        lambda row: row | {"steps": ["stop"]},
        lambda row: row | {"colour": "red"},
        lambda row: [row],
        lambda row: 5,
        lambda row: "episode",
        lambda row: None,
    ],
)
def test_an_edited_row_is_an_error_that_names_file_and_line(tmp_path, edit):
    path = save_episodes(tmp_path, played()[:3])
    first, second, third = path.read_bytes().splitlines(keepends=True)
    edited = edit(second) if edit in CUT_OFF else json.dumps(edit(json.loads(second))).encode() + b"\n"
    path.write_bytes(first + edited + (b"" if edit in CUT_OFF else third))
    with pytest.raises(DataError, match=r"episodes\.jsonl:2: not an episode"):
        load_episodes(path)


def test_no_file_is_an_error_that_names_the_place(tmp_path):
    with pytest.raises(DataError, match=r"no episodes at .*nowhere"):
        load_episodes(tmp_path / "nowhere")


def test_image_files_stay_in_their_folder_and_differ_where_the_ids_differ():
    ids = ["a/b", "a_b", "a:b", "../../etc", "..", "", "é", "è", "COCO_train2014_000000000009", "scenes-val-3"]
    files = [image_file(i) for i in ids]
    assert len(set(files)) == len(ids)
    for file in files:
        assert Path(file).name == file and not file.startswith(".")
    assert image_file("scenes-val-3") == "scenes-val-3.png"
