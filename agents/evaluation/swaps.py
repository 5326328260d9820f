"""Overlay swaps: shows policies other boxes than their own, and tells whether they can tell.

    python -m ivt_agents.evaluation.swaps --policies base=tiny mine=runs/grpo/policy --split val --samples 300

At steps 1 and 2 of an episode (after the policy's own actions so far) the drawn box is replaced by the
target, another object of its class, a random or a moved box, none, or the image by a grey one. One
answer is taken for each. The definitions stand in ``ivt_env/metrics/swaps.py`` and ``docs/swaps.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import ArrayLike, NDArray

from ivt_agents.command import progress_bars, run_command
from ivt_agents.evaluation.evaluate import PlayedOptions, named, policy_spec
from ivt_agents.evaluation.plots import plot_swaps
from ivt_agents.play.by_name import load_agent
from ivt_agents.play.served import ANSWERS, Served
from ivt_agents.training.folder import RunError, check_least, made_by, write_json
from ivt_env import boxes
from ivt_env.data.sample import Dataset, ImageArray, Sample
from ivt_env.episodes import Box
from ivt_env.files import forget, lock_folder, write_lines, write_whole
from ivt_env.game import Game
from ivt_env.metrics.swaps import (
    BAD_BELOW,
    VARIANTS,
    Swap,
    dependence,
    dependence_table,
    summarise,
    swap_headline,
    swap_table,
)
from ivt_env.metrics.table import as_json
from ivt_env.rollouts import Agent, box_tuple, play, waves
from ivt_env.vector_env import GroundingVectorEnv

MOVED_IOU = (0.3, 0.8)
"""IoU of a moved box (``shifted``, ``near``) with the box that it was."""


class BlankImages:
    """A data set with every image uniformly grey; all else as it is."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self.name, self.split = dataset.name, dataset.split

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Sample:
        return self._dataset[index]

    def image(self, sample: Sample) -> ImageArray:
        """Grey, RGB uint8 (height, width, 3), of the size of the sample's image."""
        return np.full((*sample.size, 3), 128, dtype=np.uint8)


class _OwnPlay(NamedTuple):
    """Action by action: the current box after it, and whether the policy wanted to stop."""

    boxes: tuple[Box | None, ...]
    stopped: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class _Job:
    """One answer to be taken."""

    index: int
    own: _OwnPlay
    step: int
    variant: str
    box: Box | None


