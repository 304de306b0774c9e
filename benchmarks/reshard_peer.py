"""One rank of `benchmarks.reshard`: a process that sends its part of KV streams, or receives and places it.

    python -m benchmarks.reshard_peer PLANE RANK CORE

It follows lines of JSON on standard input, each answered with one on standard output.
"""

from __future__ import annotations

import os
import random
import sys
import time

import msgspec
import torch

from anabranch.cache.paged_kv import PagedKv
from anabranch.kernels.base import Kernels
from anabranch.kernels.native import select_kernels
from anabranch.parallel.layout import KvLayout
from anabranch.parallel.reshard import tokens_of
from anabranch.protocol.kv import KvDestination
from decode.commands import DecodeEvent, OpenStream, StreamFailed
from decode.importer import KvImport
from transport.kv_stream import KvStreamReceiver, KvStreamSender, KvStreamSource
from transport.kv_stream.incoming import DTYPES
from transport.planes import Link, Plane, create_plane

CPU = torch.device("cpu")
TIMEOUT_S = 60.0
CHUNK_TOKENS = 1024
# KV and pools stay for streams that take turns: one-to-one and one pair of meshes.
MAX_KEPT = 2


class Expect(msgspec.Struct, frozen=True, kw_only=True, tag="expect"):
    """A stream may come to this rank of a decode side."""

    stream_id: int
    num_tokens: int
    layout: KvLayout


class Forget(msgspec.Struct, frozen=True, kw_only=True, tag="forget"):
    """The stream has ended; answered with what came."""

    stream_id: int


class Prepare(msgspec.Struct, frozen=True, kw_only=True, tag="prepare"):
    """Connect to the destination's ranks and have this rank's KV at hand."""

    layout: KvLayout
    destination: KvDestination


class Go(msgspec.Struct, frozen=True, kw_only=True, tag="go"):
    """Send what was prepared; answered once it is acknowledged."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank says.

    Attributes:
        address: of its plane.
        began_s, ended_s: of sending; `time.monotonic()`, which all processes share.
        payload_bytes: that it sent.
        num_slices: that came.
        error: why a stream failed; empty where none did.
    """

    address: str = ""
    began_s: float = 0.0
    ended_s: float = 0.0
    payload_bytes: int = 0
    num_slices: int = 0
    error: str = ""


class CountingReceiver(KvStreamReceiver):
    """Counts the slices that come."""

    num_slices = 0

    def on_header(self, link: Link, header: bytes, payload_bytes: int) -> memoryview | None:
        """See `PlaneHandler.on_header`."""
        self.num_slices += payload_bytes > 0
        return super().on_header(link, header, payload_bytes)


