"""Controls of equal compute: what a policy's completions are worth without refinement.

The agents here wrap a policy and sample its *first* answer several times: they look at the first observation only,
propose, and stop. Refinement must gain more than that. ``docs/controls.md`` says what each costs.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ivt_agents.play.served import ServedPolicy
from ivt_env import boxes

if TYPE_CHECKING:
    from ivt_agents.vlm.policy import VLMPolicy

    Policy = VLMPolicy | ServedPolicy

Actions = dict[str, Any]
Pick = Callable[[NDArray[np.float64], NDArray[np.float64]], int]
"""From boxes (M, 4) and the confidences (M,) of their answers to the place of the one to propose."""


def medoid(candidates: ArrayLike, confidence: ArrayLike) -> int:
    """The place of the box, of (M, 4), with the largest mean IoU with the others.

    Ties are broken by confidence (M,), then by coordinates: the chosen box does not depend on the order.
    """
    found, sure = np.asarray(candidates, dtype=np.float64), np.asarray(confidence, dtype=np.float64)
    agreement = boxes.iou(found[:, None], found[None])  # (M, M)
    # fsum rounds once, whatever the order: equal sets of IoUs give equal sums to the bit.
    ranks = [(math.fsum(row), c, *map(float, box)) for row, c, box in zip(agreement, sure, found, strict=True)]
    return max(range(len(ranks)), key=ranks.__getitem__)


def most_confident(candidates: ArrayLike, confidence: ArrayLike) -> int:
    """The place of the answer with the highest confidence (M,), the first of equals."""
    return int(np.argmax(np.asarray(confidence)))


class PickOfShots:
    """Samples the first answer several times, proposes one of the boxes, and stops.

    An answer without a usable box (unreadable, a stop, a box that the environment would refuse) costs its share and
    is left out of the choice. Where no answer has one, the first is handed on as it is.
    """

    def __init__(self, policy: Policy, count: int, pick: Pick, temperature: float = 1.0) -> None:
        """``count`` answers of ``policy`` to each first observation; ``pick`` is ``medoid`` or ``most_confident``.

        Its own temperature and batch size are as before after each ``act``.
        """
        if count < 1:
            raise ValueError(f"count {count}: give an integer of at least 1")
        self.agent, self.count, self.pick, self.temperature = policy, count, pick, _usable_temperature(temperature)
        self.shown, self.reuse = policy.shown, policy.reuse
        if pick is most_confident and isinstance(policy, ServedPolicy):
            policy.confidence = True
        self.turns: list[Any] = []
        """Every turn of the last ``act``, ``count`` for each environment that was at its first step."""

    def act(self, observations: Mapping[str, Any]) -> Actions:
        """A box (N, 4) at the first step of an episode, a stop (N,) afterwards; see ``ivt_env.rollouts.Agent``."""
        active, step = np.asarray(observations["active"]), np.asarray(observations["step"])
        actions = _stopped(active)
        rows = np.flatnonzero(active & (step == 0))
        self.turns = []
        if not len(rows):
            return actions
        shots = _shoot(self.agent, _split(observations, rows), self.count, self.temperature)
        self.turns = self.agent.turns
        chosen = [self._choose(shots, k * self.count) for k in range(len(rows))]
        return _with_answers(actions, rows, shots, chosen)

    def reset(self, mask: NDArray[np.bool_]) -> None:
        """Nothing to forget: a first observation is all there is."""

    def _choose(self, shots: Actions, start: int) -> int:
        """The place in ``shots`` of the answer to propose, among ``count`` from ``start`` on."""
        places = (k for k in range(start, start + self.count) if not shots["stop"][k])
        usable = [k for k in places if boxes.invalid_reason(shots["box"][k]) is None]
        if not usable:
            return start
        sure = shots.get("confidence", np.zeros(len(shots["stop"])))[usable]
        return usable[self.pick(np.asarray(shots["box"][usable], dtype=np.float64), sure)]


class SecondShot:
    """Answers greedily, then samples once more from the same first observation, and stops.

    The second answer cannot know of the first: it is a new conversation about the image as the episode began.
    """

    def __init__(self, policy: Policy, temperature: float = 1.0) -> None:
        """``temperature`` is that of the policy's second answer; with 0 it is the first one again."""
        self.agent, self.temperature = policy, _usable_temperature(temperature)
        self.shown, self.reuse = policy.shown, policy.reuse
        self.turns: list[Any] = []
        """Every turn of the last ``act``."""
        self._first: dict[int, dict[str, Any]] = {}

    def act(self, observations: Mapping[str, Any]) -> Actions:
        """A box (N, 4) at the first two steps, a stop (N,) afterwards; see ``ivt_env.rollouts.Agent``."""
        active, step = np.asarray(observations["active"]), np.asarray(observations["step"])
        actions = _stopped(active)
        self.turns = []
        for number, temperature in enumerate((0.0, self.temperature)):
            rows = np.flatnonzero(active & (step == number))
            if not len(rows):
                continue
            if number == 0:
                # A copy: an environment may draw its next image into the same array.
                shown = copy.deepcopy(_split(observations, rows))
                self._first |= dict(zip(rows.tolist(), shown, strict=True))
            if unseen := [row for row in rows.tolist() if row not in self._first]:
                raise RuntimeError(
                    f"environment {unseen[0]} is at its second step and its first observation was not seen: a second"
                    " shot begins where the episode does, so let the agent act from step 0 on"
                )
            shots = _shoot(self.agent, [self._first[row] for row in rows.tolist()], 1, temperature)
            self.turns = [*self.turns, *self.agent.turns]
            actions = _with_answers(actions, rows, shots, range(len(rows)))
        return actions

    def reset(self, mask: NDArray[np.bool_]) -> None:
        """Forget the first observations of the environments where ``mask`` (N,) is true."""
        self._first = {row: one for row, one in self._first.items() if row < len(mask) and not mask[row]}


