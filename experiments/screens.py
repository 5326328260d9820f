"""What a second look is worth on real screens: ``ocr`` on IVT-Screens-v0, in the loop and in one look at more pixels.

    python -m experiments.screens --out runs/screens            # every page of the test split, five expressions each
    python -m experiments.screens --per-page 1000               # all of it: hours

One look at the environment's canvas, at 2, 4 and 8 times the pixels, and at as many pixels as the loop reads on the
page in all; then the loop. Reading is by far the dearest part, so what was measured of a page is kept, and the command
goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ivt_agents.play.by_name import load_agent
from ivt_agents.play.on_split import play
from ivt_agents.play.scripted import StopAfter
from ivt_env import boxes
from ivt_env.data import load_dataset
from ivt_env.episodes import Episode
from ivt_env.files import write_whole
from ivt_env.metrics.statistics import paired_bootstrap
from ivt_env.rendering import Surroundings, size_on_canvas

CANVAS = 640
TIMES = (1, 2, 4, 8)
LOOKS = 5
SAME = "as many pixels as the loop"
LOOP = "the loop"


@dataclass(frozen=True)
class Answer:
    """What one way of looking came to on one sample."""

    way: str
    sample: str
    page: str
    noun: str
    pixels: int
    """Read in all."""
    hit: bool
    iou: float
    covered: bool
    """The first close-up shows the middle of the target."""
    any_covered: bool
    """Some close-up does."""
    looks: int


SCORES: dict[str, Callable[[Answer], bool]] = {"hit": lambda e: e.hit, "Acc@0.5": lambda e: e.iou >= 0.5}


def measure(page: str, numbers: list[int], folder: Path) -> Path:
    """All ways of looking at the samples ``numbers`` of one page; the file of their answers."""
    path = folder / f"{page}.json"
    if path.is_file() and json.loads(path.read_text())["numbers"] == numbers:
        return path
    nouns = {(sample := _dataset()[n]).sample_id: sample.meta["category"] for n in numbers}
    looped = _play(numbers, CANVAS, single=False)
    answers = [_answer(LOOP, e, nouns, CANVAS) for e in looped]
    mean = float(np.mean([each.pixels for each in answers]))
    height, width = looped[0].size
    # On a canvas of side S an image of this shape has S * S * shorter / longer pixels.
    same = round(math.sqrt(mean * max(height, width) / min(height, width)))
    ways = {way(times): round(CANVAS * math.sqrt(times)) for times in TIMES} | {SAME: same}
    for name, canvas in ways.items():
        answers += [_answer(name, e, nouns, canvas) for e in _play(numbers, canvas, single=True)]
    write_whole(path, json.dumps({"numbers": numbers, "answers": [asdict(each) for each in answers]}))
    return path


def way(times: int) -> str:
    """One look at so many times the pixels of the canvas, in words."""
    return "one look" if times == 1 else f"one look, {times} x the pixels"


@cache
def _dataset() -> Any:
    return load_dataset("screens", "test")


@cache
def _agent() -> Any:
    """One reader, and one memory of what it read."""
    return load_agent("ocr")


def _play(numbers: list[int], canvas: int, single: bool) -> list[Episode]:
    _agent().looks = 0 if single else LOOKS
    agent = StopAfter(_agent(), 1) if single else _agent()
    options: dict[str, Any] = {"canvas": canvas, "max_steps": LOOKS + 2, "view": "closeup", "closeup": {"square": True}}
    return play(agent, "IVT-Screens-v0", "test", numbers, num_envs=4, **options)


def _answer(name: str, episode: Episode, nouns: dict[str, str], canvas: int) -> Answer:
    target, last = np.array(episode.target), episode.steps[-1]
    middle = (target[:2] + target[2:]) / 2
    around = Surroundings(square=True)
    windows = [around.window(step.box, episode.size) for step in episode.steps if step.box and not step.stop]
    covered = [bool((w[:2] <= middle).all() and (middle <= w[2:]).all()) for w in windows]
    height, width = size_on_canvas(episode.size, canvas)
    read = 1 if name != LOOP else len(episode.steps)
    return Answer(
        way=name, sample=episode.sample_id, page=episode.image_id, noun=nouns[episode.sample_id],
        pixels=height * width + (read - 1) * canvas * canvas,
        hit=bool(boxes.hit(last.box, target)) if last.box else False, iou=last.iou,
        covered=covered[0] if covered else False, any_covered=any(covered), looks=read,
    )  # fmt: skip


def report(answers: list[Answer]) -> str:
    """The tables, as Markdown."""
    by_way: dict[str, list[Answer]] = defaultdict(list)
    for each in answers:
        by_way[each.way].append(each)
    loop = by_way[LOOP]
    pages = [each.page for each in loop]
    lines = [
        f"n = {len(loop)} expressions on {len(set(pages))} pages; differences: the loop minus this way, 95 % bootstrap "
        "over pages.", "", "| way | megapixels read | hit | Acc@0.5 | loop minus this: hit | Acc@0.5 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for name in (*map(way, TIMES), SAME, LOOP):
        shares, differences = [], []
        for of in SCORES.values():
            ours, theirs = ([float(of(e)) for e in by_way[of_way]] for of_way in (LOOP, name))
            shares.append(f"{100 * np.mean(theirs):.1f}")
            d = paired_bootstrap(ours, theirs, pages)
            differences.append("" if name == LOOP else f"{100 * d.diff:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]")
        megapixels = np.mean([e.pixels for e in by_way[name]]) / 1e6
        lines.append(f"| {' | '.join([name, f'{megapixels:.2f}', *shares, *differences])} |")
    before = {e.sample: e.hit for e in by_way[way(1)]}
    wrong, right_first = [e for e in loop if not before[e.sample]], [e for e in loop if before[e.sample]]
    covered = [e for e in wrong if e.covered]
    later = [e for e in wrong if e.any_covered]

    def share(part: list[Answer], whole: list[Answer]) -> str:
        return f"{len(part)} of {len(whole)} ({100 * len(part) / max(len(whole), 1):.1f} %)"

    lines += [
        "", "| the loop against one look at its canvas, by hit | |", "| --- | --- |",
        f"| wrong in one look, corrected | {share([e for e in wrong if e.hit], wrong)} |",
        f"| right in one look, regressed | {share([e for e in right_first if not e.hit], right_first)} |",
        f"| coverage: wrong, and the first close-up shows the target | {share(covered, wrong)} |",
        f"| corrected there | {share([e for e in covered if e.hit], covered)} |",
        f"| wrong, and some close-up shows the target | {share(later, wrong)} |",
        f"| corrected there | {share([e for e in later if e.hit], later)} |",
        f"| looks an episode | {np.mean([e.looks for e in loop]):.2f} |",
        "", f"| element | n | {' | '.join((way(1), way(8), LOOP))} |", "| --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for noun, count in Counter(e.noun for e in loop).most_common():
        cells = [f"{100 * np.mean([e.hit for e in by_way[w] if e.noun == noun]):.1f}" for w in (way(1), way(8), LOOP)]
        lines.append(f"| {noun} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(answers: list[Answer], path: Path) -> None:
    """Hit and Acc@0.5 against the pixels that were read."""
    from ivt_agents.evaluation.plots import plt, save_figure

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, (title, right) in zip(axes, SCORES.items(), strict=True):
        points = {}
        for name in (*map(way, TIMES), SAME, LOOP):
            held = [e for e in answers if e.way == name]
            points[name] = np.mean([e.pixels for e in held]) / 1e6, 100 * np.mean([right(e) for e in held])
        single = sorted(points[name] for name in points if name != LOOP)
        axis.plot(*zip(*single, strict=True), "o-", color="#444444", label="one look")
        axis.plot(*points[LOOP], "*", color="#c03030", markersize=14, label="the loop on a canvas of 640")
        axis.set_xscale("log", base=2)
        axis.set(title=title, xlabel="megapixels read")
        axis.set_xticks([0.25, 0.5, 1, 2], ["0.25", "0.5", "1", "2"])
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="%", ylim=(0, 100))
    axes[0].legend()
    figure.tight_layout()
    figure.set_dpi(110)
    save_figure(figure, path)


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description="ocr on IVT-Screens-v0: the loop, and one look at more pixels.")
    parser.add_argument("--out", type=Path, default=Path("runs/screens"), help="default: %(default)s")
    parser.add_argument("--pages", type=int, help="the first so many of the test split, in an order drawn once")
    parser.add_argument("--per-page", type=int, default=5, help="expressions of a page (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each (default: %(default)s)")
    args = parser.parse_args()
    numbers: dict[str, list[int]] = defaultdict(list)
    for number, page in enumerate(_dataset().image_ids()):
        numbers[page].append(number)
    pages = random.Random(0).sample(sorted(numbers), len(numbers))[: args.pages]
    counts = [min(args.per_page, len(numbers[page])) for page in pages]
    drawn = [sorted(random.Random(p).sample(numbers[p], count)) for p, count in zip(pages, counts, strict=True)]
    with ProcessPoolExecutor(args.workers) as pool:
        answers: list[Answer] = []
        for path in pool.map(measure, pages, drawn, [args.out / "pages"] * len(pages)):
            answers += [Answer(**each) for each in json.loads(path.read_text())["answers"]]
            print(f"{path.stem} done", flush=True)
    text = report(answers)
    write_whole(args.out / "report.md", text)
    plot(answers, args.out / "screens.png")
    print(f"\n{text}\n{args.out}/report.md, {args.out}/screens.png")


if __name__ == "__main__":
    main()
