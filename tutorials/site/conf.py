"""Sphinx's settings for minisft's site. ``build.py`` calls Sphinx; nothing here names a single page."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "extension"))

import contents  # noqa: E402  (found on the path above)

project = "minisft"
author = "the minisft authors"
copyright = "the minisft authors, Apache-2.0"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "library", "mathml", "docstrings", "links"]
smartquotes = False  # W' is no quotation, and --data no dash
exclude_patterns = ["CONTRIBUTING.md"]  # parts of it are included

# Pages: shown as they were executed and committed.
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
nb_ipywidgets_js: dict[str, dict[str, str]] = {}
myst_enable_extensions = ["dollarmath", "substitution", "colon_fence"]
myst_heading_anchors = 3
highlight_language = "none"
myst_update_mathjax = False
myst_substitutions = {
    "page_map": contents.page_map(HERE / "tutorials"),
    "pages": contents.page_table(HERE / "tutorials"),
    "total_times": contents.total_times(HERE / "tutorials"),
    "front_door": contents.front_door(),
    "latency": contents.latency(HERE / "merge_cpu.svg"),
}

# Library: triton.jit would hide the kernels' docstrings, and no kernel runs here.
autodoc_mock_imports = ["triton"]
autodoc_default_options = {"members": True, "undoc-members": True, "member-order": "bysource", "ignore-module-all": True}
autodoc_inherit_docstrings = False
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
add_module_names = False
toc_object_entries = False  # a page lists its modules; hundreds of names would bury them

# Looks. Everything is served from the site itself.
html_theme = "furo"
html_title = "minisft"
html_math_renderer = "mathml"
html_favicon = "static/icon.svg"
html_static_path = ["static"]
html_css_files = ["site.css"]
# The one font with a MATH table that every installation has, for readers whose system has no better one.
html_extra_path = ["fonts"]
html_copy_source = False
html_show_sphinx = False
pygments_style = "a11y-light"
pygments_dark_style = "a11y-dark"
