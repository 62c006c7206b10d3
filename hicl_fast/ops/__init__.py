"""Operators: the torch.library schema, fake kernel, autograd and choice of backend of each, one file an operator."""

from hicl_fast.backend import extension  # noqa: F401  loads what the operators call
