"""``ivt play``: draw the boxes yourself.

ivt play                                    # ten embedded scenes
ivt play --env IVT-Photos-v0 --episodes 5 --out runs/me
ivt view runs/me runs/rollout               # beside an agent on the same samples
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ivt_env.files import lock_folder

DESCRIPTION = (
    "Serves a page on this machine on which a person plays: draw a box with the mouse or the keyboard, refine it or "
    "stop. The environment scores it as it scores any agent; target, IoU and rewards are shown when an episode is "
    "over. Every finished episode is saved, and so are its steps as demonstrations for `ivt train-sft`. The same "
    "command with the same --out goes on where you stopped. Ctrl-C ends."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``ivt play`` to ``parser``."""
    parser.add_argument("--env", default="IVT-Scenes-v0", metavar="ID", help="environment id (default: %(default)s)")
    parser.add_argument("--split", default="val", help="split of the data set (default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=10, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="decides which samples are drawn (default: %(default)s)")
    parser.add_argument("--episode-steps", type=int, default=3, help="actions in an episode (default: %(default)s)")
    parser.add_argument(
        "--data-root", type=Path, metavar="FOLDER", help="folder of the real data sets (default: the variable IVT_DATA)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/human"), metavar="FOLDER",
        help="for episodes.jsonl, demonstrations.jsonl and images/ (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--port", type=int, default=0, help="(default: any that is free)")


def run(args: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C; the exit status."""
    import gymnasium as gym

    import ivt_env
    from ivt_env.env import GroundingEnv
    from ivt_env.viewer.play import PlayApp
    from ivt_env.viewer.server import LocalServer

    if args.env not in ivt_env.IDS:
        raise ValueError(f"no environment {args.env!r}; there are {', '.join(ivt_env.IDS)}")
    for option, value, least in (("--episodes", args.episodes, 1), ("--seed", args.seed, 0)):
        if value < least:
            raise ValueError(f"{option} {value}: give {least} or more")
    root = None if args.data_root is None else str(args.data_root)
    # Strict: a person's hours must not go into scenes that stand in for the data set that was named.
    options = {"split": args.split, "data_root": root, "strict": True, "max_steps": args.episode_steps}
    env = gym.make(args.env, disable_env_checker=True, **options).unwrapped
    assert isinstance(env, GroundingEnv)
    with lock_folder(args.out):
        app = PlayApp(env, args.out, args.episodes, args.seed, title=f"Play {args.env}")
        before = len(app.episodes)
        known = f", {before} played before" if before else ""
        LocalServer(app, args.port).serve(f"{args.episodes} episodes of {env.dataset.name}/{env.dataset.split}{known}")
    if app.episodes:
        ious = [episode.final_iou for episode in app.episodes]
        right = sum(iou >= 0.5 for iou in ious)
        print(
            f"{len(ious)} of {args.episodes} episodes in {args.out}: final mIoU {sum(ious) / len(ious):.3f}, "
            f"{right} right at 0.5"
        )
    return 0
