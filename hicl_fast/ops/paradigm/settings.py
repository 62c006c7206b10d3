"""The gradient paradigm's words, and what a call of it asks for once its arguments have been checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

Objective = Literal["info_nce", "arccon", "mpt", "met", "mat", "custom", "mhe", "mhs", "vicreg", "barlow_twins"]
Modification = Literal["gd", "w", "r"]

PARAMETRIC_WEIGHTS = ("power",)  # those that are written (name, parameter)

# u of ArcCon in radians, m of the rest; for the last four, m of the modified dissipation.
DEFAULT_MARGIN = {
    "info_nce": 0.0,
    "arccon": math.radians(10),
    "mpt": 0.23,
    "met": 0.45,
    "mat": 0.15 * math.pi,
    "custom": 0.0,
    "mhe": 0.30,
    "mhs": 0.30,
    "vicreg": 0.30,
    "barlow_twins": 0.30,
}
OBJECTIVES = tuple(DEFAULT_MARGIN)
HINGES = ("mpt", "met", "mat")
MODIFIABLE = ("mhe", "mhs", "vicreg", "barlow_twins")


class PairStatistics(NamedTuple):
    """What each row knows of its similarities ``s_ij = x_i·y_j``."""

    positive: Tensor  # (N,) s_ii
    hardest: Tensor  # (N,) max_{j≠i} s_ij
    nearest: Tensor  # (N,) int64, where that is; the first of several
    lse: Tensor  # (N,) log Σ_{j≠i} exp(s_ij / τ)


Dissipation = Literal["softmax"] | float | Callable[[PairStatistics], Tensor] | None
Weight = (
    Literal["softmax", "uniform", "hardest"]
    | tuple[Literal["power"], float]
    | Callable[[Tensor, PairStatistics], Tensor]
)
Ratio = Literal["arccon", "met", "mat"] | float | Callable[[PairStatistics], Tensor]


SCHEMA = (
    "str objective, str[] modified, float margin, float temperature, float strength, "
    "str dissipation, float dissipation_margin, str weight, float power, str ratio, float ratio_value"
)
NUM_FIELDS = 11


@dataclass(frozen=True)
class Settings:
    objective: str
    modified: tuple[str, ...] = ()
    margin: float = 0.0  # radians (ArcCon, MAT), distance (MET) or similarity
    temperature: float = 0.05
    strength: float = 1.0  # λ
    dissipation: Dissipation = "softmax"
    weight: Weight = "softmax"
    ratio: Ratio = 1.0

    @property
    def has_callables(self) -> bool:
        return callable(self.dissipation) or callable(self.weight) or callable(self.ratio)

    @property
    def knows_hardest(self) -> bool:
        """Whether the loss looks at single similarities with negatives at all."""
        return self.objective not in ("vicreg", "barlow_twins") or bool({"gd", "w"} & set(self.modified))

    def flat(self) -> tuple[Any, ...]:
        """As an operator takes it: SCHEMA. Only without callables."""
        dissipation, margin = _name_and_number(self.dissipation, "margin")
        weight, power = self.weight if isinstance(self.weight, tuple) else (self.weight, 0.0)
        ratio, value = _name_and_number(self.ratio, "constant")
        first = (self.objective, list(self.modified), self.margin, self.temperature, self.strength)
        return *first, dissipation, margin, weight, float(power), ratio, value

    @staticmethod
    def of_flat(flat: tuple[Any, ...]) -> Settings:
        objective, modified, margin, temperature, strength, dissipation, bound, weight, power, ratio, value = flat
        return Settings(
            objective,
            tuple(modified),
            margin,
            temperature,
            strength,
            {"margin": bound, "none": None}.get(dissipation, dissipation),
            (weight, power) if weight in PARAMETRIC_WEIGHTS else weight,
            value if ratio == "constant" else ratio,
        )


def _name_and_number(value: Any, number_is: str) -> tuple[str, float]:
    if value is None:
        return "none", 0.0
    return (value, 0.0) if isinstance(value, str) else (number_is, float(value))
