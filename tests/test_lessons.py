"""What SFT teaches about boxes. A lesson with the wrong answer, or in the wrong frame, teaches the opposite of
what its name says, and the loss goes down all the same.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from learner import small_policy

from ivt_agents.sft.demonstrations import can_be_said, demonstration, in_closeup
from ivt_agents.sft.lessons import Shares, teach_to_look
from ivt_agents.sft.teacher.template import FITS, MISSES, WRONG_OBJECT
from ivt_agents.sft.trainer import SMOOTHING, AnswerLoss, make_optimizers, to_turns
from ivt_agents.vlm.codec import parse_action
from ivt_agents.vlm.generation import generate
from ivt_agents.vlm.load import load_policy
from ivt_agents.vlm.turns import Turn
from ivt_env import boxes
from ivt_env.data import load_dataset
from ivt_env.rendering import Surroundings
from ivt_env.rollouts import make_vector_env

INDICES = range(90)
AROUND = {"margin": 0.5, "smallest": 0.1, "square": True}
VIEWS = ("overlay", "closeup", "both")
NOTHING = dict.fromkeys(("first", "own", "shifted", "corrected", "other", "candidate", "again"), 0.0)


@pytest.fixture(scope="module")
def dataset():
    return load_dataset("scenes", "train", None, True)


def first_boxes(dataset):
    """Of a student that is often near, sometimes nowhere, and sometimes gives no box."""
    rng = np.random.default_rng(0)
    near = [boxes.clip(np.asarray(dataset[i].box) + rng.normal(0, 0.02, 4)) for i in INDICES]
    answers = {0: None, 1: (0.001, 0.001, 0.02, 0.02)}
    found = [answers.get(i % 5, tuple(box)) for i, box in zip(INDICES, near, strict=True)]
    return [None if box is None or boxes.invalid_reason(box) else box for box in found]


def taught(dataset, view="both", seed=0, counted=False, **shares):
    rng, around = np.random.default_rng(seed), Surroundings(**AROUND)
    chosen = Shares(**(NOTHING | shares)) if shares else None
    return teach_to_look(dataset, INDICES, first_boxes(dataset), rng, view, around, shares=chosen, counted=counted)


@pytest.fixture(scope="module")
def made(dataset):
    return taught(dataset)


def window_of(env, demonstration):
    """What the environment itself shows beside a box."""
    return env.reset(options={"index": [demonstration.index], "initial_box": [demonstration.shown]})[0]["window"][0]


@pytest.mark.parametrize("counted", [False, True])
def test_the_right_answer_follows_from_where_the_box_lies(dataset, counted):
    """A stop where it fits; the target, in the close-up's frame where that holds it; else somewhere else.

    Where the question counts the looks, a box fits that a second look gave, or one of an object so large that a
    close-up shows little more; else one whose IoU is at least 0.9.
    """
    env = make_vector_env("IVT-Scenes-v0", 1, split="train", view="both", closeup=AROUND)
    kinds = {"first": 0, "stop": 0, "closeup": 0, "whole": 0, "other": 0, "nowhere": 0, "search": 0}
    kinds |= {"again": 0, "large": 0}
    for d in taught(dataset, counted=counted):
        sample = dataset[d.index]
        if d.shown is None:
            kinds["first"] += 1
            assert np.allclose(d.answer, first_boxes(dataset)[d.index], atol=1e-6) and (d.image, d.trace) == (1, "")
            continue
        objects = [sample.box, *sample.siblings]
        overlaps = [float(boxes.iou(d.shown, box)) for box in objects]
        on = int(np.argmax(overlaps)) if max(overlaps) >= 0.3 else None
        looks = "" if on is None else sample.meta["looks"][on]
        seen = "" if on is None else f"{'An' if looks[0] in 'aeiou' else 'A'} {looks}."
        assert d.trace.startswith(seen) and (on is not None or not d.trace.startswith("A"))
        said = d.trace.removeprefix(seen).strip()
        again = any(float(boxes.iou(d.shown, box)) >= 0.5 for box in d.before)
        x1, y1, x2, y2 = window_of(env, d)
        large = max(x2 - x1, y2 - y1) > 0.4
        fits = (overlaps[0] >= 0.7 if large else again) if counted else overlaps[0] >= 0.9
        kinds["large"] += counted and on == 0 and large and fits and not again
        if on == 0 and fits:
            kinds["stop"] += 1
            assert (d.answer, said) == (None, FITS)
        elif on == 0:
            a, b, c, e = sample.box
            inside = x1 <= a and y1 <= b and c <= x2 and e <= y2
            kinds["closeup" if inside else "whole"] += 1
            assert d.image == (2 if inside else 1) and np.allclose(d.answer, sample.box, atol=1e-6)
            assert said not in (FITS, MISSES, WRONG_OBJECT)
        else:
            kinds["again"] += again
            kinds["nowhere" if on is None else "other"] += 1
            assert (d.image, said) == (1, MISSES if on is None else WRONG_OBJECT)
            wanted = sample.box
            if sample.meta["kind"] == "mark":
                kinds["search"] += 1
                looked = [*d.before, d.shown]
                left = [box for box in objects if all(float(boxes.iou(box, b)) < 0.3 for b in looked)]
                wanted = sorted(left)[0]
                assert tuple(sample.box) in [tuple(box) for box in left], "the target was never ruled out"
            assert np.allclose(d.answer, wanted, atol=1e-6)
    assert all(count for kind, count in kinds.items() if counted or kind != "large"), kinds


def test_what_was_looked_at_before_is_objects_and_in_search_scenes_all_numbers_of_them(dataset, made):
    """The target only under a box that corrects it: with a look at it before, the episode would have ended there."""
    counts = {True: set(), False: set()}
    for d in (d for d in made if d.shown is not None):
        sample = dataset[d.index]
        objects = np.array([sample.box, *sample.siblings])
        here = int(np.argmax(boxes.iou(d.shown, objects)))
        for k, box in enumerate(d.before):
            on = boxes.iou(box, objects)
            assert on.max() > 0.3 and (np.argmax(on) > 0 or here == 0)
            if np.argmax(on) == here and sample.meta["kind"] == "mark":
                assert k == len(d.before) - 1, "what was looked at last is the object that the box is on"
        counts[sample.meta["kind"] == "mark"].add(len(d.before))
    assert counts[False] == {0, 1, 2} and counts[True] >= {0, 1, 2, 3, 4}


def test_each_state_can_be_left_out_and_search_scenes_show_every_other_object(dataset):
    assert all(d.shown is None for d in taught(dataset, first=1.0))
    with_box = [i for i, box in enumerate(first_boxes(dataset)) if box is not None]
    own = taught(dataset, own=1.0)
    assert [d.index for d in own] == with_box and not any(d.before for d in own)
    near, shifted = (taught(dataset, **{name: 1.0}) for name in ("corrected", "shifted"))
    overlap = [np.mean([boxes.iou(d.shown, dataset[d.index].box) for d in some]) for some in (near, shifted)]
    assert overlap[0] > 0.9 > overlap[1] > 0.6 and len(near) == len(shifted) == len(INDICES)
    last = [float(boxes.iou(d.before[-1], dataset[d.index].box)) for d in near]
    assert 0.6 < np.mean(last) < overlap[0]
    more = taught(dataset, candidate=1.0, again=1.0)
    assert more and all(float(boxes.iou(d.before[-1], d.shown)) > 0.5 for d in more)
    others = [d.index for d in taught(dataset, other=1.0, candidate=1.0)]
    for i in INDICES:
        siblings = len(dataset[i].siblings)
        assert others.count(i) == (siblings if dataset[i].meta["kind"] == "mark" else min(1, siblings))


def test_lessons_are_the_same_for_the_same_seed_and_without_a_close_up_only_the_frame_differs(dataset, made):
    assert taught(dataset) == made != taught(dataset, seed=1)
    flat = taught(dataset, view="overlay")
    assert [(d.shown, d.answer, d.trace, d.before) for d in flat] == [
        (d.shown, d.answer, d.trace, d.before) for d in made
    ]
    assert {d.image for d in flat} == {1} < {d.image for d in made}


def test_a_near_box_is_mended_in_the_finer_frame(dataset, made):
    """The answer's numbers, read back through the close-up, are the target to a thousandth of the close-up."""
    policy = load_policy("tiny")
    env = make_vector_env("IVT-Scenes-v0", 1, split="train", **policy.shown)
    near = [d for d in made if d.image == 2][:10]
    for d, turn in zip(near, to_turns(policy, env.screen, dataset, near), strict=True):
        action = parse_action(policy.text(turn))
        assert action.image == 2
        window = turn.prompt.windows[1]
        error = np.abs(np.array(policy.dialogue.box_of(action, turn.prompt)) - d.answer)
        assert (error <= 0.00051 * np.array([window[2] - window[0], window[3] - window[1]] * 2) + 1e-6).all()
    assert len(near) == 10


