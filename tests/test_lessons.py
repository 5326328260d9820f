"""What SFT teaches about boxes. A lesson with the wrong answer, or in the wrong frame, teaches the opposite of
what its name says, and the loss goes down all the same.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from learner import small_policy

from ivt_agents.sft import train as train_sft
from ivt_agents.sft.demonstrations import can_be_said, demonstration, in_closeup, load_demonstrations
from ivt_agents.sft.lessons import LessonPlan, teach_to_verify
from ivt_agents.sft.trainer import AnswerLoss, make_optimizers, to_turns
from ivt_agents.training.run import RunError
from ivt_agents.vlm.codec import parse_action
from ivt_agents.vlm.generation import generate
from ivt_agents.vlm.load import load_policy
from ivt_agents.vlm.turns import Turn
from ivt_env import boxes
from ivt_env.data import load_dataset
from ivt_env.episodes import Episode, Step
from ivt_env.rollouts import make_vector_env

INDICES = range(60)


@pytest.fixture(scope="module")
def dataset():
    return load_dataset("scenes", "train", None, True)


def taught(dataset, closeups: bool, plan: LessonPlan | None = None, seed: int = 0):
    rng = np.random.default_rng(seed)
    own = [boxes.clip(np.asarray(dataset[i].box) + rng.normal(0, 0.05, 4)) for i in INDICES]
    own = [None if boxes.invalid_reason(b) else tuple(b) for b in own]
    return teach_to_verify(dataset, list(INDICES), own, rng, view="both" if closeups else "overlay", plan=plan)


@pytest.fixture(scope="module")
def asked():
    return load_dataset("scenes", "train_asked", None, True)


def taught_together(asked, plan: LessonPlan | None = None):
    """Lessons about 20 images with six questions each; the student answers near the target."""
    rng = np.random.default_rng(0)
    own = [boxes.clip(np.asarray(asked[i].box) + rng.normal(0, 0.01, 4)) for i in range(120)]
    return teach_to_verify(asked, range(120), own, rng, view="both", plan=plan)


@pytest.mark.parametrize("closeups", [False, True])
def test_the_answer_depends_on_how_good_the_box_is(dataset, closeups):
    made = taught(dataset, closeups)
    kinds = {"first": 0, "stop": 0, "near": 0, "far": 0}
    for d in made:
        target = dataset[d.index].box
        if d.shown is None:
            kinds["first"] += 1
            assert d.answer is not None and d.image == 1
        elif float(boxes.iou(d.shown, target)) >= 0.92:
            kinds["stop"] += 1
            assert d.answer is None
            assert [number for number, _ in d.looks] == ([1, 2] if closeups else [1])
            assert np.allclose([box for _, box in d.looks], target, atol=1e-5), "a stop looks first, too"
        else:
            near = in_closeup(d.shown, target) and float(boxes.iou(d.shown, target)) >= 0.3
            kinds["near" if near else "far"] += 1
            assert [number for number, _ in d.looks] == ([1] if closeups and near else [])
            assert np.allclose(d.answer, target, atol=1e-5)
            assert d.image == (2 if closeups and near else 1)
    assert all(kinds.values()), kinds


def test_boxes_of_other_objects_are_shown_where_there_are_any(dataset):
    plan = LessonPlan(first=0, own=0, sibling=1, random=0, shifted=0, good=0)
    made = taught(dataset, True, plan)
    with_siblings = [i for i in INDICES if dataset[i].siblings]
    assert [d.index for d in made] == with_siblings and with_siblings
    for d in made:
        assert max(float(boxes.iou(d.shown, s)) for s in dataset[d.index].siblings) > 0.6


def test_one_box_is_shown_with_what_it_is_about_and_with_what_it_is_not(asked):
    """Otherwise the box alone, or the image, could tell what to do."""
    plan = LessonPlan(first=0, own=1, sibling=0, random=0, shifted=1, good=1)
    made = taught_together(asked, plan)
    shown: dict[tuple[str, tuple[float, ...]], list[bool]] = {}
    for d in made:
        near = float(boxes.iou(d.shown, asked[d.index].box)) >= 0.3
        shown.setdefault((asked[d.index].image_id, d.shown), []).append(near)
    mixed = sum(len(set(near)) == 2 for near in shown.values())
    assert mixed > 0.8 * len(shown), f"{mixed} of {len(shown)} boxes are shown with both"
    # The wrong ones are no more than the right ones, but for boxes that are about nothing.
    assert sum(map(sum, shown.values())) > 0.4 * len(made)


def test_a_wrong_box_of_the_students_is_shown_more_often_than_a_right_one(asked):
    plan = LessonPlan(first=0, own=1, sibling=0, random=0, shifted=0, good=0, contrast=0)
    wrong = {k: tuple(asked[k].siblings[0]) for k in range(120) if asked[k].siblings}
    own = [wrong.get(k, asked[k].box) for k in range(120)]
    made = teach_to_verify(asked, range(120), own, np.random.default_rng(0), view="both", plan=plan)
    authors = [d for d in made if d.index in wrong and d.shown == pytest.approx(wrong[d.index], abs=1e-5)]
    assert len(authors) / 20 > len(wrong) / 120, "one box is shown on each of the 20 images"


def test_what_is_taught_about_one_image_and_box_shares_its_images(asked):
    """The encoding of images is most of the work; and one that is shared is the very same input."""
    policy = load_policy("tiny", view="both")
    env = make_vector_env("IVT-Scenes-v0", 1, split="train_asked", view="both")
    made = taught_together(asked)[:40]
    together = to_turns(policy, env.screen, asked, made)
    alone = [to_turns(policy, env.screen, asked, [d])[0] for d in made]
    distinct = {id(p) for turn in together for p in turn.prompt.images}
    shows = {(asked[d.index].image_id, d.shown) for d in made}
    assert len(distinct) == sum(1 if shown is None else 2 for _, shown in shows) < len(made)
    for a, b in zip(together, alone, strict=True):
        assert (a.prompt.ids, a.completion, a.prompt.windows) == (b.prompt.ids, b.completion, b.prompt.windows)
        for x, y in zip(a.prompt.images, b.prompt.images, strict=True):
            assert torch.equal(x.patches, y.patches)


def test_lessons_are_the_same_for_the_same_seed(dataset):
    assert taught(dataset, True) == taught(dataset, True)
    assert taught(dataset, True) != taught(dataset, True, seed=1)


def test_a_near_box_is_mended_in_the_finer_frame(dataset):
    """The answer's numbers, read back through the close-up, are the target to a thousandth of the close-up."""
    policy = load_policy("tiny", view="both")
    env = make_vector_env("IVT-Scenes-v0", 1, split="train", view="both")
    near = [d for d in taught(dataset, True) if d.image == 2][:10]
    assert near
    for d, turn in zip(near, to_turns(policy, env.screen, dataset, near), strict=True):
        action = parse_action(policy.text(turn))
        assert action.image == 2
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


