"""The API reference, from the docstrings: `make docs` writes it to build/docs."""

from importlib.metadata import version as installed_version

project = "hicl_fast"
version = release = installed_version("hicl-fast")
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature's comments and the docstring say more
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_use_rtype = False
html_theme = "alabaster"
html_theme_options = {
    "description": "Contrastive losses for sentence embeddings as custom kernels",
    "page_width": "70em",
}
