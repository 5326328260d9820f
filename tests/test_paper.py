"""The paper's recipe must be the paper's: a stop that slips in, or a good box that is taught, is another one. And
its table must not flatter: what the target chose may never stand where a rule without it should.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import paper
from experiments.paper_tables import (
    VERSION_1,
    Played,
    claims,
    drop,
    most_confident,
    report,
    results,
    rules,
    version_1,
    version_2,
)
from ivt_agents.grpo import train as train_grpo
from ivt_agents.grpo.collect import collect
from ivt_agents.play.on_split import play
from ivt_agents.sft import train as train_sft
from ivt_agents.sft.demonstrations import load_demonstrations, save_demonstrations, teach_as_the_paper
from ivt_agents.sft.trainer import to_turns
from ivt_agents.training.folder import RunError
from ivt_agents.vlm.codec import STOP_TEXT, parse_action
from ivt_agents.vlm.generation import TokenScorer
from ivt_agents.vlm.load import load_policy
from ivt_agents.vlm.policy import forbid_stop, without_stop
from ivt_agents.vlm.prompts import QWEN, TINY, Prompts
from ivt_env import boxes
from ivt_env.data.scenes import Scenes
from ivt_env.episodes import Episode, Step
from ivt_env.metrics.columns import columns
from ivt_env.metrics.scores import scores
from ivt_env.rollouts import make_vector_env

CONFIGS = Path(__file__).parent.parent / "configs"
SCENES, LARGE = CONFIGS / "paper_scenes.yaml", CONFIGS / "paper_qwen3vl_4b.yaml"


@pytest.fixture(scope="module")
def dataset():
    return Scenes("train")


def moved(dataset, index: int, share: float):
    """The sample's box, moved to the side by a share of its width."""
    target = np.array(dataset[index].box)
    width = target[2] - target[0]
    way = 1 if target[2] + share * width <= 1 else -1
    return boxes.clip(target + way * share * width * np.array([1, 0, 1, 0]))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 200), st.lists(st.floats(0.01, 0.99), min_size=4, max_size=4), st.integers(1, 4))
def test_bad_first_boxes_walk_in_a_straight_line_and_good_ones_are_dropped(dataset, index, values, steps):
    first = (min(values[::2]), min(values[1::2]), max(values[::2]) + 0.005, max(values[1::2]) + 0.005)
    target = np.array(dataset[index].box)
    made = teach_as_the_paper(dataset, [index], [first], steps=steps)
    if float(boxes.iou(first, target)) > 0.85:
        assert made == []
        return
    opening, *walk = made
    assert len(walk) == steps and opening.shown is None and not opening.before
    assert opening.answer == pytest.approx(first, abs=1e-6)
    for hop, d in enumerate(walk):
        straight = np.asarray(first) + (target - first) * (hop + 1) / steps
        assert d.answer is not None and np.allclose(d.answer, straight, atol=2e-6)
        assert d.shown is not None and d.trace
        assert [*d.before, d.shown][0] == pytest.approx(first, abs=1e-6) and len(d.before) == hop
    assert np.allclose(made[-1].answer, target, atol=2e-6)


def test_neither_a_stop_nor_a_first_answer_of_its_own_is_taught(dataset):
    """The only first boxes are the student's, and no box is ever kept: ``looks`` holds both."""
    indices = list(range(80))
    student = [moved(dataset, i, 0.02 * (i % 20)) for i in indices]
    made = teach_as_the_paper(dataset, indices, student)
    taught = {d.index for d in made}
    for i, box in zip(indices, student, strict=True):
        assert (i in taught) == (float(boxes.iou(box, dataset[i].box)) <= 0.85)
    assert 0 < len(taught) < 80 and all(d.answer is not None for d in made)
    assert teach_as_the_paper(dataset, [3, 4], [None, (0.5, 0.5, 0.5, 0.6)]) == [], "a student without a box"
    for d in made:
        if d.shown is None:
            assert d.answer == pytest.approx(tuple(student[d.index]), abs=1e-6)


