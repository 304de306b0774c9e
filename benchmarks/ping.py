"""What bytes take one way between two processes through shared memory, by spinning native code: a bound."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import subprocess
import tempfile
from pathlib import Path

import torch

from anabranch.kernels.compiler import COMPILE_TIMEOUT_S, find_compiler
from anabranch.system.user_cache import cached_file

SOURCE = Path(__file__).parent / "native" / "ping.cpp"
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared")
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
    compiler, version = find_compiler()
    digest = hashlib.sha256("\0".join((version, *FLAGS, SOURCE.read_text())).encode()).hexdigest()
    path = cached_file(f"ping-{digest[:20]}.so", lambda path: _compile(compiler, path), timeout_s=2 * COMPILE_TIMEOUT_S)
    library = ctypes.CDLL(str(path))
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


def _compile(compiler: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
        made = Path(folder) / path.name
        subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(made)], check=True, timeout=COMPILE_TIMEOUT_S)
        made.replace(path)
