"""Builds the shared-memory library at first use, into the cache folder, and declares its functions."""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from ctypes import c_char_p, c_double, c_int, c_int64, c_uint64, c_void_p
from pathlib import Path

from anabranch.errors import TransportUnavailable
from anabranch.system.native_code import NativeUnavailable, load_compiled

SOURCE = Path(__file__).parent / "native" / "shm.cpp"
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fvisibility=default", "-pthread", "-w")

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
        library = load_compiled("collectives", SOURCE, FLAGS, ("-pthread",))
    except NativeUnavailable as error:
        raise TransportUnavailable(str(error)) from None
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, f"anabranch_{name}")
        function.restype = result
        function.argtypes = arguments
    return library
