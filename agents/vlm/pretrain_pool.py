"""What the tiny model is pretrained on: whole scenes and close-ups of them, drawn in processes beside the training.

An image is kept as the model takes it in, 96 pixels a side, with the labels of its cells and with questions that are
token ids already. Everything is a function of the index of a scene, never of how fast it was drawn.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ivt_agents.vlm.codec import WHOLE, Box
from ivt_env import boxes
from ivt_env.data.scenes import Scene, make_scene
from ivt_env.data.scenes.language import Expression
from ivt_env.data.scenes.world import COLOURS, MARKS, SHAPES, TEXTURES, Thing
from ivt_env.failures import end_with_parent

INPUT_SIDE = 96
"""A square image reaches the model as 96 x 96 pixels: 36 merged tokens."""
CELLS = INPUT_SIDE // 16
LABELS = 9
"""Of a cell: presence, shape, colour, texture, box (4), mark (-1: none that can be read)."""
QUESTIONS = 8
"""Kept for each image."""
SLOT = 40
"""Tokens of a question with its answer, padded at its end."""
ANSWER = 10
"""Tokens of an answer, end of turn included; four of them are numbers."""
NUMBERS = (1, 3, 5, 7)
"""Where the numbers stand in an answer."""

KINDS = ("whole", "crop", "search whole", "search one", "search pair")
"""Images of a scene: all of it; of an object and its surroundings; of two objects."""
SEARCH_FROM = 2
"""Kinds from this one on are of search scenes."""
MARK_SIDES = (12, 14, 16, 20, 24, 32)
"""Of the search scenes that are drawn, in pixels of 768."""
LEGIBLE = 4.5
"""Smallest side of a mark, in pixels of the 96, that a cell is asked to read."""
_VISIBLE = 0.6
"""Share of an object's box that a window must hold for questions about it."""
CHUNK = 20
"""Scenes that a process draws at a time."""


