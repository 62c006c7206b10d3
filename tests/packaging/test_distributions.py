"""The sdist and the wheel: what is in them, and that the wheel works once installed."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXTENSION = "hicl_fast/_C.abi3.so"

pytestmark = pytest.mark.slow


def has_compiler() -> bool:
    return any(map(shutil.which, ("c++", "g++", "clang++")))


def project_files() -> list[str]:
    """The project's files: those git knows or would not ignore."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in names if (ROOT / name).exists()]


def build(what: list[str], folder: Path, **environment: str) -> str:
    """Runs a build in a folder and gives what it printed."""
    done = subprocess.run(
        [sys.executable, *what],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def wheel_command(folder: Path) -> list[str]:
    return ["-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "--no-index", "-w", str(folder), "."]


def python_in(site: Path, *arguments: str) -> str:
    """Runs Python far from the checkout, with the wheel unpacked in ``site`` and the other packages there are.

    -S leaves out the .pth files, and with them the one through which an editable install finds the checkout.
    """
    packages = [path for path in sys.path if path.endswith("-packages")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *packages])}
    done = subprocess.run([sys.executable, "-S", *arguments], cwd=site, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def install(wheel: Path, site: Path) -> Path:
    """A wheel of pure files and one library is installed by unpacking it."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, built from a copy so that the checkout stays as it is."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in project_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    build(["setup.py", "--quiet", "sdist"], folder)
    return next((folder / "dist").glob("*.tar.gz"))


@pytest.fixture(scope="module")
def source(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not has_compiler():
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("wheel")
    build(wheel_command(folder), source, HICL_FAST_BUILD="require")
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(wheel, tmp_path_factory.mktemp("site"))


def test_sdist_is_complete(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert not set(project_files()) - packed


def test_wheel_holds_the_extension_and_the_kernels(wheel: Path) -> None:
    assert "-cp310-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {EXTENSION, "hicl_fast/py.typed", "hicl_fast/kernels/__init__.py"} <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"hicl_fast"}


def test_wheel_has_every_module(wheel: Path) -> None:
    modules = {name for name in project_files() if name.startswith("hicl_fast/") and name.endswith(".py")}
    modules |= {f"hicl_fast/{name}" for name in project_files() if name.startswith("kernels/") and name.endswith(".py")}
    with zipfile.ZipFile(wheel) as archive:
        assert modules == {name for name in archive.namelist() if name.endswith(".py")}


def test_installed_wheel_computes_with_cpp(installed: Path) -> None:
    program = """
import torch, hicl_fast
print(hicl_fast.__file__)
query, key = (torch.randn(8, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
cpp, torch_ = (hicl_fast.functional.info_nce(query, key, backend=name) for name in ("cpp", "torch"))
torch.testing.assert_close(cpp, torch_)
"""
    assert str(installed) in python_in(installed, "-c", program)


def test_installed_wheel_tells_its_backends(installed: Path) -> None:
    found = json.loads(python_in(installed, "-m", "hicl_fast.info", "--json"))
    available = {backend["name"]: backend["available"] for backend in found["backends"]}
    assert available["torch"] and available["cpp"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX2 is x86-64's")
def test_only_the_kernels_of_an_instruction_set_use_it(source: Path, wheel: Path) -> None:
    """Code for AVX2 outside its own files would crash on processors without it."""
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("needs objdump")
    objects = list((source / "build").rglob("*.o"))
    assert objects
    for compiled in objects:
        uses_ymm = "%ymm" in subprocess.run([objdump, "-d", compiled], capture_output=True, text=True).stdout
        source_name = compiled.name.partition(".")[0]
        assert uses_ymm == source_name.endswith(("_avx2", "_avx512")), compiled.name


def test_without_a_compiler_the_torch_backend_is_left(source: Path, tmp_path: Path) -> None:
    said = build(wheel_command(tmp_path), source, CXX="no-such-compiler", HICL_FAST_BUILD="auto")
    assert "WARNING: no C++ compiler found (looked for no-such-compiler)" in said
    built = next(tmp_path.glob("*.whl"))
    assert built.name.endswith("-py3-none-any.whl")
    site = install(built, tmp_path / "site")
    found = json.loads(python_in(site, "-m", "hicl_fast.info", "--json"))
    backends = {backend["name"]: backend for backend in found["backends"]}
    assert backends["torch"]["available"]
    assert not backends["cpp"]["available"]
    assert "compiler" in backends["cpp"]["remedy"]


def test_a_broken_compiler_is_told_apart_from_broken_sources(source: Path) -> None:
    said = build(["setup.py", "build_ext", "--build-lib", "build/broken"], source, CXX="false", HICL_FAST_BUILD="auto")
    assert "WARNING: the C++ compiler false does not build PyTorch extensions (it exits with status 1)" in said
    assert not list((source / "build" / "broken").rglob("*.so"))


@pytest.mark.parametrize(
    ("environment", "complaint"),
    [
        ({"CXX": "no-such-compiler", "HICL_FAST_BUILD": "require"}, "HICL_FAST_BUILD=require needs the C++ extension"),
        ({"HICL_FAST_BUILD": "maybe"}, "HICL_FAST_BUILD: expected one of auto, require, skip, got 'maybe'"),
    ],
)
def test_a_build_that_must_fail_says_why(source: Path, environment: dict[str, str], complaint: str) -> None:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=source, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode != 0
    assert complaint in done.stderr


def test_a_source_that_does_not_compile_is_an_error(source: Path, tmp_path: Path) -> None:
    if not has_compiler():
        pytest.skip("needs a C++ compiler")
    broken = shutil.copytree(source, tmp_path / "broken", ignore=shutil.ignore_patterns("cpu", "build"))
    (broken / "csrc" / "module.cpp").write_text("this is not C++\n")
    done = subprocess.run([sys.executable, "setup.py", "build_ext"], cwd=broken, capture_output=True, text=True)
    assert done.returncode != 0
    assert "module.cpp" in done.stderr and "HICL_FAST_BUILD=skip" in done.stderr
