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

from ivt_env import data, files


@pytest.fixture(autouse=True)
def no_number_format_left_by_another_test():
    """accelerate keeps one number format a process: a test must not depend on which tests ran before it."""
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture
def private_machine(tmp_path, monkeypatch):
    """The test sees and fills no data and cache folders of whoever runs it, and is warned as in a new process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    monkeypatch.delenv("IVT_DATA", raising=False)
    monkeypatch.setattr(data, "_warned", set())


@pytest.fixture
def full_disk(monkeypatch):
    """Every write of a whole file fails as on a full disk, with the system's own error."""
    opened = files._open_partial

    def on_a_full_disk(path, folder=False):
        partial, handle = opened(path, folder)
        if not folder:
            os.dup2(os.open("/dev/full", os.O_WRONLY), handle)
        return partial, handle

    monkeypatch.setattr(files, "_open_partial", on_a_full_disk)
