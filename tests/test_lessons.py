"""What SFT teaches about boxes. A lesson with the wrong answer, or in the wrong frame, teaches the opposite of
what its name says, and the loss goes down all the same.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from learner import small_policy

from agents.sft.demonstrations import can_be_said, demonstration, in_closeup
from agents.sft.lessons import LessonPlan, teach_to_verify
from agents.sft.trainer import AnswerLoss, make_optimizers, to_turns
from agents.vlm.codec import parse_action
from agents.vlm.load import load_policy
from ivt_env import boxes
from ivt_env.data import load_dataset
from ivt_env.rollouts import make_vector_env

INDICES = range(60)


@pytest.fixture(scope="module")
def dataset():
    return load_dataset("scenes", "train", None, True)


def taught(dataset, closeups: bool, plan: LessonPlan | None = None, seed: int = 0):
    rng = np.random.default_rng(seed)
    own = [boxes.clip(np.asarray(dataset[i].box) + rng.normal(0, 0.05, 4)) for i in INDICES]
    own = [None if boxes.invalid_reason(b) else tuple(b) for b in own]
    return teach_to_verify(dataset, list(INDICES), own, rng, closeups=closeups, plan=plan)


@pytest.mark.parametrize("closeups", [False, True])
def test_the_answer_depends_on_how_good_the_box_is(dataset, closeups):
    made = taught(dataset, closeups)
    kinds = {"first": 0, "stop": 0, "near": 0, "far": 0}
    for d in made:
        target = dataset[d.index].box
        if d.shown is None:
            kinds["first"] += 1
            assert d.answer is not None and d.picture == 1
        elif float(boxes.iou(d.shown, target)) >= 0.92:
            kinds["stop"] += 1
            assert d.answer is None
        else:
            near = in_closeup(d.shown, target)
            kinds["near" if near else "far"] += 1
            assert np.allclose(d.answer, target, atol=1e-5)
            assert d.picture == (2 if closeups and near else 1)
    assert all(kinds.values()), kinds


def test_boxes_of_other_objects_are_shown_where_there_are_any(dataset):
    plan = LessonPlan(first=0, own=0, sibling=1, random=0, shifted=0, good=0)
    made = taught(dataset, True, plan)
    with_siblings = [i for i in INDICES if dataset[i].siblings]
    assert [d.index for d in made] == with_siblings and with_siblings
    for d in made:
        assert max(float(boxes.iou(d.shown, s)) for s in dataset[d.index].siblings) > 0.6


def test_lessons_are_the_same_for_the_same_seed(dataset):
    assert taught(dataset, True) == taught(dataset, True)
    assert taught(dataset, True) != taught(dataset, True, seed=1)


def test_a_near_box_is_mended_in_the_finer_frame(dataset):
    """The answer's numbers, read back through the close-up, are the target to a thousandth of the close-up."""
    policy = load_policy("tiny", view="both")
    env = make_vector_env("IVT-Scenes-v0", 1, split="train", view="both")
    near = [d for d in taught(dataset, True) if d.picture == 2][:10]
    assert near
    for d, turn in zip(near, to_turns(policy, env.screen, dataset, near), strict=True):
        action = parse_action(policy.text(turn))
        assert action.picture == 2
        window = turn.prompt.windows[1]
        error = np.abs(np.array(policy.dialogue.box_of(action, turn.prompt)) - d.answer)
        assert (error <= 0.00051 * np.array([window[2] - window[0], window[3] - window[1]] * 2) + 1e-6).all()


@pytest.fixture(scope="module")
def turns(dataset):
    policy = load_policy("tiny")
    screen = make_vector_env("IVT-Scenes-v0", 1, split="train").screen
    return policy, to_turns(policy, screen, dataset, taught(dataset, False)[:12])


def test_smoothing_is_the_cross_entropy_against_a_gaussian_over_the_numbers(turns):
    policy, rows = turns
    with torch.no_grad():
        plain, smooth = (AnswerLoss(policy, True, sigma)(rows) for sigma in (0.0, 6.0))
        log_probs = AnswerLoss(policy, True, 0.0).distributions(rows)
    ids = [i for t in rows for i in t.completion]
    values = {policy.tokenizer.convert_tokens_to_ids(str(n)): n for n in range(1001)}
    assert any(i in values for i in ids) and any(i not in values for i in ids)
    for k, token in enumerate(ids):
        assert torch.isclose(plain[k], -log_probs[k, token], atol=1e-5)
        if token not in values:
            assert smooth[k] == plain[k]
            continue
        weights = {i: np.exp(-0.5 * ((n - values[token]) / 6.0) ** 2) for i, n in values.items()}
        by_hand = -sum(w * float(log_probs[k, i]) for i, w in weights.items()) / sum(weights.values())
        assert float(smooth[k]) == pytest.approx(by_hand, rel=1e-4)


def test_smoothing_is_refused_where_a_number_is_several_tokens():
    policy = load_policy("tiny")
    whole = policy.tokenizer
    policy.tokenizer = lambda text, **kwargs: {"input_ids": [1] * len(text)}
    with pytest.raises(ValueError, match="several tokens"):
        AnswerLoss(policy, True, 6.0)
    policy.tokenizer = whole


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_trained_weight_has_one_optimizer_and_adapters_never_muon(lora, kind):
    policy = small_policy(lora)
    trained = {id(p): n for n, p in policy.model.named_parameters() if p.requires_grad}
    made = make_optimizers(policy, kind)
    held = [id(p) for optimizer, _ in made for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(trained)
    names = [type(optimizer).__name__ for optimizer, _ in made]
    assert names == (["Muon", "AdamW"] if kind == "muon" and not lora else ["AdamW"])


def test_an_answer_outside_the_picture_that_is_shown_is_refused_and_left_out(dataset):
    """Clipped to the close-up it would be a line, or another box, and SFT would teach it."""
    policy = load_policy("tiny", view="closeup")
    screen = make_vector_env("IVT-Scenes-v0", 1, split="train", view="closeup").screen
    index = next(i for i in INDICES if dataset[i].box[0] > 0.5 and dataset[i].box[1] > 0.5)
    far = demonstration(dataset[index], dataset, index, (0.0, 0.0, 0.2, 0.2), dataset[index].box)
    near = demonstration(dataset[index], dataset, index, dataset[index].box, dataset[index].box)
    assert not can_be_said(far, "closeup") and can_be_said(near, "closeup")
    assert can_be_said(far, "overlay") and can_be_said(far, "both")
    with pytest.raises(ValueError, match="does not lie in"):
        to_turns(policy, screen, dataset, [far])
    assert to_turns(policy, screen, dataset, [near])
    second = demonstration(dataset[index], dataset, index, (0.0, 0.0, 0.2, 0.2), dataset[index].box, picture=2)
    assert not can_be_said(second, "both") and not can_be_said(second, "overlay")
