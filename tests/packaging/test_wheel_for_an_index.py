"""The wheel of ``make wheel``, installed beside PyTorch and nothing else, with neither compiler nor nvcc on the PATH.

The PyTorch is the one that runs the tests, for CPUs or for CUDA; where it sees a GPU, the CUDA kernels run too.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement

from tools import build_wheel

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.wheel, pytest.mark.slow]


def distributions(name: str) -> dict[str, importlib.metadata.Distribution]:
    """An installed package and all that it depends on."""
    found = {name: importlib.metadata.distribution(name)}
    for requirement in map(Requirement, found[name].requires or []):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found |= distributions(requirement.name)
    return found


def clean_environment(folder: Path) -> Path:
    """The Python of a new environment that has PyTorch and NumPy, as links, and what they depend on; no pip, no setuptools."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next((folder / "lib").glob("python*/site-packages"))
    for distribution in (distributions("torch") | distributions("numpy")).values():
        names = {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}
        for name in names:
            if not (site / name).exists():
                (site / name).symlink_to(Path(str(distribution.locate_file(name))))
    return folder / "bin" / "python"


def run(python: Path, *arguments: str) -> str:
    environment = {"PATH": "", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run([str(python), *arguments], cwd="/", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel() -> Path:
    (found,) = (ROOT / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def extension(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(build_wheel.EXTENSION, tmp_path_factory.mktemp("extension")))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a clean environment that the wheel is installed in."""
    installed = clean_environment(tmp_path_factory.mktemp("clean"))
    command = [sys.executable, "-m", "pip", "--python", str(installed), "install", "--quiet", "--no-index", str(wheel)]
    subprocess.run(command, check=True, cwd="/", env={**os.environ, "PYTHONPATH": ""})
    return installed


@pytest.fixture(scope="module")
def found(python: Path) -> dict[str, Any]:
    return json.loads(run(python, "-m", "hicl_fast.info", "--json"))


def test_it_is_for_the_systems_that_pytorch_is_for(wheel: Path) -> None:
    assert "-cp310-abi3-" in wheel.name
    assert f"manylinux_2_28_{os.uname().machine}" in wheel.name


def test_it_is_of_these_sources(extension: Path) -> None:
    digest = runpy.run_path(str(ROOT / "setup.py"), run_name="build")["source_digest"]()
    assert bytes.fromhex(digest) in extension.read_bytes()


def test_nothing_else_is_installed(python: Path, found: dict[str, Any]) -> None:
    assert str(python.parents[1]) in found["package"]
    assert found["compiler"] == "none found"


def test_it_tells_the_gpus_that_it_has_code_for(extension: Path, found: dict[str, Any]) -> None:
    codes = build_wheel.gpu_codes(extension)
    assert sorted(codes) == ["compute_80", "sm_100", "sm_80", "sm_90a"]
    assert "CPU kernels; CUDA kernels for sm_80, sm_90a, sm_100, PTX of compute_80 (CUDA 13.0)" == found["compiled_in"]


def test_it_tells_what_is_missing(found: dict[str, Any]) -> None:
    backends = {backend["name"]: backend for backend in found["backends"]}
    assert backends["cpp"]["available"]
    if torch.cuda.is_available():
        assert backends["cuda"]["available"]
    else:
        assert backends["cuda"]["reason"] in ("this PyTorch is built without CUDA", "PyTorch sees no GPU")
        assert "the kernels are compiled in" in backends["cuda"]["remedy"]


def test_it_computes(python: Path) -> None:
    """InfoNCE with explicit negatives, pooling and hard negatives, with gradients, as the equations have them."""
    program = """
import torch
from hicl_fast import functional, reference

def results(of, device, **backend):
    torch.manual_seed(0)
    rows = [torch.randn(40, 24, device=device, requires_grad=True) for _ in range(3)]
    loss = of.info_nce(*rows[:2], negatives=rows[2], **backend)
    pooled = of.segment_pool(rows[0], torch.tensor([0, 3, 40], device=device), **backend)
    gradients = torch.autograd.grad(loss + pooled.square().sum(), rows)
    return [loss, pooled, *gradients, *of.hard_negatives(*rows[:2], 4, **backend)]

tried = {"cpu": "cpp"} | ({"cuda": "cuda"} if torch.cuda.is_available() else {})
for device, backend in tried.items():
    for ours, theirs in zip(results(functional, device, backend=backend), results(reference, device), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
print("passed", *tried.values())
"""
    assert run(python, "-c", program).split()[:2] == ["passed", "cpp"]


def test_the_cuda_kernels_are_there_and_take_no_tensors_on_the_cpu(python: Path) -> None:
    program = """
import torch, hicl_fast
try:
    torch.ops.hicl_fast_cuda.normalise_rows(torch.randn(4, 8), 1e-12, None)
except NotImplementedError as error:
    print("hicl_fast_cuda::normalise_rows" in str(error) and "CPU" in str(error))
"""
    assert run(python, "-c", program) == "True\n"
