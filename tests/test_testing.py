"""The checks for authors of data sets and agents pass what is right and name what is wrong.

Silent when false: a data set whose images are of another size than its boxes, or an agent that reads
the target or mixes up its environments, passes as checked.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import playing
import pytest

from ivt_agents.play.scripted import CentreAgent, OracleAgent, RandomAgent, StopAfter
from ivt_env.data import DataError, load_dataset
from ivt_env.data.sample import Sample
from ivt_env.testing import check_agent, check_dataset

# ---- data sets -------------------------------------------------------------------------------


class Notes(playing.Notes):
    """Six samples on three images, right in everything."""

    expressions = ("the thing",) * 6


def made(**overrides: Any) -> type[Notes]:
    """Notes that differ in this. Pickled by name: the class must be found in this module."""
    one = type(f"Notes{len(globals())}", (Notes,), overrides | {"__module__": __name__})
    globals()[one.__name__] = one
    return one


def giving(sample_of: Callable[[Sample], Any]) -> type[Notes]:
    """Notes whose samples are ``sample_of(sample)``."""
    return made(__getitem__=lambda self, index: sample_of(Notes.__getitem__(self, index)))


def changed(index: int, **values: Any) -> type[Notes]:
    """Notes with one sample's fields replaced."""
    return giving(lambda sample: replace(sample, **values) if sample.sample_id == f"s{index}" else sample)


def shown(make: Callable[[Any, Sample], Any]) -> type[Notes]:
    """Notes whose images are ``make(image, sample)``."""
    return made(image=lambda self, sample: make(Notes.image(self, sample), sample))


