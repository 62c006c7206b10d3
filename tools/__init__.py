"""Programs for whoever works on the library; make runs them."""
