"""Policies on the same samples, column by column.

    python evaluate.py --help

The code is in ``agents/evaluation/evaluate.py``.
"""

import sys

from ivt_agents.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
