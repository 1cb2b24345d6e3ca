"""How Sphinx builds the documentation: `bash scripts/docs.sh`."""

from __future__ import annotations

import re
from typing import Any

import hf_prune

project, author = "hf_prune", "the hf_prune authors"
version = release = hf_prune.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
nb_execution_mode = "off"  # notebooks are stored with what they printed; the slow tests run them
exclude_patterns = ["_build"]  # where notebooks are copied to as well, beside the pages
html_theme = "furo"
html_static_path, html_css_files = ["_static"], ["pages.css"]
html_title, html_show_copyright = f"hf_prune {version}", False
myst_heading_anchors = 3
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autoclass_content = "class"
napoleon_use_rtype = False
nitpicky = False


def _link(match: re.Match[str]) -> str:
    name = match[1].removeprefix("hf_prune.")
    public = name.partition(".")[0] in hf_prune.__all__
    return f":py:obj:`{match[1]} <hf_prune.{name}>`" if public else f"``{match[1]}``"


def _as_rst(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings have code in single backticks, and cross-references as [`this`]."""
    text = "\n".join(lines)
    text = re.sub(r"\[`([\w.]+)`\](?!\()", _link, text)
    text = re.sub(r"(?<![`:\w>])`([^`\n]+)`(?![`_])", r"``\1``", text)
    lines[:] = text.split("\n")


def setup(app: Any) -> None:
    """Connect what rewrites docstrings."""
    app.connect("autodoc-process-docstring", _as_rst, priority=100)
