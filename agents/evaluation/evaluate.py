"""Plays policies on one split, or reads saved episodes, and puts their scores side by side.

    ivt evaluate --policies base=tiny sft=runs/sft/policy grpo=runs/grpo/policy
    ivt evaluate --policies floor=random ceiling=my_module:MyAgent --samples 200
    ivt evaluate --policies base=tiny loop=runs/s0/policy loop=runs/s1/policy loop=runs/s2/policy
    ivt evaluate --policies vlm='openai:http://127.0.0.1:8000/v1#MODEL' --prompt-file qwen3-vl
    ivt evaluate --episodes base=runs/evaluation/episodes/base loop=runs/other/episodes/loop

Each policy is played twice on the same samples: with its stop honoured, and forced to make every refinement
(``--no-forced`` leaves this out). In the second rollout a greedy policy without a conversation is asked only for what
comes after its stop: until then both are the same. A name that is given several times is one policy of several seeds.

``docs/methods.md`` explains every figure; ``ivt_env.metrics.audit`` gives them from saved episodes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from ivt_agents.command import progress_bars
from ivt_agents.evaluation import plots
from ivt_agents.evaluation.report import PLOTS, episode_folders, last_screen, write_report
from ivt_agents.play.by_name import load_agent
from ivt_agents.play.cost import Metered
from ivt_agents.play.on_split import Stages, check_episodes, samples_to_compare
from ivt_agents.play.scripted import Continued
from ivt_agents.play.served import ANSWERS, PROMPTS, FrameCheck, Served, ServedOptions, served_by
from ivt_agents.play.served import MAY_CHANGE as SERVED_MAY_CHANGE
from ivt_agents.training.folder import (
    CONFIG,
    check_least,
    check_new,
    check_resume,
    forget_run,
    made_by,
    recorded_options,
    write_json,
)
from ivt_agents.vlm.prompts import TINY_NAME
from ivt_env.episodes import Episode, load_episodes, save_episodes
from ivt_env.failures import read_json
from ivt_env.files import asked_of, forget, lock_folder, whole_folder, write_lines, write_whole
from ivt_env.metrics import table
from ivt_env.metrics.audit import Audit, Run, audit_runs, behaviour_lines
from ivt_env.metrics.breakdown import group_table
from ivt_env.metrics.columns import check_same_samples, outcomes
from ivt_env.metrics.scores import HEADLINE_METRICS, METRICS
from ivt_env.metrics.stopping import confidence_calibration, stop_calibration
from ivt_env.rollouts import make_vector_env, rollout
from ivt_env.vector_env import GroundingVectorEnv
from ivt_env.viewer import write_page
from ivt_env.viewer.images import ImageFinder

MAY_CHANGE = SERVED_MAY_CHANGE | {"out", "config", "resume", "overwrite", "runs", "page_episodes"}
"""Options that may change on `--resume`, because the episodes do not depend on them."""
PREDICTIONS = "predictions"
"""Folder of a JSON line per sample, for each policy."""
_PLAYED = ("episodes", ANSWERS, PROMPTS)
"""Episodes and completions that are on disk already; `--resume` continues from them."""
RESULTS = ("results.json", "table.txt", "report.html", "episodes.html", *PLOTS, PREDICTIONS, *_PLAYED)
"""What an evaluation writes. A new evaluation removes these in this order."""
RESAMPLES = 1000
COST = "cost.json"
"""What an episode cost, beside the episodes."""


@dataclass
class PlayedOptions(ServedOptions):
    """What several policies are played on."""

    env: str = "IVT-Scenes-v0"
    """Registered id."""
    split: str = "test"
    """Split to play."""
    data_root: str | None = None
    """Folder of real data sets."""
    samples: int = 1000
    """Samples, from the beginning of the split; all of it if it has fewer."""
    episode_steps: int = 3
    """Actions in an episode."""
    view: Literal["overlay", "closeup", "both"] | None = None
    """What a box is shown on, for every policy. None: what each was trained for (`overlay` where it does not say)."""
    overwrite: bool = False
    """Start over even if `out` already holds results; the old results are deleted."""
    num_envs: int = 100
    """Episodes played side by side."""
    seed: int = 0
    """Seed of what is sampled, and of the bootstrap intervals."""

    def stages(self) -> tuple[range, Stages]:
        """The numbers of the samples to play, and the environments."""
        # Named real data must be there: what is measured never falls back.
        kwargs: dict[str, Any] = {"data_root": self.data_root, "strict": True}
        kwargs |= {"split": self.split, "max_steps": self.episode_steps}
        indices = samples_to_compare(make_vector_env(self.env, 1, **kwargs).dataset, self.samples)
        count = min(self.num_envs, len(indices))
        return indices, Stages(lambda **seen: make_vector_env(self.env, count, **seen, **kwargs), self.view)


@dataclass
class Args(PlayedOptions):
    """Compare several policies on the same samples."""

    config: Path | None = None
    """YAML file whose part `evaluate` gives defaults; flags override it."""
    policies: list[str] = field(default_factory=list)
    """`name=policy`: a model folder, `tiny`, `openai:URL#MODEL`, a built-in agent, or `module:Class`. The first is
    the base; a name given again is another seed of that policy. None given: `base=tiny`."""
    episodes: list[str] = field(default_factory=list)
    """`name=folder`: score the saved episodes of that folder, and of `folder-forced` where it is there, instead
    of playing. A name given again is another seed."""
    forced: bool = True
    """Also play every policy with its stop ignored. The columns that need all steps come from this second pass."""
    out: Path = Path("runs/evaluation")
    """Folder for the tables, episodes, plots and the page."""
    resume: bool = False
    """Continue the interrupted evaluation in `out`: policies that were played to the end are not played again."""
    runs: list[Path] = field(default_factory=list)
    """Run folders whose training curves are plotted too."""
    page_episodes: int = 200
    """Episodes of each policy on the page."""
    json: bool = False
    """Print what `results.json` holds and nothing else; the verdict goes to standard error."""


@dataclass
class Played:
    """One policy's episodes, seed by seed, and what came of them."""

    runs: list[Run]
    audit: Audit

    @property
    def stopping(self) -> list[Episode]:
        """The stopping episodes of all seeds, one seed after the other."""
        return [e for run in self.runs for e in run.episodes]

    @property
    def forced(self) -> list[Episode]:
        """The forced episodes of all seeds; empty where none were played."""
        return [e for run in self.runs for e in run.forced or ()]


