"""Who is shown what. If one of these is false, the audit judges a policy by boxes that it never saw."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from test_metrics_swaps import AUROCS

from ivt_agents.evaluation.swaps import MOVED_IOU, Args, elsewhere, main, moved, play_swaps
from ivt_agents.play.by_name import load_agent
from ivt_agents.play.scripted import CentreAgent
from ivt_agents.vlm.load import load_policy
from ivt_env import boxes
from ivt_env.metrics.swaps import BAD_BELOW, VARIANTS, Swap, dependence, summarise
from ivt_env.rendering import Overlay, draw_overlay
from ivt_env.rollouts import make_vector_env
from ivt_env.vector_env import GroundingVectorEnv

OWN_FIRST, OWN_SECOND = (0.1, 0.1, 0.5, 0.5), (0.2, 0.1, 0.6, 0.5)


def environment(num_envs: int = 8, **kwargs: Any) -> GroundingVectorEnv:
    return make_vector_env("IVT-Scenes-v0", num_envs, **{"split": "val", "canvas": 32, **kwargs})


class Watcher:
    """Proposes two fixed boxes, and notes every observation that it is asked about."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.heard: list[list[int]] = []

    def act(self, observations: Mapping[str, Any]) -> dict[str, Any]:
        n = len(observations["active"])
        for i in np.flatnonzero(observations["active"]):
            self.seen.append({k: v[i] for k, v in observations.items()})
            self.heard[i].append(int(observations["step"][i]))
        own = np.where(np.asarray(observations["step"])[:, None] == 0, OWN_FIRST, OWN_SECOND)
        return {"box": own.astype(np.float32), "stop": np.zeros(n, dtype=np.int64)}

    def reset(self, mask: NDArray[np.bool_]) -> None:
        if len(self.heard) != len(mask):
            self.heard = [[] for _ in mask]
        for i in np.flatnonzero(mask):
            self.heard[i] = []


class Judge:
    """Looks at the target of ``env`` and stops by ``rule(IoU of the drawn box, a box is drawn)``; else the target."""

    def __init__(self, env: GroundingVectorEnv, rule: Any) -> None:
        self.env, self.rule = env, rule

    def act(self, observations: Mapping[str, Any]) -> dict[str, Any]:
        targets = np.array([s.box for s in self.env.samples])
        shown = observations["box"]
        quality = boxes.iou(shown, targets)
        pairs = zip(quality, ~boxes.is_no_box(shown), strict=True)
        stop = np.array([self.rule(q, there) for q, there in pairs], dtype=np.int64)
        # Its first box is off, so that its own box is neither right at once nor a stop.
        first = np.asarray(observations["step"])[:, None] == 0
        wide = targets[:, 2:] - targets[:, :2]
        off = np.concatenate([targets[:, :2], targets[:, 2:] - 0.2 * wide], axis=1)
        return {"box": np.where(first, off, targets).astype(np.float32), "stop": stop}

    def reset(self, mask: NDArray[np.bool_]) -> None:
        """Nothing to forget."""


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (lambda quality, there: quality >= 0.9, dict.fromkeys(["index", *AUROCS], 1)),
        (lambda quality, there: there, {"index": 0, "AUROC good / bad": 0.5, "presence": 1, "image": 0}),
    ],
    ids=["a verifier that looks at the target", "a policy that stops at any box"],
)
def test_what_decides_a_policys_stop_is_found_out(rule: Any, expected: dict[str, float]) -> None:
    env = environment(64)
    swaps = play_swaps(env, Judge(env, rule), range(30), replay=False)
    rows = dependence("it", swaps, n_boot=200)
    found = {(r.step, r.name.partition(":")[0]): r.value.value for r in rows}
    for step in (1, 2):
        assert {name: found[step, name] for name in expected} == expected


@pytest.mark.parametrize("view", ["overlay", "closeup", "both"])
def test_the_drawn_box_is_the_recorded_one_in_every_view(view: str) -> None:
    env, agent = environment(4, view=view), Watcher()
    swaps = play_swaps(env, agent, [3, 5, 8], variants=["target", "near", "none"], steps=[2], replay=False)
    seen = agent.seen[6:]  # three samples, two own actions
    assert len(seen) == len(swaps) == 9
    for swap, observation in zip(swaps, seen, strict=True):
        assert observation["step"] == 2
        expected = boxes.NO_BOX if swap.shown is None else np.array(swap.shown, dtype=np.float32)
        np.testing.assert_array_equal(observation["box"], expected)
        assert ("window" in observation) == (view != "overlay")
        index = next(i for i in (3, 5, 8) if env.dataset[i].sample_id == swap.sample_id)
        # The same box, had an episode begun with it: nothing but the number of the step differs.
        start = None if swap.shown is None else list(swap.shown)
        begun, _ = env.reset(options={"index": [index] * 4, "initial_box": [start] * 4})
        for key in set(begun) - {"step", "expression"}:
            np.testing.assert_array_equal(observation[key], begun[key][0])


