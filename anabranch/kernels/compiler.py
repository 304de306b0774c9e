"""Builds the CPU kernels at first use (`anabranch.system.native_code`), loads and checks them.

The library is plain C ABI and links against the OpenMP runtime that torch has loaded already, so that both
share one pool of threads. Where any of this cannot be had, `load_library` says why.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from anabranch.kernels.cpu_level import LEVELS, VARIABLE, CpuLevel, check_reached, flags_of, forced_level
from anabranch.system.native_code import NativeUnavailable, find_compiler, load_compiled

SOURCE = Path(__file__).parent / "cpu" / "kernels.cpp"
FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-w",
)
OPENMP_NAMES = ("libgomp", "libomp", "libiomp")


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
        forced = forced_level()
        shown = LEVELS[load_library(forced).ab_level()].shown + (f", forced by {VARIABLE}" if forced else "")
    except NativeUnavailable as error:
        return NativeStatus(compiler=compiler, version=version, usable=False, reason=str(error))
    return NativeStatus(compiler=compiler, version=version, usable=True, reason=f"kernels built for {shown}")


@functools.cache
def load_library(level: CpuLevel | None = None) -> ctypes.CDLL:
    """The compiled kernels, built now unless the cache folder has them.

    Args:
        level: the most that they may use of the CPU; None: all that it has.

    Raises:
        ConfigError: the CPU does not reach the level.
        NativeUnavailable: no compiler, a failed build, or no OpenMP runtime to share with torch.
    """
    if level is not None:
        native = load_library()
        reached = LEVELS[native.ab_level()]
        check_reached(level, reached)
        if level is reached:
            return native
    openmp = find_openmp()
    # Compiling knows -fopenmp, linking does not: it would add the compiler's own runtime.
    link_flags = (str(openmp), f"-Wl,-rpath,{openmp.parent}")
    library = load_compiled("kernels", SOURCE, (*FLAGS, *flags_of(level)), link_flags)
    if mapped_openmp() != mapped_openmp(including=openmp):
        raise NativeUnavailable("loading the kernels brought in a second OpenMP runtime")
    return library


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
