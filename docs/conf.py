"""The site: `make docs` leaves it in build/docs, to be read without a network.

Sphinx rather than mkdocs: the docstrings are its own markup, and every warning can be an error.
"""

from __future__ import annotations

import fastokd

project = "fastokd"
author = "the fastokd authors"
release = version = fastokd.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 3
# Code blocks without a language are plain text: commands' output, equations, layouts.
highlight_language = "text"

autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"fastokd {release}"
html_copy_source = False
html_show_sphinx = False