def main(args: Args) -> dict[str, Played]:
    """Play or load, score, write and print."""
    check_least(args, {"samples": 1, "num_envs": 1, "page_episodes": 0, "seed": 0})
    if args.policies and args.episodes:
        raise ValueError("policies and episodes: give one of them; play first, then score all that is saved")
    with lock_folder(args.out):
        if args.resume:
            check_resume(recorded_options(args.out), asdict(args), args.out, MAY_CHANGE)
        elif not args.overwrite:  # episodes that are scored may lie in this folder
            check_new(args.out, RESULTS[:1] if args.episodes else RESULTS)
        return _evaluate(args)


def _begin(args: Args) -> None:
    """Remove an earlier evaluation's results, once it is certain that this one can be made."""
    if args.resume or args.episodes:  # the episodes stay, and so does what they were played for until it is replaced
        for name in RESULTS[: -len(_PLAYED)]:
            forget(args.out / name)
    else:
        forget_run(args.out, RESULTS)
    write_json(args.out / CONFIG, asdict(args))


def _evaluate(args: Args) -> dict[str, Played]:
    costs: dict[str, list[dict[str, float]]] = {}
    if args.episodes:
        sources = named("episodes", args.episodes)
        runs: dict[str, list[Run]] = {name: [] for name in sources}
        for name, folders in sources.items():
            for folder in folders:
                forced = Path(f"{folder.rstrip('/')}-forced")
                runs[name].append(Run(load_episodes(folder), load_episodes(forced) if forced.exists() else None))
    else:
        sources = named("policies", args.policies or ["base=tiny"])
        served = Served(args, args.out / ANSWERS)
        with served.run(f", finished episodes in {args.out / 'episodes'}", "--resume"):
            runs, costs = _play(args, sources, served)
    base_name, base = next(iter(runs.items()))
    played: dict[str, Played] = {}
    for name, of_policy in runs.items():
        check_same_samples(base[0].episodes, of_policy[0].episodes, base_name, name)
        played[name] = Played(of_policy, audit_runs(of_policy, name=name, n_boot=RESAMPLES, seed=args.seed))
    if args.episodes or args.resume:
        _begin(args)
    _write(args, played, sources, costs)
    return played


