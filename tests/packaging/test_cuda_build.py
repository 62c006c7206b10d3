"""When setup.py builds the CUDA kernels, and what it says where it can't."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py defines, as its own functions see it."""
    monkeypatch.delenv("HICL_FAST_CUDA", raising=False)
    return runpy.run_path(str(ROOT / "setup.py"), run_name="build")["wants_cuda"].__globals__


def pytorch(folder: Path, cuda: str) -> Path:
    (folder / "version.py").write_text(f"__version__ = '2.13.0'\ncuda: Optional[str] = {cuda}\nhip = '6.0'\n")
    return folder


@pytest.mark.parametrize(
    ("mode", "cuda", "nvcc", "expected"),
    [
        ("auto", "'13.0'", "nvcc", True),
        ("auto", "None", "nvcc", False),
        ("auto", "'13.0'", None, False),
        ("1", "None", "nvcc", True),
        ("0", "'13.0'", "nvcc", False),
    ],
)
def test_when_it_is_built(
    build: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mode: str,
    cuda: str,
    nvcc: str | None,
    expected: bool,
) -> None:
    monkeypatch.setenv("HICL_FAST_CUDA", mode)
    monkeypatch.setitem(build, "torch_folder", lambda: pytorch(tmp_path, cuda))
    monkeypatch.setitem(build, "find_nvcc", lambda: nvcc)
    assert build["wants_cuda"]() is expected
    assert any(path.suffix == ".cu" for path in build["sources"]()) is expected
    assert ("no nvcc found" in capsys.readouterr().err) == (nvcc is None)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("maybe", "HICL_FAST_CUDA: expected one of auto, 1, 0, got 'maybe'"),
        ("1", "HICL_FAST_CUDA=1 needs the CUDA compiler"),
    ],
)
def test_what_cannot_be_is_an_error(mode: str, message: str, tmp_path: Path) -> None:
    environment = {**os.environ, "HICL_FAST_CUDA": mode, "CUDA_HOME": str(tmp_path)}
    command = [sys.executable, "setup.py", "build_ext", "--build-temp", str(tmp_path), "--build-lib", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert message in done.stderr


def test_architectures(build: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho compute_75\necho compute_80\necho compute_90\n")  # one too old for sm_100
    nvcc.chmod(0o755)
    monkeypatch.delenv("HICL_FAST_ARCHS", raising=False)
    assert build["gpu_flags"](str(nvcc)) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_80,code=compute_80",
    ]
    monkeypatch.setenv("HICL_FAST_ARCHS", "120")
    assert "-gencode=arch=compute_120,code=sm_120" in build["gpu_flags"](str(nvcc))
