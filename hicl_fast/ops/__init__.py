"""Operators: the torch.library schema, fake kernel, autograd and choice of backend of each, one file an operator."""
