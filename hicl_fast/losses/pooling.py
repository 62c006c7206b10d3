"""HiCL's aggregation of segments into sequences."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from hicl_fast import _checks as check
from hicl_fast import functional as HF
from hicl_fast.ops.backends import registry

Pooling = Literal["length", "mean"]


class SegmentPooling(nn.Module):
    r"""Weighted mean of each sequence's segments: :math:`H_b = \sum_j w_{bj} h_{bj} / \sum_j w_{bj}`.

    HiCL (arXiv 2310.09720) weights a segment by its number of tokens.

    Args:
        pooling: ``"length"`` weights by ``lengths``; ``"mean"`` weights all segments alike.
        backend: see :func:`hicl_fast.functional.segment_pool`.
    """

    def __init__(self, pooling: Pooling = "length", *, backend: str = "auto") -> None:
        super().__init__()
        check.one_of("pooling", pooling, ("length", "mean"))
        registry.check_name(backend)
        self.pooling, self.backend = pooling, backend

    def forward(self, segments: Tensor, offsets: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Pool ``segments`` (S, D), cut by ``offsets`` (B + 1,) int64, weighted by ``lengths`` (S,) tokens. -> (B, D)

        Raises:
            ValueError: ``pooling="length"`` without lengths, or as :func:`hicl_fast.functional.segment_pool` says.
        """
        if self.pooling == "mean":
            return HF.segment_pool(segments, offsets, backend=self.backend)
        if lengths is None:
            raise ValueError(
                'lengths: expected the number of tokens of each segment, as pooling="length" needs, got None'
            )
        return HF.segment_pool(segments, offsets, lengths, backend=self.backend)

    def extra_repr(self) -> str:
        return f"{self.pooling!r}"