def test_the_conversation_of_a_trajectory_holds_its_boxes_and_survives_the_file(dataset, tmp_path):
    policy = load_policy("tiny", layout="prefix")
    forbid_stop(policy)
    made = teach_as_the_paper(dataset, [5], [moved(dataset, 5, 0.6)])
    save_demonstrations(tmp_path / "d.jsonl", made)
    assert load_demonstrations(tmp_path / "d.jsonl", dataset) == made
    screen = make_vector_env("IVT-Scenes-v0", 1, split="train").screen
    turns = to_turns(policy, screen, dataset, made)
    assert [len(t.prompt.images) for t in turns] == [1, 2, 3]
    answers = [parse_action(policy.text(t)).numbers for t in turns]
    for d, numbers in zip(made, answers, strict=True):
        assert numbers == tuple(policy.codec.encode(d.answer, (96, 96)))
    # What a step answers stands in what the next one is asked.
    for earlier, later in zip(turns, turns[1:], strict=False):
        answer = made[turns.index(earlier)].answer
        said = policy.dialogue.action_text(answer, [(earlier.prompt.images[-1], (0.0, 0.0, 1.0, 1.0))])
        assert said in policy.tokenizer.decode(later.prompt.ids)


@pytest.mark.parametrize("prompts", [TINY, QWEN])
def test_no_question_offers_a_stop(prompts):
    asked = without_stop(prompts)
    assert "stop" not in asked.text and "{expression}" in asked.text and "{box}" in asked.first + asked.text
    assert "bbox_2d" in asked.text or asked == prompts
    assert without_stop(asked) == asked
    with pytest.raises(ValueError, match="Say STOP"):
        without_stop(Prompts("{expression} {box} Say STOP when done."))


def test_a_forbidden_stop_cannot_be_sampled_and_is_not_scored_as_possible():
    policy = load_policy("tiny", temperature=1.0)
    stop = policy.sampling.stop_id
    assert stop is not None and policy.tokenizer.decode([stop]) == STOP_TEXT
    forbid_stop(policy)
    env = make_vector_env("IVT-Scenes-v0", 2, split="train", max_steps=1)
    turns = [t for episode in collect(env, policy, [1], 2).turns for t in episode]
    with torch.no_grad():
        after = TokenScorer(policy.model, policy.sampling, True).distributions(turns)
    assert torch.isneginf(after[:, stop]).all() and torch.allclose(after.exp().sum(-1), torch.ones(len(after)))
    assert all(t.stop_probability is None for t in turns)


@pytest.mark.parametrize("forbidden", [True, False])
def test_a_stop_that_is_spelt_out_means_the_same_in_training_and_in_evaluation(forbidden, monkeypatch):
    policy = load_policy("tiny", temperature=1.0)
    if forbidden:
        forbid_stop(policy)
    monkeypatch.setattr(policy, "text", lambda turn: 'It fits. {"stop": true}')
    env = make_vector_env("IVT-Scenes-v0", 4, split="train", max_steps=3)
    groups = collect(env, policy, [1, 2], 2)
    assert all(turn.finished for episode in groups.turns for turn in episode)
    episodes = play(policy, "IVT-Scenes-v0", "train", [1, 2], max_steps=3)
    steps = [step for episode in episodes for step in episode.steps]
    if forbidden:
        assert groups.taken.all() and not groups.stopped.any() and groups.parse_failures == 12
        assert len(steps) == 6 and all(s.parse_failure and s.invalid and not s.stop for s in steps)
    else:
        assert groups.taken.sum() == 4 and groups.stopped.all() and groups.parse_failures == 0
        assert len(steps) == 2 and all(s.stop and not s.parse_failure for s in steps)
    assert all(step.box is None for step in steps) and not groups.ious.any()


class Scripted:
    """Plays what it is told: for each step a box, 'stop' or None (no answer)."""

    def __init__(self, script):
        self.script, self.turns, self.at = script, [], 0

    def reset(self, mask):
        self.at = 0

    def act(self, observations):
        n = len(observations["box"])
        said = self.script[self.at]
        self.at += 1
        self.turns = [object()] * n
        box = np.full((n, 4), np.nan, dtype=np.float32)
        if isinstance(said, tuple):
            box[:] = said
        return {
            "box": box,
            "stop": np.full(n, int(said == "stop")),
            "parse_failure": np.full(n, said is None),
        }


HERE, BAD = (0.1, 0.1, 0.4, 0.4), (0.5, 0.5, 0.2, 0.9)


