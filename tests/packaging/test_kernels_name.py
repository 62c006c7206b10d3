"""kernels/ is imported as hicl_fast.kernels; in a checkout's root the bare name finds it too, and must do no harm."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("use", ["from kernels import rows", "import kernels.rows", "import kernels; kernels.rows"])
def test_use_under_the_bare_name_is_refused(use: str) -> None:
    done = run_python(use)
    assert done.returncode != 0
    assert "kernels.rows" in done.stderr


def test_transformers_takes_the_bare_name_for_missing() -> None:
    program = "from transformers import BertModel, utils; print(utils.is_kernels_available())"
    done = run_python(program)
    assert done.stdout == "False\n", done.stderr


@pytest.mark.triton
def test_import_inside_the_package() -> None:
    done = run_python("import hicl_fast.kernels; print(hicl_fast.kernels.__name__, hicl_fast.kernels.__file__)")
    assert done.stdout.split() == ["hicl_fast.kernels", str(ROOT / "kernels" / "__init__.py")], done.stderr
