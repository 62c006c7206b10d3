"""What an InfoNCE call consists of, once its arguments have been checked: the one thing every backend is handed.

:class:`Problem` is the table of a call's fields. The registered operators' schemas, the shapes they ask for, the fake
kernels, and the calls of the reference and of other ranks' blocks follow from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hicl_fast.ops.backends.features import of_rows
from hicl_fast.ops.common.autograd import readable
from hicl_fast.ops.common.constants import Groups, Special
from hicl_fast.ops.common.numbers import check_scale, sum_type
from hicl_fast.ops.common.precision import float32_products
from hicl_fast.ops.common.ragged import check_offsets, row_of_each


class Wanted(NamedTuple):
    """Which of the inputs that can have a gradient need one. The names are :class:`Problem`'s fields."""

    query: bool
    key: bool
    negatives: bool
    extra_logits: bool
    scale: bool

    @property
    def bits(self) -> int:
        """The flags as one number, as the operators in csrc/ take them; query's is 1, key's 2, ..."""
        return sum(1 << bit for bit, is_wanted in enumerate(self) if is_wanted)


NOTHING = Wanted(False, False, False, False, False)
DIFFERENTIABLE = Wanted._fields


class Gradients(NamedTuple):
    """One gradient per input in the type the sums are kept in; an empty tensor where none was wanted."""

    query: Tensor  # (N, D)
    key: Tensor  # (M, D)
    negatives: Tensor  # (P, D)
    extra_logits: Tensor  # (N, E)
    scale: Tensor  # ()


class Mixing(NamedTuple):
    """Mixtures of each row's hard negatives among the keys, as further columns of that row (HNCSE, arXiv 2411.12156).

    Args:
        k: how many of a row's most similar keys, beside its positive and its group, are mixed.
        pairs: (N, m, 2) int64, which two of the k each mixture is of, from 0; for example of :func:`random_pairs`.
        alpha: the first one's share.
    """

    k: int
    pairs: Tensor
    alpha: float = 0.5


class RowStatistics(NamedTuple):
    """What one sweep over the similarities leaves behind for each row."""

    loss: Tensor  # (N,)
    negative_lse: Tensor  # (N,) log-sum-exp over the row's columns without its positive; −inf where there is none
    column_lse: Tensor  # (M,) the same for the column loss; empty unless the loss is symmetric
    positive: Tensor  # (N,) similarity of the positive, before any margin
    hardest: Tensor  # (N,) largest similarity among the negatives; −inf where there is none
    hard_negatives: Tensor | None = None  # (N, k) int64, with Mixing: the keys that were mixed
    total: Tensor | None = None  # () row_weight · Σ loss, where the backend has it at hand


class Result(NamedTuple):
    """What a call gives; all but the loss is detached."""

    loss: Tensor  # (), or (N,) with reduction="none"
    positive: Tensor  # (N,) similarity of each row's positive
    hardest: Tensor  # (N,) and of its hardest negative; −inf where there is none
    hard_negatives: Tensor | None = None  # (N, k) int64, the keys that were mixed


@dataclass(eq=False, slots=True)
class KindOfColumn:
    """A kind of column: vectors that every query is compared with, and the rules that hold for them.

    A new rule is a field here, its place in :meth:`Problem.columns`, and a line where each backend masks its logits.
    """

    name: str  # the field of the problem that they are, and whose gradient theirs is
    vectors: Tensor  # (C, D)
    wants_gradient: bool
    special: Special = Special.NOTHING
    special_column: Tensor | None = None  # (N,) int64; None: row i's is column i
    bias: float = 0.0  # added to the logit of a row's own negative
    groups: Groups = Groups.ORDINARY
    query_group: Tensor | None = None  # (N, G) int64, where the groups are not ordinary: one id for each relation
    group: Tensor | None = None  # (C, G) int64, likewise
    hardness: float = 0.0  # times the similarity, held constant, is added to the logit of a column that is no positive
    left_out: Tensor | None = None  # (T,) int64, columns that one row each is without,
    left_out_offsets: Tensor | None = None  # (N + 1,) int64: row i without those from offset i to the next

    @property
    def count(self) -> int:
        return self.vectors.shape[0]

    @property
    def num_relations(self) -> int:
        return 0 if self.group is None else self.group.shape[1]

    @property
    def added(self) -> tuple[float, float]:
        """The least and the most that the rules add to a logit."""
        return min(self.bias, 0.0) - self.hardness, max(self.bias, 0.0) + self.hardness

    def contiguous(self) -> KindOfColumn:
        """The same, its rules' tensors contiguous, as kernels take them."""
        rules = {name: x.contiguous() for name in _RULE_TENSORS if (x := getattr(self, name)) is not None}
        return replace(self, **rules)