@pytest.mark.parametrize(
    ("script", "bonus", "length", "failures"),
    [
        ([HERE, HERE, HERE], 0.1, 3, 0),
        ([HERE, "stop", HERE], 0.1, 2, 0),
        ([HERE, None, HERE], 0.0, 3, 1),
        ([HERE, BAD, HERE], 0.0, 3, 0),  # parsed, and refused by the environment
        ([HERE, HERE, None], 0.0, 3, 1),
    ],
)
def test_the_format_bonus_is_paid_once_and_for_whole_episodes_only(script, bonus, length, failures):
    reward = {"kind": "final"}
    env = make_vector_env("IVT-Scenes-v0", 2, split="train", max_steps=3, reward=reward)
    paid = collect(env, Scripted(script), [4], 2, format_bonus=0.1)
    plain = collect(env, Scripted(script), [4], 2)
    assert paid.taken.sum(-1).tolist() == [[length, length]]
    assert np.allclose((paid.rewards - plain.rewards).sum(-1), bonus)
    assert np.allclose(np.delete(paid.rewards, length - 1, -1), 0)
    assert np.allclose(plain.rewards.sum(-1), paid.ious[:, :, -1])
    assert paid.parse_failures == 2 * failures
    strict = collect(env, Scripted(script), [4], 2, format_bonus=0.1, require_format=True)
    assert np.array_equal(strict.rewards, paid.rewards if bonus else np.zeros_like(paid.rewards))
    assert np.array_equal(strict.ious, paid.ious)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format_bonus": 0.1}, "would cost both"),
        ({"require_format": True}, "the penalty neither"),
        ({"format_bonus": -0.1, "invalid_penalty": 0.0}, "format_bonus -0.1"),
        ({"format_bonus": float("nan"), "invalid_penalty": 0.0}, "format_bonus nan"),
    ],
)
def test_a_bonus_that_contradicts_is_refused(options, message):
    with pytest.raises(RunError, match=message):
        train_grpo.check_options(train_grpo.Args(**options))
    train_grpo.check_options(train_grpo.Args(format_bonus=0.1, invalid_penalty=0.0, stop=False))


@pytest.mark.parametrize("path", [SCENES, LARGE])
def test_both_configurations_are_the_papers_recipe(path, tmp_path):
    recipe = paper.load_recipe(paper.Args(config=path, out=tmp_path, seed=3))
    assert (recipe.grpo.num_generations, recipe.grpo.beta, recipe.grpo.format_bonus) == (6, 0.04, 0.1)
    assert recipe.grpo.episode_steps == 3 and recipe.single.episode_steps == 1 and not recipe.single.stop
    assert replace(recipe.single, episode_steps=3, out=recipe.grpo.out) == recipe.grpo
    assert recipe.sft.layout == recipe.grpo.layout == "prefix" and recipe.sft.samples == 2400
    assert recipe.grpo.model == str(recipe.sft.out / "policy")
    assert {recipe.sft.seed, recipe.grpo.seed, recipe.single.seed} == {3}
    own = recipe.own_gain
    assert own is not None and (own.model, own.seed, own.stop) == (recipe.grpo.model, 3, False)
    assert (own.reward, own.advantage, own.discount) == ("gain", "return_to_go", 0.0)
    for stage in recipe.stages.values():
        train_grpo.check_options(stage)
    values = [x for x in SCENES.read_text().splitlines() if x.startswith("  ")]
    assert values and all("# paper" in x or "# our choice" in x for x in values)


def test_a_dry_run_of_the_4b_model_says_all_stages_and_writes_nothing(tmp_path, capsys):
    assert paper.main(paper.Args(config=LARGE, out=tmp_path / "out", dry_run=True)) == {}
    said = capsys.readouterr().out
    assert said.count("Qwen/Qwen3-VL-4B-Instruct") >= 3 and said.count("GB") > 3
    for words in ("lessons paper", "stop False", "format_bonus 0.1", "episode_steps 1", "Mixed-v0", "layout prefix"):
        assert words in said, words
    assert not (tmp_path / "out").exists()


TARGET = (0.4, 0.4, 0.6, 0.6)


def episode(number: int, ious: list[float], confidence: list[float] | None = None) -> Episode:
    """Boxes inside the target with the given IoUs, one a step."""
    steps = []
    for k, iou in enumerate(ious):
        box = (0.4, 0.4, 0.6, 0.4 + 0.2 * iou)
        stated = None if confidence is None else confidence[k]
        steps.append(Step(box, False, box, float(boxes.iou(box, TARGET)), 0.0, None, "", False, None, stated))
    one = Episode(f"s{number}", f"p{number}", "scenes", "test", "x", TARGET, (96, 96), steps)
    one.truncated = True
    return one


def policy_of(curves: list[list[float]], confidence: list[float] | None = None) -> Played:
    made = [episode(i, curve, confidence) for i, curve in enumerate(curves)]
    return Played(made, columns(episodes_forced=made))


