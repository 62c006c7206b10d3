"""csrc/constants.h says what hicl_fast/ops/common/constants.py says."""

from __future__ import annotations

import enum
import re
from pathlib import Path

import pytest
import torch

import hicl_fast
from hicl_fast.ops.common import constants

HEADER = Path(__file__).resolve().parents[2] / "csrc" / "constants.h"


@pytest.mark.skipif(
    not any(s.name == "cpp" and s.available for s in hicl_fast.backends()), reason="needs the C++ extension"
)
def test_the_copies_are_equal() -> None:
    of_csrc = dict(line.split(" ") for line in torch.ops.hicl_fast_cpp.constants().splitlines())
    for name, value in of_csrc.items():
        expected = constants
        for part in name.split("."):
            expected = getattr(expected, part)
        assert float(value) == float(expected), name
    enums = [x for x in vars(constants).values() if isinstance(x, type) and issubclass(x, enum.IntEnum)]
    members = {f"{kind.__name__}.{member.name}" for kind in enums if kind is not enum.IntEnum for member in kind}
    assert members == {name for name in of_csrc if "." in name}
    assert len(of_csrc) == len(re.findall(r"\bk\w+ = ", HEADER.read_text())), (
        "csrc/constants.h has one that isn't compared"
    )


def test_nothing_else_in_csrc_has_a_copy() -> None:
    numbers = re.compile(r"\b1e-(?:4|7|12)f?\b")
    found = {
        path.name
        for path in HEADER.parent.rglob("*.*")
        if path.suffix in {".h", ".cpp", ".cuh", ".cu"} and numbers.search(_code(path))
    }
    assert found == {"constants.h"}


def _code(path: Path) -> str:
    return re.sub(r"//.*", "", path.read_text())