def test_a_policy_writes_down_where_the_target_is_before_it_keeps_mends_or_leaves_a_box(dataset):
    """The place is in the frame of the whole image, then of the close-up; the action is what stands last."""
    policy = load_policy("tiny", view="both")
    screen = make_vector_env("IVT-Scenes-v0", 1, split="train", view="both").screen
    made = [d for d in taught(dataset, True) if d.shown is not None]
    seen = set()
    for d, turn in zip(made, to_turns(policy, screen, dataset, made), strict=True):
        text, action = policy.text(turn), parse_action(policy.text(turn))
        first = parse_action(text[: text.index("}") + 1])
        whole = np.array(policy.dialogue.box_of(first, turn.prompt))
        assert first.image == 1 and np.abs(whole - dataset[d.index].box).max() <= 0.00051
        assert action.stop == (d.answer is None) and text.count("bbox_2d") == len(d.looks) + (not action.stop)
        seen.add((action.stop, action.image, len(d.looks)))
    assert seen == {(True, 1, 2), (False, 2, 1), (False, 1, 0)}


def test_the_decision_weight_multiplies_what_follows_a_box_and_nothing_else(turns):
    policy, rows = turns
    with torch.no_grad():
        plain, weighted = (AnswerLoss(policy, True, 6.0, weight)(rows) for weight in (1.0, 3.0))
    ids = [i for t in rows for i in t.completion]
    closing = policy.tokenizer.convert_tokens_to_ids("]}")
    follows = torch.tensor([k > 0 and ids[k - 1] == closing for k in range(len(ids))])
    assert 0 < int(follows.sum()) < len(ids)
    assert torch.allclose(weighted, torch.where(follows, 3 * plain, plain))