SHAKEN = [[0.9, 0.3, 0.89]] * 40 + [[0.3, 0.6, 0.3]] * 30
"""More are right at step 0 alone than at step 1 alone, so that only the oracle gains."""


def story(grpo: list[list[float]] | None = None, sft: list[list[float]] | None = None) -> dict[str, Played]:
    """The paper's, drawn sharply: 200 images, the base collapses, SFT spoils four in five and mends one."""
    half = 100
    return {
        "base": policy_of([[0.9, 0.1, 0.1]] * 160 + [[0.1, 0.1, 0.1]] * 40),
        "sft": policy_of(
            sft or [[0.9, 0.7, 0.6]] * half + [[0.9, 0.45, 0.4]] * 60 + [[0.3, 0.9, 0.2]] * 40, [0.5, 0.6, 0.7]
        ),
        "grpo": policy_of(grpo or [[0.9, 0.9, 0.89]] * 130 + SHAKEN, [0.9, 0.8, 0.7]),
        "single": policy_of([[0.9]] * 160 + [[0.3]] * 40),
    }


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({}, set()),
        # half of the drop is left: no five times
        ({"grpo": [[0.9, 0.8, 0.75]] * 130 + SHAKEN}, {4}),
        # the last step is right where the first was not: a rule gains, no mirage
        ({"grpo": [[0.9, 0.9, 0.9]] * 160 + [[0.3, 0.6, 0.8]] * 40}, {7}),
        # GRPO sits still on bad boxes: nothing for an oracle to gain, and accuracy falls
        ({"grpo": [[0.9, 0.9, 0.9]] * 20 + [[0.3, 0.3, 0.3]] * 180}, {5, 7}),
        # SFT mends everything
        ({"sft": [[0.3, 0.6, 0.9]] * 200}, {3, 4, 5, 6}),
    ],
)
def test_each_part_of_the_story_can_fail(changes, broken):
    made = claims(story(**changes))
    assert len(made) == 8 and {k for k, claim in enumerate(made) if not claim.holds} == broken


@pytest.mark.parametrize(
    ("after", "fewer", "kept"),
    [
        ([[0.9, 0.9, 0.89]] * 130 + SHAKEN, True, True),
        ([[0.9, 0.8, 0.75]] * 130 + SHAKEN, False, True),
        ([[0.3, 0.3, 0.3]] * 200, True, False),
    ],
)
def test_grpo_on_own_gains_is_judged_where_it_was_trained(after, fewer, kept):
    played = story()
    made = claims(played | {"own_gain": policy_of(after)})
    assert made[:8] == claims(played) and [c.holds for c in made[8:]] == [fewer, kept]
    for text in (version_1(played), version_2(played)):
        assert "own gain" not in text and "own_gain" not in text


def test_only_the_oracle_may_look_at_the_target():
    """Whatever the target is, the label-free rules choose the same steps."""
    curves = [[0.2, 0.5, 0.9], [0.9, 0.2, 0.5]]
    played = policy_of(curves, [0.1, 0.8, 0.3])
    found = rules(played)
    assert [name for name, c in found.items() if c.oracle] == ["oracle_best"] and list(found)[-1] == "oracle_best"
    assert np.allclose(found["most_confident"].iou, [0.5, 0.2], atol=1e-6)
    assert np.allclose(found["oracle_best"].iou, [0.9, 0.9], atol=1e-6)
    assert all((found["oracle_best"].iou >= c.iou - 1e-9).all() for c in found.values())
    unsure = most_confident([episode(0, [0.3, 0.8, 0.9])])
    assert np.allclose(unsure.iou, 0.3, atol=1e-6), "nothing stated: the first box"
    assert drop(policy_of([[0.9, 0.7, 0.5], [0.5, 0.5, 0.7]])) == pytest.approx(0.05, abs=1e-6)


def test_the_first_version_quotes_the_paper_and_marks_what_the_target_chose():
    played = story() | {"own_gain": policy_of([[0.9, 0.9, 0.9]] * 200)}
    text = report(played, "made up").splitlines()
    for line in VERSION_1:
        at = next(k for k, t in enumerate(text) if t.startswith(line.title))
        assert ("*" in line.title) == played[line.policy].columns[line.column].oracle
        cells = text[at][len(line.title) :].split()
        assert cells[0] == f"{100 * scores(played[line.policy].columns[line.column], ['Acc@0.5'])['Acc@0.5']:.1f}"
        below = [] if line.policy == "own_gain" else text[at + 1].split()
        assert below[3:4] == ([f"{100 * line.reported[0]:.1f}"] if line.reported[0] else [])
    marked = [t for t in version_2(played).splitlines() if "oracle_best" in t]
    assert marked and all("oracle_best *" in t for t in marked)
    assert results(played)["policies"]["grpo"]["oracle_rules"] == ["oracle_best"]