def play_swaps(
    env: GroundingVectorEnv,
    agent: Agent,
    indices: Sequence[int],
    seed: int = 0,
    *,
    variants: Sequence[str] = VARIANTS,
    steps: Sequence[int] = (1, 2),
    replay: bool = True,
    agent_name: str = "",
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Swap]:
    """Take an agent's answer to each drawn box.

    First the agent plays its own actions, up to the last step asked for. A wish to stop is noted and the
    box kept, as in a forced rollout. Then, for each step, variant and sample, one answer is taken to an
    observation of that step with the other box drawn.

    A sample gives no ``own``, ``shifted`` and ``blank`` where the agent has no box by then, and no
    ``sibling`` where it has none apart from the target (IoU below ``BAD_BELOW``). The boxes of ``target``,
    ``sibling``, ``random`` and ``near`` depend on seed, sample and step only: they are the same for every agent.

    ``env`` is made with ``autoreset_mode="Disabled"`` and the view that the agent needs; ``indices`` name each sample
    once. ``steps`` are numbers of own actions before the swap, each from 1 to ``env.max_steps - 1``; ``replay``: play
    them again before each answer, for an agent that remembers. ``on_progress`` gets how many answers have been taken,
    and of how many. The answers come by step, sample (as in ``indices``) and variant.
    """
    if not len(indices) or len(set(indices)) != len(indices):
        raise ValueError(f"indices: give each sample once, and at least one; these are {len(indices)}")
    if not variants or not set(variants) <= set(VARIANTS):
        raise ValueError(f"variants {list(variants)}: choose from {', '.join(VARIANTS)}")
    if not steps or not all(1 <= s < env.max_steps for s in steps):
        raise ValueError(
            f"steps {list(steps)}: an episode of at most {env.max_steps} actions has a drawn box to answer at steps "
            f"1 to {env.max_steps - 1}; give max_steps={max([*steps, 1]) + 1} or other steps"
        )
    env.reset(options={"index": [int(indices[0])] * env.num_envs})
    plays = _own_plays(env, agent, indices, max(steps))
    order = [v for v in VARIANTS if v in variants]
    jobs = [
        _Job(int(index), play, step, variant, box)
        for step in sorted(set(steps))
        for index, play in zip(indices, plays, strict=True)
        for variant in order
        for box in _boxes_of(variant, env.dataset[int(index)], play.boxes[step - 1], [seed, int(index), step])
    ]
    answers: dict[tuple[int, int, str], Swap] = {}
    screen = env.screen
    shown: dict[str, Any] = {"canvas": screen.side, "view": screen.view, "overlay": screen.overlay}
    shown |= {"closeup": screen.around, "max_steps": env.max_steps, "autoreset_mode": AutoresetMode.DISABLED}
    for blank in (False, True):
        stage = GroundingVectorEnv(env.num_envs, dataset=BlankImages(env.dataset) if blank else env.dataset, **shown)
        for step in sorted(set(steps)):
            # Answers about one sample side by side: its image is decoded, and a model's prompt computed, once.
            chosen = [j for j in jobs if j.step == step and (j.variant == "blank") == blank]
            for wave, active in waves(chosen, env.num_envs):
                for job, swap in _answers(env, stage, agent, wave, active, replay, agent_name):
                    answers[job.step, job.index, job.variant] = swap
                if on_progress is not None:
                    on_progress(len(answers), len(jobs))
        stage.close()
    return [answers[job.step, job.index, job.variant] for job in jobs]


def moved(box: ArrayLike, rng: np.random.Generator) -> NDArray[np.float64]:
    """A box (4,) moved and scaled by shares of its sides, with an IoU in ``MOVED_IOU`` with what it was.

    Each side's centre moves by up to 0.4 of its length and its length changes by up to a factor of 1.35; what
    would reach out of the image is cut off.
    """
    b = np.asarray(box, dtype=np.float64)
    centre, size = (b[:2] + b[2:]) / 2, b[2:] - b[:2]
    for _ in range(100):
        middle = centre + rng.uniform(-0.4, 0.4, 2) * size
        half = size * np.exp(rng.uniform(-0.3, 0.3, 2)) / 2
        found = boxes.clip(np.concatenate([middle - half, middle + half]))
        if MOVED_IOU[0] <= float(boxes.iou(found, b)) <= MOVED_IOU[1]:
            return found
    half = size * np.sqrt(0.5) / 2  # half the area, inside the old box: an IoU of 0.5 wherever the box lies
    return np.concatenate([centre - half, centre + half])


def elsewhere(target: ArrayLike, rng: np.random.Generator) -> NDArray[np.float64]:
    """A box (4,) anywhere, with sides of 0.05 to 0.5 of the image, that is not about the target (4,)."""
    while True:
        size = rng.uniform(0.05, 0.5, 2)
        low = rng.uniform(0, 1 - size)
        found = np.concatenate([low, low + size])
        if float(boxes.iou(found, target)) < BAD_BELOW:
            return found


def _boxes_of(variant: str, sample: Sample, own: Box | None, key: Sequence[int]) -> list[Box | None]:
    """The box to draw; nothing where the sample has not this variant."""
    # A stream of its own for each variant, so that leaving one out changes no other.
    rng = np.random.default_rng([*key, VARIANTS.index(variant)])
    target = boxes.visible_part(sample.box)
    if variant == "none":
        return [None]
    if variant == "target":
        return [target]
    if variant == "random":
        return [box_tuple(elsewhere(target, rng))]
    if variant == "sibling":
        apart = [boxes.visible_part(b) for b in sample.siblings if float(boxes.iou(b, sample.box)) < BAD_BELOW]
        return [apart[int(rng.integers(len(apart)))]] if apart else []
    known = target if variant == "near" else own
    if known is None:
        return []
    return [known if variant in ("own", "blank") else box_tuple(moved(known, rng))]


