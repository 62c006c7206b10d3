"""Positives mixed with hard negatives. ``api`` is the function, ``reference`` its equation."""
