"""What controls of equal compute promise, and that their cost is what the model really computed.

If one of these is false, nothing crashes: a control that saw the first box is no control, a medoid that
depends on the order of the samples is chance, N samples that are one are a single shot, and a cost that is
not what was computed makes two policies equal on paper only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from ivt_agents.play.by_name import load_agent
from ivt_agents.play.controls import PickOfShots, SecondShot, medoid, most_confident
from ivt_agents.play.cost import Metered, cost_of
from ivt_agents.play.scripted import StopAfter
from ivt_agents.sft import train as train_sft
from ivt_agents.vlm.codec import parse_action
from ivt_agents.vlm.load import PolicyError, load_policy
from ivt_agents.vlm.policy import VLMPolicy
from ivt_agents.vlm.turns import Turn
from ivt_env import boxes
from ivt_env.rollouts import Agent, make_vector_env, rollout
from ivt_env.vector_env import GroundingVectorEnv

FIRST = [3, 7, 11]
"""Samples of the validation split."""


def environment(num_envs: int = len(FIRST), **kwargs: Any) -> GroundingVectorEnv:
    return make_vector_env("IVT-Scenes-v0", num_envs, **{"split": "val", "canvas": 96, **kwargs})


def opened(indices: list[int] = FIRST, **kwargs: Any) -> tuple[GroundingVectorEnv, dict[str, Any]]:
    """An environment at its first observation."""
    env = environment(len(indices), **kwargs)
    observations, _ = env.reset(seed=0, options={"index": indices})
    return env, {**observations, "active": np.ones(len(indices), dtype=bool)}


def begun(agent: Agent, num_envs: int) -> Any:
    agent.reset(np.ones(num_envs, dtype=bool))
    return agent


def proposals(agent: Agent, num_envs: int = 3, episodes: int = 5, **kwargs: Any) -> list[list[tuple[Any, bool]]]:
    played = rollout(environment(num_envs, **kwargs), agent, episodes, seed=0, indices=range(episodes))
    return [[(s.proposal, s.stop) for s in episode.steps] for episode in played]


# ---- the choice ------------------------------------------------------------------------------


def test_the_medoid_is_the_box_that_agrees_most_with_the_others() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        found = np.sort(rng.random((6, 2, 2)), axis=1).reshape(6, 4)
        means = [np.mean([boxes.iou(a, b) for k, b in enumerate(found) if k != j]) for j, a in enumerate(found)]
        assert means[medoid(found, rng.random(6))] == pytest.approx(max(means))
    crowd = [(0.1, 0.1, 0.5, 0.5), (0.11, 0.1, 0.5, 0.5), (0.1, 0.12, 0.5, 0.5)]
    assert medoid([(0.6, 0.6, 0.9, 0.9), *crowd], [1.0, 0.1, 0.1, 0.1]) != 0, "an outlier, however sure of itself"


def test_the_chosen_box_does_not_depend_on_the_order_of_the_samples() -> None:
    rng = np.random.default_rng(1)
    ties = 0
    for _ in range(200):
        # A coarse grid and few confidences: many boxes agree equally well.
        low, size = rng.integers(0, 3, (5, 2)), rng.integers(1, 3, (5, 2))
        found = np.concatenate([low, low + size], axis=1) / 5
        sure = rng.integers(1, 3, 5) / 2
        chosen = {tuple(found[order][medoid(found[order], sure[order])]) for order in map(rng.permutation, [5] * 6)}
        assert len(chosen) == 1
        agreement = boxes.iou(found[:, None], found[None]).sum(1)
        best = found[np.isclose(agreement, agreement.max())]
        ties += len(np.unique(best, axis=0)) > 1
    assert ties > 20, "hardly a tie was tried"


def test_best_of_takes_the_argmax_of_the_confidence() -> None:
    assert most_confident(np.zeros((4, 4)), [0.2, 0.9, 0.3, 0.9]) == 1


def answers(policy: VLMPolicy, turns: list[Turn | None]) -> list[tuple[tuple[float, ...], float] | None]:
    """Box and log-probability a token of each answer, read from the sampled ids; None without a usable box."""
    found: list[tuple[tuple[float, ...], float] | None] = []
    for turn in turns:
        assert turn is not None
        action = parse_action(policy.text(turn)) if turn.finished else parse_action("")
        box = None if action.numbers is None else tuple(v / 1000 for v in action.numbers)
        usable = box is not None and boxes.invalid_reason(np.asarray(box)) is None
        found.append((box, float(np.mean(turn.log_probs))) if usable and box is not None else None)
    return found


@pytest.mark.parametrize(("kind", "pick"), [("medoid", medoid), ("best-of", most_confident)])
def test_a_pick_of_shots_proposes_what_its_own_readable_answers_say(kind: str, pick: Any) -> None:
    control = load_agent(f"{kind}-6@2.0:vlm:tiny", seed=5)
    assert isinstance(control, PickOfShots)
    _, observations = opened()
    actions = control.act(observations)
    found = answers(control.agent, control.turns)
    assert any(a is None for a in found), "every answer was readable: nothing was left out"
    for row in range(len(FIRST)):
        mine = found[6 * row : 6 * row + 6]
        kept = [a for a in mine if a is not None]
        assert len({box for box, _ in kept}) > 1, "the samples are one sample"
        best = pick([box for box, _ in kept], [np.exp(c) for _, c in kept])
        assert actions["box"][row] == pytest.approx(kept[best][0], abs=1e-6)
        assert actions["confidence"][row] == pytest.approx(np.exp(kept[best][1]))
        assert not actions["stop"][row] and not actions["parse_failure"][row]


# ---- what they are equal to ------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["medoid-3@0:vlm:tiny", "best-of-2@0:vlm:tiny"])
def test_without_chance_a_pick_of_shots_is_the_first_step_of_the_policy_and_a_stop(spec: str) -> None:
    assert proposals(load_agent(spec)) == proposals(load_agent("stop-after-1:vlm:tiny"))


@pytest.mark.parametrize("spec", ["medoid-2@0:vlm:tiny", "second-shot@0:vlm:tiny"])
def test_the_number_of_environments_does_not_change_what_is_answered(spec: str) -> None:
    assert proposals(load_agent(spec), 1) == proposals(load_agent(spec), 2)


@pytest.mark.parametrize("spec", ["medoid-3:vlm:tiny", "second-shot:vlm:tiny"])
def test_samples_are_decided_by_the_seed(spec: str) -> None:
    first, again, other = (proposals(load_agent(spec, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_a_conversation_that_could_grow_begins_anew_with_every_shot() -> None:
    for spec in ("second-shot@0:vlm:tiny", "medoid-2@0:vlm:tiny"):
        assert proposals(load_agent(spec, layout="prefix")) == proposals(load_agent(spec, layout="fresh"))


def test_a_conversation_that_the_policy_had_before_is_not_gone_on_with() -> None:
    policy = load_policy("tiny", layout="prefix")
    _, observations = opened()
    policy.set_temperature(0.25)
    control = PickOfShots(policy, 1, medoid, 0.0)
    wanted = control.act(observations)["text"]
    policy.act(observations)
    assert control.act(observations)["text"] == wanted and policy.temperature == 0.25
    assert all(t is not None and len(t.prompt.images) == 1 for t in control.turns)


# ---- the second shot -------------------------------------------------------------------------


def after(env: GroundingVectorEnv, box: tuple[float, ...]) -> dict[str, Any]:
    """The second observation, with ``box`` drawn."""
    n = env.num_envs
    action = {"box": np.tile(np.float32(box), (n, 1)), "stop": np.zeros(n, dtype=np.int64)}
    return {**env.step(action)[0], "active": np.ones(n, dtype=bool)}


@pytest.mark.parametrize("view", ["overlay", "both"])
def test_the_second_shot_does_not_depend_on_the_first_box(view: str) -> None:
    second = []
    shown = []
    for box in ((0.0, 0.0, 0.4, 0.3), (0.5, 0.5, 0.9, 1.0)):
        env, observations = opened(view=view)
        agent = begun(load_agent("second-shot:vlm:tiny", seed=4), len(FIRST))
        agent.act(observations)
        shown.append(after(env, box))
        second.append(agent.act(shown[-1]))
    assert not np.array_equal(shown[0]["image"], shown[1]["image"]) or view == "both"
    assert not np.array_equal(shown[0]["box"], shown[1]["box"])
    assert second[0]["text"] == second[1]["text"]
    assert np.array_equal(second[0]["box"], second[1]["box"], equal_nan=True)


def test_the_first_of_two_shots_is_the_policys_own_and_the_third_action_is_a_stop() -> None:
    own = proposals(load_agent("stop-after-1:vlm:tiny"))
    two = proposals(load_agent("second-shot:vlm:tiny"))
    assert [e[0] for e in two] == [e[0] for e in own]
    assert [[stop for _, stop in e] for e in two] == [[False, False, True]] * len(two)
    again = proposals(load_agent("second-shot@0:vlm:tiny"))
    assert [e[1] for e in again] == [e[0] for e in again], "without chance it is the first shot once more"


def test_an_environment_that_draws_into_the_same_array_does_not_reach_the_second_shot() -> None:
    env, observations = opened()
    agent = begun(load_agent("second-shot@0:vlm:tiny"), len(FIRST))
    wanted = agent.act(observations)["box"].copy()
    second = after(env, (0.1, 0.1, 0.2, 0.2))
    observations["image"][:] = second["image"]
    observations["box"][:] = second["box"]
    assert np.array_equal(agent.act(second)["box"], wanted)


def test_a_second_shot_without_the_first_observation_is_refused() -> None:
    env, observations = opened()
    agent = begun(load_agent("second-shot:vlm:tiny"), len(FIRST))
    agent.act(observations)
    second = after(env, (0.1, 0.1, 0.2, 0.2))
    agent.reset(np.array([False, True, False]))
    with pytest.raises(RuntimeError, match="environment 1 .*from step 0 on"):
        agent.act(second)
    second["active"][1] = False
    assert agent.act(second)["stop"].tolist() == [0, 0, 0]


# ---- masks and answers without a box -----------------------------------------------------------


@pytest.mark.parametrize(("spec", "count"), [("medoid-2:vlm:tiny", 2), ("second-shot:vlm:tiny", 1)])
def test_only_environments_at_their_first_step_whose_episode_goes_on_are_asked(spec: str, count: int) -> None:
    _, observations = opened([3, 7, 11, 15])
    observations["active"] = np.array([True, False, True, True])
    observations["step"] = np.array([0, 0, 2, 0])
    agent = begun(load_agent(spec), 4)
    actions = agent.act(observations)
    assert len(agent.turns) == 2 * count
    assert actions["stop"].tolist() == [0, 0, 1, 0]
    assert np.isfinite(actions["box"]).all(axis=1).tolist() == [True, False, False, True]
    assert [bool(text) for text in actions["text"]] == [True, False, False, True]
    observations["active"][:] = False
    assert agent.act(observations)["stop"].tolist() == [0] * 4 and agent.turns == []


@pytest.mark.parametrize("spec", ["medoid-4:vlm:tiny", "best-of-4:vlm:tiny", "second-shot:vlm:tiny"])
def test_answers_that_cannot_be_read_cost_what_they_cost_and_end_no_run(spec: str) -> None:
    agent = Metered(load_agent(spec, max_new_tokens=3))  # too short for any box
    played = rollout(environment(2), agent, 3, seed=0, indices=range(3))
    shots = 2 if spec.startswith("second") else 1
    for episode in played:
        assert [s.parse_failure for s in episode.steps] == [True] * shots + [False]
        assert episode.terminated and episode.steps[-1].box is None
    assert agent.cost is not None
    each = 2 if spec.startswith("second") else 4
    assert (agent.cost.answers, agent.cost.sampled) == (3 * each, 3 * each * 3)


# ---- what it costs ---------------------------------------------------------------------------


class Watched:
    """Counts what goes through the vision tower and the language model, by hooks on them."""

    def __init__(self, policy: VLMPolicy) -> None:
        self.images = self.patches = self.prefilled = self.decoded = 0
        policy.core.model.visual.register_forward_pre_hook(self.see, with_kwargs=True)
        policy.core.model.register_forward_pre_hook(self.read, with_kwargs=True)

    def see(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        grids = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        self.images += len(grids)
        self.patches += int(grids.prod(-1).sum())

    def read(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        rows, columns = kwargs["input_ids"].shape
        if columns == 1:
            self.decoded += rows
        else:
            self.prefilled += int(kwargs["attention_mask"][:, -columns:].sum())


@pytest.mark.parametrize(
    ("spec", "options", "env_options"),
    [
        ("vlm:tiny", {}, {}),
        ("vlm:tiny", {"layout": "prefix"}, {"view": "both"}),
        ("vlm:tiny", {"layout": "prefix", "reuse": False}, {}),
        ("stop-after-2:vlm:tiny", {"layout": "prefix"}, {}),
        ("medoid-3:vlm:tiny", {"batch_size": 4}, {}),
        ("medoid-2:vlm:tiny", {"reuse": False}, {}),
        ("second-shot:vlm:tiny", {}, {"view": "both"}),
        ("best-of-2:pixels-2:vlm:tiny", {}, {"canvas": 384}),
    ],
)
def test_the_counted_cost_is_what_the_model_computed(spec: str, options: Any, env_options: Any) -> None:
    agent: Any = Metered(load_agent(spec, **options))
    policy = agent
    while not isinstance(policy, VLMPolicy):
        policy = policy.agent
    seen = Watched(policy)
    rollout(environment(2, **env_options), agent, 3, seed=0, indices=range(3))  # the last wave is short
    cost = agent.cost
    counted = (cost.images, cost.patches, cost.prefilled, cost.sampled - cost.answers)
    # The token that is sampled last is never run through the model.
    assert counted == (seen.images, seen.patches, seen.prefilled, seen.decoded)
    assert cost.images > 0 and cost.answers > 0


def test_any_number_of_shots_shares_one_image_and_one_prefill() -> None:
    costs = {}
    for spec in ("stop-after-1:vlm:tiny", "medoid-5:vlm:tiny"):
        agent = Metered(load_agent(spec, batch_size=8))  # 8 is no multiple of 5
        rollout(environment(3), agent, 3, seed=0, indices=range(3))
        costs[spec] = agent.cost
    one, five = costs.values()
    assert one is not None and five is not None
    assert (five.images, five.prefilled) == (one.images, one.prefilled)
    assert five.answers == 5 * one.answers == 15


def test_metering_changes_nothing_but_the_count() -> None:
    assert proposals(Metered(load_agent("vlm:tiny"))) == proposals(load_agent("vlm:tiny"))
    assert Metered(load_agent("vlm:tiny", view="both")).shown["view"] == "both"


def test_an_agent_that_does_not_show_its_turns_has_no_cost_rather_than_none() -> None:
    agent = Metered(load_agent("stop-after-1:random"))
    rollout(environment(2), agent, 2, seed=0)
    assert agent.cost is None


def test_a_conversation_that_was_joined_halfway_is_not_guessed_at() -> None:
    env, observations = opened()
    policy = load_policy("tiny", layout="prefix")
    policy.act(observations)
    policy.act(after(env, (0.1, 0.1, 0.5, 0.5)))
    with pytest.raises(ValueError, match="count every act from the beginning"):
        cost_of(policy.turns)


# ---- larger images -------------------------------------------------------------------------


def test_the_larger_image_can_be_trained_on_and_is_what_the_trained_policy_is_shown(tmp_path: Any) -> None:
    few: dict[str, Any] = {"samples": 4, "steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    few |= {"eval_samples": 0, "report_to": "none", "out": tmp_path / "run"}
    trained = load_policy(train_sft.main(train_sft.Args(single_shot=True, pixels=2.0, **few)))
    image = [np.zeros((384, 384, 3), np.uint8)]
    assert trained.dialogue.process(image)[0].grid == (1, 16, 16)


@pytest.mark.parametrize("pixels", [0.2, -1.0, float("nan"), float("inf")])
def test_a_budget_below_the_least_is_refused_with_the_least_factor(pixels: float) -> None:
    with pytest.raises(PolicyError, match=r"pixels .*at most 9216 .*never fewer than 2304.*at least 0\.25"):
        load_policy("tiny", pixels=pixels)


# ---- naming a control ------------------------------------------------------------------------


def test_a_spec_gives_the_control_that_it_names() -> None:
    control = load_agent("medoid-12@0.5:vlm:tiny")
    assert isinstance(control, PickOfShots) and (control.count, control.temperature) == (12, 0.5)
    assert control.pick is medoid
    best = load_agent("best-of-3:vlm:tiny")
    assert isinstance(best, PickOfShots) and best.pick is most_confident and best.temperature == 1.0
    second = load_agent("second-shot@2:pixels-2:vlm:tiny", view="closeup")
    assert isinstance(second, SecondShot) and second.temperature == 2.0 and second.shown["view"] == "closeup"
    assert second.agent.image_processor.size["longest_edge"] == 2 * 96 * 96
    stopped = load_agent("stop-after-1:medoid-2:vlm:tiny")
    assert isinstance(stopped, StopAfter) and isinstance(stopped.agent, PickOfShots)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("medoid-0:vlm:tiny", "control 'medoid-0'.*N answers, at least 1"),
        ("best-of-3@-1:vlm:tiny", "behind it @T"),
        ("second-shot-2:vlm:tiny", "control 'second-shot-2'"),
        ("medoid-3", "write 'medoid-3:vlm:FOLDER'"),
        ("second-shot:", "write 'second-shot:vlm:FOLDER'"),
        ("medoid-3:random", "answers of a model"),
        ("medoid-2:medoid-3:vlm:tiny", "answers of a model"),
        ("pixels-2", "'pixels-2:vlm:tiny'"),
        ("pixels-two:vlm:tiny", "how many times the pixels"),
        ("pixels-2:random", "of which model"),
        ("pixels-0.1:vlm:tiny", "at least 0.25"),
        ("medoid:vlm:tiny", "no module 'medoid'.*did you mean 'medoid-N'"),
    ],
)
def test_a_control_that_is_misspelt_is_told_how_it_is_written(spec: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_agent(spec)


def test_a_temperature_beside_the_name_is_refused_because_it_would_not_be_used() -> None:
    with pytest.raises(ValueError, match="medoid-8@0.7"):
        load_agent("medoid-2:vlm:tiny", temperature=0.5)


def test_an_option_out_of_range_is_refused_with_its_value() -> None:
    policy = load_policy("tiny")
    for make, says in (
        (lambda: PickOfShots(policy, 0, medoid), "count 0"),
        (lambda: PickOfShots(policy, 2, medoid, -1.0), "temperature -1"),
        (lambda: SecondShot(policy, float("nan")), "temperature nan"),
    ):
        with pytest.raises(ValueError, match=says):
            make()