def _own_plays(env: GroundingVectorEnv, agent: Agent, indices: Sequence[int], actions: int) -> list[_OwnPlay]:
    """The agent's own first actions on each sample, a stop replaced by keeping the box."""
    plays = []
    for wave, active in waves(list(indices), env.num_envs):
        moments = islice(play(env, agent, options={"index": wave}, active=active, ignore_stop=True), actions)
        played = [([_held(game) for game in env.games], np.array(m.actions["stop"], dtype=bool)) for m in moments]
        held, wishes = zip(*played, strict=True)
        by_sample = zip(zip(*held, strict=True), zip(*wishes, strict=True), strict=True)
        plays += [_OwnPlay(*one) for one in islice(by_sample, int(active.sum()))]
    return plays


class _Given:
    """Makes given proposals first; then, or if it is asked all along, the agent answers."""

    def __init__(self, agent: Agent, given: Sequence[NDArray[np.float32]], ask: bool) -> None:
        self.agent, self.given, self.ask = agent, list(given), ask

    def act(self, observations: Mapping[str, Any]) -> Mapping[str, Any]:
        said = self.agent.act(observations) if self.ask or not self.given else {}
        if not self.given:
            return said
        return {"box": self.given.pop(0), "stop": np.zeros(len(observations["active"]), dtype=np.int64)}

    def reset(self, mask: NDArray[np.bool_]) -> None:
        if self.ask:
            self.agent.reset(mask)


def _answers(
    env: GroundingVectorEnv,
    stage: GroundingVectorEnv,
    agent: Agent,
    jobs: Sequence[_Job],
    active: NDArray[np.bool_],
    replay: bool,
    agent_name: str,
) -> Iterator[tuple[_Job, Swap]]:
    """One answer for each job of a wave; all have the same step."""
    step, options = jobs[0].step, {"index": [j.index for j in jobs]}
    # The agent's environment shows the same samples all along: an oracle looks there.
    own = _Given(agent, [_stack([j.own.boxes[t] for j in jobs]) for t in range(step)], ask=True)
    for _ in islice(play(env, own, options=options, active=active), step if replay else 0):
        pass
    # Refused proposals use up steps and draw nothing, so that the box appears at its step, or none does.
    drawn = [_stack([None] * len(jobs))] * (step - 1) + [_stack([j.box for j in jobs])]
    moments = play(stage, _Given(agent, drawn, ask=False), options=options, active=active)
    for _ in islice(moments, step):
        pass
    before = [(_held(game), game.iou) for game in stage.games]
    moment = next(moments)
    for i, job in enumerate(jobs[: int(active.sum())]):
        game, (box, iou) = stage.games[i], before[i]
        action = "refused" if moment.invalid[i] is not None else "propose"
        action = "stop" if moment.stops[i] else "unparsable" if moment.unparsable[i] else action
        swap = Swap(
            sample_id=game.sample.sample_id,
            image_id=game.sample.image_id,
            variant=job.variant,
            step=step,
            shown=box,
            shown_iou=iou,
            target=box_tuple(game.sample.box),
            action=action,
            new_box=_held(game),
            new_iou=game.iou,
            stop_probability=moment.said(i)["stop_probability"],
            reached=not any(job.own.stopped[:step]),
            agent=agent_name,
            dataset=game.sample.dataset,
            split=game.sample.split,
        )
        yield job, swap


def _stack(wanted: Sequence[Box | None]) -> NDArray[np.float32]:
    """Boxes (n, 4) to propose; NaN, which is refused, for none."""
    return np.array([[np.nan] * 4 if b is None else b for b in wanted], dtype=np.float32)


def _held(game: Game) -> Box | None:
    return None if game.box is None else box_tuple(game.box)


RESULTS = ("results.json", "table.txt", "swaps.png", "swaps")
"""What is written; swaps anew remove it in this order."""