@dataclass(frozen=True)
class Words:
    """Token ids of the question and its answer, taken apart: a process that draws needs no tokenizer."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    """Behind the expression, up to where the answer begins."""
    of: dict[str, int]
    """Of the words of expressions, with the space before them."""
    answer: tuple[int, ...]
    """With zeros where the numbers stand."""
    numbers: tuple[int, ...]
    """Of 0..1000."""
    in_closeup: int
    """The first token of an answer in the frame of the second image."""
    describe: tuple[int, ...]
    """The question that asks for a description, up to where it begins."""
    pieces: dict[str, tuple[int, ...]]
    """Of "A", "An" and "."."""

    def slot(self, expression: str, box: Sequence[float]) -> tuple[list[int], int]:
        """Ids of a question and its answer, and how many belong to the question."""
        asked = [*self.before, *(self.of[word] for word in expression.split()), *self.after]
        answer = list(self.answer)
        for place, value in zip(NUMBERS, np.round(np.asarray(box) * 1000).tolist(), strict=True):
            answer[place] = self.numbers[int(value)]
        return asked + answer, len(asked)

    def description(self, looks: str) -> list[int]:
        """Ids of what the second image shows, end of turn included."""
        article = self.pieces["An" if looks[0] in "aeiou" else "A"]
        return [*article, *(self.of[word] for word in looks.split()), *self.pieces["."], self.answer[-1]]


@dataclass
class Pool:
    """Images with their labels and questions; rows of one kind lie together."""

    images: NDArray[np.uint8]
    """(N, 96, 96, 3)"""
    cells: NDArray[np.float32]
    """(N, 36, 9)"""
    slots: NDArray[np.int16]
    """(N, 8, SLOT) token ids"""
    lengths: NDArray[np.int16]
    """(N, 8): tokens of each question without its answer; 0: no such question"""
    descriptions: NDArray[np.int16]
    """(N, ANSWER) token ids of what a close-up shows, padded with 0; all 0: nothing to say"""
    scenes: tuple[int, int]
    """Standard scenes and search scenes when all are drawn."""
    drawn: list[int]
    """Of both, how many are there already."""

    def row(self, kind: int, scene: int) -> int:
        """Where the image of a scene lies."""
        return int(self._starts()[kind]) + scene

    def _starts(self) -> NDArray[np.int64]:
        """The first row of each kind."""
        standard, search = self.scenes
        return np.cumsum([0, standard, standard, search, search])

    def sample(self, rng: np.random.Generator, count: int, shares: Sequence[float]) -> NDArray[np.int64]:
        """Rows of ``count`` images, of each kind a share."""
        kinds = rng.choice(len(KINDS), count, p=shares)
        drawn = np.array([self.drawn[kind >= SEARCH_FROM] for kind in range(len(KINDS))])
        return self._starts()[kinds] + rng.integers(0, drawn[kinds])

    def sample_pairs(self, rng: np.random.Generator, count: int, search: float) -> NDArray[np.int64]:
        """Rows of ``count`` scenes and of a close-up of each, (count, 2); a share of them are search scenes."""
        searched = rng.random(count) < search
        closeup = np.where(searched, SEARCH_FROM + 1 + rng.integers(0, 2, count), 1)
        whole = np.where(searched, SEARCH_FROM, 0)
        scene = rng.integers(0, np.array(self.drawn)[searched.astype(int)])
        starts = self._starts()
        return np.stack([starts[whole] + scene, starts[closeup] + scene], 1)

    def choose(self, rng: np.random.Generator, rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        """For each row ``count`` different questions at random, those that there are first; (rows, count)."""
        order = rng.random((len(rows), QUESTIONS)) + (self.lengths[rows] == 0)
        return np.argsort(order, axis=1)[:, :count]


def empty_pool(standard: int, search: int, folder: str) -> Pool:
    """Room for all images of so many scenes in files of ``folder`` (``OSError``), which processes share."""
    n = 2 * standard + 3 * search
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "images": ((n, INPUT_SIDE, INPUT_SIDE, 3), np.uint8),
        "cells": ((n, CELLS * CELLS, LABELS), np.float32),
        "slots": ((n, QUESTIONS, SLOT), np.int16),
        "lengths": ((n, QUESTIONS), np.int16),
        "descriptions": ((n, ANSWER), np.int16),
    }
    maps: dict[str, Any] = {}
    try:
        for name, (shape, kind) in shapes.items():
            maps[name] = np.memmap(Path(folder) / name, kind, "w+", shape=shape)  # type: ignore[call-overload]
            if hasattr(os, "posix_fallocate"):
                # All of it now: where a disk is full, writing to a mapped file ends the process by a signal.
                with open(Path(folder) / name, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, maps[name].nbytes)
    except OSError as error:
        size = sum(math.prod(shape) * np.dtype(kind).itemsize for shape, kind in shapes.values())
        told = (
            f"{error.strerror}: the images of {standard + search:,} scenes take {size / 1e9:.2f} GB; TMPDIR says where"
        )
        raise OSError(error.errno, told, folder) from error
    return Pool(**maps, scenes=(standard, search), drawn=[0, 0])


class Drawing:
    """A pool that fills while one trains. Use as a context: at its end the processes go."""

    def __init__(
        self, words: Words, standard: int, search: int, workers: int, first: int = 0, split: str = "train"
    ) -> None:
        """Start drawing scenes ``first``, ``first + 1``, ... of ``split`` and of its search scenes."""
        # The files lose their names at once, so that nothing is left of them however this ends.
        with tempfile.TemporaryDirectory(prefix="ivt-pool-") as folder:
            self.pool = empty_pool(standard, search, folder)
        # fork: a worker has the pool, and is at work at once, without importing what trains.
        context = multiprocessing.get_context("fork")
        self._end = context.Event()
        self._workers = ProcessPoolExecutor(workers, context, _begin, (words, self.pool, first, split, self._end))
        self._done = self._workers.map(_fill, *zip(*_jobs(standard, search), strict=True))

    def __enter__(self) -> Drawing:
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes, each with the scene that it is at."""
        self._end.set()
        self._workers.shutdown(cancel_futures=True)

    def until(self, share: float) -> None:
        """Wait until this share of both kinds of scenes is drawn; ChildProcessError where a process was killed."""
        pool = self.pool
        while any(d < math.ceil(min(share, 1.0) * n) for d, n in zip(pool.drawn, pool.scenes, strict=True)):
            try:
                search, upto = next(self._done)
            except BrokenProcessPool:
                told = "a process that draws scenes was killed; where memory is short, give fewer --workers or --scenes"
                raise ChildProcessError(told) from None
            pool.drawn[search] = upto


