"""What every test runs under: no window, no sound, no network. Set before anything is imported."""

from __future__ import annotations

import os

os.environ["SDL_VIDEODRIVER"] = "dummy"
os.environ["SDL_AUDIODRIVER"] = "dummy"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import pytest
from accelerate.state import AcceleratorState
from file_server import server  # noqa: F401  (a fixture of several test files)


@pytest.fixture(autouse=True)
def no_number_format_left_by_another_test():
    """accelerate keeps one number format a process: a test must not depend on which tests ran before it."""
    yield
    AcceleratorState._reset_state(True)
