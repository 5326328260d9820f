"""Play a few episodes and show every step: the command to look at an environment or an agent.

Prints each episode for a person, and writes ``episodes.jsonl``, the images and a page for a
browser. It measures nothing.

    ivt rollout
    ivt rollout --env IVT-Photos-v0 --agent my_module:MyAgent --episodes 16 --index 0
    ivt rollout --agent random --episodes 100 --json > episodes.jsonl

``python -m ivt_agents.play.rollout`` is the same command. Where the episodes themselves are not seen (``--json``, or
output into a file), a bar on standard error shows how far it is.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.markup import escape

import ivt_env
from ivt_agents.command import progress_bars, run_command
from ivt_agents.play.by_name import load_agent
from ivt_agents.play.chat import ServedError
from ivt_agents.play.on_split import Stages
from ivt_agents.play.served import ANSWERS, Served, ServedOptions
from ivt_env.data.checked import closest
from ivt_env.data.sample import ImageArray, Sample
from ivt_env.episodes import Box, Episode, Step, save_episodes
from ivt_env.files import forget, lock_folder
from ivt_env.rollouts import Agent, make_vector_env, rollout
from ivt_env.vector_env import GroundingVectorEnv
from ivt_env.viewer import write_page


@dataclass
class Args(ServedOptions):
    """Play a few episodes, show every step, and save them with a page to look at."""

    config: Path | None = None
    """YAML file whose part `rollout` gives defaults; flags override it."""
    env: str = "IVT-Scenes-v0"
    """Environment id."""
    agent: str = "oracle"
    """random, centre, oracle, stop-after-K:AGENT, vlm:FOLDER, openai:URL#MODEL, sb3:FOLDER, or your own as
    module:Class (`ivt agents` lists every form, controls such as medoid-8:vlm:tiny among them)."""
    episodes: int = 1
    """How many."""
    seed: int = 0
    """Decides which samples are drawn (episode i: seed + i), and what a random agent does."""
    split: str = "val"
    """Split of the data set."""
    index: int | None = None
    """Play this sample (from 0), and with more episodes the ones after it, instead of drawing."""
    episode_steps: int = 3
    """Actions in an episode."""
    view: Literal["overlay", "closeup", "both"] | None = None
    """What the agent sees once there is a box. None: what it was trained for (`overlay` where it does not say)."""
    data_root: str | None = None
    """Folder of the real data sets; not given: the variable IVT_DATA, then the user's cache."""
    strict: bool = False
    """Refuse to serve the embedded scenes in place of a data set that is not on this machine."""
    forced: bool = False
    """Never stop: a stop is replaced by proposing the current box again."""
    out: Path = Path("runs/rollout")
    """Folder for episodes.jsonl, images/ and page.html."""
    json: bool = False
    """Print one JSON object per episode and nothing else."""


def main(args: Args) -> None:
    """Play, print and save."""
    served = Served(args, args.out / ANSWERS)
    with served.run(""):
        _rollout(args, served)


def _rollout(args: Args, served: Served) -> None:
    env, agent = _set_up(args, served)
    asked = ivt_env.IDS[args.env]["dataset"]
    played, samples = [], {}
    with lock_folder(args.out):
        try:
            for episode in _with_progress(args, _play(args, env, agent)):
                played.append(episode)
                samples[episode.sample_id] = env.samples[0]
                if args.json:
                    print(json.dumps(asdict(episode)), flush=True)
                    continue
                print(f"episode {len(played)} of {args.episodes}")
                print(describe(episode, in_place_of=None if env.dataset.name == asked else asked), flush=True)
        except ServedError:
            if played:
                _save(args, env, played, samples)
            raise
        _save(args, env, played, samples)


def _set_up(args: Args, served: Served) -> tuple[GroundingVectorEnv, Agent]:
    if args.episodes < 1:
        raise ValueError(f"--episodes {args.episodes}: give an integer of at least 1")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: give an integer of at least 0")
    if args.env not in ivt_env.IDS:
        near = closest(args.env, ivt_env.IDS)
        raise ValueError(f"no environment {args.env!r}{near}; there are {', '.join(ivt_env.IDS)}")
    options = {"split": args.split, "data_root": args.data_root, "strict": args.strict, "max_steps": args.episode_steps}
    envs = Stages(lambda **seen: make_vector_env(args.env, num_envs=1, **seen, **options), args.view)
    env = envs.of(None)
    last = len(env.dataset) - 1
    if args.index is not None and not 0 <= args.index <= last - (args.episodes - 1):
        raise ValueError(
            f"--index {args.index}, {args.episodes} episode(s): {env.dataset.name}/{env.dataset.split} "
            f"holds samples 0 to {last}"
        )
    agent = load_agent(args.agent, env=env, seed=args.seed, served=served)
    return envs.of(agent), agent


