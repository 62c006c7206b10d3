"""Links for systems older than this machine's, so that a wheel built here loads on them.

A linker binds a function to its newest version in the library that it finds: ``dlopen`` to glibc 2.34's, though 2.2.5's does
the same and is still there. ``link_flags`` gives it libraries instead of glibc's own that hold nothing but names, each in
its newest version up to the one asked for, and old_systems.cpp's few functions. Whatever else came with a later glibc or
libstdc++ keeps its version, and auditwheel names it.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path

Version = tuple[int, ...]

# A function or variable in what `nm -D --with-symbol-versions` prints; the version that linkers take has two @.
_SYMBOL = re.compile(r"^\S+ [TWiBDRV] (\w+)@@?(?:GLIBC|GLIBCXX|CXXABI)_([\d.]+)$", re.MULTILINE)

_GLIBC = ("libm.so.6", "libc.so.6")

# Before glibc 2.34 part of what is now in libc was here; programs that are built so find it at run time on either side.
_FORMER_LIBRARIES = ("libdl.so.2", "libpthread.so.0", "librt.so.1")

_NEWER_FUNCTIONS = Path(__file__).with_suffix(".cpp")


def link_flags(compiler: list[str], limit: Version, folder: Path) -> list[str]:
    """What a linker is given before its libraries; the files go to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [str(_library_of_names(compiler, library, limit, folder)) for library in _GLIBC]
    newer = str(folder / "newer.o")
    _compile(compiler, ["-std=c++17", "-O2", "-fPIC", "-c", str(_NEWER_FUNCTIONS), "-o", newer])
    former = [f"-l:{library}" for library in _FORMER_LIBRARIES]
    return [newer, *names, "-Wl,--push-state,--no-as-needed", *former, "-Wl,--pop-state"]


def versions_to_link(listing: str, limit: Version) -> dict[str, Version]:
    """Of every name the newest version up to ``limit``, or the first one where all are newer.

    All names, not only those that have a newer version: a linker that has these libraries reads no others of their name, and
    would leave what it doesn't find here without a version, which is any function's oldest.
    """
    versions = defaultdict(list)
    for name, version in _SYMBOL.findall(listing):
        versions[name].append(tuple(map(int, version.split("."))))
    return {name: max((one for one in there if one <= limit), default=min(there)) for name, there in versions.items()}


def unversioned(compiler: list[str], extension: Path) -> set[str]:
    """Names of the system's that the extension takes in any version: none, or what loads is left to chance."""
    needed = set(re.findall(r"^ +U (\w+)$", _listing(extension), re.MULTILINE))
    libraries = [_locate(compiler, library) for library in (*_GLIBC, "libstdc++.so.6")]
    return needed & {name for library in libraries for name, _ in _SYMBOL.findall(_listing(library))}


def _locate(compiler: list[str], library: str) -> Path:
    """The file that the compiler links for a library."""
    command = [*compiler, f"-print-file-name={library}"]
    return Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())


def _library_of_names(compiler: list[str], library: str, limit: Version, folder: Path) -> Path:
    versions = versions_to_link(_listing(_locate(compiler, library)), limit)
    by_version = defaultdict(list)
    for name, version in sorted(versions.items()):
        by_version[version].append(name)
    script = folder / f"{library}.map"
    script.write_text(
        "".join(f"GLIBC_{_text(version)} {{ {'; '.join(by_version[version])}; }};\n" for version in by_version)
    )
    target = folder / library
    options = ["-shared", "-nostdlib", f"-Wl,-soname,{library}", f"-Wl,--version-script={script}"]
    assembly = "".join(f".globl {name}\n.type {name},%function\n{name}:\n" for name in sorted(versions))
    _compile(compiler, [*options, "-x", "assembler", "-", "-o", str(target)], assembly)
    return target


def _listing(library: Path) -> str:
    command = ["nm", "-D", "--with-symbol-versions", str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _compile(compiler: list[str], options: list[str], source: str = "") -> None:
    subprocess.run([*compiler, *options], input=source, text=True, check=True)


def _text(version: Version) -> str:
    return ".".join(map(str, version))
