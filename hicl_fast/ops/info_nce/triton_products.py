"""The gradients' matrix products, ``dQ̂ = A K̂`` and ``dK̂ = Aᵀ Q̂``, through the library, with float32 sums."""

from __future__ import annotations

import torch
from torch import Tensor

from hicl_fast.kernels import products
from hicl_fast.kernels.rows import Partners
from hicl_fast.ops.common.constants import NORM_FLOOR, Special
from hicl_fast.ops.common.precision import float32_products
from hicl_fast.ops.info_nce.triton_operands import Operands


def matmul(a: Tensor, b: Tensor, precision: str, onto: Tensor | None = None) -> Tensor:
    """``a @ b`` in float32, added to ``onto`` in place if that is given.

    ``precision`` of float32 operands: "ieee", or "tf32" where PyTorch's own products are.
    """
    if a.dtype == torch.float32 and precision == "ieee" != float32_products(a.device.type):
        return products.product(a, b, onto)  # the library's would be rounded, by a setting that isn't ours to change
    if not a.is_cpu and a.dtype != torch.float32:
        if onto is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.addmm(onto, a, b, out_dtype=torch.float32, out=onto)
    a, b = a.float(), b.float()
    return torch.mm(a, b) if onto is None else torch.addmm(onto, a, b, out=onto)


class InputGradients:
    """Gradients of query, key and negatives, gathered from chunks of rows."""

    def __init__(self, operands: Operands) -> None:
        self._operands = operands
        self._products: list[Tensor | None] = [None] * len(operands.kinds)  # of the columns
        self.query = operands.positive.new_empty(operands.problem.query.shape if operands.wanted.query else (0,))

    def add(
        self,
        rows: slice,
        stored: list[Tensor],  # (R, C) for each kind of column: ∂loss/∂s up to the factors, without the target
        row_factor: Tensor,  # (R,) that makes ∂loss/∂s of it
        scaled_query: Tensor,  # (R, D) unit rows times their factor for the columns' gradients
        coefficient: Tensor,  # (R,) ∂loss/∂s at the target
    ) -> None:
        operands = self._operands
        if operands.wanted.query:
            product = None
            for gradient, kind in zip(stored, operands.kinds, strict=True):
                if kind.unit is not None and kind.count:
                    product = matmul(gradient, kind.unit, operands.precision, onto=product)
            assert product is not None  # there is at least one key
            partners = Partners(operands.keys.vectors, coefficient, operands.target[rows])
            by_row = operands.row_kernels.gradient
            by_row(product, row_factor, operands.query[rows], partners, NORM_FLOOR, self.query[rows])
        for i, (gradient, kind) in enumerate(zip(stored, operands.kinds, strict=True)):
            if kind.rules.wants_gradient:
                self._products[i] = matmul(gradient.T, scaled_query, operands.precision, onto=self._products[i])

    def columns(self, factor: Tensor, coefficient: Tensor) -> dict[str, Tensor]:
        """The kinds' gradients (C, D) by name; ``factor`` (1,) undoes the scaled query's, coefficient (N,)."""
        operands = self._operands
        found = {}
        for product, kind in zip(self._products, operands.kinds, strict=True):
            if product is None:
                continue
            partners = self._partners(coefficient) if kind.rules.special == Special.POSITIVE else None
            by_row = operands.row_kernels.gradient
            by_row(product, factor.expand(product.shape[0]), kind.vectors, partners, NORM_FLOOR, product)
            found[kind.rules.name] = product  # in its product's memory
        return found

    def _partners(self, coefficient: Tensor) -> Partners:
        """The rows that a key is the target of."""
        index, begin = self._operands.rows_by_target or (None, None)
        return Partners(self._operands.query, coefficient, index, begin)
