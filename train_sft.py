"""Supervised warm start.

    python train_sft.py --help

The code is in ``agents/sft/train.py``.
"""

import sys

from ivt_agents.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-sft", *sys.argv[1:]]))
