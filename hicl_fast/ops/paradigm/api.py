"""The losses of the gradient paradigm."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from hicl_fast import _checks as check
from hicl_fast.ops.info_nce.problem import Result
from hicl_fast.ops.paradigm import operator as op
from hicl_fast.ops.paradigm.settings import (
    DEFAULT_MARGIN,
    HINGES,
    MODIFIABLE,
    OBJECTIVES,
    PARAMETRIC_WEIGHTS,
    Dissipation,
    Modification,
    Objective,
    Ratio,
    Settings,
    Weight,
)


def paradigm(
    u: Tensor,  # (N, D)
    v: Tensor,  # (N, D)
    objective: Objective,
    *,
    modified: Collection[Modification] = (),
    margin: float | None = None,
    temperature: float = 0.05,
    strength: float = 1.0,
    dissipation: Dissipation = "softmax",
    weight: Weight = "softmax",
    ratio: Ratio = 1.0,
    backend: str = "auto",
) -> Tensor:
    r"""A loss of the gradient paradigm (arXiv 2402.18281) between two views, without the N×N matrix.

    .. math:: \frac{\partial L_i}{\partial u_i} =
              \mathrm{GD}_i \sum_{j \ne i} W_{ij} \, (v_j - R_{ij} \, v_i)

    with u and v normalised: gradient dissipation, weight and ratio. docs/paradigm.md has each objective's equation.
    Inputs may be float64, float32, bfloat16 or float16, of mixed types and any strides; sums are kept in float32
    (float64). A zero row has similarity 0 to everything and gets gradient 0.

    Further derivatives are those of plain PyTorch, at its cost: whatever an equation holds constant stays constant in them.

    Args:
        u: (N, D) one view; need not be normalised. A single row has no negatives: see docs/paradigm.md.
        v: (N, D) the other; row i is u_i's positive, all others its negatives.
        objective: ``"info_nce"``, ``"arccon"``, ``"mpt"``, ``"met"``, ``"mat"``; ``"custom"``: the equation with
            ``dissipation``, ``weight`` and ``ratio``, in both directions, each with the other view constant; or a loss
            that is not contrastive: ``"mhe"`` (alignment and uniformity), ``"mhs"``, ``"vicreg"``, ``"barlow_twins"``.
        modified: of those last four, what is replaced by the paper's: any of ``"gd"``, ``"w"``, ``"r"``. The weight of
            ``"mhs"`` is its nearest negative already, so ``"w"`` changes nothing there.
        margin: ArcCon's angle u and MAT's m in radians, MET's m as a distance, else m as a similarity: of the hinge, or
            of the modified dissipation. Default: the paper's.
        temperature: τ > 0, of every softmax.
        strength: λ > 0, of what drives the rows apart in the last four.
        dissipation: of ``"custom"``: ``"softmax"``; a margin m, for 1[s_ii − max s_ij < m]; ``None``, for 1; or a
            function of :class:`hicl_fast.reference.PairStatistics` that gives (N,).
        weight: of ``"custom"``: ``"softmax"`` (over negatives, times 1/τ), ``"uniform"``, ``"hardest"``,
            ``("power", p)`` (max(s, 1e-4)^p, normalised over negatives), or a function of some rows' similarities
            (R, N) and their statistics that gives (R, N); what it gives on the diagonal is ignored.
        ratio: of ``"custom"`` and of the modification ``"r"``: a number. Of ``"custom"`` also ``"arccon"``, ``"met"``,
            ``"mat"`` (those losses' ratios, with the hardest negative), or a function of the statistics that gives (N,).
        backend: ``"auto"``, ``"torch"``, ``"cpp"``, ``"triton"`` or ``"cuda"`` (the first two objectives alone).

    Returns:
        A float32 (float64) scalar. NaN or Inf in an input gives NaN.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        hicl_fast.BackendError: the backend asked for is not there or does not do this call.
    """
    return paradigm_with_statistics(
        u,
        v,
        objective,
        modified=modified,
        margin=margin,
        temperature=temperature,
        strength=strength,
        dissipation=dissipation,
        weight=weight,
        ratio=ratio,
        backend=backend,
    ).loss


def paradigm_with_statistics(
    u: Tensor,
    v: Tensor,
    objective: Objective,
    *,
    modified: Collection[Modification] = (),
    margin: float | None = None,
    temperature: float = 0.05,
    strength: float = 1.0,
    dissipation: Dissipation = "softmax",
    weight: Weight = "softmax",
    ratio: Ratio = 1.0,
    backend: str = "auto",
) -> Result:
    """:func:`paradigm`, and the detached similarities of each row's positive (N,) and of its hardest negative.

    The second is (N,), for ``"mhe"``, ``"vicreg"`` and ``"barlow_twins"`` (and ``"mhs"`` with ``"gd"``) of the
    nearest neighbour in u_i's own view; it is empty for the last two as they stand, which look at no single pair.
    """
    settings = paradigm_settings(
        objective, modified, margin, temperature, strength, dissipation=dissipation, weight=weight, ratio=ratio
    )
    check_views(u, v)
    return op.apply(u, v, settings, backend)


def check_views(u: Tensor, v: Tensor, fewest: int = 1) -> None:
    """Two views of a batch of at least so many rows."""
    check.floating_matrix("u", u, "(N, D)")
    check.floating_matrix("v", v, "(N, D)", like=u)
    if u.shape[0] < fewest or u.shape[1] == 0:
        rows = "two rows" if fewest == 2 else "one row"
        raise ValueError(f"u: expected at least {rows} and one dimension, got {check.describe(u)}")
    if v.shape != u.shape:
        raise ValueError(f"v: expected shape {tuple(u.shape)}, as u has, got {check.describe(v)}")


def paradigm_settings(
    objective: Objective,
    modified: Collection[Modification],
    margin: float | None,
    temperature: float,
    strength: float,
    *,
    dissipation: Dissipation,
    weight: Weight,
    ratio: Ratio,
) -> Settings:
    """The arguments of :func:`paradigm` that are not tensors, checked."""
    check.one_of("objective", objective, OBJECTIVES)
    if isinstance(modified, str) or not isinstance(modified, Collection):
        raise TypeError(f"modified: expected a collection of names, got {check.describe(modified)}")
    for name in modified:
        check.one_of("modified", name, ("gd", "w", "r"))
    if modified and objective not in MODIFIABLE:
        raise ValueError(
            f"modified: expected none with {objective!r}, got {check.shown(modified)}; "
            f"only {', '.join(MODIFIABLE)} have modified forms"
        )
    margin = DEFAULT_MARGIN[objective] if margin is None else margin
    if objective == "arccon":
        check.angle("margin", margin)
    elif objective in HINGES:
        check.non_negative_number("margin", margin)
    else:
        check.real_number("margin", margin)
    if margin != DEFAULT_MARGIN[objective] and not _has_margin(objective, modified):
        why = {"info_nce": "'arccon' has one", "custom": "a number as its dissipation is one"}.get(
            objective, "the modification 'gd' has one"
        )
        raise ValueError(f"margin: expected none with {objective!r}, got {check.shown(margin)}; {why}")
    check.positive_number("temperature", temperature)
    check.positive_number("strength", strength)
    if strength != 1.0 and objective not in MODIFIABLE:
        raise ValueError(
            f"strength: expected 1.0 with {objective!r}, got {check.shown(strength)}; only {', '.join(MODIFIABLE)} have one"
        )
    if objective == "custom":
        _check_parts(dissipation, weight, ratio)
    else:
        for part, value in (("dissipation", dissipation), ("weight", weight)):
            if not isinstance(value, str) or value != "softmax":
                raise ValueError(
                    f"{part}: expected the default with {objective!r}, got {check.describe(value)}; "
                    "only 'custom' has its own"
                )
        check.real_number("ratio", ratio)
        if ratio != 1.0 and "r" not in modified:
            raise ValueError(f"ratio: expected 1.0 without 'custom' or the modification 'r', got {check.shown(ratio)}")
    chosen = tuple(name for name in ("gd", "w", "r") if name in modified)
    return Settings(objective, chosen, float(margin), float(temperature), float(strength), dissipation, weight, ratio)


def _has_margin(objective: Objective, modified: Collection[Modification]) -> bool:
    return "gd" in modified if objective in MODIFIABLE else objective not in ("info_nce", "custom")


def _check_parts(dissipation: Dissipation, weight: Weight, ratio: Ratio) -> None:
    if isinstance(dissipation, str):
        check.one_of("dissipation", dissipation, ("softmax",))
    elif dissipation is not None and not callable(dissipation):
        check.real_number("dissipation", dissipation)
    if isinstance(weight, (tuple, list)):
        if len(weight) != 2 or not isinstance(weight[0], str) or weight[0] not in PARAMETRIC_WEIGHTS:
            raise ValueError(f"weight: expected ('power', p), got {check.describe(weight)}")
        check.real_number("weight", weight[1])
    elif not callable(weight):
        check.one_of("weight", weight, ("softmax", "uniform", "hardest"))
    if isinstance(ratio, str):
        check.one_of("ratio", ratio, ("arccon", "met", "mat"))
    elif not callable(ratio):
        check.real_number("ratio", ratio)
