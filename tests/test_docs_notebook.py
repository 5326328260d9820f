"""The notebook runs from the first cell to the last, and prints what it shows.

Silent when false: the first thing that a newcomer runs ends in a traceback.
"""

from __future__ import annotations

from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", reason='the notebook needs pip install "ivt-env[dev]"')
nbformat = pytest.importorskip("nbformat")

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "notebooks" / "tour.ipynb"


def said(notebook):
    """What every code cell printed or gave, in words; of an image, that it was one.

    A cell's prints are joined: how many messages they come in is a matter of time.
    """
    told = []
    for cell in notebook.cells:
        words = ""
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            words += "an image" if "image/png" in data else output.get("text") or data.get("text/plain")
        told.append(words)
    return told


def test_the_notebook_runs_and_says_what_it_shows(tmp_path):
    shown = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(shown)
    running = nbformat.from_dict(shown)
    for cell in running.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = nbclient.NotebookClient(
        running, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    before = said(nbformat.read(NOTEBOOK, as_version=4))
    client.execute()
    assert said(running) == before
    assert before.count("an image") == 3 and any("oracle" in words for words in before)


def test_the_notebook_is_small_and_names_no_folder_of_a_machine():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 300_000
    assert "/home/" not in text and "/root/" not in text and "/work/" not in text
