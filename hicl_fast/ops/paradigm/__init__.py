"""The losses of the gradient paradigm. ``api`` is the function, ``reference`` its equation."""
