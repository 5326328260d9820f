"""Episodes as arrays, and the answer that each stopping rule would have given.

A *column* is one way of choosing the answer of an episode among its boxes. All but ``oracle_best``
are label-free: they never look at the target, so they could be deployed. The columns exist side by
side because a gain that only the oracle column shows is no gain (arXiv 2606.13156, second version).

No episode is ever dropped: an action that could not be parsed or was refused leaves the box in
force where it was, and no box has IoU 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ivt_env import boxes
from ivt_env.episodes import Box, Episode

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
RolloutKind = Literal["forced", "stopping"]


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What n episodes of at most T actions came to, as arrays.

    Where an episode ended before T actions, the later entries repeat its last box and its IoU, and
    ``acted`` is False there.
    """

    sample_ids: tuple[str, ...]
    picture_ids: tuple[str, ...]
    """Cluster of each episode for the statistics, length n."""
    start_iou: Array
    """IoU of the box that the episode started from, 0 for none. Shape (n,)."""
    start_box: Array
    """The box that the episode started from, zeros for none, xyxy relative. Shape (n, 4)."""
    iou: Array
    """IoU of the box in force after each action. Shape (n, T)."""
    box: Array
    """The box in force after each action, zeros for none, xyxy relative. Shape (n, T, 4)."""
    acted: Mask
    """An action was taken. Shape (n, T)."""
    stop: Mask
    """The action was a stop. Shape (n, T)."""
    accepted: Mask
    """The action put forward a box that the environment accepted. Shape (n, T)."""
    parse_failure: Mask
    """The agent's text held no usable action. Shape (n, T)."""
    stop_probability: Array
    """Stated probability of stopping instead of this action, NaN where not stated. Shape (n, T)."""
    confidence: Array
    """Stated confidence in this action, NaN where not stated. Shape (n, T)."""

    @property
    def num_actions(self) -> NDArray[np.int64]:
        """Actions taken, the stop among them. Shape (n,)."""
        return self.acted.sum(axis=1)

    @property
    def num_proposals(self) -> NDArray[np.int64]:
        """Actions other than a stop, the refused and unparsed ones among them. Shape (n,)."""
        return (self.acted & ~self.stop).sum(axis=1)

    @property
    def stopped(self) -> Mask:
        """The policy ended the episode itself. Shape (n,)."""
        return np.asarray(self.stop.any(axis=1))

    @property
    def iou_before(self) -> Array:
        """IoU of the box in force before each action. Shape (n, T)."""
        return np.concatenate([self.start_iou[:, None], self.iou[:, :-1]], axis=1)

    @property
    def box_before(self) -> Array:
        """The box in force before each action, zeros for none. Shape (n, T, 4)."""
        return np.concatenate([self.start_box[:, None], self.box[:, :-1]], axis=1)

    @property
    def has_box_before(self) -> Mask:
        """A box was in force before the action, so the action refines it or keeps it. Shape (n, T)."""
        return ~boxes.is_no_box(self.box_before)


@dataclass(frozen=True, slots=True)
class Column:
    """The answers of one rule: K possible answers for each of n episodes, with their probabilities.

    K is 1 for a rule that decides, and more for a rule that draws at random: its scores are exact
    expectations over the draw, not a simulation.
    """

    name: str
    ious: Array
    """IoU of each possible answer. Shape (n, K)."""
    weights: Array
    """Probability of each possible answer; every row sums to 1. Shape (n, K)."""
    oracle: bool
    """The rule looks at the target: a ceiling, never a result."""
    rollout: RolloutKind
    """``forced``: the stop was not available. ``stopping``: it was."""

    @property
    def iou(self) -> Array:
        """Final IoU of each episode, in expectation where the rule draws at random. Shape (n,)."""
        return (self.ious * self.weights).sum(axis=1)

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self.ious)