class Receiving:
    """What a decode rank has, without a model."""

    def __init__(self, plane_name: str, rank: int) -> None:
        self._rank = rank
        self._receiver = CountingReceiver()
        self._plane: Plane = create_plane(plane_name, self._receiver)
        self._error = ""
        self._kernels: dict[str, Kernels] = {}
        self._pools: dict[tuple[KvLayout, int], PagedKv] = {}

    def expect(self, request: Expect) -> Answer:
        """Open a stream into blocks that lie scattered over the pool."""
        layout, pool = request.layout, self._pool(request.layout, request.num_tokens)
        blocks = list(range(pool.num_blocks))
        random.Random(request.stream_id).shuffle(blocks)
        if layout.dtype not in self._kernels:
            self._kernels[layout.dtype] = select_kernels(CPU, DTYPES[layout.dtype])
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
            head_start=layout.heads_of(self._rank % layout.tp).start,
            alive_every_s=3.0,
            emit=self._hear,
        )
        self._receiver.num_slices = 0
        self._receiver.open(
            request.stream_id,
            1,
            layout=layout,
            rank=self._rank,
            num_cached_tokens=0,
            num_tokens=request.num_tokens,
            sink=sink,
        )
        return Answer(address=self._plane.address)

    def forget(self, request: Forget) -> Answer:
        self._receiver.close(request.stream_id)
        return Answer(num_slices=self._receiver.num_slices, error=self._error)

    def close(self) -> None:
        self._plane.close()

    def _hear(self, event: DecodeEvent) -> None:
        if isinstance(event, StreamFailed):
            self._error = event.error.message

    def _pool(self, layout: KvLayout, num_tokens: int) -> PagedKv:
        key = layout, num_tokens
        if key not in self._pools:
            if len(self._pools) == MAX_KEPT:
                self._pools.clear()
            self._pools[key] = PagedKv(
                num_layers=layout.num_layers,
                num_blocks=-(-num_tokens // (layout.block_size * layout.cp)),
                block_size=layout.block_size,
                num_kv_heads=len(layout.heads_of(self._rank % layout.tp)),
                head_dim=layout.head_dim,
                dtype=DTYPES[layout.dtype],
                device=CPU,
            )
        return self._pools[key]


class Sending:
    """What a prefill rank has, without a model: its part of a prompt's KV, every layer in its own memory."""

    def __init__(self, plane_name: str, rank: int) -> None:
        self._rank = rank
        self._source = KvStreamSource(planes=(plane_name,), configured=plane_name)
        self._kept: dict[tuple[KvLayout, int], list[tuple[range, torch.Tensor]]] = {}
        self._next: tuple[KvStreamSender, KvLayout, list[tuple[range, torch.Tensor]]] | None = None

    def prepare(self, request: Prepare) -> Answer:
        layout, num_tokens = request.layout, request.destination.num_tokens
        key = layout, num_tokens
        if key not in self._kept:
            if len(self._kept) == MAX_KEPT:
                self._kept.clear()
            self._kept[key] = [
                (chunk, self._make_kv(layout, chunk))
                for start in range(0, num_tokens, CHUNK_TOKENS)
                for chunk in (range(start, min(start + CHUNK_TOKENS, num_tokens)),)
            ]
        sender = self._source.open(request.destination, source_layout=layout, source_rank=self._rank)
        self._next = sender, layout, self._kept[key]
        return Answer()

    def go(self) -> Answer:
        """Layer by layer, chunk by chunk, as prefill does."""
        assert self._next is not None
        sender, layout, chunks = self._next
        head_start = layout.heads_of(self._rank % layout.tp).start
        began_s = time.monotonic()
        for chunk, kv_L2TKD in chunks:
            for layer in range(layout.num_layers):
                k_TKD, v_TKD = kv_L2TKD[layer].unbind(0)
                sender.send_layer(layer, head_start, chunk.start, k_TKD, v_TKD, chunk=chunk)
        sender.commit(token_id=0)
        stats = sender.wait_ack(TIMEOUT_S)
        return Answer(began_s=began_s, ended_s=time.monotonic(), payload_bytes=stats.payload_bytes)

    def close(self) -> None:
        self._source.close()

    def _make_kv(self, layout: KvLayout, chunk: range) -> torch.Tensor:
        held = sum(map(len, tokens_of(layout, self._rank // layout.tp, chunk)))
        num_heads = len(layout.heads_of(self._rank % layout.tp))
        return torch.randn(layout.num_layers, 2, held, num_heads, layout.head_dim).to(DTYPES[layout.dtype])


def serve(plane_name: str, rank: int, core: int) -> None:
    """Answer requests until standard input ends."""
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {core})
    receiving, sending = Receiving(plane_name, rank), Sending(plane_name, rank)
    requests = msgspec.json.Decoder(Expect | Forget | Prepare | Go)
    for line in sys.stdin.buffer:
        match requests.decode(line):
            case Expect() as request:
                answer = receiving.expect(request)
            case Forget() as request:
                answer = receiving.forget(request)
            case Prepare() as request:
                answer = sending.prepare(request)
            case Go():
                answer = sending.go()
        sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
        sys.stdout.buffer.flush()
    sending.close()
    receiving.close()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    os._exit(0)
