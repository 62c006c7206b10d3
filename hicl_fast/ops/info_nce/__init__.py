"""InfoNCE over cosine similarities. ``api`` is the function, ``reference`` its equation."""
