"""Checks that authors of new data sets and agents can run on theirs.

>>> from ivt_env.data import load_dataset
>>> from ivt_env.testing import check_dataset
>>> check_dataset(load_dataset("scenes", "val"), samples=5)
"""

from __future__ import annotations

import hashlib
import inspect
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ivt_env import boxes
from ivt_env.data.sample import DataError, Dataset, ImageArray, Sample
from ivt_env.env import GroundingEnv
from ivt_env.episodes import Episode, Step
from ivt_env.expression_space import MAX_EXPRESSION
from ivt_env.rollouts import Agent, make_vector_env, play, rollout
from ivt_env.vector_env import GroundingVectorEnv

Randomness = Literal["none", "seeded", "free"]


def check_dataset(dataset: Dataset, samples: int = 100) -> None:
    """Whether a data set keeps what ``Dataset`` and ``Sample`` promise, on some of its samples.

    Checked: the fields of each sample, boxes and siblings, unique ids, errors outside the range, the same
    sample and image at every reading, images (RGB uint8 of the stated size; one image for one
    ``image_id``; none that a caller could draw on for all), pickling, and that a perfect box earns 1.

    Args:
        dataset: to check.
        samples: how many, evenly over the whole; the first and the last are among them.

    Raises:
        DataError: for the first thing that is wrong; names the index, the field and the value.
    """
    if not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples {samples!r}: give an integer of at least 1")
    where = _check_whole(dataset)
    size = len(dataset)
    indices = sorted({round(i) for i in np.linspace(0, size - 1, min(samples, size)).tolist()})
    seen, images, first = dict[str, int](), dict[str, tuple[int, str]](), dict[int, Sample]()
    for index in indices:
        sample = first[index] = dataset[index]
        at = f"{where}[{index}]"
        _check_sample(sample, at, dataset.split)
        if sample.sample_id in seen:
            _fail(f"{at} has the sample_id {sample.sample_id!r} of index {seen[sample.sample_id]}; ids must be unique")
        seen[sample.sample_id] = index
        digest = _check_image(dataset, sample, at)
        other, known = images.setdefault(sample.image_id, (index, digest))
        if known != digest:
            _fail(f"{at} and index {other} share the image_id {sample.image_id!r}, and their images differ")
    # In another order than before: what a data set remembers of the last reading must not show.
    try:
        copied = pickle.loads(pickle.dumps(dataset))
    except Exception as error:
        raise DataError(f"{where} cannot be pickled, as worker processes need it: {error!r}") from error
    for index in reversed(indices):
        for name, again in (("read again", dataset[index]), ("read from a pickled copy", copied[index])):
            if again != first[index]:
                _fail(f"{where}[{index}], {name}, is another sample: {again} instead of {first[index]}")
        if _digest(copied.image(first[index])) != images[first[index].image_id][1]:
            _fail(f"{where}[{index}]: the image that a pickled copy gives is another one")
    env = GroundingEnv(dataset, canvas=64)
    for index in indices[:: max(1, len(indices) // 5)]:
        observation, info = env.reset(options={"index": index})
        if not env.observation_space.contains(observation):
            _fail(f"{where}[{index}]: its observation is not of the environment's space")
        box, visible = first[index].box, boxes.visible_part(info["target"].tolist())
        most, reward = float(boxes.iou(visible, box)), env.step({"box": np.array(visible, np.float32), "stop": 0})[1]
        if not reward > 0.99 * most:
            _fail(f"{where}[{index}]: its own box {box} earns {reward:.3f} instead of {most:.3f}; too thin?")


def _fail(message: str) -> None:
    raise DataError(message)


def _check_whole(dataset: Dataset) -> str:
    """Names, length and errors outside the range; gives how a message names the data set."""
    kind = type(dataset).__name__
    for name in ("name", "split"):
        value = getattr(dataset, name, None)
        if not isinstance(value, str) or not value:
            _fail(f"{kind}.{name} is {value!r}: give a text")
    for name in ("__len__", "__getitem__", "image"):
        if not callable(getattr(dataset, name, None)):
            _fail(f"{kind} has no method {name}; a data set has __len__, __getitem__ and image")
    where = f"{dataset.name} {dataset.split}"
    size = len(dataset)
    if size < 1:
        _fail(f"{where} is empty")
    for index in (size, -1, size + 1000):
        try:
            dataset[index]
        except IndexError:
            continue
        except Exception as error:
            raise DataError(f"{where}[{index}] raises {error!r}; it must be an IndexError") from error
        _fail(f"{where}[{index}] gives a sample although there are {size}; it must raise IndexError")
    return where


def _check_sample(sample: Sample, at: str, split: str) -> None:
    if not isinstance(sample, Sample):
        _fail(f"{at} is a {type(sample).__name__}, not an ivt_env.data.sample.Sample")
    for name in ("sample_id", "image_id", "expression", "dataset", "split"):
        value = getattr(sample, name)
        if not isinstance(value, str) or not value.strip():
            _fail(f"{at}: {name} is {value!r}, not a text")
    if sample.split != split:
        _fail(f"{at}: split is {sample.split!r} in a data set of the split {split!r}")
    if len(sample.expression) > MAX_EXPRESSION:
        _fail(f"{at}: expression of {len(sample.expression)} characters; at most {MAX_EXPRESSION} fit")
    try:
        sample.expression.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{at}: expression {sample.expression!r} is not valid Unicode ({error})") from error
    size = sample.size
    if not isinstance(size, tuple) or len(size) != 2 or not all(isinstance(v, int) and v > 0 for v in size):
        _fail(f"{at}: size is {size!r}; give (height, width) in pixels, two integers above 0")
    if not isinstance(sample.siblings, tuple):
        _fail(f"{at}: siblings is a {type(sample.siblings).__name__}; give a tuple of boxes")
    for name, box in [("box", sample.box), *(("a sibling", sibling) for sibling in sample.siblings)]:
        if not isinstance(box, tuple) or not all(isinstance(v, int | float) for v in box):
            _fail(f"{at}: {name} is {box!r}; give a tuple of 4 floats (float() of NumPy's)")
        # In float32 as well, as in info["target"]. A target may go beyond the image, if some of it is visible.
        for held in (box, np.array(box, dtype=np.float32)):
            if not np.isfinite(held).all() or boxes.invalid_reason(boxes.clip(held)):
                why = boxes.invalid_reason(held)
                _fail(f"{at}: {name} {box}: {why}; boxes are x1, y1, x2, y2 relative to the image")
    if sample.box in sample.siblings:
        _fail(f"{at}: the target {sample.box} is among its own siblings")
    if not isinstance(sample.meta, Mapping):
        _fail(f"{at}: meta is a {type(sample.meta).__name__}, not a mapping")
    try:
        json.dumps(dict(sample.meta))
    except (TypeError, ValueError) as error:
        raise DataError(f"{at}: meta {dict(sample.meta)} cannot be written as JSON ({error})") from error


def _check_image(dataset: Dataset, sample: Sample, at: str) -> str:
    """One image, read twice; gives its digest."""
    image = dataset.image(sample)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        _fail(f"{at}: its image is {getattr(image, 'dtype', type(image).__name__)}; give an array of uint8")
    if image.shape != (*sample.size, 3):
        _fail(f"{at}: its image has shape {image.shape}, its size says {(*sample.size, 3)} (height, width, RGB)")
    digest = _digest(image)
    again = dataset.image(sample)
    if _digest(again) != digest:
        _fail(f"{at}: its image differs from one reading to the next")
    if np.shares_memory(image, again) and again.flags.writeable:
        _fail(
            f"{at}: its image is kept and can be drawn on, which would show in every later reading; "
            "give a copy, or image.setflags(write=False)"
        )
    return digest


def _digest(image: ImageArray) -> str:
    return hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()).hexdigest()


class _OtherTargets:
    """A data set that looks the same and has other target boxes."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset, self.name, self.split = dataset, dataset.name, dataset.split

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        sample = self.dataset[index]
        x1, y1, x2, y2 = sample.box
        # Mirrored, and where that changes little, one corner of the image.
        other = (1 - x2, 1 - y2, 1 - x1, 1 - y1)
        if boxes.iou(other, sample.box) > 0.3:
            other = (0.0, 0.0, 0.125, 0.125)
        return replace(sample, box=other, siblings=())

    def image(self, sample: Sample) -> ImageArray:
        return self.dataset.image(sample)


def check_agent(
    agent: Agent | Callable[..., Agent],
    env_id: str = "IVT-Scenes-v0",
    *,
    episodes: int = 6,
    num_envs: int = 3,
    seed: int = 0,
    randomness: Randomness = "none",
    pass_env: bool = False,
    tolerance: float = 1e-4,
    **options: Any,
) -> None:
    """Whether an agent keeps what ``Agent`` promises, in episodes that it plays.

    Checked on an agent: its methods; ``box`` (N, 4) float and ``stop`` (N,) of 0 and 1; the optional ``text``,
    ``parse_failure``, ``stop_probability``, ``confidence``; that it leaves observations as they were and copes with
    episodes that are over and with resets of some environments. Of a factory also: new agents play alike, one
    environment at a time or several, whatever the inactive ones show and whatever the target box is; and ``reset``
    makes them forget.

    Args:
        agent: an agent, or a class or function that makes one without arguments.
        env_id: what it plays.
        episodes: how many.
        num_envs: how many at once, at least 2.
        seed: decides the samples.
        randomness: ``none``: equal observations since ``reset`` give equal actions. ``seeded``: new agents
            draw alike in their k-th episode, whatever came before it. ``free``: new agents differ, and
            nothing is compared.
        pass_env: the factory takes the vector environment.
        tolerance: on box coordinates; a model's numbers depend a little on the size of a batch.
        **options: of the environment (``canvas``, ``view``, ``max_steps``, ...).

    Raises:
        AssertionError: for the first thing that is wrong, with the value.
        ValueError: for arguments that check nothing.
    """
    if num_envs < 2 or episodes < 2:
        raise ValueError(f"num_envs {num_envs}, episodes {episodes}: give at least 2 of each, to compare them")
    if randomness not in ("none", "seeded", "free"):
        raise ValueError(f"randomness {randomness!r}: choose none, seeded or free")
    made = not inspect.isclass(agent) and hasattr(agent, "act")

    def new(env: GroundingVectorEnv) -> Agent:
        if made:
            found: Any = agent
        else:
            found = agent(env) if pass_env else agent()  # type: ignore[operator]
        for name in ("act", "reset"):
            _require(callable(getattr(found, name, None)), f"{type(found).__name__} has no method {name}")
        return found

    def alike(env: GroundingVectorEnv, agent: Agent, message: str, spoil: bool = False) -> None:
        _compare(played, rollout(env, _Checked(agent, spoil), episodes, seed), tolerance, message)

    env = make_vector_env(env_id, num_envs, **options)
    played = rollout(env, _Checked(new(env)), episodes, seed)
    _check_partial_reset(env, new(env), seed)
    if made or randomness == "free":
        return
    alike(env, new(env), "a second new agent acts otherwise: is a seed missing?")
    if randomness == "none":
        experienced = new(env)
        rollout(env, _Checked(experienced), episodes, seed + 1)
        alike(env, experienced, "after reset() it remembers earlier episodes")
    one = make_vector_env(env_id, 1, **options)
    alike(one, new(one), f"played alone it acts otherwise than {num_envs} at once")
    alike(env, new(env), "what an environment with active=False shows changes what others do", spoil=True)
    chosen = {k: v for k, v in options.items() if k not in ("split", "data_root", "strict", "canvas")}
    targets = _OtherTargets(env.dataset)
    other = GroundingVectorEnv(num_envs, targets, canvas=env.screen.side, autoreset_mode="Disabled", **chosen)
    alike(other, new(other), "it decides by the target box, which it must not read")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _compare(expected: Sequence[Episode], found: Sequence[Episode], tolerance: float, message: str) -> None:
    for number, (a, b) in enumerate(zip(expected, found, strict=True)):
        for step, (one, other) in enumerate(zip(a.steps, b.steps, strict=False)):
            same = one.stop == other.stop and np.allclose(_box_of(one), _box_of(other), rtol=0, atol=tolerance)
            instead, here = (f"box {_box_of(s).round(4).tolist()}, stop {int(s.stop)}" for s in (one, other))
            _require(same, f"{message} (episode {number}, step {step}: {here} instead of {instead})")


def _box_of(step: Step) -> NDArray[np.float64]:
    """What was proposed (4,); zeros for a stop and for what is not finite."""
    return np.array(step.proposal or boxes.NO_BOX, dtype=np.float64)


class _Checked:
    """An agent all of whose answers are checked. With ``spoil`` it sees black where an episode is over."""

    def __init__(self, agent: Agent, spoil: bool = False) -> None:
        self.agent, self.spoil, self.reset = agent, spoil, agent.reset

    def act(self, observations: Mapping[str, Any]) -> Mapping[str, Any]:
        """Boxes (N, 4) and stops (N,); observations must stay as they were."""
        shown, active = dict(observations), observations["active"].copy()
        if self.spoil:
            shown["image"] = shown["image"].copy()
            shown["image"][~active] = 0
        kept = {key: value.copy() if isinstance(value, np.ndarray) else value for key, value in shown.items()}
        actions = self.agent.act(shown)
        for key, value in kept.items():
            _require(key in shown and np.array_equal(shown[key], value), f"act() changed the observation {key!r}")
        _require(isinstance(actions, Mapping), f"act() returned a {type(actions).__name__}, not a mapping")
        return _checked(actions, active)


def _check_partial_reset(env: GroundingVectorEnv, agent: Agent, seed: int) -> None:
    """Some environments begin anew while others are in mid-episode."""
    checked = _Checked(agent)
    next(play(env, checked, seed=seed))
    mask = np.arange(env.num_envs) == env.num_envs - 1
    observations, _ = env.reset(seed=seed + 1, options={"reset_mask": mask})
    agent.reset(mask.copy())
    checked.act({**observations, "active": np.array([not game.over for game in env.games])})


def _checked(actions: Mapping[str, Any], active: NDArray[np.bool_]) -> Mapping[str, Any]:
    """The boxes and stops of an answer for N environments; AssertionError for whatever it says that cannot be."""
    n = len(active)
    for key in ("box", "stop"):
        _require(key in actions, f"act() returned no {key!r}; there are {', '.join(map(repr, actions))}")
    proposals, stops = np.asarray(actions["box"]), np.asarray(actions["stop"])
    _require(proposals.shape == (n, 4), f"box has shape {proposals.shape}, not ({n}, 4), for {n} environments")
    _require(np.issubdtype(proposals.dtype, np.floating), f"box is {proposals.dtype}, not floating point")
    _require(stops.shape == (n,), f"stop has shape {stops.shape}, not ({n},), for {n} environments")
    whole = np.issubdtype(stops.dtype, np.integer) or stops.dtype == bool
    _require(whole and bool(np.isin(stops, (0, 1)).all()), f"stop is {stops.tolist()} ({stops.dtype}), not 0 or 1")
    for key in ("text", "parse_failure", "stop_probability", "confidence"):
        if actions.get(key) is None:
            continue
        _require(len(actions[key]) == n, f"{key} has {len(actions[key])} entries for {n} environments")
        chosen = [actions[key][i] for i in np.flatnonzero(active).tolist()]
        if key == "text":
            _require(all(isinstance(text, str) for text in chosen), f"text is {chosen!r}, not texts")
        elif key == "parse_failure":
            _require(all(isinstance(v, bool | np.bool_) for v in chosen), f"parse_failure is {chosen!r}, not booleans")
        else:
            within = all(0 <= float(v) <= 1 for v in chosen)
            _require(within, f"{key} is {[float(v) for v in chosen]}, not from 0 to 1")
    return {"box": proposals.astype(np.float32), "stop": stops.astype(np.int64)}


__all__ = ["check_agent", "check_dataset"]
