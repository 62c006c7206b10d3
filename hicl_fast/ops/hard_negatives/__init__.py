"""Each row's hardest negatives. ``api`` is the function, ``reference`` its equation."""