def _jobs(standard: int, search: int) -> Iterator[tuple[int, int, int]]:
    """(search?, first scene, behind the last): both kinds in step, so that any share of them is drawn together."""
    parts = max(math.ceil(standard / CHUNK), math.ceil(search / CHUNK))
    for part in range(parts):
        for kind, total in enumerate((standard, search)):
            low, high = total * part // parts, total * (part + 1) // parts
            if high > low:
                yield kind, low, high


_shared: list[Any] = []


def _begin(words: Words, pool: Pool, first: int, split: str, end: Event) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, which reaches all: the one that trains ends these
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()
    _shared[:] = [words, pool, first, split, end]


def _fill(search: int, low: int, high: int) -> tuple[int, int]:
    """Draw scenes ``low`` to ``high`` into the pool's rows."""
    words, pool, first, split, end = _shared
    for number in range(low, high):
        if end.is_set():  # nobody waits for these
            break
        views = search_views(split, first + number) if search else standard_views(split, first + number)
        for kind, view in enumerate(views, SEARCH_FROM if search else 0):
            view.write(pool, pool.row(kind, number), words)
    return search, high


@dataclass(frozen=True)
class View:
    """A square window of a scene, as the model would see it, and what can be asked about it."""

    scene: Scene
    image: NDArray[np.uint8]
    """(96, 96, 3)"""
    window: Box
    questions: list[Expression]
    about: Thing | None = None
    """The object that a close-up is of."""

    def write(self, pool: Pool, row: int, words: Words) -> None:
        """Into a row of the pool."""
        pool.images[row] = self.image
        pool.cells[row] = cell_labels(self.scene.things, self.window)
        asked = [e for e in self.questions if shown(self.scene.things[e.target], self.window) >= _VISIBLE]
        for number, question in enumerate(asked[:QUESTIONS]):
            box = boxes.clip(boxes.into_window(self.scene.things[question.target].box, self.window))
            ids, length = words.slot(question.text, box.tolist())
            pool.slots[row, number, : len(ids)] = ids
            pool.lengths[row, number] = length
        if self.about is not None:
            described = words.description(self.about.looks)
            pool.descriptions[row, : len(described)] = described


def standard_views(split: str, index: int) -> list[View]:
    """A whole scene, and a close-up around one of its objects."""
    scene, rng = make_scene(split, index), np.random.default_rng((77, index))
    full = Image.fromarray(scene.image())
    asked = scene.questions(QUESTIONS)
    # The close-up is around an object that is asked about, or there would be nothing to ask.
    target = scene.things[asked[int(rng.integers(len(asked)))].target]
    window = _around(target.box, rng, (1.2, 3.5), smallest=0.1)
    return [_view(scene, full, WHOLE, asked), _view(scene, full, window, asked, target)]


def search_views(split: str, index: int) -> list[View]:
    """A whole search scene, a close-up of one object, and one of two."""
    rng = np.random.default_rng((78, index))
    scene = make_scene(f"{split}_search_{MARK_SIDES[index % len(MARK_SIDES)]}", index)
    full = Image.fromarray(scene.image())
    asked = scene.questions(len(scene.things) + 2)
    one = scene.things[int(rng.integers(len(scene.things)))]
    near = min((t for t in scene.things if t is not one), key=lambda t: math.dist(t.centre, one.centre))
    both = np.array([one.box, near.box])
    pair = (*both[:, :2].min(0).tolist(), *both[:, 2:].max(0).tolist())
    closeup, of_both = _around(one.box, rng, (1.1, 2.8), smallest=0.1), _around(pair, rng, (1.05, 1.5), smallest=0.2)
    windows = ((WHOLE, None), (closeup, one), (of_both, None))
    return [_view(scene, full, window, asked, about) for window, about in windows]


