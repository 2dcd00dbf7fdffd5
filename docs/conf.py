"""Sphinx's configuration. `make docs` builds the site in build/docs; it can be read without a network.

Sphinx is used instead of mkdocs because it reads the docstrings' markup and can treat warnings as errors.
"""

from __future__ import annotations

import fastokd

project = "fastokd"
author = "the fastokd authors"
release = version = fastokd.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 3
# Code blocks without a language (output of commands, equations, folder layouts) are plain text.
highlight_language = "text"

autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"fastokd {release}"
html_copy_source = html_use_index = html_domain_indices = False
html_show_sphinx = False
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
# Copies the commands of a session without its prompts and output.
copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True