_RULE_TENSORS = [one.name for one in fields(KindOfColumn) if "Tensor" in str(one.type) and one.name != "vectors"]


def _tensor(shape: str, *, optional: bool = False) -> Any:
    """A field of a shape, a letter for each dimension, as ``check_shapes`` takes it."""
    return field(default=None, metadata={"shape": shape}) if optional else field(metadata={"shape": shape})


@dataclass(eq=False, slots=True)
class Problem:
    """The columns of a row are, in order: M keys, P explicit negatives, B bank rows, E extra logits."""

    query: Tensor = _tensor("ND")
    key: Tensor = _tensor("MD")
    scale: Tensor = _tensor("")  # 1 / temperature; on the CPU where its value is known to the host
    target: Tensor | None = _tensor("N", optional=True)  # int64; None: row i's positive is key i
    negatives: Tensor | None = _tensor("PD", optional=True)
    bank: Tensor | None = _tensor("BD", optional=True)
    extra_logits: Tensor | None = _tensor("NE", optional=True)

    # int64. Row and column are of one group where one of their G ids is the same.
    query_group: Tensor | None = _tensor("NG", optional=True)
    key_group: Tensor | None = _tensor("MG", optional=True)
    negatives_group: Tensor | None = _tensor("PG", optional=True)
    bank_group: Tensor | None = _tensor("BG", optional=True)

    # int64. Where rows have several positives: all rows' lists of keys one after the other, and where each begins and ends.
    # `target` has the first of each list, and none of a list is a negative of its row.
    targets: Tensor | None = _tensor("T", optional=True)
    target_offsets: Tensor | None = _tensor("O", optional=True)

    # A column is left out, unless it is a positive, where its similarity is above the lowest of these:
    limit: Tensor | None = _tensor("N", optional=True)
    false_negative_margin: float = math.inf  # the positive's similarity plus this
    false_negative_ratio: float = math.inf  # this times the positive's similarity, where that is above 0

    # Times the similarity, held constant, is added to the logits of those that are no positives.
    key_hardness: float = 0.0
    negatives_hardness: float = 0.0
    bank_hardness: float = 0.0

    hard_negative_weight: float = 0.0  # added to the logit of row i's own negative; 0: no negative is anyone's own
    same_group: str = "exclude"  # "exclude" | "negative" | "positive"
    margin: float = 0.0  # radians
    symmetric: bool = False  # only without negatives, bank, extra logits, target and several positives
    precision: str = "default"  # of the products: "default" | "float32" | "bf16"

    @property
    def dtype(self) -> torch.dtype:
        """The type sums, losses and logits are kept in: float64 if an input is float64, else float32."""
        return sum_type(self.query, self.key, self.negatives, self.bank, self.extra_logits)

    def with_exact_products(self) -> Problem:
        """The problem, in float64 where it asks for float32 products and PyTorch's would be rounded to less."""
        if self.precision != "float32" or self.dtype != torch.float32:
            return self
        if float32_products(self.query.device.type) == "ieee":
            return self
        return replace(self, query=self.query.double())  # one input in float64 makes the sums float64

    def columns(self, wanted: Wanted) -> list[KindOfColumn]:
        """The kinds of column that are vectors, the keys first."""
        groups, hardness = self._groups(self.key_group), self.key_hardness
        lists = self.targets, self.target_offsets
        keys = KindOfColumn("key", self.key, wanted.key, Special.POSITIVE, self.target, 0.0, *groups, hardness, *lists)
        kinds = [keys]
        if self.negatives is not None:
            own, bias = Special.NOTHING, self.hard_negative_weight
            if bias:
                own = Special.OWN_NEGATIVE
            groups, hardness = self._groups(self.negatives_group), self.negatives_hardness
            kinds.append(
                KindOfColumn("negatives", self.negatives, wanted.negatives, own, None, bias, *groups, hardness)
            )
        if self.bank is not None:
            groups, hardness = self._groups(self.bank_group), self.bank_hardness
            kinds.append(KindOfColumn("bank", self.bank, False, Special.NOTHING, None, 0.0, *groups, hardness))
        return kinds

    def _groups(self, group: Tensor | None) -> tuple[Groups, Tensor | None, Tensor | None]:
        """What columns of a row's group are to it, where they have groups (C, G), and those of rows and columns."""
        meaning = GROUPS[self.same_group]
        if self.query_group is None or group is None or meaning == Groups.ORDINARY:
            return Groups.ORDINARY, None, None
        return meaning, self.query_group, group

    @property
    def has_limit(self) -> bool:
        return self.limit is not None or min(self.false_negative_margin, self.false_negative_ratio) < math.inf

    def row_of_targets(self) -> Tensor:  # (T,) int64
        """Where rows have several positives: the row that each is of."""
        assert self.targets is not None and self.target_offsets is not None
        return row_of_each(self.target_offsets, self.targets.shape[0])

    def one_relation(self) -> tuple[Tensor | None, Tensor | None]:
        """Groups (N,) and (M,) of queries and keys, for what knows of one relation; ``None`` where they mean nothing."""
        if self.query_group is None or self.key_group is None or GROUPS[self.same_group] == Groups.ORDINARY:
            return None, None
        return self.query_group[:, 0], self.key_group[:, 0]

    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The inputs that can have gradients, in the order of :class:`Wanted` and :class:`Gradients`."""
        return tuple([getattr(self, name) for name in DIFFERENTIABLE])

    def constants(self) -> tuple[Tensor | None, ...]:
        """The tensors that can have none, as far as there are any."""
        return tuple([x for name in _CONSTANTS if (x := getattr(self, name)) is not None])

    def flat(self) -> list[Any]:
        """As the registered operators take it."""
        return [getattr(self, name) for name in FIELDS]

    def shapes(self) -> dict[str, tuple[Tensor | None, str]]:
        """By name each tensor and the shape that it must have."""
        table = str.maketrans({"M": "N"} if self.symmetric else {})
        return {name: (getattr(self, name), shape.translate(table)) for name, shape in _SHAPES.items()}

    def features(self) -> tuple[str, ...]:
        """What the call asks beyond the plain one, in the words in which a backend refuses it."""
        # The conditions are Python's own, so that a compiler tracing the call can settle them.
        columns = (self.key, self.negatives, self.extra_logits)
        found = list(of_rows(self.query, *(x for x in columns if x is not None)))
        if self.bank is not None:
            found.append("a bank")
        if self.query_group is not None and self.same_group == "positive":
            found.append("several positives")
        if self.query_group is not None and self.query_group.shape[1] > 1:
            found.append("several relations")
        if self.negatives_group is not None:
            found.append("groups of explicit negatives")
        if self.has_limit:
            found.append("a limit")
        if self.targets is not None:
            found.append("several targets")
        if self.key_hardness or self.negatives_hardness or self.bank_hardness:
            found.append("hardness")
        if self.symmetric:
            found.append("a symmetric loss")
        return tuple(found)

    def check_values(self) -> None:
        """Raise ``ValueError`` for a target or temperature out of range.

        Looks at host memory only: a device is never waited for.
        """
        check_scale(self.scale)
        if self.targets is not None and self.target_offsets is not None:
            check_offsets("target_offsets", self.target_offsets, self.targets.shape[0], "targets", least=1)
        if (target := readable(self.target if self.targets is None else self.targets)) is not None:
            low, high = (int(bound) for bound in torch.aminmax(target))
            if low < 0 or high >= self.key.shape[0]:
                raise ValueError(
                    f"target: expected indices of keys, 0 to {self.key.shape[0] - 1}, got values from {low} to {high}"
                )


GROUPS = {"exclude": Groups.EXCLUDED, "negative": Groups.ORDINARY, "positive": Groups.POSITIVES}

FIELDS = [one.name for one in fields(Problem)]
_SHAPES = {
    one.name: one.metadata["shape"] for one in fields(Problem) if "shape" in one.metadata and one.name != "scale"
}

_CONSTANTS = [name for name in _SHAPES if name not in DIFFERENTIABLE]

# As torch.library writes the fields of a call, and its gradients.
_SCHEMA_TYPES = {"Tensor": "Tensor", "Tensor | None": "Tensor?", "float": "float", "str": "str", "bool": "bool"}
SCHEMA = ", ".join(f"{_SCHEMA_TYPES[one.type]} {one.name}" for one in fields(Problem))  # type: ignore[index]
GRADIENTS_SCHEMA = ", ".join(f"Tensor {name}_grad" for name in DIFFERENTIABLE)
