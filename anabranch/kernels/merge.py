"""The LSE merge: one attention result from two over disjoint sets of keys.

Ring steps, tree reductions and prefix merges are all this function. Shape suffixes: T tokens, H heads,
D head dim.
"""

from __future__ import annotations

import torch


def merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge two partial attention results of the same queries over disjoint keys; associative, commutative.

    A part that saw no key has `lse = -inf`; whatever its `out` holds is ignored. Chains of merges should
    keep `out` in float32: the result has `out_a`'s dtype.

    Args:
        out_a, out_b: `[T, H, D]`, each normalised over its own keys.
        lse_a, lse_b: `[T, H]` float32, natural-log sum of exponentials of the scaled scores.

    Returns:
        `(out [T, H, D], lse [T, H])` over the keys of both; zero and -inf where both are empty.

    Source: FlashAttention (Dao et al. 2022), section 3.1; Ring Attention (Liu et al. 2023), section 3.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    # Where both are empty, subtracting -inf from itself would give NaN; any finite stand-in gives weight 0.
    base = lse.masked_fill(lse == -torch.inf, 0.0)
    out = _weighted(out_a, lse_a, base) + _weighted(out_b, lse_b, base)
    return out.to(out_a.dtype), lse


def _weighted(out: torch.Tensor, lse: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    kept = out.float().masked_fill((lse == -torch.inf).unsqueeze(-1), 0.0)
    return kept * (lse - base).exp().unsqueeze(-1)
