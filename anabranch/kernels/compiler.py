"""Builds the CPU kernels at first use: finds a compiler, compiles into the cache folder, loads, checks.

The library is plain C ABI and links against the OpenMP runtime that torch has loaded already, so that both
share one pool of threads. Its file name is a hash of everything that went into it; several processes may
start at once. Where any of this cannot be had, `load_library` says why.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from anabranch.errors import DeadlineExceeded
from anabranch.system.user_cache import cached_file

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "cpu"
FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-fPIC",
    "-w",
)
COMPILERS = ("g++", "c++")
COMPILE_TIMEOUT_S = 120.0
# For the process that compiles; each of its steps has COMPILE_TIMEOUT_S.
BUILD_TIMEOUT_S = 3 * COMPILE_TIMEOUT_S
VERSION_TIMEOUT_S = 10.0
OPENMP_NAMES = ("libgomp", "libomp", "libiomp")
CACHE_REMEDY = "set ANABRANCH_CACHE to a folder whose files can be written and loaded"
# What `ab_level` returns, for people.
LEVELS = ("portable", "AVX-512", "AVX-512 BF16", "AMX BF16")


class NativeUnavailable(Exception):
    """The CPU kernels cannot be built or loaded here; the message says why and what helps."""


@dataclass(frozen=True, kw_only=True)
class NativeStatus:
    """What `doctor` shows: the compiler found, and whether the kernels that it builds are used.

    Attributes:
        compiler: its path, or None.
        version: first line of its `--version`, or None.
        usable: whether the kernels are built and loaded.
        reason: what they use where they are usable, else why not and the remedy.
    """

    compiler: str | None
    version: str | None
    usable: bool
    reason: str


@functools.cache
def native_status() -> NativeStatus:
    """Find out, by building, whether this machine runs the native kernels."""
    compiler = version = None
    try:
        compiler, version = find_compiler()
        level = LEVELS[load_library().ab_level()]
    except NativeUnavailable as error:
        return NativeStatus(compiler=compiler, version=version, usable=False, reason=str(error))
    return NativeStatus(compiler=compiler, version=version, usable=True, reason=f"kernels built for {level}")


@functools.cache
def load_library(extra_flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The compiled kernels, built now unless the cache folder has them.

    Args:
        extra_flags: after the standard ones; tests build for lesser machines with them.

    Raises:
        NativeUnavailable: no compiler, a failed build, or no OpenMP runtime to share with torch.
    """
    compiler, version = find_compiler()
    openmp = find_openmp()
    flags = (*FLAGS, *extra_flags)
    name = f"kernels-{_fingerprint(version, flags, openmp)}.so"
    try:
        path = cached_file(name, lambda path: _compile(compiler, flags, openmp, path), timeout_s=BUILD_TIMEOUT_S)
        library = ctypes.CDLL(str(path))
    except DeadlineExceeded as error:
        raise NativeUnavailable(str(error)) from error
    except OSError as error:
        raise NativeUnavailable(f"{error}; {CACHE_REMEDY}") from error
    if mapped_openmp() != mapped_openmp(including=openmp):
        raise NativeUnavailable("loading the kernels brought in a second OpenMP runtime")
    return library


def find_compiler() -> tuple[str, str]:
    """Path and version line of a GNU C++ compiler: `$CXX`, or the first on the path.

    Raises:
        NativeUnavailable: there is none. Clang is none: its OpenMP calls need another runtime than torch's.
    """
    named = os.environ.get("CXX")
    for name in (named,) if named else COMPILERS:
        path = shutil.which(name)
        if path is None:
            continue
        try:
            shown = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=VERSION_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if shown.returncode == 0 and "Free Software Foundation" in shown.stdout:
            return path, shown.stdout.splitlines()[0]
    looked_for = named or " or ".join(COMPILERS)
    raise NativeUnavailable(f"no GNU C++ compiler ({looked_for}): install g++, or point CXX at one")


def mapped_openmp(including: Path | None = None) -> set[Path]:
    """OpenMP runtimes in this process's memory, and `including`."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        raise NativeUnavailable(f"cannot tell which OpenMP runtime torch uses on {platform.system()}")
    paths = {Path(line.split(maxsplit=5)[5]) for line in maps.read_text().splitlines() if line.count("/")}
    found = {path.resolve() for path in paths if path.name.startswith(OPENMP_NAMES)}
    return found | {including} if including else found


def find_openmp() -> Path:
    """The OpenMP runtime that torch computes with.

    Raises:
        NativeUnavailable: torch has none, or there are several and none is in torch's folder.
    """
    found = mapped_openmp()
    site = Path(torch.__file__).resolve().parent
    own = {path for path in found if path.is_relative_to(site) or path.is_relative_to(site.parent / "torch.libs")}
    candidates = own or found
    if len(candidates) != 1:
        names = ", ".join(map(str, sorted(found))) or "none"
        raise NativeUnavailable(f"torch's OpenMP runtime is not to be told (found: {names})")
    return candidates.pop()


def _fingerprint(version: str, flags: Sequence[str], openmp: Path) -> str:
    digest = hashlib.sha256()
    for source in sorted(SOURCES.glob("*.[ch]*")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    digest.update("\0".join((version, *flags, str(openmp), _cpu_flags())).encode())
    return digest.hexdigest()[:20]


def _cpu_flags() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return platform.machine() + flags


def _compile(compiler: str, flags: Sequence[str], openmp: Path, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
        made = Path(folder) / path.name
        # Compiling knows -fopenmp, linking does not: it would add the compiler's own runtime.
        steps = (
            [compiler, *flags, "-c", str(SOURCES / "kernels.cpp"), "-o", f"{made}.o"],
            [compiler, "-shared", f"{made}.o", str(openmp), f"-Wl,-rpath,{openmp.parent}", "-o", str(made)],
        )
        for step in steps:
            log.info("building the CPU kernels: %s", " ".join(step))
            try:
                done = subprocess.run(step, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
            except subprocess.TimeoutExpired as error:
                raise NativeUnavailable(f"compiling took over {COMPILE_TIMEOUT_S:.0f} s") from error
            if done.returncode != 0:
                shown = done.stderr.strip().splitlines() or ["no message"]
                raise NativeUnavailable(f"compiling failed: {shown[0]}")
        made.replace(path)
