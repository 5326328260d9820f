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
    add, data_root = parser.add_argument, "folder of the real data sets (default: the variable IVT_DATA)"
    out = "for episodes.jsonl, demonstrations.jsonl and images/ (default: %(default)s)"
    add("--env", default="IVT-Scenes-v0", metavar="ID", help="environment id (default: %(default)s)")
    add("--split", default="val", help="split of the data set (default: %(default)s)")
    add("--episodes", type=int, default=10, metavar="N", help="how many (default: %(default)s)")
    add("--seed", type=int, default=0, help="decides which samples are drawn (default: %(default)s)")
    add("--episode-steps", type=int, default=3, help="actions in an episode (default: %(default)s)")
    add("--data-root", type=Path, metavar="FOLDER", help=data_root)
    add("--out", type=Path, default=Path("runs/human"), metavar="FOLDER", help=out)
    add("--port", type=int, default=0, help="(default: any that is free)")


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
        known = f", {len(app.episodes)} played before" if app.episodes else ""
        LocalServer(app, args.port).serve(f"{args.episodes} episodes of {env.dataset.name}/{env.dataset.split}{known}")
    if app.episodes:
        ious = [episode.final_iou for episode in app.episodes]
        mean, right = sum(ious) / len(ious), sum(iou >= 0.5 for iou in ious)
        said = f"{len(ious)} of {args.episodes} episodes in {args.out}: final mIoU {mean:.3f}, {right} right at 0.5"
        print(said)
    return 0