def _play(args: Args, env: GroundingVectorEnv, agent: Agent) -> Iterator[Episode]:
    """One by one, so that each can be looked at while the next is played."""
    for i in range(args.episodes):
        indices = None if args.index is None else [args.index + i]
        options: dict[str, Any] = {"indices": indices, "ignore_stop": args.forced, "agent_name": args.agent}
        yield from rollout(env, agent, 1, args.seed + i, **options)


def _with_progress(args: Args, episodes: Iterator[Episode]) -> Iterator[Episode]:
    if sys.stderr.isatty() and (args.json or not sys.stdout.isatty()):
        # The output is not redirected: rich would send it where the bar is.
        with progress_bars() as progress:
            yield from progress.track(episodes, args.episodes, description=escape(args.agent))
    else:
        yield from episodes


def _save(args: Args, env: GroundingVectorEnv, played: list[Episode], samples: dict[str, Sample]) -> None:
    def image_of(episode: Episode) -> ImageArray:
        return env.dataset.image(samples[episode.sample_id])

    older = args.out / "episodes.jsonl"
    if older.exists():
        count = sum(1 for _ in older.open("rb"))
        print(f"replaces {count} episode(s) that were there; --out names another folder", file=sys.stderr)
    forget(args.out / "page.html")  # never beside other episodes than its own
    saved = save_episodes(args.out, played, image_of)
    page = write_page(args.out / "page.html", played, image_of, title=f"{args.agent} on {args.env}")
    # With --json the output belongs to the program that reads it.
    print(f"episodes  {saved}\npage      {page}", file=sys.stderr if args.json else sys.stdout)


def describe(episode: Episode, in_place_of: str | None = None) -> str:
    """The episode in words, one line a step; ``in_place_of`` names the data set asked for where another was served."""
    height, width = episode.size
    instead = f"   IN PLACE OF {in_place_of}" if in_place_of else ""
    sample = f"{episode.dataset}/{episode.split}, sample {_printable(episode.sample_id)}"
    lines = [f"  find      {_printable(episode.expression)}"]
    lines += [f"  served    {sample}, {width}x{height} pixels{instead}", f"  target    {_numbers(episode.target)}"]
    if episode.initial_box is not None:
        lines.append(f"  start     {_numbers(episode.initial_box)}")
    for number, step in enumerate(episode.steps):
        lines += _describe_step(step, number)
    how = "stopped" if episode.terminated else "out of steps"
    earned = f"final IoU {episode.final_iou:.3f}, total reward {round(episode.total_reward, 3) + 0.0:+.3f}"
    return "\n".join([*lines, f"  end       {how}, {earned}\n"])


def _describe_step(step: Step, number: int) -> list[str]:
    name = "stop" if step.stop else f"step {number}"
    proposal = "" if step.stop else "no usable box" if step.proposal is None else _numbers(step.proposal)
    line = f"  {name:<9} {proposal:<27}   IoU {step.iou:.3f}   reward {round(step.reward, 3) + 0.0:+.3f}"
    if step.stop_probability is not None:
        line += f"   P(stop) {step.stop_probability:.2f}"
    lines = [line]
    if step.invalid is not None:
        lines.append(f"            refused: {_printable(step.invalid)}; the box stays")
    if step.parse_failure:
        lines.append("            no action could be read from the text")
    lines += [f"            | {_printable(words)}" for words in step.text.splitlines()]
    return lines


def _numbers(box: Box) -> str:
    return "  ".join(f"{v:.3f}" for v in box)


def _printable(text: str) -> str:
    """Text of unknown origin for a terminal: control characters are spelled out, never sent."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal with a small character set must not end a run at the first other expression.
        sys.stdout.reconfigure(errors="backslashreplace")
    run_command(main, Args, section="rollout")
