"""Steps per second through the server on this machine, against the environment itself.

    python benchmarks/server.py

The server is a process of its own, as are the clients, which play at once and each as fast as it can. An episode
has 20 actions; its reset is counted as one of 21 exchanges, because it costs an exchange, too. Rounds of all
cases take turns, so that a slow minute of the machine hits them all; medians are given. Beside the rate stands what
an exchange costs in processor time, of the client's process and of the server's: that hardly depends on what else the
machine does, and the rate does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np

import ivt_env  # noqa: F401  registers the ids
from ivt_env.server import RemoteEnv

STEPS = 20
CASES = [("IVT-Scenes-v0", 384), ("IVT-Photos-v0", 640)]

Rate = tuple[float, float, float]
"""Exchanges per second, milliseconds of processor time of an exchange here, and in the server."""


def play(env: gym.Env, seconds: float) -> tuple[int, float, float]:
    """Exchanges, steps and resets; seconds; seconds of processor time."""
    boxes = np.sort(np.random.default_rng(0).random((STEPS, 2, 2)), axis=1).reshape(-1, 4).astype(np.float32)
    env.reset(seed=0)
    done, start, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        env.reset()
        for box in boxes:
            env.step({"box": box, "stop": 0})
        done += STEPS + 1
    return done, time.perf_counter() - start, time.process_time() - cpu


def client(address: str, encoding: str, seconds: float) -> None:
    """One client's process: waits for a line, plays, prints what it did."""
    env = RemoteEnv(address, encoding=encoding)
    env.reset(seed=0)
    print("ready", flush=True)
    sys.stdin.readline()
    print(*play(env, seconds), flush=True)
    env.close()


def serve(env_id: str, canvas: int) -> tuple[subprocess.Popen[str], str]:
    """A server's process and its address."""
    options = ["--env", env_id, "--kwargs", json.dumps({"canvas": canvas, "max_steps": STEPS})]
    command = [sys.executable, "-m", "ivt_env.server", "--port", "0", *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
    server.stdout.readline()
    return server, server.stdout.readline().removeprefix("at ").strip()


def cpu_of(pid: int) -> float:
    """Seconds of processor time that a process has used; Linux only."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def through_server(server: int, address: str, encoding: str, clients: int, seconds: float) -> Rate:
    """All clients together."""
    options = ["--client", address, encoding, "--seconds", str(seconds)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([sys.executable, __file__, *options], **pipes) for _ in range(clients)]
    for process in started:
        process.stdout.readline()
    before = cpu_of(server)
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    said = [[float(v) for v in process.communicate()[0].split()] for process in started]
    done = sum(one[0] for one in said)
    served = 1e3 * (cpu_of(server) - before) / done
    return sum(one[0] / one[1] for one in said), 1e3 * sum(one[2] for one in said) / done, served


def main() -> None:
    """Measure all cases and print a table for the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of each case (default: %(default)s)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4], help="at once (default: %(default)s)")
    parser.add_argument("--client", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client:
        client(*args.client, args.seconds)
        return
    servers = {case: serve(*case) for case in CASES}
    found: dict[tuple[str, int, str, int], list[Rate]] = {}
    try:
        for _ in range(args.rounds):
            for case, (server, address) in servers.items():
                local = gym.make(case[0], canvas=case[1], max_steps=STEPS, disable_env_checker=True).unwrapped
                done, seconds, cpu = play(local, args.seconds)
                found.setdefault((*case, "none", 1), []).append((done / seconds, 1e3 * cpu / done, 0.0))
                for encoding in ("png", "raw"):
                    for clients in args.clients:
                        rate = through_server(server.pid, address, encoding, clients, args.seconds)
                        found.setdefault((*case, encoding, clients), []).append(rate)
    finally:
        for server, _ in servers.values():
            server.terminate()
            server.wait(20)
    print("| environment | pixels | way | clients | steps/s | CPU ms here | CPU ms in the server |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for (env_id, canvas, encoding, clients), rates in sorted(found.items()):
        way = "in this process" if encoding == "none" else f"server, `{encoding}`"
        rate, here, there = (statistics.median(column) for column in zip(*rates, strict=True))
        print(f"| `{env_id}` | {canvas} | {way} | {clients} | {rate:.0f} | {here:.2f} | {there:.2f} |")


if __name__ == "__main__":
    main()
