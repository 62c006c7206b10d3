"""The numbers and names that define the mathematics, shared by reference, operators and kernels. It imports none of them.

csrc/constants.h has copies (``kNormFloor``, ...); tests/csrc/test_constants.py holds them equal to these.
"""

from __future__ import annotations

import enum
from typing import Literal

NORM_FLOOR = 1e-12  # x̂ = x / max(‖x‖, NORM_FLOOR)
ANGLE_CLAMP = 1e-7  # θ = arccos(clamp(s, −1 + ANGLE_CLAMP, 1 − ANGLE_CLAMP))
DISTANCE_FLOOR = 1e-4  # of squared distances between unit rows
POWER_FLOOR = 1e-4  # of similarities under a power
SMALLEST_SUM = 1e-6  # of the two similarities that a positive is mixed by
GRID_STEPS = 20  # of positive mixing's search: it tries weights 0, 0.1, ..., 2.0

# ‖g‖² of a mixture comes from a sum whose terms can cancel, with an error of a few roundings of the terms. A smaller result
# has no digits that are right: such a mixture has no direction.
VANISHING = 16  # roundings

SameGroup = Literal["exclude", "negative", "positive"]
Reduction = Literal["mean", "sum", "none"]


class Special(enum.IntEnum):
    """What a row's special column of a kind is."""

    NOTHING = 0  # no column is anyone's
    POSITIVE = 1  # the target: left out of the softmax's sum, and accounted for by itself
    OWN_NEGATIVE = 2  # the explicit negative that belongs to the row: its logit gets a bias


class Groups(enum.IntEnum):
    """What the columns of a row's own group are to the row."""

    ORDINARY = 0  # negatives like all others
    EXCLUDED = 1  # left out
    POSITIVES = 2  # further positives, beside the target
