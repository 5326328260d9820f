"""Multi-turn GRPO in the environment.

    python train_grpo.py --help

The code is in ``agents/grpo/train.py``.
"""

from ivt_agents.command import run_command
from ivt_agents.grpo.train import Args, main

if __name__ == "__main__":
    run_command(main, Args, section="grpo")
