"""Large pages for large tensors: a random read of 4 KiB pages waits for page tables more than for its data."""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch

MIN_BYTES = 4 << 20


def ask_for_huge_pages(tensor: torch.Tensor) -> bool:
    """Ask the kernel to back a tensor that nothing was written to yet with huge pages (Linux, `MADV_HUGEPAGE`).

    Returns:
        Whether it was asked: not for small tensors, on devices, or by systems that have none. It may still decline.
    """
    if sys.platform != "linux" or not tensor.is_cpu or tensor.nbytes < MIN_BYTES:
        return False
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes, madvise.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return bool(madvise(start, length, mmap.MADV_HUGEPAGE) == 0)