def test_the_stop_is_heard_wherever_in_an_answer_it_comes():
    """Its probability is the highest that it had anywhere, not that of an answer that begins with it."""
    policy = load_policy("tiny")
    screen = make_vector_env("IVT-Scenes-v0", 1, split="train").screen
    data = load_dataset("scenes", "train", None, True)
    (turn,) = to_turns(policy, screen, data, [demonstration(data[0], data, 0, None, data[0].box)])
    (said,) = generate(policy.core, [turn.prompt], policy.sampling, None, False)
    known = Turn(said.prompt, said.completion)
    with torch.no_grad():
        log_probs = AnswerLoss(policy, True).distributions([known])
    assert said.stop_probability == pytest.approx(float(log_probs[:, policy.sampling.stop_id].exp().max()), rel=1e-3)


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


def test_an_answer_outside_the_image_that_is_shown_is_refused_and_left_out(dataset):
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
    second = demonstration(dataset[index], dataset, index, (0.0, 0.0, 0.2, 0.2), dataset[index].box, image=2)
    assert not can_be_said(second, "both") and not can_be_said(second, "overlay")


def test_the_student_is_asked_about_some_of_each_image_and_everything_else_is_taught_all_the_same(
    monkeypatch, tmp_path
):
    asked: list[int] = []

    def answers(policy, env, indices, on_progress, **kwargs):
        asked.extend(indices)
        return [
            Episode("", "", "", "", "", (0, 0, 1, 1), (9, 9), [Step((0, 0, 1, 1), False, (0.1, 0.1, 0.5, 0.5), 0, 0)])
            for _ in indices
        ]

    monkeypatch.setattr(train_sft, "play", answers)
    args = train_sft.Args(
        lessons="verification",
        split="train_asked",
        samples=60,
        neighbours=6,
        harvested=2,
        seed=3,
        steps=0,
        eval_samples=0,
        report_to="none",
        out=tmp_path / "run",
    )
    train_sft.main(args)
    assert len(asked) == 20 and np.unique(np.array(asked) // 6, return_counts=True)[1].tolist() == [2] * 10
    made = load_demonstrations(
        tmp_path / "run" / "demonstrations.jsonl", load_dataset("scenes", "train_asked", None, True)
    )
    first = [d.index for d in made if d.shown is None]
    assert len(set(first)) == 60, "every sample is taught its first answer"
    with pytest.raises(RunError, match="harvested 0"):
        train_sft.main(dataclasses.replace(args, harvested=0))
    relayed = dataclasses.replace(args, first_answers=0.0, out=tmp_path / "relayed")
    train_sft.main(relayed)
    lessons = load_demonstrations(
        tmp_path / "relayed" / "demonstrations.jsonl", load_dataset("scenes", "train_asked", None, True)
    )
    assert lessons and all(d.shown is not None for d in lessons)
    for wrong in ({"first_answers": 1.5}, {"first_answers": 0.0, "lessons": "walks"}):
        with pytest.raises(RunError, match="first_answers"):
            train_sft.main(dataclasses.replace(args, **wrong))