def named(option: str, texts: Sequence[str]) -> dict[str, list[str]]:
    """What stands for each name, in order: several entries are seeds."""
    found: dict[str, list[str]] = {}
    examples = {"policies": "name=policy, for example base=tiny"}
    examples["episodes"] = "name=folder, for example base=runs/evaluation/episodes/base"
    for text in texts:
        name, _, value = text.partition("=")
        if not name or not value:
            raise ValueError(f"{option}: write {examples[option]}, not {text!r}")
        if value in found.setdefault(name, []):
            raise ValueError(f"{option}: {text!r} must be given once; a name that is given again is another seed")
        found[name].append(value)
    return found


def _folders(names: Mapping[str, Sequence[str]]) -> dict[tuple[str, int], str]:
    """Folder of the episodes of each name and seed; ValueError for two that would share one."""
    found = {
        (name, number): name if len(seeds) == 1 else f"{name}-seed{number}"
        for name, seeds in names.items()
        for number in range(len(seeds))
    }
    taken = [*found.values(), *(f"{folder}-forced" for folder in found.values())]
    if twice := [folder for folder in taken if taken.count(folder) > 1]:
        raise ValueError(f"policies: two of {', '.join(names)} would be saved as {twice[0]!r}: rename one")
    return found


def _play(
    args: Args, names: Mapping[str, Sequence[str]], served: Served
) -> tuple[dict[str, list[Run]], dict[str, list[dict[str, float]]]]:
    """The runs of each policy, saved as they come, and what its answers cost."""
    seeds = [(name, folder, policy_spec(names[name][number])) for (name, number), folder in _folders(names).items()]
    indices, envs = args.stages()
    count = len(indices)

    def saved_at(folder: str, forced: bool) -> Path:
        return args.out / "episodes" / f"{folder}{'-forced' if forced else ''}"

    passes = (False, True) if args.forced else (False,)
    begun = False
    for _, folder, spec in seeds:  # a server that is not there is found before anything is played
        if "openai:" in spec and not all(args.resume and asked_of(saved_at(folder, one)) for one in passes):
            load_agent(spec, env=envs.of(None), seed=args.seed, served=served)
            if not begun:  # its answers are kept from the first on
                if args.resume:
                    served.check_same(args.out)
                _begin(args)
                write_whole(args.out / PROMPTS, served.text)
            begun = True
    runs: dict[str, list[Run]] = {}
    costs: dict[str, list[dict[str, float]]] = {}
    with progress_bars(note=begun) as progress:
        for name, folder, spec in seeds:
            found: list[list[Episode]] = []
            for forced in passes:
                saved = saved_at(folder, forced)
                if args.resume and asked_of(saved) is not None:  # complete: only then it has its name
                    found.append(load_episodes(saved))
                    if (saved / COST).exists() and not forced:
                        costs.setdefault(name, []).append(read_json(saved / COST, f"remove {saved}"))
                    continue
                note = str(served.usage) if begun else ""
                task = progress.add_task(f"{folder}{', forced' if forced else ''}", total=count, note=note)
                served.usage.on_change = lambda task=task: progress.update(task, note=str(served.usage))  # type: ignore[misc]
                # Each rollout gets a fresh agent, so that a sampling agent draws the same each time. Its view is known
                # only after it is made, so it is made with the default environment, which the oracle alone uses.
                agent = Metered(load_agent(spec, env=envs.of(None), seed=args.seed, served=served))
                env = envs.of(agent)
                if forced and getattr(agent.agent, "repeats_itself", False):
                    agent = Metered(Continued(agent.agent, found[0], env.num_envs))
                watch = _Watch(saved, agent, name, env, lambda task=task: progress.advance(task))  # type: ignore[misc]
                said: dict[str, Any] = {"agent_name": name, "on_episode": watch.finished}
                found.append(rollout(env, agent, count, args.seed, indices=indices, ignore_stop=forced, **said))
                watch.end()
                check_episodes(found[-1], stop=not forced)
                if not begun:  # if a policy cannot be played, existing results stay
                    _begin(args)
                    begun = True
                with whole_folder(saved, asdict(args) | {"policy": spec, "ignore_stop": forced}) as partial:
                    save_episodes(partial, found[-1])
                    if agent.cost is not None and not forced:
                        costs.setdefault(name, []).append(agent.cost.per_episode(count))
                        write_json(partial / COST, costs[name][-1])
                watch.journal.unlink(missing_ok=True)
            runs.setdefault(name, []).append(Run(found[0], found[1] if args.forced else None))
    return runs, costs


