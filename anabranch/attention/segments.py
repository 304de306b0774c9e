"""Which part of the scores between a rank's queries and a shard of keys is to be computed, and how.

Positions decide. Queries and keys lie in order of position, so causality and the window cut rectangles:
most are computed whole, and only the edges need a mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from anabranch.attention.accumulate import Accumulator
from anabranch.kernels.base import Kernels
from anabranch.kernels.block_attention import attend_block

# Rows of queries that share one cut of the keys where a mask is needed: little is computed in vain.
MASKED_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A rectangle of scores.

    Attributes:
        q: rows of the queries.
        kv: rows of the shard.
        hidden_TC: bool mask, True where the query must not see the key.
    """

    q: slice
    kv: slice
    hidden_TC: torch.Tensor | None = None


def length(rows: slice) -> int:
    """Rows in a slice that has a start and a stop."""
    start: int = rows.start
    stop: int = rows.stop
    return stop - start


def rectangle(q: slice, kv: slice) -> list[Segment]:
    """A segment without a mask; none where it is empty."""
    if q.start >= q.stop or kv.start >= kv.stop:
        return []
    return [Segment(q=q, kv=kv)]


def by_position(
    queries: range, q_start: int, key_positions_C: torch.Tensor, kv_start: int, window: int | None
) -> list[Segment]:
    """Segments of queries at consecutive positions over keys at any ascending positions.

    Args:
        queries: positions of the queries; the first is row `q_start`.
        key_positions_C: int64, ascending; the first key is row `kv_start` of the shard.
        window: a query at p sees keys from `p - window + 1` to p; None: all up to p.
    """
    segments = []
    for first in range(0, len(queries), MASKED_ROWS):
        part = queries[first : first + MASKED_ROWS]
        oldest = 0 if window is None else part[0] - window + 1
        cut = torch.tensor([oldest, part[-1] + 1], device=key_positions_C.device)
        i, j = torch.searchsorted(key_positions_C, cut).tolist()
        if i >= j:
            continue
        keys_C = key_positions_C[i:j]
        q = slice(q_start + first, q_start + first + len(part))
        kv = slice(kv_start + i, kv_start + j)
        sees_all = int(keys_C[-1]) <= part[0] and (window is None or int(keys_C[0]) > part[-1] - window)
        hidden_TC = None
        if not sees_all:
            queries_T1 = torch.arange(part.start, part.stop, device=keys_C.device).unsqueeze(1)
            hidden_TC = keys_C > queries_T1
            if window is not None:
                hidden_TC |= keys_C <= queries_T1 - window
        segments.append(Segment(q=q, kv=kv, hidden_TC=hidden_TC))
    return segments


def attend_segments(
    kernels: Kernels,
    segments: tuple[Segment, ...],
    q_THD: torch.Tensor,
    k_CKD: torch.Tensor,
    v_CKD: torch.Tensor,
    scale: float,
    total: Accumulator,
) -> None:
    """Compute the segments and add them to `total`, whose rows are q's."""
    for segment in segments:
        out, lse = attend_block(
            kernels,
            q_THD[segment.q],
            k_CKD[segment.kv],
            v_CKD[segment.kv],
            scale,
            hidden_TC=segment.hidden_TC,
        )
        total.add(segment.q, out, lse)
