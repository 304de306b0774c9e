"""The receiving process of `benchmarks.reshard`: the ranks of a decode worker, each with its plane and receiver.

It follows lines of JSON on standard input, each answered with one on standard output:
    OpenRequest    blocks are set aside on every rank, a stream may come        -> Answer
    CloseRequest   the stream has ended                                        -> Answer, with what was counted
"""

from __future__ import annotations

import os
import random
import sys

import msgspec
import torch

from anabranch.cache.paged_kv import PagedKv
from anabranch.kernels.native import select_kernels
from anabranch.parallel.layout import KvLayout
from decode.commands import DecodeEvent, OpenStream, StreamFailed
from decode.importer import KvImport
from transport.kv_stream import KvStreamReceiver
from transport.kv_stream.incoming import DTYPES
from transport.planes import Link, create_plane

CPU = torch.device("cpu")
MAX_RANKS = 4
# Pools stay for the streams that take turns: one-to-one and one pair of meshes.
MAX_POOLS = 2


class OpenRequest(msgspec.Struct, frozen=True, kw_only=True, tag="open"):
    """Expect a stream on as many ranks as the layout has."""

    stream_id: int
    num_tokens: int
    layout: KvLayout


class CloseRequest(msgspec.Struct, frozen=True, kw_only=True, tag="close"):
    """Forget a stream."""

    stream_id: int


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What the peer says.

    Attributes:
        addresses: of its ranks' planes.
        num_slices: that came since the last CloseRequest, at all ranks.
        error: why a stream failed; empty where none did.
    """

    addresses: tuple[str, ...] = ()
    num_slices: int = 0
    error: str = ""


class CountingReceiver(KvStreamReceiver):
    """Counts the slices that come."""

    num_slices = 0

    def on_header(self, link: Link, header: bytes, payload_bytes: int) -> memoryview | None:
        """See `PlaneHandler.on_header`."""
        self.num_slices += payload_bytes > 0
        return super().on_header(link, header, payload_bytes)


class Rank:
    """One rank: what a decode rank has, without a model."""

    def __init__(self, plane_name: str, rank: int) -> None:
        self.rank = rank
        self.receiver = CountingReceiver()
        self.plane = create_plane(plane_name, self.receiver)
        self.error = ""
        self._kernels = {name: select_kernels(CPU, dtype) for name, dtype in DTYPES.items()}
        self._pools: dict[tuple[KvLayout, int], PagedKv] = {}

    def open(self, request: OpenRequest) -> None:
        """Expect this rank's part of a stream, in blocks that lie scattered over the pool."""
        layout, pool = request.layout, self._pool(request.layout, request.num_tokens)
        blocks = list(range(pool.num_blocks))
        random.Random(request.stream_id).shuffle(blocks)
        sink = KvImport(
            pool,
            self._kernels[layout.dtype],
            OpenStream(
                stream_id=request.stream_id,
                generation=1,
                block_ids=tuple(blocks),
                num_cached_tokens=0,
                num_tokens=request.num_tokens,
            ),
            span=layout.block_size * layout.cp,
            head_start=layout.heads_of(self.rank % layout.tp).start,
            alive_every_s=3.0,
            emit=self._hear,
        )
        self.receiver.open(
            request.stream_id,
            1,
            layout=layout,
            rank=self.rank,
            num_cached_tokens=0,
            num_tokens=request.num_tokens,
            sink=sink,
        )

    def take_num_slices(self) -> int:
        """Slices since the last call."""
        count, self.receiver.num_slices = self.receiver.num_slices, 0
        return count

    def _hear(self, event: DecodeEvent) -> None:
        if isinstance(event, StreamFailed):
            self.error = event.error.message

    def _pool(self, layout: KvLayout, num_tokens: int) -> PagedKv:
        key = layout, num_tokens
        pool = self._pools.pop(key, None)
        if pool is None:
            if len(self._pools) == MAX_POOLS:
                del self._pools[next(iter(self._pools))]
            pool = PagedKv(
                num_layers=layout.num_layers,
                num_blocks=-(-num_tokens // (layout.block_size * layout.cp)),
                block_size=layout.block_size,
                num_kv_heads=len(layout.heads_of(self.rank % layout.tp)),
                head_dim=layout.head_dim,
                dtype=DTYPES[layout.dtype],
                device=CPU,
            )
        self._pools[key] = pool
        return pool


def serve(plane_name: str) -> None:
    """Answer requests until standard input ends."""
    torch.set_num_threads(1)
    ranks = [Rank(plane_name, rank) for rank in range(MAX_RANKS)]
    requests = msgspec.json.Decoder(OpenRequest | CloseRequest)
    for line in sys.stdin.buffer:
        request = requests.decode(line)
        if isinstance(request, OpenRequest):
            for rank in ranks[: request.layout.num_ranks]:
                rank.open(request)
        else:
            for rank in ranks:
                rank.receiver.close(request.stream_id)
        answer = Answer(
            addresses=tuple(rank.plane.address for rank in ranks),
            num_slices=sum(rank.take_num_slices() for rank in ranks),
            error=next((rank.error for rank in ranks if rank.error), ""),
        )
        sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
        sys.stdout.buffer.flush()
    for rank in ranks:
        rank.plane.close()


if __name__ == "__main__":
    serve(sys.argv[1])
    os._exit(0)