def outcomes(episodes: Sequence[Episode], *, verify: bool = True) -> Outcomes:
    """Turn n episodes into arrays.

    Args:
        episodes: Saved or fresh records, in the order that the results keep.
        verify: Recompute every IoU from its box and the target, and refuse records that disagree.

    Raises:
        ValueError: For no episodes, an episode without a step, a step after a stop, or a recorded
            IoU further than 1e-4 from the one recomputed.
    """
    if not episodes:
        raise ValueError("no episodes to score: the list is empty")
    for i, episode in enumerate(episodes):
        if not episode.steps:
            raise ValueError(f"episode {i} ({episode.sample_id!r}) has no step: it was never played")
        if any(step.stop for step in episode.steps[:-1]):
            raise ValueError(f"episode {i} ({episode.sample_id!r}) goes on after its stop")
    n, horizon = len(episodes), max(len(e.steps) for e in episodes)
    lengths = np.array([len(e.steps) for e in episodes])
    acted = np.arange(horizon) < lengths[:, None]
    # The last step speaks for an episode that is over; ``acted`` marks those entries. (n, T)
    padded = [e.steps + [e.steps[-1]] * (horizon - len(e.steps)) for e in episodes]

    def numbers(name: Literal["iou", "stop_probability", "confidence"]) -> Array:
        rows = [[getattr(step, name) for step in steps] for steps in padded]
        return np.array(rows, dtype=np.float64).reshape(n, horizon)  # None becomes NaN

    def flags(name: Literal["stop", "parse_failure"]) -> Mask:
        return np.array([[getattr(step, name) for step in steps] for steps in padded], dtype=bool) & acted

    target = np.array([e.target for e in episodes], dtype=np.float64)
    start_box = np.array([_or_zeros(e.initial_box) for e in episodes], dtype=np.float64)
    box = np.array([[_or_zeros(s.box) for s in steps] for steps in padded], dtype=np.float64)
    accepted = [[s.proposal is not None and s.invalid is None and not s.stop for s in steps] for steps in padded]
    recorded = numbers("iou")
    if verify:
        _check_ious(episodes, recorded, boxes.iou(box, target[:, None]))
    return Outcomes(
        sample_ids=tuple(e.sample_id for e in episodes),
        picture_ids=tuple(e.picture_id for e in episodes),
        start_iou=boxes.iou(start_box, target),
        start_box=start_box,
        iou=recorded,
        box=box,
        acted=acted,
        stop=flags("stop"),
        accepted=np.array(accepted, dtype=bool) & acted,
        parse_failure=flags("parse_failure"),
        stop_probability=np.where(acted, numbers("stop_probability"), np.nan),
        confidence=np.where(acted, numbers("confidence"), np.nan),
    )


def columns(
    *,
    episodes_forced: Sequence[Episode] | None = None,
    episodes_stopping: Sequence[Episode] | None = None,
    stable_iou: float = 0.9,
    stop_gate: float = 0.5,
    verify: bool = True,
) -> dict[str, Column]:
    """Every column that the rollouts allow, in reading order.

    With both rollouts, ``step_0`` and ``learned_stop`` come from the stopping one and the rest from
    the forced one. With one only, ``step_0`` comes from it and the columns of the other are absent.

    Args:
        episodes_forced: The policy rolled out with the stop not available.
        episodes_stopping: The same samples in the same order, with the stop available.
        stable_iou: Two successive boxes at least this alike end the episode in ``box_stability``.
        stop_gate: Stated stop probability that ends the episode in ``confidence_gated``.
        verify: As in ``outcomes``.

    Returns:
        Columns of n episodes by name: ``step_0``, ``last_step``, ``learned_stop``,
        ``box_stability``, ``confidence_gated`` (only where a stop probability is stated),
        ``random_step``, ``oracle_best``.

    Raises:
        ValueError: For no rollout, a stop in the forced one, or rollouts of different samples.
    """
    if episodes_forced is None and episodes_stopping is None:
        raise ValueError("no rollout given: pass episodes_forced, episodes_stopping or both")
    forced = None if episodes_forced is None else outcomes(episodes_forced, verify=verify)
    stopping = None if episodes_stopping is None else outcomes(episodes_stopping, verify=verify)
    if episodes_forced is not None and episodes_stopping is not None:
        check_same_samples(episodes_forced, episodes_stopping, "episodes_forced", "episodes_stopping")
    if forced is not None and forced.stopped.any():
        first = int(np.argmax(forced.stopped))
        raise ValueError(
            f"episodes_forced[{first}] ({forced.sample_ids[first]!r}) holds a stop, as do "
            f"{int(forced.stopped.sum())} of {len(forced.stopped)}: roll out with the stop not available"
        )
    made: list[Column] = []
    if stopping is not None:
        made += [_decided("step_0", step_0(stopping), "stopping")]
    elif forced is not None:
        made += [_decided("step_0", step_0(forced), "forced")]
    if forced is not None:
        made += [_decided("last_step", last_step(forced), "forced")]
    if stopping is not None:
        made += [_decided("learned_stop", last_step(stopping), "stopping")]
    if forced is not None:
        made += [_decided("box_stability", box_stability(forced, stable_iou), "forced")]
        if not np.isnan(forced.stop_probability).all():
            made += [_decided("confidence_gated", confidence_gated(forced, stop_gate), "forced")]
        made += [random_step(forced), _decided("oracle_best", oracle_best(forced), "forced", oracle=True)]
    return {column.name: column for column in made}


