"""Scores over saved episodes: numpy only, no model needed.

- ``columns``: episodes as arrays, and the answer each stopping rule would have given
- ``scores``: accuracies, correction and break rates, NSRI, per-step changes, failures
- ``stopping``: precision and recall of the stops, calibration of what the policy states
- ``breakdown``: any column and metric by data set, box size and siblings
- ``audit``: all of it about one policy, from saved episodes of one or several seeds
- ``swaps``: what a policy does when another box is drawn, and whether its stop depends on the box's quality
- ``statistics``: intervals, tests and detectable differences, clustered by image
- ``table``: text, Markdown and JSON

Import from the modules; nothing is repeated here, so that no function hides a module of its name.
"""