def test_a_lesson_asks_what_the_episode_would_have_asked_with_the_looks_at_that_place(dataset):
    """The boxes before decide the count; taught with another one than is asked, the policy would never stop."""
    policy = load_policy("tiny")
    env = make_vector_env("IVT-Scenes-v0", 1, split="train", max_steps=8, **policy.shown)
    walk = [(0.1, 0.1, 0.3, 0.3), (0.6, 0.6, 0.8, 0.8), (0.11, 0.1, 0.3, 0.3), (0.1, 0.11, 0.3, 0.3)]
    seen = env.reset(options={"index": [4]})[0]
    for k, box in enumerate(walk):
        seen = env.step({"box": np.array([box], dtype=np.float32), "stop": np.array([0])})[0]
        (asked,) = policy.prompts_for(seen, [0])
        demo = demonstration(dataset[4], dataset, 4, seen["box"][0], None, before=walk[:k])
        (turn,) = to_turns(policy, env.screen, dataset, [demo])
        assert turn.prompt.ids == asked.ids
        assert f"Look {(1, 1, 2, 3)[k]}." in policy.tokenizer.decode(asked.ids)


def test_every_lesson_is_words_that_the_tiny_model_knows_whole_and_fits_its_limit(dataset, made):
    policy = load_policy("tiny")
    screen = make_vector_env("IVT-Scenes-v0", 1, split="train", **policy.shown).screen
    chosen = made[::4]
    for d, turn in zip(chosen, to_turns(policy, screen, dataset, chosen), strict=True):
        action = parse_action(policy.text(turn))
        assert action.stop == (d.answer is None) and not action.failed
        assert len(turn.completion) <= policy.sampling.max_new_tokens
        ids = policy.tokenizer(d.trace)["input_ids"]
        marks = d.trace.count(".") + d.trace.count(";")
        assert len(ids) <= len(d.trace.split()) + marks + d.trace.startswith("An "), "an article is two tokens"


