"""The docs site: Sphinx reads the Markdown pages here and the docstrings of lfm_jax (`make docs`)."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

project = "lfm_jax"
html_title = "lfm_jax"
extensions = [
    "myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton",
    "docstrings", "config_table", "module_list", "request_fields", "verb_help",  # in _ext
]
exclude_patterns = ["**/reading.md"]

nitpicky = True
# Types in signatures come from jax, flax and others, whose sites a build without a network cannot look into.
nitpick_ignore_regex = [("py:.*", ".*")]

myst_heading_anchors = 4
myst_links_external_new_tab = True

napoleon_numpy_docstring = False
napoleon_use_rtype = False  # What stands before a colon in "Returns" is seldom a type.
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88
add_module_names = False
python_use_unqualified_type_names = True

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b6e4f", "color-brand-content": "#0b6e4f"},
    "dark_css_variables": {"color-brand-primary": "#4cc9a0", "color-brand-content": "#4cc9a0"},
}
pygments_style = "tango"
pygments_dark_style = "monokai"

copybutton_prompt_text = "$ "
