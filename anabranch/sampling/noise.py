"""Sampling noise as a pure function of (seed, token index, token id).

Gumbel noise added to log-weights makes the largest sum a sample of their softmax (Gumbel-max). The noise comes
from an integer hash, not from a generator with state, so that any worker, at any place in a batch and on any
device, draws the same token, and the noise of a few candidates can be computed without that of all the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_MASK64 = (1 << 64) - 1
# Largest float32 below 1, so that log1p(-u) stays finite.
_MAX_UNIFORM = 1.0 - 2.0**-24


def _mix64(x: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _signed32(x: int) -> int:
    """The int32 with the bits of the low 32 bits of `x`."""
    x &= 0xFFFFFFFF
    return x - (1 << 32) if x >> 31 else x


def noise_key(seed: int, index: int) -> tuple[int, int]:
    """Two int32 words for the token at `index` of a request with `seed`."""
    key = _mix64((_mix64((seed + 0x9E3779B97F4A7C15) & _MASK64) + index) & _MASK64)
    return _signed32(key), _signed32(key >> 32)


_GOLDEN = _signed32(0x9E3779B9)
_MULTIPLIER_1 = _signed32(0x7FEB352D)
_MULTIPLIER_2 = _signed32(0x846CA68B)


def gumbel_noise(keys: Sequence[tuple[int, int]], token_ids_RK: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise for tokens.

    Args:
        keys: a `noise_key` for each of R rows.
        token_ids_RK: int32, `[R, K]`, or `[1, K]` when the rows share their candidates.

    Returns:
        float32 `[R, K]`; equal ids under equal keys get equal noise.
    """
    keys_R2 = torch.tensor(keys, dtype=torch.int32).to(token_ids_RK.device, non_blocking=True)
    # int32 products wrap; `>>` is arithmetic, so the sign's copies are masked off. The hash is lowbias32 (Wellons).
    bits = token_ids_RK * _GOLDEN + keys_R2[:, :1]
    bits ^= (bits >> 16) & 0xFFFF
    bits *= _MULTIPLIER_1
    bits ^= keys_R2[:, 1:]
    bits ^= (bits >> 15) & 0x1FFFF
    bits *= _MULTIPLIER_2
    bits ^= (bits >> 16) & 0xFFFF
    # 31 bits that keep their precision near 0, where the likely winners of a large vocabulary lie.
    uniform = (bits & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31).clamp_(max=_MAX_UNIFORM)
    return uniform.neg_().log1p_().neg_().log_().neg_()
