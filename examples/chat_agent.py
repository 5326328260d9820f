"""Let any chat model with an OpenAI-compatible address play a few episodes.

    python examples/chat_agent.py http://127.0.0.1:8000/v1 --model X --episodes 3

At every step the model is sent the image with its current box drawn and the question, in a new conversation, and
its answer is played as it is. Without ``--model`` the server's only model is taken. A key, where one is needed, comes
from the variable OPENAI_API_KEY. docs/text_actions.md shows what it prints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import gymnasium as gym
import tyro

import ivt_env  # noqa: F401  registers the ids
from ivt_agents.command import run_command
from ivt_agents.sft.teacher.openai import Budget, OpenAITeacher
from ivt_env.wrappers import TextActions, visible_image


@dataclass
class Args:
    """Play a few episodes with a chat model."""

    address: Annotated[str, tyro.conf.Positional]
    """Base address of the server, for example http://127.0.0.1:8000/v1."""
    model: str = ""
    """Its name on the server; none given: the only one that the server serves."""
    env: str = "IVT-Scenes-v0"
    """Registered id."""
    split: str = "val"
    """Split of the data set."""
    episodes: int = 3
    """How many: the first samples of the split."""
    episode_steps: int = 3
    """Actions in an episode."""
    max_reply_tokens: int = 300
    """Limit of one answer; one that is cut off has no action in it."""
    max_requests: int = 1000
    """Requests to the server, repeated ones included; then the run ends."""


def main(args: Args) -> None:
    """Play, and print every step."""
    if args.episodes < 1:
        raise ValueError(f"--episodes {args.episodes}: give an integer of at least 1")
    address = f"{args.address}#{args.model}" if args.model else args.address
    model = OpenAITeacher(address, Budget(max_requests=args.max_requests))
    # A real data set that was asked for is never replaced.
    env = TextActions(gym.make(args.env, split=args.split, max_steps=args.episode_steps, strict=True))
    final, failures, steps = [], 0, 0
    for index in range(args.episodes):
        observation, info = env.reset(seed=index, options={"index": index})
        print(f"episode {index + 1} of {args.episodes}: {info['dataset']}/{args.split} {info['sample_id']}")
        print(f"  {observation['text'].splitlines()[0]}")
        over = False
        while not over:
            text = model.answer(visible_image(observation), observation["text"], args.max_reply_tokens)
            observation, reward, terminated, truncated, info = env.step(text)
            over, steps, failures = terminated or truncated, steps + 1, failures + info["parse_failure"]
            said = printable(" ".join(text.split()))
            print(f"  IoU {info['iou']:.3f}   reward {round(float(reward), 3) + 0.0:+.3f}   {said}")
            if "invalid" in info:
                print(f"      refused: {info['invalid']}")
        final.append(info["iou"])
    print(f"mean final IoU {sum(final) / len(final):.3f} over {len(final)}, {failures} of {steps} answers unreadable")
    env.close()


def printable(text: str) -> str:
    """A model's words for a terminal: control characters are spelled out, never sent."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


if __name__ == "__main__":
    run_command(main, Args)
