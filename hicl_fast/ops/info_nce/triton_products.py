"""The gradients' matrix products, ``dQ̂ = A K̂`` and ``dK̂ = Aᵀ Q̂``, through the library, with float32 sums."""

from __future__ import annotations

import torch
from torch import Tensor

from hicl_fast.kernels import launch
from hicl_fast.kernels.launch import Partners
from hicl_fast.ops.common.constants import NORM_FLOOR
from hicl_fast.ops.common.precision import float32_products
from hicl_fast.ops.info_nce.problem import Wanted
from hicl_fast.ops.info_nce.triton_operands import Operands


def matmul(a: Tensor, b: Tensor, precision: str, onto: Tensor | None = None) -> Tensor:
    """``a @ b`` in float32, added to ``onto`` in place if that is given.

    ``precision`` of float32 operands: "ieee", or "tf32" where PyTorch's own products are.
    """
    if a.dtype == torch.float32 and precision == "ieee" != float32_products(a.device.type):
        return launch.product(a, b, onto)  # the library's would be rounded, by a setting that isn't ours to change
    if not a.is_cpu and a.dtype != torch.float32:
        if onto is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.addmm(onto, a, b, out_dtype=torch.float32, out=onto)
    a, b = a.float(), b.float()
    return torch.mm(a, b) if onto is None else torch.addmm(onto, a, b, out=onto)


class InputGradients:
    """Gradients of query, key and negatives, gathered from chunks of rows."""

    def __init__(self, operands: Operands, wanted: Wanted) -> None:
        self._operands = operands
        self._column_is_wanted = [wanted.key, wanted.negatives and operands.problem.negatives is not None, False]
        self._column_products: list[Tensor | None] = [None] * len(operands.columns)
        self._wants_query = wanted.query
        self.query = operands.positive.new_empty(operands.problem.query.shape if wanted.query else (0,))

    def add(
        self,
        rows: slice,
        slopes: list[Tensor],  # (R, C) for each kind of column: ∂loss/∂s up to the factors, without the target
        row_factor: Tensor,  # (R,) that turns slopes into ∂loss/∂s
        scaled_query: Tensor,  # (R, D) unit rows times their factor for the columns' gradients
        coefficient: Tensor,  # (R,) ∂loss/∂s at the target
    ) -> None:
        operands = self._operands
        if self._wants_query:
            product = None
            for slope, unit in zip(slopes, operands.units, strict=True):
                if unit is not None and unit.shape[0]:
                    product = matmul(slope, unit, operands.precision, onto=product)
            assert product is not None  # there is at least one key
            partners = Partners(operands.columns[0].vectors, coefficient, operands.target[rows])
            by_row = operands.row_kernels.gradient
            by_row(product, row_factor, operands.query[rows], partners, NORM_FLOOR, self.query[rows])
        for i, slope in enumerate(slopes):
            if self._column_is_wanted[i]:
                self._column_products[i] = matmul(
                    slope.T, scaled_query, operands.precision, onto=self._column_products[i]
                )

    def columns(self, factor: Tensor, coefficient: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of key (M, D) and negatives (P, D); ``factor`` (1,) undoes the scaled query's, coefficient (N,)."""
        operands = self._operands
        by_target = operands.rows_by_target if self._column_is_wanted[0] else None
        index, begin = (None, None) if by_target is None else by_target
        key = self._finish(0, factor, Partners(operands.query, coefficient, index, begin))
        return key, self._finish(1, factor, None)

    def _finish(self, i: int, factor: Tensor, partners: Partners | None) -> Tensor:
        """The gradient of a kind of column, in its product's memory; empty where it isn't wanted."""
        if not self._column_is_wanted[i]:
            return self._operands.positive.new_empty(0)
        product, vectors = self._column_products[i], self._operands.columns[i].vectors
        assert product is not None  # there is at least one row
        by_row = self._operands.row_kernels.gradient
        by_row(product, factor.expand(product.shape[0]), vectors, partners, NORM_FLOOR, product)
        return product