COUNT = itertools.count()
WRITABLE = np.zeros((20, 30, 3), np.uint8)
BROKEN: dict[str, tuple[type[Any], str]] = {
    "no name": (made(name=""), r"Notes\d+.name is ''"),
    "no image method": (made(image=None), "no method image"),
    "empty": (made(__len__=lambda self: 0), "notes train is empty"),
    "endless": (
        made(__getitem__=lambda self, index: Notes.__getitem__(self, index % 6)),
        r"\[6\] gives a sample although there are 6",
    ),
    "another error": (
        made(__getitem__=lambda self, index: {}[index] if index == 6 else Notes.__getitem__(self, index)),
        r"\[6\] raises KeyError",
    ),
    "a dict": (giving(asdict), r"\[0\] is a dict, not"),
    "no expression": (changed(3, expression=" "), r"\[3\]: expression is ' '"),
    "a long expression": (changed(3, expression="x" * 5000), "expression of 5000 characters"),
    "half a character": (changed(3, expression="a \ud83d"), "not valid Unicode"),
    "an id that is a number": (changed(5, sample_id=5), r"\[5\]: sample_id is 5"),
    "an id twice": (changed(4, sample_id="s1"), r"\[4\] has the sample_id 's1' of index 1"),
    "another split": (changed(0, split="val"), "split is 'val' in a data set of the split 'train'"),
    "a box in pixels": (changed(2, box=(3.0, 4.0, 20.0, 18.0)), r"\[2\]: box .* outside \[0, 1\]"),
    "a box as xywh": (changed(2, box=(0.6, 0.2, 0.3, 0.5)), "x2 <= x1"),
    "NaN in a box": (changed(2, box=(0.1, 0.2, float("nan"), 0.5)), "not finite"),
    "a box of NumPy": (changed(2, box=np.array([0.1, 0.2, 0.3, 0.4])), r"give a tuple of 4 floats"),
    "a box flat in float32": (changed(2, box=(0.5, 0.1, 0.5 + 1e-12, 0.5)), "x2 <= x1"),
    "a size turned": (changed(1, size=(30, 20)), r"shape \(20, 30, 3\), its size says \(30, 20, 3\)"),
    "a size of floats": (changed(1, size=(20.0, 30.0)), "two integers"),
    "a broken sibling": (changed(1, siblings=((0.5, 0.5, 0.4, 0.6),)), "a sibling .* x2 <= x1"),
    "its own sibling": (changed(0, siblings=((0.1, 0.2, 0.5, 0.9),)), "among its own siblings"),
    "a list of siblings": (changed(0, siblings=[]), "siblings is a list"),
    "meta that is no JSON": (changed(0, meta={"file": {1}}), "cannot be written as JSON"),
    "another sample each time": (giving(lambda s: replace(s, expression=f"thing {next(COUNT)}")), "is another sample"),
    "an image of floats": (shown(lambda image, _: image / 255), "float64; give an array of uint8"),
    "a grey image": (shown(lambda image, _: image[..., 0]), r"shape \(20, 30\)"),
    "a shared id, two images": (
        shown(lambda image, sample: 255 - image if sample.sample_id == "s1" else image),
        r"\[1\] and index 0 share the image_id 'p0'",
    ),
    "a flickering image": (shown(lambda image, _: image + next(COUNT) % 256), "differs from one reading to the next"),
    "an image to draw on": (made(image=lambda self, sample: WRITABLE), "can be drawn on"),
    "an open file": (made(__reduce__=lambda self: open(__file__).__reduce_ex__(4)), "cannot be pickled"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_data_set_is_named_for_what_is_broken(name):
    broken, message = BROKEN[name]
    with pytest.raises(DataError, match=message):
        check_dataset(broken())


def test_the_embedded_data_sets_and_a_right_one_pass():
    check_dataset(load_dataset("photos", "train"), samples=8)
    check_dataset(load_dataset("scenes", "val"), samples=8)
    check_dataset(Notes())


def test_the_first_and_the_last_sample_are_always_looked_at():
    for index in (0, 5):
        with pytest.raises(DataError, match=rf"\[{index}\]: image_id"):
            check_dataset(changed(index, image_id="")(), samples=2)
    with pytest.raises(ValueError, match="samples 0"):
        check_dataset(Notes(), samples=0)


# ---- agents ----------------------------------------------------------------------------------


class Right(CentreAgent):
    """Decides from the observation: a box that depends on the image, moved at every step."""

    def act(self, observations: Any) -> dict[str, Any]:
        n = len(observations["active"])
        low = observations["image"].reshape(n, -1).mean(1) / 255 / 2 + 0.01 * np.asarray(observations["step"])
        box = np.stack([low, low, low + 0.4, low + 0.3], axis=1).astype(np.float32)
        return {"box": box, "stop": np.asarray(observations["step"]) > 1, "text": ["so"] * n}


def saying(**values: Any) -> type[Right]:
    """Right, but with other things in its answer; a value may be a function of N."""

    class Saying(Right):
        def act(self, observations: Any) -> Any:
            answer = super().act(observations)
            n = len(answer["box"])
            made = {k: v(n) if callable(v) else v for k, v in values.items()}
            return {k: v for k, v in (answer | made).items() if v is not None}

    return Saying


def acting(act: Callable[[dict[str, Any], Any], Any]) -> type[Right]:
    """Right, but it answers ``act(answer, observations)``."""
    return type(
        "Acting", (Right,), {"act": lambda self, observations: act(Right.act(self, observations), observations)}
    )


class NoReset:
    act = Right.act


def at_random(answer: dict[str, Any], _: Any) -> dict[str, Any]:
    return answer | {"box": answer["box"] + np.random.default_rng().uniform(0, 0.05, (len(answer["box"]), 1))}


def by_the_inactive(answer: dict[str, Any], observations: Any) -> dict[str, Any]:
    over = ~observations["active"]
    dark = over.any() and len(over) > 1 and observations["image"][over].max() == 0
    return answer | {"box": answer["box"] * (0.5 if dark else 1.0)}


Unseeded = acting(at_random)


class Remembers(Right):
    """Counts its steps and never forgets them."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = np.zeros(0)

    def reset(self, mask: Any) -> None:
        if len(self.steps) != len(mask):
            self.steps = np.zeros(len(mask))

    def act(self, observations: Any) -> dict[str, Any]:
        answer = super().act(observations)
        answer["box"] = answer["box"] * (0.9 ** self.steps[:, None]).astype(np.float32)
        self.steps += 1
        return answer


class FullResetsOnly(Right):
    def reset(self, mask: Any) -> None:
        assert mask.all(), "cannot reset some"


AGENTS: dict[str, tuple[type[Any], str]] = {
    "no reset": (NoReset, "NoReset has no method reset"),
    "no mapping": (acting(lambda answer, _: None), "returned a NoneType"),
    "no stop": (saying(stop=None), "returned no 'stop'"),
    "one box for all": (saying(box=np.zeros(4, np.float32)), r"box has shape \(4,\), not \(3, 4\)"),
    "boxes of integers": (saying(box=lambda n: np.zeros((n, 4), int)), "box is int64"),
    "one stop for all": (saying(stop=0), r"stop has shape \(\)"),
    "stop as a probability": (saying(stop=lambda n: np.full(n, 0.3)), r"stop is \[0.3, 0.3, 0.3\]"),
    "stop as a class": (saying(stop=lambda n: np.full(n, 2)), r"stop is \[2, 2, 2\]"),
    "one text for all": (saying(text="so"), "text has 2 entries for 3"),
    "texts that are numbers": (saying(text=lambda n: [1] * n), "text is"),
    "parse failures as texts": (saying(parse_failure=lambda n: ["no"] * n), "parse_failure is"),
    "a logit for a probability": (saying(stop_probability=lambda n: np.full(n, 3.5)), "stop_probability is .*3.5"),
    "confidence in percent": (saying(confidence=lambda n: np.full(n, 80.0)), "confidence is"),
    "paints on the image": (
        acting(lambda answer, seen: seen["image"].fill(0) or answer),
        "changed the observation 'image'",
    ),
    "unseeded": (Unseeded, "is a seed missing"),
    # As a network in training mode does, whose normalisation spans the batch.
    "looks at the batch": (
        acting(lambda answer, _: answer | {"box": np.clip(answer["box"] * answer["box"].mean() * 2, 0, 1)}),
        "played alone it acts otherwise than 3 at once",
    ),
    "looks at the inactive": (acting(by_the_inactive), "active=False"),
    "remembers": (Remembers, "remembers earlier episodes"),
    "resets all or none": (FullResetsOnly, "cannot reset some"),
}


@pytest.mark.parametrize("name", AGENTS)
def test_a_broken_agent_is_named_for_what_is_broken(name):
    broken, message = AGENTS[name]
    # Something is inactive only where episodes end at different times.
    agent = StopsByImage(broken) if name == "looks at the inactive" else broken
    with pytest.raises(AssertionError, match=message):
        check_agent(agent, canvas=48)


class StopsByImage:
    """Makes agents that stop at once in some images, so that some environments are over early."""

    def __init__(self, inner: type[Any]) -> None:
        self.inner = inner

    def __call__(self) -> Any:
        inner = self.inner()
        act = inner.act

        def stopping(observations: Any) -> dict[str, Any]:
            answer = act(observations)
            some = observations["image"].reshape(len(answer["box"]), -1).sum(1) % 3 == 0
            return answer | {"stop": np.where(some, 1, np.asarray(answer["stop"]).astype(int))}

        inner.act = stopping
        return inner


def test_right_agents_pass():
    check_agent(Right, canvas=48, view="both")
    check_agent(CentreAgent(), canvas=48, view="closeup")
    check_agent(lambda: StopAfter(RandomAgent(), 1), canvas=48, randomness="seeded")
    check_agent(Unseeded, canvas=48, randomness="free")


def test_an_agent_that_reads_the_target_is_found_out():
    with pytest.raises(AssertionError, match="decides by the target box"):
        check_agent(OracleAgent, canvas=48, pass_env=True, randomness="seeded")


def test_arguments_that_would_check_nothing_are_refused():
    for options, named in (
        ({"num_envs": 1}, "num_envs 1"),
        ({"episodes": 1}, "episodes 1"),
        ({"randomness": "some"}, "'some'"),
    ):
        with pytest.raises(ValueError, match=named):
            check_agent(Right, **options)
