"""Scores over saved episodes: numpy only, no model needed.

- ``columns``: episodes as arrays, and the answer each stopping rule would have given
- ``scores``: accuracies, correction and break rates, NSRI, per-step changes, failures
- ``stopping``: precision and recall of the stops, calibration of what the policy states
- ``statistics``: intervals, tests and detectable differences, clustered by picture
- ``table``: text, Markdown and JSON

Import from the modules; nothing is repeated here, so that no function hides a module of its name.
"""
