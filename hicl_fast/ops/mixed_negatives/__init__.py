"""Mixtures of a row's hard negatives. ``api`` is the function, ``reference`` its equation."""