class _Watch:
    """Takes a policy's episodes as they are finished; those of a served model are on disk at once."""

    def __init__(
        self, saved: Path, agent: Metered, name: str, env: GroundingVectorEnv, advance: Callable[[], None]
    ) -> None:
        self.journal, self._advance = saved.with_name(f"{saved.name}.part.jsonl"), advance
        served = served_by(agent)
        self._frame = None if served is None else FrameCheck(name, served.asked, env.screen.side)
        self._known: set[str] = set()
        if served is not None and self.journal.exists():  # of the run that goes on here; its last line may be cut off
            whole = self.journal.read_bytes()
            write_whole(self.journal, whole[: whole.rfind(b"\n") + 1])
            self._known = {episode.sample_id for episode in load_episodes(self.journal)}

    def finished(self, episode: Episode) -> None:
        """Count, check and keep one more."""
        self._advance()
        if self._frame is None:
            return
        self._frame.see(episode)
        if episode.sample_id not in self._known:
            self.journal.parent.mkdir(exist_ok=True)
            with self.journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(episode), allow_nan=False) + "\n")

    def end(self) -> None:
        """Say what the answers look like, where they are few."""
        if self._frame is not None:
            self._frame.say()


def policy_spec(text: str) -> str:
    """What ``load_agent`` takes for a policy as it is named in a command."""
    return f"vlm:{text}" if text == TINY_NAME or Path(text).is_dir() else text


