"""Cuts and packs layers' KV for one destination rank into slices of a good size.

Large pieces are cut along their tokens; small ones of consecutive layers share a slice, because every message
costs both ends the same however short it is. A slice leaves once it is a small part of the stream: what still waits
when prefill ends is all that prefill does not hide.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from anabranch.kernels.base import Kernels
from transport.kv_stream.staging import Staging

SLICE_BYTES = 2 << 20
# Layers share a slice up to a share of what goes to the destination, within these bounds.
COALESCE_SHARE = 1 / 16
MIN_COALESCE_BYTES = 256 << 10
MAX_COALESCE_BYTES = 1 << 20
# Keeps a slice's header far below the plane's limit.
MAX_RUNS = 256

Run = tuple[int, int]


@dataclass(frozen=True, eq=False, kw_only=True)
class Cut:
    """What one slice takes of a layer; the same for every layer of a chunk.

    Attributes:
        runs: (first position, count) of its tokens.
        rows: where these are in the layer's tensors: a span, or int64 indices.
        num_rows: how many they are.
    """

    runs: tuple[Run, ...]
    rows: slice | torch.Tensor
    num_rows: int

    def layer_bytes(self, num_heads: int, like_TKD: torch.Tensor) -> int:
        """Of K and V of its rows and so many heads of a layer's tensors."""
        return 2 * self.num_rows * num_heads * like_TKD.shape[2] * like_TKD.element_size()


class PackedSlice:
    """Consecutive layers of one rectangle of heads and tokens, packed.

    Attributes:
        head_start, num_heads: by their number in the whole model.
    """

    __slots__ = ("_layer_bytes", "_room_L2RKD", "cut", "head_start", "layer", "num_heads", "num_layers", "staging")

    def __init__(
        self, layer: int, head_start: int, num_heads: int, cut: Cut, like_TKD: torch.Tensor, staging: Staging
    ) -> None:
        head_dim = like_TKD.shape[2]
        self.layer = layer
        self.num_layers = 0
        self.head_start = head_start
        self.num_heads = num_heads
        self.cut = cut
        self.staging = staging
        self._layer_bytes = cut.layer_bytes(num_heads, like_TKD)
        room = staging.data[: staging.capacity // self._layer_bytes * self._layer_bytes].view(like_TKD.dtype)
        self._room_L2RKD = room.view(-1, 2, cut.num_rows, num_heads, head_dim)

    @property
    def num_bytes(self) -> int:
        return self.num_layers * self._layer_bytes

    def takes(self, layer: int, head_start: int, num_heads: int, cut: Cut) -> bool:
        """Whether a layer's rows can be appended."""
        return (
            layer == self.layer + self.num_layers
            and cut is self.cut
            and (head_start, num_heads) == (self.head_start, self.num_heads)
            and self.num_layers < self._room_L2RKD.shape[0]
        )

    def append(self, kernels: Kernels, k_TKD: torch.Tensor, v_TKD: torch.Tensor, heads: slice) -> None:
        """Copy one layer's rows of `heads` (where they are in the tensors), K then V, behind what is packed."""
        kernels.export_kv(k_TKD, v_TKD, self.cut.rows, heads, self._room_L2RKD, self.num_layers)
        self.num_layers += 1


class RowMap:
    """Rows of tensors that hold some runs of tokens, one run after the other.

    Args:
        held: ascending.
    """

    def __init__(self, held: list[range]) -> None:
        self._starts = [run.start for run in held]
        self._rows = list(accumulate((len(run) for run in held), initial=0))

    def cuts(self, runs: list[Run], row_bytes: int) -> list[Cut]:
        """Cut runs, each of which lies in one that is held, into slices of a good size."""
        return [self._cut(group) for group in _groups(runs, max(1, SLICE_BYTES // row_bytes))]

    def _cut(self, runs: tuple[Run, ...]) -> Cut:
        spans = [self._span(start, count) for start, count in runs]
        num_rows = sum(len(span) for span in spans)
        # Neighbours in the tensors even where their tokens are not: one piece.
        if all(left.stop == right.start for left, right in pairwise(spans)):
            return Cut(runs=runs, rows=slice(spans[0].start, spans[-1].stop), num_rows=num_rows)
        return Cut(runs=runs, rows=torch.tensor([row for span in spans for row in span]), num_rows=num_rows)

    def _span(self, start: int, count: int) -> range:
        index = bisect_right(self._starts, start) - 1
        row = self._rows[index] + start - self._starts[index]
        return range(row, row + count)


class Packer:
    """The slices of one (stream, destination rank), in the order in which they shall leave.

    Args:
        kernels: copy the rows.
        take: gives a staging buffer of at least so many bytes; may wait, may raise.
        give: takes back a buffer that was not sent.
        send: takes a packed slice.
        coalesce_bytes: up to what size layers share a slice that is begun now.
    """

    def __init__(
        self,
        kernels: Kernels,
        take: Callable[[int], Staging],
        give: Callable[[Staging], None],
        send: Callable[[PackedSlice], None],
        coalesce_bytes: Callable[[], int],
    ) -> None:
        self._kernels = kernels
        self._take = take
        self._give = give
        self._send = send
        self._coalesce_bytes = coalesce_bytes
        self._full_bytes = 0
        self._open: PackedSlice | None = None

    def add(
        self, layer: int, head_start: int, k_TKD: torch.Tensor, v_TKD: torch.Tensor, heads: slice, cuts: list[Cut]
    ) -> None:
        """Pack one layer's rows of some heads; cuts of one chunk are the same objects for every layer.

        Args:
            head_start: number of the first of `heads` in the whole model.
            heads: where they are in the tensors.
        """
        num_heads = heads.stop - heads.start
        for cut in cuts:
            if self._open is None or not self._open.takes(layer, head_start, num_heads, cut):
                self.flush()
                self._full_bytes = self._coalesce_bytes()
                staging = self._take(max(cut.layer_bytes(num_heads, k_TKD), self._full_bytes))
                self._open = PackedSlice(layer, head_start, num_heads, cut, k_TKD, staging)
            self._open.append(self._kernels, k_TKD, v_TKD, heads)
            if self._open.num_bytes >= self._full_bytes:
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
