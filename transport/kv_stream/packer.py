"""Cuts and packs layers' KV for one destination rank into slices of a good size.

Large pieces are cut along their tokens; small ones of consecutive layers share a slice, because every message
costs both ends the same however short it is.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate

import torch

from transport.kv_stream.staging import Staging

SLICE_BYTES = 1 << 20
COALESCE_BYTES = 256 << 10
# Keeps a slice's header far below the plane's limit.
MAX_RUNS = 256

Run = tuple[int, int]


class PackedSlice:
    """Consecutive layers of one rectangle of heads and tokens, packed."""

    __slots__ = ("head_start", "layer", "num_bytes", "num_heads", "num_layers", "runs", "staging")

    def __init__(self, layer: int, head_start: int, num_heads: int, runs: tuple[Run, ...], staging: Staging) -> None:
        self.layer = layer
        self.num_layers = 0
        self.head_start = head_start
        self.num_heads = num_heads
        self.runs = runs
        self.staging = staging
        self.num_bytes = 0

    def takes(self, layer: int, head_start: int, num_heads: int, runs: tuple[Run, ...], num_bytes: int) -> bool:
        """Whether the piece can be appended."""
        return (
            layer == self.layer + self.num_layers
            and (head_start, num_heads, runs) == (self.head_start, self.num_heads, self.runs)
            and self.num_bytes + num_bytes <= self.staging.capacity
        )

    def append(self, k_parts: list[torch.Tensor], v_parts: list[torch.Tensor], num_bytes: int) -> None:
        """Copy one layer's rows, K then V, behind what is packed."""
        rows = sum(part.shape[0] for part in k_parts)
        part = k_parts[0]
        target_2TKD = (
            self.staging.data[self.num_bytes : self.num_bytes + num_bytes]
            .view(part.dtype)
            .view(2, rows, part.shape[1], part.shape[2])
        )
        for target_TKD, parts in zip(target_2TKD.unbind(0), (k_parts, v_parts), strict=True):
            first = 0
            for source_TKD in parts:
                target_TKD[first : first + source_TKD.shape[0]].copy_(source_TKD)
                first += source_TKD.shape[0]
        self.num_layers += 1
        self.num_bytes += num_bytes


class RowMap:
    """Rows of tensors that hold some runs of tokens, one run after the other.

    Args:
        held: ascending.
    """

    def __init__(self, held: list[range]) -> None:
        self._starts = [run.start for run in held]
        self._rows = list(accumulate((len(run) for run in held), initial=0))

    def span(self, start: int, count: int) -> slice:
        """The rows of tokens `start` to `start + count - 1`, which lie in one run."""
        index = bisect_right(self._starts, start) - 1
        row = self._rows[index] + start - self._starts[index]
        return slice(row, row + count)


class Packer:
    """The slices of one (stream, destination rank), in the order in which they shall leave.

    Args:
        take: gives a staging buffer of at least so many bytes; may wait, may raise.
        give: takes back a buffer that was not sent.
        send: takes a packed slice.
    """

    def __init__(
        self,
        take: Callable[[int], Staging],
        give: Callable[[Staging], None],
        send: Callable[[PackedSlice], None],
    ) -> None:
        self._take = take
        self._give = give
        self._send = send
        self._open: PackedSlice | None = None

    def add(
        self, layer: int, head_start: int, rows: RowMap, k_TKD: torch.Tensor, v_TKD: torch.Tensor, runs: list[Run]
    ) -> None:
        """Pack one layer's rows of `runs`; `rows` says in which rows of the tensors a run lies."""
        num_heads = k_TKD.shape[1]
        row_bytes = 2 * num_heads * k_TKD.shape[2] * k_TKD.element_size()
        for group in _groups(runs, max(1, SLICE_BYTES // row_bytes)):
            num_bytes = row_bytes * sum(count for _, count in group)
            if self._open is None or not self._open.takes(layer, head_start, num_heads, group, num_bytes):
                self.flush()
                self._open = PackedSlice(
                    layer, head_start, num_heads, group, self._take(max(num_bytes, COALESCE_BYTES))
                )
            spans = [rows.span(start, count) for start, count in group]
            self._open.append([k_TKD[span] for span in spans], [v_TKD[span] for span in spans], num_bytes)
            if self._open.num_bytes >= COALESCE_BYTES:
                self.flush()

    def flush(self) -> None:
        """Send what is packed."""
        packed, self._open = self._open, None
        if packed is not None:
            self._send(packed)

    def drop(self) -> None:
        """Forget what is packed."""
        packed, self._open = self._open, None
        if packed is not None:
            self._give(packed.staging)


def _groups(runs: list[Run], max_rows: int) -> Iterator[tuple[Run, ...]]:
    """Cut runs into groups of at most `max_rows` tokens and `MAX_RUNS` runs."""
    group: list[Run] = []
    room = max_rows
    for start, count in runs:
        while count:
            taken = min(count, room)
            group.append((start, taken))
            start, count, room = start + taken, count - taken, room - taken
            if not room or len(group) == MAX_RUNS:
                yield tuple(group)
                group, room = [], max_rows
    if group:
        yield tuple(group)
