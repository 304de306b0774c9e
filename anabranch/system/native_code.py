"""C++ of this project as libraries: compiled at first use into the cache folder, by one process for all, and loaded."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from anabranch.errors import DeadlineExceeded
from anabranch.system.user_cache import VARIABLE, cached_file

log = logging.getLogger(__name__)

COMPILERS = ("g++", "c++")
COMPILE_TIMEOUT_S = 120.0
# For the process that compiles; each of its steps has COMPILE_TIMEOUT_S.
BUILD_TIMEOUT_S = 3 * COMPILE_TIMEOUT_S
VERSION_TIMEOUT_S = 10.0


class NativeUnavailable(Exception):
    """A library cannot be built or loaded here; the message says why and what helps."""


def load_compiled(name: str, source: Path, flags: Sequence[str], link_flags: Sequence[str] = ()) -> ctypes.CDLL:
    """The library of a source file and the headers beside it, built now unless the cache folder has it.

    Args:
        name: how its file's name begins; the rest is a hash of everything that goes into it.
        flags: of the compiler, for the source alone.
        link_flags: of the compiler, for making the library of it.

    Raises:
        NativeUnavailable: there is no compiler, or no folder to write to, or the build failed.
    """
    compiler, version = find_compiler()
    digest = hashlib.sha256("\0".join((version, *flags, "", *link_flags, _cpu())).encode())
    for part in sorted(source.parent.glob("*.[ch]*")):
        digest.update(part.name.encode() + b"\0" + part.read_bytes())

    def build(path: Path) -> None:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
            made = Path(folder) / path.name
            _run([compiler, *flags, "-fPIC", "-c", str(source), "-o", f"{made}.o"])
            _run([compiler, "-shared", f"{made}.o", *link_flags, "-o", str(made)])
            made.replace(path)

    try:
        return ctypes.CDLL(str(cached_file(f"{name}-{digest.hexdigest()[:20]}.so", build, timeout_s=BUILD_TIMEOUT_S)))
    except DeadlineExceeded as error:
        raise NativeUnavailable(str(error)) from error
    except OSError as error:
        raise NativeUnavailable(f"{error}; set {VARIABLE} to a folder whose files can be written and loaded") from error


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


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return platform.machine() + flags


def _run(step: Sequence[str]) -> None:
    log.info("building: %s", " ".join(step))
    try:
        done = subprocess.run(step, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise NativeUnavailable(f"compiling took over {COMPILE_TIMEOUT_S:.0f} s") from error
    if done.returncode != 0:
        shown = done.stderr.strip().splitlines() or ["no message"]
        raise NativeUnavailable(f"compiling failed: {shown[0]}")
