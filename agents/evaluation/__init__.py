"""Evaluation: columns of several policies on the same samples, overlay swaps, plots and the report."""