def step_0(played: Outcomes) -> Array:
    """IoU of the box in force after the first action: what a single shot would give. Shape (n,).

    A first action that failed, or stopped at once, has IoU 0 unless the episode started from a box.
    """
    return played.iou[:, 0]


def last_step(played: Outcomes) -> Array:
    """IoU of the box in force at the end. Shape (n,).

    ``last_step`` on a forced rollout, ``learned_stop`` on one where the policy could stop.
    """
    return played.iou[:, -1]


def box_stability(played: Outcomes, stable_iou: float = 0.9) -> Array:
    """IoU of the first accepted box that repeats the box before it, else of the last. Shape (n,).

    A refused or unparsed action leaves the box where it was; that is no agreement, so it does not
    end the episode.
    """
    alike = boxes.iou(played.box, played.box_before) >= stable_iou
    stable = played.accepted & played.has_box_before & alike  # (n, T)
    return _at_first(stable, played.iou, played.iou[:, -1])


def confidence_gated(played: Outcomes, stop_gate: float = 0.5) -> Array:
    """IoU of the box in force when the stated stop probability first reaches the gate. Shape (n,).

    The answer is the box *before* that action. The gate is closed while there is no box and where
    no probability is stated; an episode that never passes it ends with its last box.
    """
    passes = played.acted & played.has_box_before & (played.stop_probability >= stop_gate)  # NaN: False
    return _at_first(passes, played.iou_before, played.iou[:, -1])


def random_step(played: Outcomes) -> Column:
    """One of the proposals an episode made, each equally likely; exact expectations, K = T.

    A refused or unparsed proposal counts with the box that was in force after it.

    Raises:
        ValueError: For an episode without a proposal (it stopped at once).
    """
    proposals = played.acted & ~played.stop
    counts = proposals.sum(axis=1, keepdims=True)
    if (counts == 0).any():
        first = played.sample_ids[int(np.argmax(counts[:, 0] == 0))]
        raise ValueError(f"{first!r} made no proposal to draw from: use a rollout without the stop")
    return Column("random_step", played.iou, proposals / counts, oracle=False, rollout="forced")


def oracle_best(played: Outcomes) -> Array:
    """Best IoU of any box in force, the starting box among them. Shape (n,). Uses the target."""
    return np.maximum(played.start_iou, played.iou.max(axis=1))


def prefix_agreement(forced: Outcomes, stopping: Outcomes, tolerance: float = 1e-6) -> float:
    """Share of episodes whose two rollouts hold the same boxes up to the stop.

    1 for a deterministic policy that the mere availability of the stop does not change. Below 1,
    ``oracle_best`` (of the forced rollout) need not bound the columns of the stopping one.

    Args:
        forced: n episodes without the stop.
        stopping: The same n samples with it.
        tolerance: Largest difference of a coordinate that still counts as the same box.

    Raises:
        ValueError: For different numbers of episodes.
    """
    if len(forced.sample_ids) != len(stopping.sample_ids):
        raise ValueError(f"{len(forced.sample_ids)} forced and {len(stopping.sample_ids)} stopping episodes")
    shared = min(forced.iou.shape[1], stopping.iou.shape[1])
    proposed = (stopping.acted & ~stopping.stop)[:, :shared]
    same = (np.abs(forced.box[:, :shared] - stopping.box[:, :shared]) <= tolerance).all(axis=-1)
    longer = stopping.num_proposals > forced.num_proposals
    return float(((same | ~proposed).all(axis=1) & ~longer).mean())


