"""What the agents without a model promise, and how an agent is named.

If one of these is false, nothing crashes: a baseline that peeks at the target looks like a good
agent, a random baseline changes with the batch size, and "stopped after one" has refined twice.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ivt_agents.play.by_name import BUILT_IN, Agent, load_agent
from ivt_agents.play.scripted import CentreAgent, OracleAgent, RandomAgent, StopAfter
from ivt_env import boxes
from ivt_env.data.scenes import Scenes
from ivt_env.episodes import Episode
from ivt_env.rollouts import make_vector_env, rollout
from ivt_env.testing import _OtherTargets
from ivt_env.vector_env import GroundingVectorEnv

BLIND = [*(name for name in BUILT_IN if name != "oracle"), "stop-after-1:random", "stop-after-2:centre", "vlm:tiny"]
BLIND += ["medoid-2:vlm:tiny", "best-of-2:vlm:tiny", "second-shot:vlm:tiny"]


def environment(num_envs: int = 8, **kwargs: Any) -> GroundingVectorEnv:
    return make_vector_env("IVT-Scenes-v0", num_envs, **{"split": "val", "canvas": 32, **kwargs})


def actions_of(episodes: list[Episode]) -> list[list[tuple[Any, bool]]]:
    return [[(step.proposal, step.stop) for step in episode.steps] for episode in episodes]


def observed(steps: list[int], active: list[bool] | None = None) -> dict[str, Any]:
    """As much of an observation as a scripted agent looks at."""
    active = [True] * len(steps) if active is None else active
    return {"step": np.array(steps), "active": np.array(active), "box": np.zeros((len(steps), 4))}


def begun(agent: Agent, num_envs: int) -> Agent:
    agent.reset(np.ones(num_envs, dtype=bool))
    return agent


# ---- who sees the target ---------------------------------------------------------------------


@pytest.mark.parametrize("spec", BLIND)
def test_no_agent_but_the_oracle_acts_on_the_target(spec: str) -> None:
    played = []
    for dataset in (Scenes("val"), _OtherTargets(Scenes("val"))):
        env = environment(dataset=dataset)
        # The environment is offered to every agent, as the commands do; only the oracle may take it.
        played.append(rollout(env, load_agent(spec, env=env, seed=3), episodes=24, seed=5))
    one, other = played
    assert all(a.target != b.target and a.sample_id == b.sample_id for a, b in zip(one, other, strict=True))
    assert [e.total_reward for e in one] != [e.total_reward for e in other]  # the targets did change
    assert actions_of(one) == actions_of(other)


# ---- each agent ------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [*BUILT_IN, "stop-after-1:random", "stop-after-2:oracle"])
def test_every_action_lies_in_the_action_space_and_every_box_is_usable(spec: str) -> None:
    env = environment()
    agent = begun(load_agent(spec, env=env), 8)
    observations, _ = env.reset(seed=1)
    proposed = 0
    for active in (np.ones(8, dtype=bool), np.arange(8) < 5):
        actions = agent.act({**observations, "active": active})
        assert actions["box"].dtype == np.float32 and actions["box"].shape == (8, 4)
        assert actions["stop"].dtype == np.int64 and actions["stop"].shape == (8,)
        assert env.action_space.contains({"box": actions["box"], "stop": actions["stop"]})
        for i in np.flatnonzero(active & (actions["stop"] == 0)):
            assert boxes.invalid_reason(actions["box"][i]) is None
            proposed += 1
        assert not actions["box"][~active].any() and not actions["stop"][~active].any()
        observations = env.step(actions)[0]
    assert proposed >= 8


def test_random_boxes_are_uniform_over_all_boxes_and_never_empty() -> None:
    agent = begun(RandomAgent(seed=1), 4000)
    drawn = agent.act(observed([0] * 4000))["box"]
    assert (drawn[:, :2] < drawn[:, 2:]).all() and drawn.min() >= 0 and drawn.max() <= 1
    # Two uniform numbers, sorted: means 1/3 and 2/3. The standard error is 0.004.
    assert np.abs(drawn.mean(axis=0) - [1 / 3, 1 / 3, 2 / 3, 2 / 3]).max() < 0.02
    assert abs(np.corrcoef(drawn[:, 0], drawn[:, 1])[0, 1]) < 0.08  # the two axes are independent


def test_random_agent_stops_by_chance_but_never_at_the_first_step() -> None:
    agent = begun(RandomAgent(seed=1, stop_probability=0.25), 4000)
    assert not agent.act(observed([0] * 4000))["stop"].any()
    assert abs(agent.act(observed([1] * 4000))["stop"].mean() - 0.25) < 0.035  # 5 standard errors
    always = begun(RandomAgent(stop_probability=1.0), 3)
    assert always.act(observed([0, 1, 2]))["stop"].tolist() == [0, 1, 1]


@pytest.mark.parametrize("spec", ["random", "oracle"])
def test_the_seed_alone_decides_what_is_drawn_and_not_the_number_of_environments(spec: str) -> None:
    runs = []
    for num_envs, seed in ((1, 4), (3, 4), (7, 4), (7, 5)):
        env = environment(num_envs)
        runs.append(actions_of(rollout(env, load_agent(spec, env=env, seed=seed), episodes=10, seed=9)))
    assert runs[0] == runs[1] == runs[2] != runs[3]
    assert len({str(episode) for episode in runs[0]}) == 10  # and no two episodes are alike


def test_reset_begins_new_streams_only_where_the_mask_is_true() -> None:
    touched, untouched = begun(RandomAgent(seed=2), 3), begun(RandomAgent(seed=2), 3)
    touched.reset(np.array([False, True, False]))
    same = touched.act(observed([0] * 3))["box"] == untouched.act(observed([0] * 3))["box"]
    assert same.all(axis=1).tolist() == [True, False, True]


def test_centre_proposes_one_box_around_the_centre_and_stops() -> None:
    for episode in rollout(environment(), CentreAgent(side=0.5), episodes=8, seed=0):
        assert [(s.proposal, s.stop) for s in episode.steps] == [
            ((0.25, 0.25, 0.75, 0.75), False),
            (None, True),
        ]
        assert episode.terminated


def test_oracle_without_noise_is_right_at_once_and_stops_after_its_proposals() -> None:
    env = environment()
    for episode in rollout(env, OracleAgent(env, noise=0.0, proposals=1), episodes=16, seed=0):
        assert episode.steps[0].iou > 0.9999
        assert [s.stop for s in episode.steps] == [False, True]


def test_oracle_noise_shrinks_from_step_to_step() -> None:
    env = environment(32)
    played = rollout(env, OracleAgent(env, noise=0.1, shrink=0.5, proposals=3), episodes=160, seed=0)
    error = np.array(
        [[(np.array(s.proposal) - e.target) / (e.target[2] - e.target[0]) for s in e.steps] for e in played]
    )  # (160, 3 steps, 4 edges), relative to the target's width
    spread = error[:, :, [0, 2]].std(axis=(0, 2))
    assert np.allclose(spread, [0.1, 0.05, 0.025], rtol=0.15)


def test_oracle_boxes_stay_usable_under_absurd_noise() -> None:
    env = environment(32)
    played = rollout(env, OracleAgent(env, noise=50.0, shrink=1.0, proposals=3), episodes=96, seed=0)
    assert {s.invalid for e in played for s in e.steps} == {None}
    assert np.mean([e.final_iou for e in played]) < 0.5  # it was absurd


# ---- stopped after k -------------------------------------------------------------------------


class Talker:
    """Proposes one box for ever, says something, and notes which environments it was asked about."""

    def __init__(self, stop: int = 0, box: tuple[float, ...] = (0.1, 0.1, 0.2, 0.2)) -> None:
        self.stop, self.box = stop, box
        self.asked: list[list[bool]] = []
        self.resets: list[list[bool]] = []

    def act(self, observations: Mapping[str, Any]) -> Mapping[str, Any]:
        self.asked.append(observations["active"].tolist())
        n = len(observations["active"])
        return {
            "box": np.tile(np.array(self.box, dtype=np.float32), (n, 1)),
            "stop": np.full(n, self.stop),
            "text": ["words"] * n,
            "parse_failure": np.ones(n, dtype=bool),
            "confidence": np.full(n, 0.5),
        }

    def reset(self, mask: Any) -> None:
        self.resets.append(mask.tolist())


@pytest.mark.parametrize("count", [1, 3, 5])
def test_stop_after_k_proposes_k_times_and_then_stops(count: int) -> None:
    talker = Talker()
    played = rollout(environment(4, max_steps=4), StopAfter(talker, count), episodes=4, seed=0)
    proposals = min(count, 4)
    for episode in played:
        assert [s.stop for s in episode.steps] == [False] * proposals + [True] * (count < 4)
        assert episode.terminated == (count < 4)
    assert len(talker.asked) == proposals and talker.resets == [[True] * 4]


def test_stop_after_0_keeps_the_box_that_the_episode_began_with() -> None:
    start = [0.2, 0.2, 0.6, 0.6]
    talker = Talker()
    (episode,) = rollout(environment(1), StopAfter(talker, 0), 1, seed=0, initial_boxes=[start])
    assert [s.stop for s in episode.steps] == [True] and talker.asked == []
    assert np.allclose(episode.steps[0].box or (), start)


def test_stop_after_k_lets_the_agent_stop_earlier_and_counts_a_refused_proposal() -> None:
    (episode,) = rollout(environment(1), load_agent("stop-after-3:centre"), 1, seed=0)
    assert [s.stop for s in episode.steps] == [False, True]
    (episode,) = rollout(environment(1), StopAfter(Talker(box=(0.5, 0.5, 0.1, 0.1)), 1), 1, seed=0)
    assert [s.invalid is not None for s in episode.steps] == [True, False]
    assert episode.terminated


def test_stop_after_k_neither_asks_nor_quotes_the_agent_where_the_rule_has_stopped() -> None:
    talker = Talker()
    actions = StopAfter(talker, 1).act(observed([0, 1, 1, 0], [True, True, False, False]))
    assert talker.asked == [[True, False, False, False]]
    assert actions["stop"].tolist() == [0, 1, 0, 0]
    assert actions["text"][:2] == ["words", ""]
    assert actions["parse_failure"][:2].tolist() == [True, False]
    assert actions["confidence"][0] == 0.5


# ---- naming an agent -------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current directory whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("plugged_"):
            del sys.modules[name]


def test_a_spec_gives_the_agent_that_it_names() -> None:
    env = environment(1)
    assert isinstance(load_agent("random"), RandomAgent)
    assert isinstance(load_agent("centre"), CentreAgent)
    assert isinstance(load_agent("oracle", env=env), OracleAgent)
    stopped = load_agent("stop-after-12:stop-after-3:oracle", env=env, noise=0.5)
    assert isinstance(stopped, StopAfter) and stopped.count == 12
    assert isinstance(stopped.agent, StopAfter) and stopped.agent.count == 3
    assert isinstance(stopped.agent.agent, OracleAgent) and stopped.agent.agent.noise == 0.5


def test_a_class_in_the_current_directory_plugs_in_by_name(here: Path) -> None:
    (here / "plugged_mine.py").write_text(
        "import numpy as np\n"
        "class Corner:\n"
        "    def act(self, observations):\n"
        "        n = len(observations['active'])\n"
        "        return {'box': np.tile([0, 0, 0.5, 0.5], (n, 1)), 'stop': np.zeros(n)}\n"
        "    def reset(self, mask): pass\n"
    )
    for spec in ("plugged_mine:Corner", "stop-after-1:plugged_mine:Corner"):
        (episode,) = rollout(environment(1), load_agent(spec), 1, seed=0)
        assert episode.steps[0].proposal == (0, 0, 0.5, 0.5)


def test_a_vlm_without_the_training_install_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ivt_agents.vlm.load", None)
    with pytest.raises(ValueError, match="vlm:x.*needs the training install"):
        load_agent("vlm:x")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (
            "randon",
            "no agent 'randon' .did you mean 'random'..; there are random, centre, oracle, ocr, stop-after-K",
        ),
        ("Center", "did you mean 'centre'"),
        ("", "no agent ''; there are random"),
        ("vlm:", "no agent 'vlm:'"),
        ("oracle", "reads the target box.*env="),
        ("stop-after-2", "who proposes, like 'stop-after-1:random'"),
        ("stop-after--1:random", "after how many proposals"),
        ("stop-after-1:randon", "did you mean 'random'"),
        ("vml:folder", "no module 'vml'.*did you mean 'vlm'"),
        ("my-file:Agent", "'my-file' is not a module name"),
        ("plugged_nowhere:Agent", "no module 'plugged_nowhere'"),
        ("plugged_zoo.sub:Agent", "no module 'plugged_zoo.sub'"),
        ("plugged_zoo:lion", "no class 'lion' .did you mean 'Lion'..*has Lion, Mute, Needy"),
        ("plugged_zoo:NUMBER", "no class 'NUMBER'"),
        ("plugged_zoo:Mute", "no method reset"),
        ("plugged_zoo:Needy", "made as Needy.., without arguments: missing a required argument: 'size'"),
        ("plugged_torn:Agent", "plugged_torn cannot be imported: No module named 'plugged_absent'"),
    ],
)
def test_a_spec_that_names_no_agent_is_told_why_and_what_there_is(spec: str, says: str, here: Path) -> None:
    (here / "plugged_zoo.py").write_text(
        "NUMBER = 3\n"
        "class Lion:\n    def act(self, o): ...\n    def reset(self, m): ...\n"
        "class Mute:\n    def act(self, o): ...\n"
        "class Needy(Lion):\n    def __init__(self, size): ...\n"
    )
    (here / "plugged_torn.py").write_text("import plugged_absent\n")
    with pytest.raises(ValueError, match=says):
        load_agent(spec)


def test_what_a_plugged_in_module_raises_itself_is_not_reworded(here: Path) -> None:
    (here / "plugged_broken.py").write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        load_agent("plugged_broken:Agent")


def test_a_plugged_in_class_refuses_options_instead_of_dropping_them(here: Path) -> None:
    (here / "plugged_plain.py").write_text("class A:\n    def act(self, o): ...\n    def reset(self, m): ...\n")
    assert load_agent("plugged_plain:A") is not None
    with pytest.raises(ValueError, match="without arguments: no temperature"):
        load_agent("plugged_plain:A", temperature=1.0)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: RandomAgent(stop_probability=1.5), "stop_probability 1.5"),
        (lambda: RandomAgent(seed=-1), "seed -1"),
        (lambda: CentreAgent(side=0), "side 0"),
        (lambda: OracleAgent(environment(1), noise=float("nan")), "noise nan"),
        (lambda: OracleAgent(environment(1), proposals=0), "proposals 0"),
        (lambda: StopAfter(CentreAgent(), -1), "count -1"),
    ],
)
def test_an_option_out_of_range_is_refused_with_its_value(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()