def test_blank_is_the_own_box_on_grey() -> None:
    env, agent = environment(2), Watcher()
    (swap,) = play_swaps(env, agent, [7], variants=["blank"], steps=[1], replay=False)
    image, (height, width) = agent.seen[-1]["image"], agent.seen[-1]["extent"]
    expected = np.full((height, width, 3), 128, dtype=np.uint8)
    draw_overlay(expected, (height, width), swap.shown, Overlay())
    np.testing.assert_array_equal(image[:height, :width], expected)
    assert swap.shown == pytest.approx(OWN_FIRST) and swap.target == pytest.approx(env.dataset[7].box)


@pytest.mark.parametrize("replay, heard", [(True, [0, 1, 2]), (False, [2])])
def test_an_agent_that_remembers_has_its_own_actions_in_mind(replay: bool, heard: list[int]) -> None:
    agent = Watcher()
    play_swaps(environment(3), agent, range(3), variants=["target"], steps=[2], replay=replay)
    assert agent.heard == [heard] * 3
    if replay:
        replayed = agent.seen[-6:-3]
        assert all(o["step"] == 1 and o["box"] == pytest.approx(np.array(OWN_FIRST)) for o in replayed)


def test_own_boxes_are_those_of_the_step_and_a_wish_to_stop_is_noted() -> None:
    env = environment(4)
    swaps = play_swaps(env, Watcher(), range(3), variants=["own"], replay=False)
    assert [s.step for s in swaps] == [1, 1, 1, 2, 2, 2]
    assert all(s.shown == pytest.approx(OWN_FIRST if s.step == 1 else OWN_SECOND) and s.reached for s in swaps)
    # The centre agent stops at once: step 2 shows its first box still, and says that it would not be there.
    stopped = play_swaps(env, CentreAgent(), range(3), variants=["own"], replay=False)
    assert [(s.reached, s.action) for s in stopped] == [(True, "stop")] * 3 + [(False, "stop")] * 3
    assert len({s.shown for s in stopped}) == 1


def test_wrong_boxes_are_wrong_and_moved_ones_moved() -> None:
    swaps = play_swaps(environment(64), Watcher(), range(40), replay=False)
    by = {v: [s for s in swaps if s.variant == v] for v in VARIANTS}
    assert {v: len(found) for v, found in by.items() if v != "sibling"} == dict.fromkeys(
        set(VARIANTS) - {"sibling"}, 80
    )
    assert 10 < len(by["sibling"]) < 80
    assert all(s.shown_iou < BAD_BELOW for s in [*by["sibling"], *by["random"]])
    low, high = MOVED_IOU
    assert all(low - 1e-4 <= s.shown_iou <= high + 1e-4 for s in by["near"])
    own = {(s.sample_id, s.step): s.shown for s in by["own"]}
    moved_by = [float(boxes.iou(s.shown, own[s.sample_id, s.step])) for s in by["shifted"]]
    assert low - 1e-4 <= min(moved_by) and max(moved_by) <= high + 1e-4
    assert all(s.shown_iou == pytest.approx(1, abs=1e-5) for s in by["target"])


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (0, 0, 1, 0.001), (0.999, 0.999, 1, 1), (0.4, 0.4, 0.6, 0.6)])
def test_any_box_can_be_moved_and_missed(box: tuple[float, ...]) -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        found = moved(box, rng)
        assert boxes.invalid_reason(found.astype(np.float32)) is None
        assert MOVED_IOU[0] <= float(boxes.iou(found, box)) <= MOVED_IOU[1]
        assert float(boxes.iou(elsewhere(box, rng), box)) < BAD_BELOW