def _view(scene: Scene, full: Image.Image, window: Box, asked: list[Expression], about: Thing | None = None) -> View:
    """The window, cut at whole pixels."""
    side = scene.side
    x1, y1 = round(window[0] * side), round(window[1] * side)
    size = min(max(8, round((window[2] - window[0]) * side)), side - max(x1, y1))
    cut = full.crop((x1, y1, x1 + size, y1 + size)).resize((INPUT_SIDE, INPUT_SIDE), Image.Resampling.BICUBIC)
    return View(scene, np.asarray(cut), (x1 / side, y1 / side, (x1 + size) / side, (y1 + size) / side), asked, about)


def _around(box: Sequence[float], rng: np.random.Generator, factor: tuple[float, float], smallest: float) -> Box:
    """A square window around a box, ``factor`` times as large, not centred; the box may stick out a little."""
    longest = max(box[2] - box[0], box[3] - box[1])
    size = min(max(longest * math.exp(rng.uniform(*np.log(factor))), smallest), 1.0)
    slack = max(size - longest, 0.15 * longest)
    centre = (np.array(box[:2]) + np.array(box[2:])) / 2 + rng.uniform(-0.5, 0.5, 2) * slack
    low = np.clip(centre - size / 2, 0, 1 - size)
    return (float(low[0]), float(low[1]), float(low[0] + size), float(low[1] + size))


def shown(thing: Thing, window: Box) -> float:
    """Share of the thing's box that lies in a window."""
    x1, y1, x2, y2 = thing.box
    width, height = min(x2, window[2]) - max(x1, window[0]), min(y2, window[3]) - max(y1, window[1])
    return max(width, 0.0) * max(height, 0.0) / ((x2 - x1) * (y2 - y1))


def cell_labels(things: Sequence[Thing], window: Box = WHOLE) -> NDArray[np.float32]:
    """What each merged token should know, (36, 9).

    A cell speaks for the object that covers most of it or, before that, for a small object that
    lies mostly inside it, which would otherwise have no cell at all. A mark is a label of the cells that it lies in
    alone: a cell that does not see it cannot learn to name it.
    """
    labels = np.zeros((CELLS * CELLS, LABELS), dtype=np.float32)
    labels[:, 8] = -1
    best = np.zeros(CELLS * CELLS)
    for thing in things:
        box = boxes.clip(boxes.into_window(thing.box, window)).tolist()
        if shown(thing, window) < 0.3:
            continue
        for cell, shared in _cells_of(box):
            score = shared + shared / ((box[2] - box[0]) * (box[3] - box[1]) * CELLS**2)
            if score > max(best[cell], 0.3):
                best[cell] = score
                kinds = (SHAPES.index(thing.shape), COLOURS.index(thing.colour), TEXTURES.index(thing.texture))
                labels[cell, :8] = (1, *kinds, *box)
        if thing.mark is not None:
            inside = boxes.into_window(np.array(thing.mark.box_px) / thing.image_side, window)
            side = float(inside[2] - inside[0])
            if side * INPUT_SIDE >= LEGIBLE and (inside >= 0).all() and (inside <= 1).all():
                for cell, shared in _cells_of(inside.tolist()):
                    if shared >= 0.2 * (side * CELLS) ** 2 or shared >= 0.5:
                        labels[cell, 8] = MARKS.index(thing.mark.kind)
    return labels


def _cells_of(box: Sequence[float]) -> Iterator[tuple[int, float]]:
    """The cells that a box touches, and how much of each it covers."""
    x1, y1, x2, y2 = (v * CELLS for v in box)
    for row in range(int(y1), min(CELLS, math.ceil(y2))):
        for column in range(int(x1), min(CELLS, math.ceil(x2))):
            shared = (min(x2, column + 1) - max(x1, column)) * (min(y2, row + 1) - max(y1, row))
            yield row * CELLS + column, shared
