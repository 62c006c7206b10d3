"""The losses inside other people's training code: one module for each library, imported by name.

Importing :mod:`hicl_fast` imports none of the libraries; importing a module here without its library says what to install.
"""
