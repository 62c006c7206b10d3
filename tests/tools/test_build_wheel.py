"""tools/build_wheel.py and tools/old_systems.py: what they refuse, and which versions are linked."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools import build_wheel, old_systems

ROOT = Path(__file__).resolve().parents[2]

LISTING = """
0000000000085500 T dlopen@GLIBC_2.2.5
0000000000085500 T dlopen@@GLIBC_2.34
0000000000089000 T pthread_cond_wait@@GLIBC_2.3.2
0000000000089100 T pthread_cond_wait@GLIBC_2.2.5
0000000000012340 D stderr@@GLIBC_2.2.5
0000000000012340 T arc4random@@GLIBC_2.36
0000000000012340 T __secret@@GLIBC_PRIVATE
                 U __tls_get_addr@GLIBC_2.3
"""


def test_functions_are_linked_in_their_newest_version_that_old_systems_have() -> None:
    assert old_systems.versions_to_link(LISTING, (2, 28)) == {
        "dlopen": (2, 2, 5),
        "pthread_cond_wait": (2, 3, 2),
        "stderr": (2, 2, 5),
        "arc4random": (2, 36),  # left as it is, for auditwheel to name
    }


def test_without_nvcc_it_fails_and_says_so(tmp_path: Path) -> None:
    environment = {**os.environ, "CUDA_HOME": str(tmp_path)}
    environment.pop("HICL_FAST_CUDA", None)
    command = [sys.executable, "-m", "tools.build_wheel"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert (
        f"no nvcc in {tmp_path}/bin; HICL_FAST_CUDA=0 make wheel builds a wheel without the CUDA kernels" in done.stderr
    )


def test_only_what_asks_for_it_is_built_without_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("HICL_FAST_CUDA", "0")
    assert build_wheel.cuda_environment() == {"HICL_FAST_CUDA": "0"}
    for mode in ("auto", "1", "no"):
        monkeypatch.setenv("HICL_FAST_CUDA", mode)
        with pytest.raises(build_wheel.Failure, match="no nvcc"):
            build_wheel.cuda_environment()


def wheel_of(folder: Path, *libraries: str) -> Path:
    with zipfile.ZipFile(folder / "some.whl", "w") as archive:
        for library in libraries:
            archive.writestr(library, "")
    return folder / "some.whl"


def test_a_wheel_with_libraries_of_others_is_refused(tmp_path: Path) -> None:
    wheel = wheel_of(tmp_path, build_wheel.EXTENSION, "hicl_fast.libs/libc10.so")
    with pytest.raises(build_wheel.Failure, match=r"libraries of others: .*libc10\.so"):
        build_wheel.checked(["c++"], wheel, tmp_path)


@pytest.mark.parametrize(
    ("loose", "codes", "complaint"),
    [
        ({"memcpy"}, ["sm_80", "sm_90a", "sm_100", "compute_80"], "takes whatever version there is of memcpy"),
        (set(), ["sm_80", "compute_80"], r"no code for sm_100, sm_90a; it has sm_80 compute_80"),
        (set(), [], "no code for .*; it has none"),
    ],
)
def test_an_extension_that_is_not_as_it_should_be_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, loose: set[str], codes: list[str], complaint: str
) -> None:
    monkeypatch.delenv("HICL_FAST_CUDA", raising=False)
    monkeypatch.delenv("HICL_FAST_ARCHS", raising=False)
    monkeypatch.setattr(old_systems, "unversioned", lambda *_: loose)
    monkeypatch.setattr(build_wheel, "gpu_codes", lambda _: codes)
    with pytest.raises(build_wheel.Failure, match=complaint):
        build_wheel.checked(["c++"], wheel_of(tmp_path, build_wheel.EXTENSION), tmp_path)