@dataclass
class Args(PlayedOptions):
    """Show policies other boxes than their own."""

    policies: list[str] = field(default_factory=lambda: ["base=tiny"])
    """`name=policy`: a model folder, `tiny`, `openai:URL#MODEL`, a built-in agent, or `module:Class`."""
    samples: int = 300
    """Samples, from the beginning of the split; all of it if it has fewer."""
    steps: tuple[int, ...] = (1, 2)
    """Numbers of own actions after which the box is swapped."""
    out: Path = Path("runs/swaps")
    """Folder for the records, tables and plot."""


def main(args: Args) -> dict[str, list[Swap]]:
    """Play, score, write and print."""
    names = {name: policy_spec(text) for name, (text, *_) in named("policies", args.policies).items()}
    if len(names) != len(args.policies):
        raise ValueError(f"policies: every name must be given once, not {args.policies}")
    if odd := [name for name in names if Path(name).name != name]:
        raise ValueError(f"policies: {odd[0]!r} is also the name of a file, and so holds no folder; rename it")
    check_least(args, {"samples": 1, "num_envs": 1, "seed": 0})
    with lock_folder(args.out):
        if not args.overwrite and (args.out / RESULTS[0]).exists():
            raise RunError(f"{args.out} holds swaps: add --overwrite to lose them, or give another --out")
        served = Served(args, args.out / ANSWERS)
        with served.run(""):
            return _swap(args, names, served)


def _swap(args: Args, names: dict[str, str], served: Served) -> dict[str, list[Swap]]:
    indices, envs = args.stages()
    for spec in names.values():  # a server that is not there is found before anything is lost
        if "openai:" in spec:
            load_agent(spec, env=envs.of(None), seed=args.seed, served=served)
    for name in RESULTS:
        forget(args.out / name)
    played: dict[str, list[Swap]] = {}
    with progress_bars(note=True) as progress:
        for name, spec in names.items():
            agent = load_agent(spec, env=envs.of(None), seed=args.seed, served=served)
            env = envs.of(agent)
            task = progress.add_task(name, total=None, note="")
            served.usage.on_change = lambda task=task: progress.update(task, note=str(served.usage))  # type: ignore[misc]
            played[name] = play_swaps(
                env,
                agent,
                indices,
                args.seed,
                steps=args.steps,
                # Only a model that says that it answers from the observation alone is spared its own actions.
                replay=getattr(agent, "layout", "prefix") != "fresh",
                agent_name=name,
                on_progress=lambda done, total, task=task: progress.update(  # type: ignore[misc]
                    task, completed=done, total=total
                ),
            )
            write_lines(args.out / "swaps" / f"{name}.jsonl", map(asdict, played[name]))
    _write(args, played, names, len(indices))
    return played


def _write(args: Args, played: dict[str, list[Swap]], names: dict[str, str], count: int) -> None:
    scores = [row for name, swaps in played.items() for row in summarise(name, swaps, n_boot=1000, seed=args.seed)]
    depends = [row for name, swaps in played.items() for row in dependence(name, swaps, n_boot=1000, seed=args.seed)]
    one = next(iter(played.values()))[0]
    served = f"{one.dataset}/{one.split}"
    head = f"{args.env}, served: {served}, {count} samples, one answer each; 95 % intervals over images"
    asked = "does the answer depend on how good the drawn box is?"
    text = "\n\n".join([head, swap_table(scores), asked, dependence_table(depends)])
    write_whole(args.out / "table.txt", text + "\n")
    plot_swaps(scores, played, args.out / "swaps.png")
    results = {"args": asdict(args), **made_by(), "policies": names, "served": served}
    write_json(args.out / "results.json", results | {"variants": as_json(scores), "dependence": as_json(depends)})
    print(f"{args.env}, served: {served}, n = {count}\n\n{swap_headline(depends)}\n")
    print(f"every table, figure and answer: {args.out} (in a report: ivt report FOLDER --swaps {args.out})")


if __name__ == "__main__":
    run_command(main, Args)
