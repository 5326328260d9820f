"""Policies on the same samples, column by column.

    python evaluate.py --help

The code is in ``agents/evaluation/evaluate.py``.
"""

from ivt_agents.command import run_command
from ivt_agents.evaluation.evaluate import Args, main

if __name__ == "__main__":
    run_command(main, Args, section="evaluate")
