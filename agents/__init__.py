"""Agents for the grounding environments, and the learners that train them."""

import sys

if sys.argv[:1] == ["-m"]:  # of `python -m`, which takes a moment to import the rest
    import ivt_env  # noqa: F401  Ctrl-C is quiet from here on