def _write(
    args: Args,
    played: Mapping[str, Played],
    sources: Mapping[str, Sequence[str]],
    costs: Mapping[str, list[dict[str, float]]],
) -> None:
    audits = {name: one.audit for name, one in played.items()}
    first = next(iter(audits.values()))
    comparisons = _comparisons(audits, args.seed)
    served = ", ".join(first.served)
    text = _report(args, played, audits, comparisons) + _costs(costs)
    write_whole(args.out / "table.txt", "\n".join(text) + "\n")
    results = {
        "args": asdict(args),
        **made_by(),
        "policies": dict(sources),
        "served": served,
        "rows": table.as_json([row for one in audits.values() for row in one.rows]),
        "comparisons": table.as_json(comparisons),
        "costs": dict(costs),
        "behaviour": behaviour_lines(audits),
        "audits": {name: one.as_json() for name, one in audits.items()},
    }
    for (name, number), folder in _folders(sources).items():
        _write_predictions(args.out / PREDICTIONS / f"{folder}.jsonl", played[name].runs[number].episodes)
    write_json(args.out / "results.json", results)
    _plot(args, played)
    episodes = {name: one.runs[0].episodes for name, one in played.items()}
    image_of = ImageFinder(episodes, episode_folders(args.out, results), args.data_root)
    shown = {name: list(some[: args.page_episodes]) for name, some in episodes.items()}
    write_page(args.out / "episodes.html", shown, image_of, title=f"Episodes: {', '.join(played)} on {served}")
    page = write_report(args.out, episodes, image_of)
    print(last_screen(results, page), file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print((args.out / "results.json").read_text(encoding="utf-8").rstrip("\n"))


def _write_predictions(path: Path, episodes: Sequence[Episode]) -> None:
    """A JSON line per sample, as `ivt score` reads it: the answer, and what led to it, step by step."""
    rows = (
        {
            "sample_id": episode.sample_id,
            "box": episode.steps[-1].box,
            "boxes": [step.box for step in episode.steps],
            "stopped": episode.terminated,
            "texts": [step.text for step in episode.steps],
            "tokens": [step.tokens for step in episode.steps],
            "seconds": [step.seconds for step in episode.steps],
        }
        for episode in episodes
    )
    write_lines(path, chain([{"format": "xyxy", "frame": "relative"}], rows))


def _report(
    args: Args, played: Mapping[str, Played], audits: Mapping[str, Audit], comparisons: Sequence[table.Comparison]
) -> list[str]:
    first = next(iter(audits.values()))
    rows = [row for one in audits.values() for row in one.rows]
    # The three headline metrics, so that their intervals fit on a line.
    short = [replace(row, scores={m: row.scores[m] for m in HEADLINE_METRICS}) for row in rows]
    several = {name: len(one.runs) for name, one in audits.items() if len(one.runs) > 1}
    longest = max(len(e.steps) for one in played.values() for e in one.stopping + one.forced)
    source = "saved episodes" if args.episodes else args.env
    text = [f"{source}, served: {', '.join(first.served)}, n = {first.episodes}, at most {longest} actions"]
    if several:
        text += ["means over seeds: " + ", ".join(f"{name} {count}" for name, count in several.items())]
    text += ["", *(table.policy_table(rows, metric) + "\n" for metric in (*METRICS, "hit"))]
    text += ["with their 95 % intervals over images:", table.score_table(short), ""]
    if several:
        text += [table.seed_table(rows, metric) + "\n" for metric in HEADLINE_METRICS]
    text += ["paired differences over images, 95 % bootstrap intervals:", ""]
    text += [table.difference_table([c for c in comparisons if c.metric == m]) + "\n" for m in HEADLINE_METRICS]
    text += ["how the steps were used, and what the policy knows of its boxes:"]
    text += [table.render(["figure", *audits], behaviour_lines(audits)), ""]
    groups = {name: [g for g in one.groups if g.column in ("step_0", "learned_stop")] for name, one in audits.items()}
    text += ["by data set, size of the target's box and number of same-class distractors:", group_table(groups)]
    return text


def _costs(costs: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """A table of what an episode cost, of the policies that show it; means over seeds."""
    if not costs:
        return []
    fields = next(iter(costs.values()))[0]
    lines = [
        [name, *(f"{sum(seed[field] for seed in seeds) / len(seeds):.1f}" for field in fields)]
        for name, seeds in costs.items()
    ]
    return ["", "what an episode cost, with its stop honoured:", table.render(["policy", *fields], lines)]


def _comparisons(audits: Mapping[str, Audit], seed: int) -> list[table.Comparison]:
    """What each policy gains on its own first box, and its answer on the first boxes and answers of the others."""
    base = next(iter(audits))
    pairs = []
    for name, one in audits.items():
        pairs += [((name, key), (name, "step_0")) for key in one.columns if key != "step_0"]
        others = [(other, column) for other in audits if other != name for column in ("step_0", "learned_stop")]
        pairs += [((name, "learned_stop"), other) for other in others]
        pairs += [((name, "step_0"), (base, "step_0"))] if name != base else []
    found = []
    for metric in (*HEADLINE_METRICS, "Acc@0.7"):
        for a, b in pairs:
            first, second = (audits[policy].columns[column] for policy, column in (a, b))
            images = audits[base].image_ids
            found.append(
                table.compare(" ".join(a), first, " ".join(b), second, images, metric, n_boot=RESAMPLES, seed=seed)
            )
    return found


def _plot(args: Args, played: Mapping[str, Played]) -> None:
    forced = {name: one.forced for name, one in played.items() if one.forced}
    if forced:
        plots.plot_accuracy_by_step(forced, args.out / "accuracy_by_step.png")
    stopping = {name: one.stopping for name, one in played.items()}
    plots.plot_before_after(stopping, args.out / "before_after.png")
    plots.plot_groups({name: one.audit.groups for name, one in played.items()}, args.out / "groups.png")
    found = {name: outcomes(episodes, verify=False) for name, episodes in stopping.items()}
    stated = {
        "stop probability, of the box that is shown": {k: stop_calibration(v) for k, v in found.items()},
        "confidence, in the box that is given": {k: confidence_calibration(v) for k, v in found.items()},
    }
    stated = {title: {k: c for k, c in of.items() if c.num} for title, of in stated.items()}
    if any(stated.values()):  # agents without probabilities have nothing to draw
        plots.plot_reliability({title: of for title, of in stated.items() if of}, args.out / "reliability.png")
    if args.runs:
        plots.plot_training(args.runs, args.out / "training.png")
