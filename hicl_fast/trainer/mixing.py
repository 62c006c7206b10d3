"""HNCSE's mixing in the trainer's methods: the modules as the arguments describe them, and the same in plain PyTorch."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from hicl_fast import FusedInfoNCELoss, HardNegativeMixing, PositiveMixing, reference
from hicl_fast import _checks as check
from hicl_fast.ops.positive_mixing.operator import Weights
from hicl_fast.trainer.method import Arguments


class Mixes(NamedTuple):
    """What a method mixes."""

    negatives: bool = False
    positives: bool = False


def modules(mixes: Mixes, args: Arguments, seed: int) -> dict[str, Any]:
    """The loss modules' arguments for what is mixed."""
    found: dict[str, Any] = {}
    if mixes.negatives:
        found["hard_negative_mixing"] = HardNegativeMixing(
            args.num_hard_negatives,
            args.num_mixed,
            args.mixing_alpha,
            bank=args.bank,  # type: ignore[arg-type]
            queue_size=args.queue_size,
            require_k=args.require_hard_negatives,
            seed=seed,
            backend=args.backend,
        )
    if mixes.positives:
        found["positive_mixing"] = PositiveMixing(
            args.positive_threshold, _weights(args.positive_weights), backend=args.backend
        )
    return found


def reference_info_nce(loss: FusedInfoNCELoss, query: Tensor, key: Tensor, **options: Any) -> Tensor:
    """The reference of what the fused loss computed last, (N, D) and (M, D), with the negatives and pairs it mixed.

    Selection is not repeated: two negatives that are equally hard to float rounding may be told apart either way.
    """
    positives, negatives = loss.positive_mixing, loss.hard_negative_mixing
    if positives is not None and positives.hardest is not None:
        key = reference.positive_mixing(
            query, key, key[positives.hardest], threshold=positives.threshold, weights=positives.weights
        )
    if negatives is not None and negatives.mixed is not None:
        mixed = negatives.mixed
        options["extra_logits"] = reference.mixed_negative_logits(
            query,
            key if mixed.bank is None else mixed.bank.to(query.dtype),
            mixed.index,
            mixed.pairs,
            alpha=negatives.alpha,
            temperature=options["temperature"],
        )
    return reference.info_nce(query, key, **options)


def _weights(text: str) -> Weights:
    if text == "search":
        return "search"
    try:
        first, second = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"positive_weights: expected two numbers, as 1.0,0.1, or search, got {check.shown(text)}"
        ) from None
    for weight in (first, second):
        check.real_number("positive_weights", weight)
    return first, second
