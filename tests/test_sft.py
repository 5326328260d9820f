"""Demonstrations decide what the loop learns. A trace with the wrong box, or a stop that is missing, teaches that."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from ivt_agents.sft.demonstrations import Demonstration, load_demonstrations, save_demonstrations, teach_as_the_paper
from ivt_agents.sft.teacher.template import FITS, MISSES, WRONG_OBJECT, critique
from ivt_agents.sft.train import Args
from ivt_agents.sft.trainer import batches, to_turns, train
from ivt_agents.training.run import MetricsLog
from ivt_agents.vlm.codec import parse_action
from ivt_agents.vlm.load import load_policy
from ivt_agents.vlm.tiny import tiny_tokenizer
from ivt_agents.vlm.turns import Turn
from ivt_env.data.sample import DataError
from ivt_env.data.scenes import Scenes
from ivt_env.rollouts import make_vector_env

TARGET = (0.4, 0.4, 0.6, 0.6)


@pytest.fixture(scope="module")
def dataset():
    return Scenes("train")


def taught(dataset, student=(0.1, 0.1, 0.2, 0.2)) -> list[Demonstration]:
    return teach_as_the_paper(dataset, [5], [student])


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ((0.3, 0.4, 0.5, 0.6), ["too far left", "move right"]),
        ((0.5, 0.4, 0.7, 0.6), ["too far right", "move left"]),
        ((0.4, 0.3, 0.6, 0.5), ["too high", "move down"]),
        ((0.4, 0.5, 0.6, 0.7), ["too low", "move up"]),
        ((0.3, 0.4, 0.7, 0.6), ["too wide", "make it narrower"]),
        ((0.45, 0.4, 0.55, 0.6), ["too narrow", "make it wider"]),
        ((0.4, 0.3, 0.6, 0.7), ["too tall", "make it shorter"]),
        ((0.4, 0.45, 0.6, 0.55), ["too short", "make it taller"]),
    ],
)
def test_the_teacher_says_what_is_wrong_and_which_way(box, words):
    said = critique(box, TARGET).lower()
    assert all(w in said for w in words), said


def test_the_teacher_tells_a_wrong_object_from_a_wrong_place():
    assert critique((0, 0, 0.2, 0.2), TARGET) == MISSES
    assert critique((0, 0, 0.2, 0.2), TARGET, [(0.0, 0.0, 0.2, 0.21)]) == WRONG_OBJECT
    assert critique(TARGET, TARGET) == FITS


@given(st.lists(st.floats(0.01, 0.99), min_size=4, max_size=4))
def test_every_trace_is_made_of_words_the_tokenizer_knows_whole(values):
    box = (
        min(values[0], values[2]),
        min(values[1], values[3]),
        max(values[0], values[2]) + 0.01,
        max(values[1], values[3]) + 0.01,
    )
    text = critique(box, TARGET)
    words = [w.strip(".;") for w in text.split()]
    assert len(tiny_tokenizer()(text)["input_ids"]) <= len(words) + text.count(";") + text.count(".")


def test_demonstrations_survive_the_file(tmp_path, dataset):
    made = taught(dataset)
    assert made[-1].before
    save_demonstrations(tmp_path / "d.jsonl", made)
    assert load_demonstrations(tmp_path / "d.jsonl", dataset) == made


def test_demonstrations_of_the_scenes_are_checked_without_making_a_scene(tmp_path, dataset, monkeypatch):
    save_demonstrations(tmp_path / "d.jsonl", taught(dataset))
    monkeypatch.setattr(type(dataset), "__getitem__", None)
    assert load_demonstrations(tmp_path / "d.jsonl", dataset)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shown": [0.5, 0.5, 0.1, 0.6]}, "x2 <= x1"),
        ({"answer": [0.1, 0.1, 2.0, 0.6]}, "outside"),
        ({"index": 10**9}, "outside the"),
        ({"sample_id": "train-6"}, "train-5"),
        ({"dataset": "refcocog"}, "scenes/train"),
        ({"split": "test"}, "made for scenes/test"),
        ({"boxes": []}, "not a demonstration"),
        ({"answer": "stop"}, "not a demonstration"),
    ],
)
def test_a_bad_line_is_refused_with_file_and_line(tmp_path, dataset, changes, message):
    good = asdict(taught(dataset)[0])
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | changes) + "\n")
    with pytest.raises(DataError, match=message) as error:
        load_demonstrations(path, dataset)
    assert f"{path}:2" in str(error.value)


def test_missing_and_empty_files_are_refused(tmp_path, dataset):
    with pytest.raises(DataError, match="no demonstrations at"):
        load_demonstrations(tmp_path / "none.jsonl", dataset)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no demonstrations"):
        load_demonstrations(tmp_path / "empty.jsonl", dataset)


@pytest.mark.parametrize("layout", ["fresh", "prefix"])
@pytest.mark.parametrize("view", ["overlay", "closeup", "both"])
def test_a_demonstration_looks_exactly_like_the_rollout_it_teaches(dataset, view, layout):
    """Same pixels, trail included, and same ids, at every step: one formatter serves SFT, rollouts and evaluation."""
    policy = load_policy("tiny", view=view, layout=layout)
    env = make_vector_env("IVT-Scenes-v0", 1, split="train", **policy.shown)
    assert env.screen.overlay.trail
    proposals = [(0.1, 0.2, 0.5, 0.7), (0.15, 0.25, 0.6, 0.65), (0.15, 0.3, 0.45, 0.65)]
    observations, _ = env.reset(options={"index": [5]})
    for number, answer in enumerate([*proposals, None]):
        (rolled,) = policy.prompts_for(observations, [0])
        shown = proposals[number - 1] if number else None
        earlier = tuple(proposals[: max(0, number - 1)])
        demonstration = Demonstration("scenes", "train", 5, "train-5", shown, answer, before=earlier)
        (turn,) = to_turns(policy, env.screen, dataset, [demonstration])
        assert turn.prompt.ids == rolled.ids and turn.prompt.windows == rolled.windows
        assert turn.prompt.opening == rolled.opening == (number == 0)
        assert len(turn.prompt.images) == len(rolled.images)
        for mine, its in zip(turn.prompt.images, rolled.images, strict=True):
            assert torch.equal(mine.patches, its.patches) and mine.grid == its.grid
        if answer is not None:
            if layout == "prefix":  # what a policy that says just that would have said
                policy._said = {0: (Turn(rolled, turn.completion, finished=True), None)}
            observations = env.step({"box": np.array([answer], np.float32), "stop": np.zeros(1, int)})[0]


def test_demonstrations_made_together_share_equal_images_and_no_others(dataset):
    """The encoding of images is most of the work; one that is shared must be the very same input."""
    policy = load_policy("tiny")
    screen = make_vector_env("IVT-Scenes-v0", 1, split="train", **policy.shown).screen
    a, b = (0.1, 0.2, 0.5, 0.7), (0.15, 0.25, 0.6, 0.65)
    states = [(None, ()), (b, ()), (b, (a,)), (b, (a,)), (a, ()), (None, ())]
    made = [Demonstration("scenes", "train", 5, "train-5", box, None, before=earlier) for box, earlier in states]
    together = to_turns(policy, screen, dataset, made)
    for turn, alone in zip(together, (to_turns(policy, screen, dataset, [d])[0] for d in made), strict=True):
        assert turn.prompt.ids == alone.prompt.ids
        for mine, its in zip(turn.prompt.images, alone.prompt.images, strict=True):
            assert torch.equal(mine.patches, its.patches)
    assert len({id(image) for turn in together for image in turn.prompt.images}) == 1 + 2 * 3


def test_the_answer_ends_with_the_end_of_turn_and_parses(dataset):
    policy = load_policy("tiny")
    screen = make_vector_env("IVT-Scenes-v0", 1, split="train", **policy.shown).screen
    kept = Demonstration("scenes", "train", 5, "train-5", dataset[5].box, None)
    for demonstration in [*taught(dataset), kept]:
        (turn,) = to_turns(policy, screen, dataset, [demonstration])
        assert turn.completion[-1] in policy.sampling.end_ids and turn.finished
        action = parse_action(policy.text(turn))
        assert action.stop == (demonstration.answer is None) and not action.failed


def test_batches_show_every_demonstration_once_an_epoch():
    samples = [7, 7, 3, 3, 3, 5, 1, 1, 1, 1]
    seen = np.concatenate(list(batches(samples, 4, 5, np.random.default_rng(0))))
    assert sorted(seen[:10]) == list(range(10)) and sorted(seen[10:]) == list(range(10))
    # Those of one sample stand together: its image is decoded once.
    for epoch in (seen[:10], seen[10:]):
        changes = sum(samples[a] != samples[b] for a, b in zip(epoch, epoch[1:], strict=False))
        assert changes == len(set(samples)) - 1
    assert list(seen[:10]) != list(seen[10:])


def test_training_lowers_the_loss_on_its_demonstrations(tmp_path, dataset):
    policy = load_policy("tiny")
    policy.model.requires_grad_(True)
    screen = make_vector_env("IVT-Scenes-v0", 1, split="train", **policy.shown).screen
    made = teach_as_the_paper(dataset, range(4), [(0.1, 0.1, 0.3, 0.3)] * 4)
    turns = to_turns(policy, screen, dataset, made)
    losses: list[float] = []
    train(
        policy,
        lambda chosen: [turns[i] for i in chosen],
        [d.index for d in made],
        Accelerator(cpu=True),
        MetricsLog(Path(tmp_path)),
        Args(out=tmp_path, steps=12, per_device_train_batch_size=4, gradient_accumulation_steps=3, optim="adamw"),
        lambda _, loss: losses.append(loss),
    )
    assert losses[-1] < 0.7 * losses[0]
