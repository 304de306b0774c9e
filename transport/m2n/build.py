"""Builds the channel's shared-memory library at first use, into the cache folder, and declares its functions."""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from ctypes import c_char_p, c_int, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path

from anabranch.errors import TransportUnavailable
from anabranch.system.native_code import NativeUnavailable, load_compiled

SOURCE = Path(__file__).parent / "native" / "m2n.cpp"
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fvisibility=default", "-pthread", "-w")

_FUNCTIONS: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "control_bytes": (c_uint64, ()),
    "open": (c_void_p, (c_void_p, c_int, c_void_p, c_uint64, c_uint32, c_int)),
    "close": (None, (c_void_p,)),
    "populate": (None, (c_void_p, c_uint64)),
    "send": (c_int, (c_void_p, c_uint32, c_char_p, c_uint64, c_void_p, c_int)),
    "take": (c_int, (c_void_p,)),
    "posted_offset": (c_uint64, (c_int,)),
    "wait": (c_int, (c_void_p, c_int, c_int, c_int64, c_int64)),
}


@functools.cache
def load_library() -> ctypes.CDLL:
    """The compiled library, with its functions' types declared.

    Raises:
        TransportUnavailable: not Linux, or no C++ compiler, or the build failed; says which and the remedy.
    """
    if sys.platform != "linux":
        raise TransportUnavailable(f"the shared-memory channel needs Linux; this is {platform.system()}: use tcp")
    try:
        return _declared(load_compiled("m2n", SOURCE, FLAGS, ("-pthread",)))
    except NativeUnavailable as error:
        raise TransportUnavailable(str(error)) from None


@functools.cache
def load_brief_library() -> ctypes.CDLL:
    """The same, for calls that are too short to let another thread run Python meanwhile."""
    return _declared(ctypes.PyDLL(load_library()._name))


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, f"anabranch_m2n_{name}")
        function.restype = result
        function.argtypes = arguments
    return library