def check_same_samples(a: Sequence[Episode], b: Sequence[Episode], a_name: str = "a", b_name: str = "b") -> None:
    """Refuse to pair episodes that are not of the same samples, in the same order.

    Raises:
        ValueError: Naming the first pair and the field that differ.
    """
    if len(a) != len(b):
        raise ValueError(f"cannot pair: {a_name} has {len(a)} episodes, {b_name} has {len(b)}")
    for i, (left, right) in enumerate(zip(a, b, strict=True)):
        for field in ("dataset", "split", "sample_id", "picture_id", "target", "initial_box"):
            x, y = getattr(left, field), getattr(right, field)
            if x != y:
                raise ValueError(
                    f"cannot pair: episode {i} differs in {field}: {x!r} in {a_name}, {y!r} in {b_name}; "
                    "score the same samples in the same order"
                )


def select(column: Column, keep: Mask) -> Column:
    """The column restricted to the episodes where ``keep`` (n,) is True.

    Raises:
        ValueError: When nothing is left or the shapes differ.
    """
    if keep.shape != (len(column),):
        raise ValueError(f"the mask has shape {keep.shape}, the column {column.name!r} {len(column)} episodes")
    if not keep.any():
        raise ValueError(f"no episode of {column.name!r} is selected")
    return Column(column.name, column.ious[keep], column.weights[keep], column.oracle, column.rollout)


def strata(episodes: Sequence[Episode]) -> dict[str, Mask]:
    """Masks (n,) for the rows per data set and per box size; empty strata are left out.

    Keys are ``dataset:<name>`` and ``size:small|medium|large``: the target's area in pixels of the
    original picture, below 32 squared, below 96 squared, or more (the COCO convention).
    """
    datasets = np.array([e.dataset for e in episodes])
    target = np.array([e.target for e in episodes], dtype=np.float64)
    height_width = np.array([e.size for e in episodes], dtype=np.float64)
    area_px = boxes.area(target) * height_width.prod(axis=1)
    size = np.digitize(area_px, [32.0**2, 96.0**2])
    found = {f"dataset:{name}": datasets == name for name in sorted(set(datasets.tolist()))}
    found |= {f"size:{name}": size == k for k, name in enumerate(("small", "medium", "large"))}
    return {name: mask for name, mask in found.items() if mask.any()}


def _decided(name: str, iou: Array, rollout: RolloutKind, oracle: bool = False) -> Column:
    return Column(name, iou[:, None], np.ones((len(iou), 1)), oracle, rollout)


def _at_first(condition: Mask, values: Array, otherwise: Array) -> Array:
    """``values`` (n, T) at the first True of ``condition`` (n, T), else ``otherwise`` (n,)."""
    first = condition.argmax(axis=1)
    return np.where(condition.any(axis=1), values[np.arange(len(values)), first], otherwise)


def _or_zeros(box: Box | None) -> Box:
    return (0.0, 0.0, 0.0, 0.0) if box is None else box


def _check_ious(episodes: Sequence[Episode], recorded: Array, recomputed: Array) -> None:
    wrong = ~(np.abs(recorded - recomputed) <= 1e-4)  # a NaN is wrong too
    if wrong.any():
        i, t = (int(k) for k in np.argwhere(wrong)[0])
        raise ValueError(
            f"episode {i} ({episodes[i].sample_id!r}), step {t}: recorded IoU {recorded[i, t]:.6g}, but its "
            f"box and target give {recomputed[i, t]:.6g} ({int(wrong.any(axis=1).sum())} episodes disagree)"
        )