def test_answers_depend_neither_on_the_number_of_environments_nor_on_the_other_variants() -> None:
    def play(num_envs: int, **kwargs: Any) -> list[Swap]:
        return play_swaps(environment(num_envs), Watcher(), [4, 9, 2, 7, 1], 3, **kwargs)

    everything = play(64)
    assert everything == play(3) == play(1, replay=False)
    some = play(4, variants=["near", "sibling"], steps=[2])
    assert some == [s for s in everything if s.variant in ("near", "sibling") and s.step == 2]
    assert everything != play_swaps(environment(64), Watcher(), [4, 9, 2, 7, 1], 4)
    env, fixed = environment(32), ["target", "sibling", "random", "near"]
    one, other = (play_swaps(env, load_agent(a, env=env), range(6), variants=fixed) for a in ("random", "oracle"))
    assert [s.shown for s in one] == [s.shown for s in other] and one != other, "every agent is shown the same boxes"


def test_failures_are_counted_and_without_an_own_box_nothing_is_drawn_for_it() -> None:
    class Silent(Watcher):
        """Says nothing usable at first, then a box that is none."""

        def act(self, observations: Mapping[str, Any]) -> dict[str, Any]:
            first = np.asarray(observations["step"]) == 0
            box = np.where(first[:, None], np.nan, [0.5, 0.1, 0.2, 0.4]).astype(np.float32)
            stop = np.zeros(len(first), dtype=np.int64)
            return {"box": box, "stop": stop, "parse_failure": first, "stop_probability": first * 0.5}

    swaps = play_swaps(environment(8), Silent(), range(4))
    assert {s.variant for s in swaps} <= {"target", "sibling", "random", "near", "none"}
    assert {s.action for s in swaps} == {"refused"} and all(s.new_box == s.shown for s in swaps)
    assert all(r.failed == r.num for r in summarise("it", swaps, n_boot=10))
    assert all(s.stop_probability == 0 for s in swaps)


def test_the_tiny_model_answers_alike_with_and_without_its_own_actions_replayed() -> None:
    env = make_vector_env("IVT-Scenes-v0", 16, split="val")
    policy = load_policy("tiny")
    kept = {"variants": ["target", "blank"], "steps": [1]}
    one, other = (play_swaps(env, policy, range(4), replay=replay, **kept) for replay in (True, False))
    assert [(s.shown, s.action, s.new_box) for s in one] == [(s.shown, s.action, s.new_box) for s in other]
    assert all(s.stop_probability is not None for s in one)


@pytest.mark.parametrize(
    "kwargs, why",
    [
        ({"indices": []}, "at least one"),
        ({"indices": [1, 1]}, "each sample once"),
        ({"variants": ["siblings"]}, "choose from own, target"),
        ({"variants": []}, "choose from own, target"),
        ({"steps": [3]}, "max_steps=4"),
        ({"steps": [0]}, "steps 1 to 2"),
        ({"steps": []}, "steps 1 to 2"),
    ],
)
def test_what_cannot_be_played_is_refused(kwargs: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        play_swaps(environment(2), CentreAgent(), **{"indices": [0], **kwargs})


def test_the_command_writes_records_tables_and_plot(tmp_path, capsys) -> None:
    args = Args(policies=["floor=centre", "top=oracle"], samples=12, out=tmp_path / "swaps", num_envs=50)
    played = main(args)
    assert {p.name for p in args.out.iterdir()} == {"table.txt", "results.json", "swaps.png", "swaps"}
    for name, swaps in played.items():
        lines = (args.out / "swaps" / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == json.loads(json.dumps([asdict(s) for s in swaps]))
    screen, table = capsys.readouterr().out.splitlines(), (args.out / "table.txt").read_text()
    assert len(screen) <= 15 and [line.split()[0] for line in screen[4:8]] == ["floor", "floor", "top", "top"]
    assert "index: target - sibling, random" in table and "floor" in table
    results = json.loads((args.out / "results.json").read_text())
    assert results["served"] == "scenes/test"
    assert {(r["policy"], r["variant"]) for r in results["variants"]} == {(p, v) for p in played for v in VARIANTS}


@pytest.mark.parametrize(
    "change, why",
    [
        ({"policies": ["tiny"]}, "name=policy"),
        ({"policies": ["a/b=centre"]}, "also the name of a file"),
        ({"policies": ["a=centre", "a=random"]}, "given once"),
        ({"samples": 0}, "samples 0"),
        ({"steps": (3,)}, "max_steps=4"),
    ],
)
def test_a_wrong_command_line_says_what_to_do(tmp_path, change: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        main(Args(**{"policies": ["a=centre"], "samples": 3, "out": tmp_path, **change}))
