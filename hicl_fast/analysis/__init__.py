"""What drives a gradient: the paradigm's three parts of live embeddings. ``python -m hicl_fast.analysis`` draws figures."""

from hicl_fast.analysis.terms import GradientTerms, gradient_terms

__all__ = ["GradientTerms", "gradient_terms"]
