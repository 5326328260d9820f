"""How many times as fast an evaluation of a served model is with 16 requests at a time as with one.

    python benchmarks/served.py

A server in a process of its own answers each request after 200 ms, always alike. Each evaluation is the whole command
(``ivt evaluate``: both passes, tables, plots, report), on the same samples of ``val``; its seconds are those of the
wall clock, with those of playing alone beside them. The scores of both must be equal.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from server_processes import free_port, scripted  # noqa: E402


@dataclass
class Args:
    """Options."""

    samples: int = 500
    """Of `val`."""
    seconds: float = 0.2
    """That the server takes to answer."""
    concurrency: tuple[int, ...] = (1, 16)
    """Requests at a time, one evaluation each."""
    forced: bool = True
    """Play every sample a second time, as `ivt evaluate` does."""


def main(args: Args) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        log = folder / "answers.log"
        log.touch()
        server = scripted(port, args.seconds, log)
        rows, found = [], {}
        for at_a_time in args.concurrency:
            out, before = folder / str(at_a_time), len(log.read_text().split())
            command = [sys.executable, str(ROOT / "evaluate.py"), "--split", "val", "--samples", str(args.samples)]
            command += ["--policies", f"m=openai:http://127.0.0.1:{port}/v1#m", "--prompt-file", "tiny"]
            command += ["--out", str(out), "--concurrency", str(at_a_time), *([] if args.forced else ["--no-forced"])]
            start, used = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
            subprocess.run(command, check=True, capture_output=True, env=os.environ | {"no_proxy": "*"})
            seconds, used = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - used
            last = out / "episodes" / ("m-forced" if args.forced else "m") / "episodes.jsonl"
            playing = last.stat().st_mtime - (out / "config.json").stat().st_mtime  # written as it begins
            rows.append((at_a_time, seconds, playing, used, len(log.read_text().split()) - before))
            found[at_a_time] = json.loads((out / "results.json").read_text())["rows"]
        server.kill()
        server.wait()
    print(f"{args.samples} samples of IVT-Scenes-v0/val, a server that answers in {args.seconds * 1000:.0f} ms")
    print("concurrency  answers  seconds  times as fast  playing alone  times as fast  processor's seconds")
    for at_a_time, seconds, playing, used, answers in rows:
        line = f"{at_a_time:>11}  {answers:>7}  {seconds:>7.1f}  {rows[0][1] / seconds:>13.1f}"
        print(f"{line}  {playing:>13.1f}  {rows[0][2] / playing:>13.1f}  {used:>19.1f}")
    same = all(scores == found[args.concurrency[0]] for scores in found.values())
    print("the scores are equal" if same else "THE SCORES DIFFER")


if __name__ == "__main__":
    main(tyro.cli(Args))
