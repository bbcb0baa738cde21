"""Sphinx's settings: the site is made of the pages beside this file and of the docstrings. Build it with ``make docs``."""

from __future__ import annotations

from typing import Any

import fastroute

project = "fastroute"
author = "the authors of fastroute"
release = version = fastroute.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
default_role = "code"  # single backticks in docstrings

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
maximum_signature_line_length = 90
python_use_unqualified_type_names = True
add_module_names = False
napoleon_custom_sections = ["Shape"]
napoleon_use_ivar = True

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"fastroute {release}"
html_copy_source = False
html_show_copyright = False
html_show_search_summary = False  # it would fetch pages, which a browser forbids to files
html_static_path = ["static"]
html_css_files = ["site.css"]

# What every operator's docstring promises, a line each.
FACTS = ("Differentiable", "Deterministic", "Synchronises", "CUDA-graph safe", "Memory layout", "Source")


def list_facts(app: Any, what: str, name: str, item: object, options: object, lines: list[str]) -> None:
    """Make the lines of facts a list, which they would run together without."""
    result: list[str] = []
    inside = False
    for line in lines:
        head, colon, rest = line.partition(": ")
        if colon and head in FACTS:
            result += [] if inside else [""]
            result.append(f"- **{head}:** {rest}")
            inside = True
        elif inside and line.startswith(" "):
            result.append(f"  {line.strip()}")
        else:
            result += ["", line] if inside else [line]
            inside = False
    lines[:] = result


def setup(app: Any) -> None:
    """Sphinx calls this."""
    # Before napoleon, whose priority is 500.
    app.connect("autodoc-process-docstring", list_facts, priority=400)
