"""Episodes as arrays, and the answer that each stopping rule would have given.

A *column* is one way of choosing the answer of an episode among its boxes. All but ``oracle_best``
work without ground truth: they never look at the target, so they could be deployed. The columns exist side by
side because a gain that only the oracle column shows is no gain (arXiv 2606.13156, second version).

No episode is ever dropped: an action that could not be parsed or was refused leaves the box in
force where it was, and no box has IoU 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ivt_env import boxes
from ivt_env.episodes import Episode

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
    image_ids: tuple[str, ...]
    """Cluster of each episode for the statistics, length n."""
    start_iou: Array
    """IoU of the box that the episode started from, 0 for none. Shape (n,)."""
    start_box: Array
    """The box that the episode started from, zeros for none, xyxy relative. Shape (n, 4)."""
    iou: Array
    """IoU of the current box after each action. Shape (n, T)."""
    start_hit: Array
    """1 where the centre of the box that the episode started from lies in the target, else 0. Shape (n,)."""
    hit: Array
    """The same of the current box after each action. Shape (n, T)."""
    box: Array
    """The current box after each action, zeros for none, xyxy relative. Shape (n, T, 4)."""
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
        """IoU of the current box before each action. Shape (n, T)."""
        return np.concatenate([self.start_iou[:, None], self.iou[:, :-1]], axis=1)

    @property
    def box_before(self) -> Array:
        """The current box before each action, zeros for none. Shape (n, T, 4)."""
        return np.concatenate([self.start_box[:, None], self.box[:, :-1]], axis=1)

    @property
    def has_box_before(self) -> Mask:
        """There was a current box before the action, so the action refines it or keeps it. Shape (n, T)."""
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
    seeds: int = 1
    """Runs of one policy that are averaged here (``pool_seeds``): K is this many blocks of equal width."""
    hits: Array | None = None
    """1 where the centre of the possible answer lies in the target, else 0. Shape (n, K)."""

    @property
    def iou(self) -> Array:
        """Final IoU of each episode, in expectation where the rule draws at random. Shape (n,)."""
        return (self.ious * self.weights).sum(axis=1)

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self.ious)

    def by_seed(self) -> list[Column]:
        """The column of each run that is averaged here, in the order given to ``pool_seeds``."""
        ious, weights = np.split(self.ious, self.seeds, axis=1), np.split(self.weights, self.seeds, axis=1)
        hits = [None] * self.seeds if self.hits is None else np.split(self.hits, self.seeds, axis=1)
        runs = zip(ious, weights, hits, strict=True)
        return [replace(self, ious=iou, weights=w * self.seeds, hits=hit, seeds=1) for iou, w, hit in runs]


def outcomes(episodes: Sequence[Episode], *, verify: bool = True) -> Outcomes:
    """Turn n episodes, saved or fresh, into arrays.

    ``verify`` recomputes every IoU from its box and the target, and refuses a record that is further than 1e-4 from it.
    An episode without a step, or with one after its stop, is a ValueError.
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
    start_box = np.array([e.initial_box or boxes.NO_BOX for e in episodes], dtype=np.float64)
    box = np.array([[s.box or boxes.NO_BOX for s in steps] for steps in padded], dtype=np.float64)
    accepted = [[s.proposal is not None and s.invalid is None and not s.stop for s in steps] for steps in padded]
    recorded = numbers("iou")
    if verify:
        _check_ious(episodes, recorded, boxes.iou(box, target[:, None]))
    return Outcomes(
        sample_ids=tuple(e.sample_id for e in episodes),
        image_ids=tuple(e.image_id for e in episodes),
        start_iou=boxes.iou(start_box, target),
        start_box=start_box,
        iou=recorded,
        start_hit=boxes.hit(start_box, target).astype(np.float64),
        hit=boxes.hit(box, target[:, None]).astype(np.float64),
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

    By name: ``step_0``, ``last_step``, ``learned_stop``, ``box_stability``, ``confidence_gated`` (only where a stop
    probability is stated), ``verifier_gated`` (only where some box has a score), ``random_step``, ``oracle_best``.
    With both rollouts, ``step_0`` and ``learned_stop`` come from the stopping one and the rest from
    the forced one. With one only, ``step_0`` comes from it and the columns of the other are absent.

    Args:
        episodes_forced: The policy rolled out with the stop not available.
        episodes_stopping: The same samples in the same order, with the stop available.
        stable_iou: As in ``box_stability``.
        stop_gate: As in ``confidence_gated``.
        verify: As in ``outcomes``.

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

    def of(forced: Outcomes | None, stopping: Outcomes | None) -> list[Column]:
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
            if not np.isnan(stop_verification(forced)).all():
                made += [_decided("verifier_gated", verifier_gated(forced), "forced")]
            made += [random_step(forced), _decided("oracle_best", oracle_best(forced), "forced", oracle=True)]
        return made

    # No rule but the oracle's looks at the score, so hits are chosen as IoUs are.
    pointing = of(*(None if o is None else replace(o, iou=o.hit, start_iou=o.start_hit) for o in (forced, stopping)))
    return {c.name: replace(c, hits=p.ious) for c, p in zip(of(forced, stopping), pointing, strict=True)}


def step_0(played: Outcomes) -> Array:
    """IoU of the current box after the first action: what a single shot would give. Shape (n,).

    A first action that failed, or stopped at once, has IoU 0 unless the episode started from a box.
    """
    return played.iou[:, 0]


def last_step(played: Outcomes) -> Array:
    """IoU of the current box at the end. Shape (n,).

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
    """IoU of the current box when the stated stop probability first reaches the gate. Shape (n,).

    The answer is the box *before* that action. The gate is closed while there is no box and where
    no probability is stated; an episode that never passes it ends with its last box.
    """
    passes = played.acted & played.has_box_before & (played.stop_probability >= stop_gate)  # NaN: False
    return _at_first(passes, played.iou_before, played.iou[:, -1])


def stop_verification(played: Outcomes) -> Array:
    """What the policy says about each box when it is shown it: a score for ``verifier_gated``.

    The box after action t is shown to the policy before action t + 1, and the stop probability that
    it states there speaks of that box. NaN where no action followed (the last box of an episode is
    never shown again) or none was stated. Shape (n, T).
    """
    following = played.stop_probability[:, 1:]  # NaN already where no action was taken
    return np.concatenate([following, np.full((len(following), 1), np.nan)], axis=1)


def verifier_gated(played: Outcomes) -> Array:
    """IoU of the box that the policy keeps by its own judgement: the first, unless it scores a later one higher. (n,).

    The scores are those of ``stop_verification``. The box after the first action is kept. Box after box, a later one
    takes its place where its own score exceeds that of the kept box. A box without a score (the last one of an
    episode) is not taken, and one kept without a score is not given up. Only where no box is kept at all is the next
    one taken whatever its score: an episode without an answer has nothing to protect.
    """
    score = stop_verification(played)
    kept_iou, kept_box, kept_score = played.iou[:, 0], played.box[:, 0], score[:, 0]
    for t in range(1, played.iou.shape[1]):
        better = score[:, t] > kept_score  # NaN on either side: False
        take = played.accepted[:, t] & (better | boxes.is_no_box(kept_box))
        kept_iou = np.where(take, played.iou[:, t], kept_iou)
        kept_box = np.where(take[:, None], played.box[:, t], kept_box)
        kept_score = np.where(take, score[:, t], kept_score)
    return kept_iou


def random_step(played: Outcomes) -> Column:
    """One of the proposals an episode made, each equally likely; exact expectations, K = T.

    A refused or unparsed proposal counts with the current box after it. An episode without a proposal (it stopped
    at once) is a ValueError.
    """
    proposals = played.acted & ~played.stop
    counts = proposals.sum(axis=1, keepdims=True)
    if (counts == 0).any():
        first = played.sample_ids[int(np.argmax(counts[:, 0] == 0))]
        raise ValueError(f"{first!r} made no proposal to draw from: use a rollout without the stop")
    return Column("random_step", played.iou, proposals / counts, oracle=False, rollout="forced")


def oracle_best(played: Outcomes) -> Array:
    """Best IoU of any current box, the starting box among them. Shape (n,). Uses the target."""
    return np.maximum(played.start_iou, played.iou.max(axis=1))


def prefix_agreement(forced: Outcomes, stopping: Outcomes, tolerance: float = 1e-6) -> float:
    """Share of episodes whose two rollouts hold the same boxes (to ``tolerance``) up to the stop.

    1 for a deterministic policy that the mere availability of the stop does not change. Below 1,
    ``oracle_best`` (of the forced rollout) need not bound the columns of the stopping one.
    """
    if len(forced.sample_ids) != len(stopping.sample_ids):
        raise ValueError(f"{len(forced.sample_ids)} forced and {len(stopping.sample_ids)} stopping episodes")
    shared = min(forced.iou.shape[1], stopping.iou.shape[1])
    proposed = (stopping.acted & ~stopping.stop)[:, :shared]
    same = (np.abs(forced.box[:, :shared] - stopping.box[:, :shared]) <= tolerance).all(axis=-1)
    longer = stopping.num_proposals > forced.num_proposals
    return float(((same | ~proposed).all(axis=1) & ~longer).mean())


def check_same_samples(a: Sequence[Episode], b: Sequence[Episode], a_name: str = "a", b_name: str = "b") -> None:
    """ValueError for episodes that are not of the same samples in the same order; it names the first difference."""
    if len(a) != len(b):
        raise ValueError(f"cannot pair: {a_name} has {len(a)} episodes, {b_name} has {len(b)}")
    for i, (left, right) in enumerate(zip(a, b, strict=True)):
        for field in ("dataset", "split", "sample_id", "image_id", "target", "initial_box"):
            x, y = getattr(left, field), getattr(right, field)
            if x != y:
                raise ValueError(
                    f"cannot pair: episode {i} differs in {field}: {x!r} in {a_name}, {y!r} in {b_name}; "
                    "score the same samples in the same order"
                )


def select(column: Column, keep: Mask) -> Column:
    """The column restricted to the episodes where ``keep`` (n,) is True; ValueError when nothing is left."""
    if keep.shape != (len(column),):
        raise ValueError(f"the mask has shape {keep.shape}, the column {column.name!r} {len(column)} episodes")
    if not keep.any():
        raise ValueError(f"no episode of {column.name!r} is selected")
    hits = None if column.hits is None else column.hits[keep]
    return replace(column, ious=column.ious[keep], weights=column.weights[keep], hits=hits)


def pool_seeds(columns: Sequence[Column]) -> Column:
    """The mean over several runs of one policy (seeds) on the same n samples, as one column.

    A seed is treated as a draw: the answer of an episode is that of each run with probability
    1 / S. Every score of the result is then the mean of the runs' scores, and its value for an
    episode the mean of the runs' values, so that intervals resample images with all their runs.
    """
    if not columns:
        raise ValueError("no columns to pool: give one for every seed")
    first = columns[0]
    for column in columns:
        if (column.name, column.rollout, len(column)) != (first.name, first.rollout, len(first)):
            raise ValueError(
                f"cannot pool {column.name!r} ({column.rollout}) of {len(column)} episodes with "
                f"{first.name!r} ({first.rollout}) of {len(first)}"
            )
        if column.seeds != 1:
            raise ValueError(f"{column.name!r} is a mean over {column.seeds} seeds already")
    width = max(column.ious.shape[1] for column in columns)

    def blocks(values: Sequence[Array]) -> Array:  # an answer that is not there has probability 0
        return np.concatenate([np.pad(v, ((0, 0), (0, width - v.shape[1]))) for v in values], axis=1)

    hits = [c.hits for c in columns if c.hits is not None]
    return replace(
        first,
        ious=blocks([c.ious for c in columns]),
        weights=blocks([c.weights for c in columns]) / len(columns),
        seeds=len(columns),
        hits=blocks(hits) if len(hits) == len(columns) else None,
    )


SIZE_LIMITS_PX = {"small": 32.0, "medium": 96.0, "large": np.inf}
"""Square root of the box's area in pixels of the original image, upper limits (the COCO convention)."""
SIDE_LIMITS = {"tiny": 0.1, "small": 0.16, "medium": 0.32, "large": np.inf}
"""Square root of the box's share of the image's area, upper limits: where the scenes draw theirs."""


def strata(episodes: Sequence[Episode]) -> dict[str, Mask]:
    """Masks (n,) by data set, box size (``SIZE_LIMITS_PX``, ``SIDE_LIMITS``) and siblings; empty ones are left out.

    They are named ``dataset:<name>``, ``size:small|medium|large``, ``side:tiny|small|medium|large`` (for images that
    are all of one size, such as the scenes) and ``siblings:0|1|2|3+`` (annotated other objects of the target's class).
    Every kind of stratum splits the episodes: each is in exactly one of the kind. A box at a limit
    belongs to the larger band, except that ``tiny`` holds its own limit, as in ``test_small``.
    """
    datasets = np.array([e.dataset for e in episodes])
    area = boxes.area(np.array([e.target for e in episodes], dtype=np.float64))
    pixels = np.array([e.size for e in episodes], dtype=np.float64).prod(axis=1)
    # Areas are compared, not roots: the square root of 32 * 32 pixels may fall on either side of 32.
    size = np.digitize(area * pixels, [limit**2 for limit in SIZE_LIMITS_PX.values()][:-1])
    tiny, *others = (limit**2 for limit in SIDE_LIMITS.values())
    side = np.where(area <= tiny * (1 + 1e-9), 0, 1 + np.digitize(area, others[:-1]))
    siblings = np.minimum([len(e.siblings) for e in episodes], 3)
    found = {f"dataset:{name}": datasets == name for name in sorted(set(datasets.tolist()))}
    found |= {f"size:{name}": size == k for k, name in enumerate(SIZE_LIMITS_PX)}
    found |= {f"side:{name}": side == k for k, name in enumerate(SIDE_LIMITS)}
    found |= {f"siblings:{name}": siblings == k for k, name in enumerate(("0", "1", "2", "3+"))}
    return {name: mask for name, mask in found.items() if mask.any()}


def _decided(name: str, iou: Array, rollout: RolloutKind, oracle: bool = False) -> Column:
    return Column(name, iou[:, None], np.ones((len(iou), 1)), oracle, rollout)


def _at_first(condition: Mask, values: Array, otherwise: Array) -> Array:
    """``values`` (n, T) at the first True of ``condition`` (n, T), else ``otherwise`` (n,)."""
    first = condition.argmax(axis=1)
    return np.where(condition.any(axis=1), values[np.arange(len(values)), first], otherwise)


def _check_ious(episodes: Sequence[Episode], recorded: Array, recomputed: Array) -> None:
    wrong = ~(np.abs(recorded - recomputed) <= 1e-4)  # a NaN is wrong too
    if wrong.any():
        i, t = (int(k) for k in np.argwhere(wrong)[0])
        raise ValueError(
            f"episode {i} ({episodes[i].sample_id!r}), step {t}: recorded IoU {recorded[i, t]:.6g}, but its "
            f"box and target give {recomputed[i, t]:.6g} ({int(wrong.any(axis=1).sum())} episodes disagree)"
        )
