"""Builds the shared-memory library at first use, into the cache folder, and declares its functions."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import platform
import subprocess
import sys
import tempfile
from ctypes import c_char_p, c_double, c_int, c_int64, c_uint64, c_void_p
from pathlib import Path

from anabranch.errors import DeadlineExceeded, TransportUnavailable
from anabranch.kernels.compiler import (
    BUILD_TIMEOUT_S,
    CACHE_REMEDY,
    COMPILE_TIMEOUT_S,
    NativeUnavailable,
    find_compiler,
)
from anabranch.system.user_cache import cached_file

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "native"
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fvisibility=default", "-fPIC", "-shared", "-pthread", "-w")


_FUNCTIONS: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "segment_bytes": (c_uint64, (c_int, c_uint64)),
    "attach": (c_void_p, (c_int, c_int, c_int, c_uint64, c_char_p, c_int, c_double, c_double)),
    "await_rank": (c_int, (c_void_p, c_int, c_double)),
    "watch": (None, (c_void_p, c_int, c_int)),
    "arena": (c_void_p, (c_void_p,)),
    "populate": (None, (c_void_p, c_uint64)),
    "all_reduce": (c_int, (c_void_p, c_void_p, c_uint64, c_int)),
    "all_gather": (c_int, (c_void_p, c_void_p, c_void_p, c_uint64, c_uint64)),
    "barrier": (c_int, (c_void_p,)),
    "post": (c_int64, (c_void_p, c_void_p, c_int, c_int, c_int, c_int)),
    "wait": (c_int, (c_void_p, c_void_p)),
    "free": (None, (c_void_p,)),
    "reason": (c_int, (c_void_p, c_char_p)),
    "abort": (None, (c_void_p, c_char_p)),
    "close": (None, (c_void_p,)),
    "unmap": (None, (c_void_p,)),
}


@functools.cache
def load_library() -> ctypes.CDLL:
    """The compiled library, with its functions' types declared.

    Raises:
        TransportUnavailable: not Linux, or no C++ compiler, or the build failed; says which and the remedy.
    """
    if sys.platform != "linux":
        raise TransportUnavailable(f"shared-memory collectives need Linux; this is {platform.system()}: use gloo")
    try:
        compiler, version = find_compiler()
    except NativeUnavailable as error:
        raise TransportUnavailable(str(error)) from None
    digest = hashlib.sha256("\0".join((version, *FLAGS, _machine())).encode())
    for source in sorted(SOURCES.glob("*.[ch]*")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    name = f"collectives-{digest.hexdigest()[:20]}.so"
    try:
        path = cached_file(name, lambda path: _compile(compiler, path), timeout_s=BUILD_TIMEOUT_S)
        library = ctypes.CDLL(str(path))
    except DeadlineExceeded as error:
        raise TransportUnavailable(str(error)) from None
    except OSError as error:
        raise TransportUnavailable(f"{error}; {CACHE_REMEDY}") from None
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, f"anabranch_{name}")
        function.restype = result
        function.argtypes = arguments
    return library


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return platform.machine() + next((line for line in lines if line.lower().startswith(("flags", "features"))), "")


def _compile(compiler: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
        made = Path(folder) / path.name
        command = [compiler, *FLAGS, str(SOURCES / "shm.cpp"), "-o", str(made)]
        log.info("building the shared-memory collectives: %s", " ".join(command))
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise TransportUnavailable(f"compiling took over {COMPILE_TIMEOUT_S:.0f} s") from None
        if done.returncode != 0:
            raise TransportUnavailable(f"compiling failed: {(done.stderr.strip().splitlines() or ['no message'])[0]}")
        made.replace(path)