CONTROL_FORMS = ("medoid-N:VLM", "best-of-N:VLM", "second-shot:VLM")
"""How a command line names a control; ``@T`` behind the name sets the temperature: ``medoid-8@0.7:vlm:tiny``."""


def control_of(name: str) -> Callable[[Policy], PickOfShots | SecondShot] | None:
    """What makes the control that ``name`` names; None for another name, ValueError for one that only begins so."""
    if not name.startswith(("medoid-", "best-of-", "second-shot")):
        return None
    found = re.fullmatch(r"(?:(medoid|best-of)-([1-9][0-9]*)|second-shot)(?:@([0-9]+(?:\.[0-9]+)?))?", name)
    if not found:
        raise ValueError(
            f"control {name!r}: write medoid-N, best-of-N (N answers, at least 1) or second-shot, and behind it @T for"
            " another temperature than 1: 'medoid-8', 'best-of-4@0.7'"
        )
    picks: dict[str, Pick] = {"medoid": medoid, "best-of": most_confident}
    kind, count, temperature = found[1], found[2], float(found[3] or 1.0)
    if kind is None:
        return lambda policy: SecondShot(policy, temperature)
    return lambda policy: PickOfShots(policy, int(count), picks[kind], temperature)


def _usable_temperature(temperature: float) -> float:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature {temperature}: give a number of at least 0")
    return temperature


def _stopped(active: NDArray[np.bool_]) -> Actions:
    """A stop for every active environment, (N,)."""
    return {"box": np.full((len(active), 4), np.nan, dtype=np.float32), "stop": active.astype(np.int64)}


def _split(observations: Mapping[str, Any], rows: NDArray[np.intp]) -> list[dict[str, Any]]:
    """The observations of single environments."""
    return [{key: value[row] for key, value in observations.items()} for row in rows.tolist()]


def _shoot(policy: Policy, shown: Sequence[Mapping[str, Any]], count: int, temperature: float) -> Actions:
    """Independent answers, ``count`` to each observation in turn, as the policy's actions (M * count)."""
    batch: dict[str, Any] = {key: [one[key] for one in shown for _ in range(count)] for key in shown[0]}
    everyone = np.ones(len(shown) * count, dtype=bool)
    batch["active"] = everyone
    # No answer goes on with a conversation: not with another sample's, and not with an earlier one.
    policy.reset(everyone)
    usual, rows = policy.temperature, policy.batch_size
    policy.set_temperature(temperature)
    policy.batch_size = count * max(1, rows // count)  # no batch ends between answers to one observation
    try:
        return policy.act(batch)
    finally:
        policy.set_temperature(usual)
        policy.batch_size = rows
        policy.reset(everyone)


def _with_answers(actions: Actions, rows: NDArray[np.intp], shots: Actions, chosen: Sequence[int]) -> Actions:
    """``actions`` (N) with the answers at places ``chosen`` of ``shots`` in environments ``rows``."""
    places, count = list(chosen), len(actions["stop"])
    actions["box"][rows] = shots["box"][places]
    actions["stop"][rows] = shots["stop"][places]
    text = list(actions.get("text", [""] * count))
    for row, place in zip(rows.tolist(), places, strict=True):
        text[row] = shots["text"][place]
    actions["text"] = text
    for key in ("tokens", "seconds"):  # all answers cost, not the chosen one alone
        if key in shots and places:
            each = np.asarray(shots[key]).reshape(len(places), -1).sum(axis=1)
            actions.setdefault(key, np.zeros(count, dtype=each.dtype))[rows] = each
    for key in ("parse_failure", "confidence", "stop_probability"):
        if key in shots:
            values = np.asarray(shots[key])
            actions.setdefault(key, np.zeros(count, dtype=values.dtype))[rows] = values[places]
    return actions
