"""What bytes take one way between two processes through shared memory, by spinning native code: a bound."""

from __future__ import annotations

import ctypes
import functools
import mmap
from pathlib import Path

import torch

from anabranch.system.native_code import load_compiled

SOURCE = Path(__file__).parent / "native" / "ping.cpp"
FLAGS = ("-O3", "-march=native", "-std=c++17")
ANSWER_TIMEOUT_S = 20.0


def make_segment(folder: Path, name: str, num_bytes: int) -> Path:
    """A segment for pings of `num_bytes`, to be mapped by both sides."""
    path = folder / name
    with path.open("wb") as file:
        file.truncate(_library().ping_segment_bytes(num_bytes))
    return path


def ping_s(segment: Path, side: int, x: torch.Tensor, num_rounds: int) -> float:
    """Seconds that x's bytes take one way; both sides, 0 and 1, call it once with a segment of their own pair.

    Raises:
        TimeoutError: the other side did not answer within ANSWER_TIMEOUT_S.
    """
    with segment.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        base = (ctypes.c_char * len(mapped)).from_buffer(mapped)
        seconds: float = _library().ping(
            ctypes.addressof(base), side, x.data_ptr(), x.nbytes, num_rounds, ANSWER_TIMEOUT_S
        )
        del base  # or the mapping could not be closed
    if seconds < 0:
        raise TimeoutError(f"no answer to a ping within {ANSWER_TIMEOUT_S:g} s")
    return seconds


@functools.cache
def _library() -> ctypes.CDLL:
    library = load_compiled("ping", SOURCE, FLAGS)
    library.ping_segment_bytes.restype, library.ping_segment_bytes.argtypes = ctypes.c_uint64, [ctypes.c_uint64]
    library.ping.restype = ctypes.c_double
    library.ping.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_uint64,
        ctypes.c_int,
        ctypes.c_double,
    ]
    return library
