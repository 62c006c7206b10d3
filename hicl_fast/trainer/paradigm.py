"""The gradient paradigm as a method of the trainer."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from torch import Tensor

from hicl_fast import GradientParadigmLoss, reference
from hicl_fast.trainer.method import Arguments, Views

# The ratio of the modification "r" in the paper's BERT runs (arXiv 2402.18281).
PAPER_RATIO = {"mhe": 1.75, "mhs": 1.75, "vicreg": 1.5, "barlow_twins": 1.5}


class GradientParadigm:
    """A sentence against itself under another dropout mask, or its labelled positive, by ``--objective``."""

    segmented: ClassVar[bool] = False
    most_columns: ClassVar[int | None] = 2
    max_seq_length: ClassVar[int] = 32
    options: ClassVar[frozenset[str]] = frozenset({"paradigm"})

    def __init__(self, args: Arguments, seed: int = 0) -> None:
        if args.gather == "ring":
            raise ValueError("gather: expected none or all with --method paradigm, got 'ring'")
        self.settings = settings_of(args)
        try:
            self.fused = GradientParadigmLoss(
                **self.settings,
                log_gradient_terms=args.log_gradient_terms,
                backend=args.backend,
                gather=args.gather == "all",
            )
        except (ValueError, TypeError) as error:
            raise ValueError(re.sub("^margin:", "paradigm_margin:", str(error))) from None

    def loss(self, views: Views) -> Tensor:
        return self.fused(views.anchor, views.positive)

    def reference(self, views: Views) -> Tensor:
        return reference.paradigm(views.anchor, views.positive, **self.settings)


def settings_of(args: Arguments) -> dict[str, Any]:
    """The loss's options as the arguments give them."""
    modified = tuple(part for part in args.modified.split(",") if part)
    ratio: Any = _number_or_name(args.ratio)
    if ratio is None:
        ratio = PAPER_RATIO.get(args.objective, 1.0) if "r" in modified else 1.0
    settings: dict[str, Any] = {
        "objective": args.objective,
        "modified": modified,
        "margin": args.paradigm_margin,
        "temperature": args.temp,
        "strength": args.strength,
        "ratio": ratio,
        "dissipation": None if args.dissipation == "none" else _number_or_name(args.dissipation),
    }
    kind, _, power = args.weight.partition(":")
    settings["weight"] = (kind, _number_or_name(power)) if power else kind
    return settings


def _number_or_name(text: str | None) -> float | str | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return text
