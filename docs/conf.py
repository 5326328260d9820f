"""The documentation site: ``python -m sphinx -W --keep-going docs build/docs``.

Needs the docs extra, and no network.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ivt_env  # noqa: E402

project = "ivt-env"
author = "ivt-env contributors"
copyright = "ivt-env contributors, Apache-2.0"
release = version = ivt_env.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["notebooks/.ipynb_checkpoints"]
html_theme = "furo"
html_title = f"ivt-env {release}"
html_static_path: list[str] = []
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    # The system's own fonts: nothing is fetched when a page is opened.
    "light_css_variables": {"font-stack": "system-ui, sans-serif", "font-stack--monospace": "ui-monospace, monospace"},
    "footer_icons": [],
}

myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
# Single backticks in docstrings mean code, as in the pages.
default_role = "code"


def markdown_sections(_app: Any, _what: str, name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Cut the Markdown sections from a docstring that is also shown by ``help`` and Gymnasium's tools.

    They are on the environments' pages, which are made from them.
    """
    first = next((i for i, line in enumerate(lines) if re.match(r"## ", line)), None)
    if first is not None:
        lines[first:] = [f"Spaces, rewards, ends and arguments of ``{name}``: see :doc:`/environments`.", ""]


def plain_bars(_app: Any, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """A bar in a docstring is an absolute value or an alternative, never a substitution of reStructuredText."""
    lines[:] = [re.sub(r"(``[^`]*``)|\|", lambda found: found[1] or "\\|", line) for line in lines]


def setup(app: Any) -> None:
    """Called by Sphinx."""
    # Before Napoleon, which would take a heading for a section of its own.
    app.connect("autodoc-process-docstring", markdown_sections, priority=1)
    app.connect("autodoc-process-docstring", plain_bars, priority=2)