@pytest.fixture(scope="module")
def turns(dataset):
    policy = load_policy("tiny")
    screen = make_vector_env("IVT-Scenes-v0", 1, split="train", **policy.shown).screen
    return policy, to_turns(policy, screen, dataset, taught(dataset)[:12])


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


def test_smoothing_is_the_usual_one_where_numbers_are_single_tokens_and_refused_elsewhere():
    policy = load_policy("tiny")
    assert AnswerLoss(policy, True, None).smoothing == SMOOTHING > 0
    policy.tokenizer = lambda text, **kwargs: {"input_ids": [1] * len(text)}
    assert AnswerLoss(policy, True, None).smoothing == 0
    with pytest.raises(ValueError, match="several tokens"):
        AnswerLoss(policy, True, 6.0)


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
    screen = make_vector_env("IVT-Scenes-v0", 1, split="train", **policy.shown).screen
    index = next(i for i in INDICES if dataset[i].box[0] > 0.5 and dataset[i].box[1] > 0.5)
    target, size = dataset[index].box, dataset[index].size
    far = demonstration(dataset[index], dataset, index, (0.0, 0.0, 0.2, 0.2), target)
    near = demonstration(dataset[index], dataset, index, target, target)
    second = demonstration(dataset[index], dataset, index, (0.0, 0.0, 0.2, 0.2), target, image=2)
    said = {view: [can_be_said(d, view, screen.around, size) for d in (far, near, second)] for view in VIEWS}
    assert said == {"overlay": [True, True, False], "closeup": [False, True, False], "both": [True, True, False]}
    with pytest.raises(ValueError, match="does not lie in"):
        to_turns(policy, screen, dataset, [far])
    assert to_turns(policy, screen, dataset, [near])


def test_whether_a_close_up_holds_the_target_depends_on_how_much_it_shows():
    shown, target, size = (0.4, 0.4, 0.5, 0.5), (0.34, 0.42, 0.48, 0.5), (400, 800)
    held = {m: in_closeup(shown, target, Surroundings(m, 0.0), size) for m in (0.0, 0.5, 1.0)}
    assert held == {0.0: False, 0.5: False, 1.0: True}
    # As high as it is wide in pixels: half as wide a share of an image that is twice as wide as high.
    wide = Surroundings(0.0, 0.2, square=True)
    assert in_closeup(shown, (0.41, 0.26, 0.49, 0.64), wide, size)
    assert not in_closeup(shown, (0.26, 0.41, 0.64, 0.49), wide, size)
