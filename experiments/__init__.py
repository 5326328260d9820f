"""Recipes over the commands: the paper's recipe and the study, with their tables. Not installed."""
