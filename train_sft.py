"""Supervised warm start.

    python train_sft.py --help

The code is in ``agents/sft/train.py``.
"""

from ivt_agents.command import run_command
from ivt_agents.sft.train import Args, main

if __name__ == "__main__":
    run_command(main, Args, section="sft")
