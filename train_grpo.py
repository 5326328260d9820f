"""Multi-turn GRPO in the environment.

    python train_grpo.py --help

The code is in ``agents/grpo/train.py``.
"""

import sys

from ivt_agents.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-grpo", *sys.argv[1:]]))
