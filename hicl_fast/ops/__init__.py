"""The operators, a folder each; what they share in ``common``, what a backend is in ``backends``.

A folder has, in the order of a call: ``api`` (signature and checks), ``operator`` (schema, fake kernel, autograd, choice of a
backend), a file for each backend, and ``reference``, the equation that they are all measured against.
"""

from hicl_fast.ops.backends import extension  # noqa: F401  loads what the operators call
