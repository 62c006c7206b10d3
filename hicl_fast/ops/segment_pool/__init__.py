"""Weighted means over ragged sequences. ``api`` is the function, ``reference`` its equation."""
