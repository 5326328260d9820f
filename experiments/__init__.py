"""Recipes over the commands: the paper's recipe and the study, with their tables. Not installed."""

import ivt_agents  # noqa: F401  Ctrl-C is quiet from here on