def test_the_command_trains_plays_and_takes_up_what_is_done(tmp_path, capsys):
    content = yaml.safe_load(SCENES.read_text())
    content["sft"] |= {"samples": 12, "steps": 1, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 4}
    content["grpo"] |= {"steps": 1, "prompts": 1, "num_generations": 2, "max_completion_length": 14}
    content["own_gain"] |= {"steps": 1, "prompts": 1, "num_generations": 2, "cooldown": 1}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(content))
    args = paper.Args(config=path, out=tmp_path / "run", samples=6, split="val", num_envs=6)
    found = paper.main(args)
    assert set(found["policies"]) == {"base", "sft", "single", "grpo", "own_gain"} and len(found["claims"]) == 10
    assert {"step_0", "last_step", "random_step", "oracle_best"} <= set(found["policies"]["grpo"]["rules"])
    lines = (args.out / "table.txt").read_text()
    assert "version 1" in lines and "version 2" in lines and "n = 6" in lines
    dataset = Scenes("train")
    taught = load_demonstrations(args.out / "sft" / "demonstrations.jsonl", dataset)
    assert taught and all(d.answer is not None for d in taught)
    capsys.readouterr()
    weights = args.out / "grpo" / "policy" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert paper.main(args)["policies"] == found["policies"]
    assert capsys.readouterr().out.count("is done already") == 4 and weights.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="was made with seed 0, not 1: give another --out"):
        paper.main(replace(args, seed=1))


OTHER = [("sft", "lessons", "looks"), ("grpo", "stop", True), ("grpo", "advantage", "return_to_go")]
OTHER += [
    ("grpo", "reward", "gain"),
    ("grpo", "episode_steps", 1),
    ("grpo", "layout", "fresh"),
    ("grpo", "bf16", False),
]
OTHER += [("own_gain", "stop", True), ("own_gain", "view", "closeup"), ("own_gain", "episode_steps", 2)]


@pytest.mark.parametrize(
    ("part", "options", "asked", "why"),
    [
        ("grpo", {}, {"split": "tset"}, "no split 'tset'"),
        ("grpo", {"num_generations": 1}, {}, "num_generations 1"),
        ("own_gain", {"cooldown": 999}, {}, "cooldown 999"),
        ("own_gain", {"quantize": "nf4"}, {}, "lora_r 0 with weights in nf4"),
        *((part, {key: value}, {}, f"(grpo|{part}).{key} is") for part, key, value in OTHER),
    ],
)
def test_another_recipe_and_what_would_fail_at_the_end_are_refused_at_once(part, options, asked, why, tmp_path):
    content = yaml.safe_load(SCENES.read_text())
    content[part] |= options
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=why):
        paper.main(paper.Args(config=path, out=tmp_path / "run", **asked))
    assert not (tmp_path / "run").exists()


def test_the_part_of_another_grpo_cannot_choose_folder_model_or_seed_and_may_be_empty(tmp_path):
    content = yaml.safe_load(SCENES.read_text())
    path = tmp_path / "own.yaml"
    content["own_gain"] |= {"out": "elsewhere", "seed": 7, "model": "tiny"}
    path.write_text(yaml.safe_dump(content))
    recipe = paper.load_recipe(paper.Args(config=path, out=tmp_path / "run", seed=3))
    assert recipe.own_gain is not None and recipe.own_gain.seed == 3
    assert recipe.own_gain.out == tmp_path / "run" / "own-gain" and recipe.own_gain.model == recipe.grpo.model
    path.write_text(yaml.safe_dump(content | {"own_gain": None}))
    assert paper.load_recipe(paper.Args(config=path)).own_gain is None


def test_a_warm_start_made_on_the_way_has_the_papers_lessons(tmp_path, monkeypatch):
    """GRPO without the stop, started from nothing, must not be taught stops first."""
    asked = []
    monkeypatch.setattr(train_sft, "main", lambda args: asked.append(args) or tmp_path)
    for stop, lessons in ((False, "paper"), (True, "looks")):
        train_grpo._warm_start(train_grpo.Args(stop=stop, out=tmp_path / f"run{stop}"), Mock())
        assert asked[-1].lessons == lessons
