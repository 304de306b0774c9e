"""One rank of `benchmarks.reshard`: a process that sends its part of KV streams, or receives and places it.

    python -m benchmarks.reshard_peer PLANE CORE

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
from runtime.generation.commands import GenerationEvent, OpenStream, StreamFailed
from runtime.generation.importer import KvImport
from transport.kv_stream import KvStreamReceiver, KvStreamSender, KvStreamSource
from transport.kv_stream.incoming import DTYPES
from transport.planes import Link, Plane, create_plane

CPU = torch.device("cpu")
TIMEOUT_S = 60.0
CHUNK_TOKENS = 1024


class Expect(msgspec.Struct, frozen=True, kw_only=True, tag="expect"):
    """A stream may come to this rank of a decode side.

    Attributes:
        rank: which rank of the layout this process is.
        part: which of the streams that come here at a time it is; each has a pool of its own.
    """

    stream_id: int
    num_tokens: int
    layout: KvLayout
    rank: int
    part: int = 0


class Forget(msgspec.Struct, frozen=True, kw_only=True, tag="forget"):
    """The stream has ended; answered with what came.

    Attributes:
        look: whether every byte is where it belongs is looked at first.
    """

    stream_id: int
    look: bool = False


class Prepare(msgspec.Struct, frozen=True, kw_only=True, tag="prepare"):
    """Connect to the destination's ranks and have this rank's KV at hand: one more stream to send at the next Go.

    Attributes:
        rank: which rank of the layout this process is.
        part: which of the streams that it sends at a time this is; each has KV of its own.
        chunk_tokens: tokens of a prefill step.
    """

    layout: KvLayout
    destination: KvDestination
    rank: int
    chunk_tokens: int = CHUNK_TOKENS
    part: int = 0


class Go(msgspec.Struct, frozen=True, kw_only=True, tag="go"):
    """Send what was prepared; answered once all of it is acknowledged."""


class Clear(msgspec.Struct, frozen=True, kw_only=True, tag="clear"):
    """Let go of KV and pools, which stay for streams of the same shape."""


Request = Expect | Forget | Prepare | Go | Clear


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

    def __init__(self, plane_name: str) -> None:
        self._receiver = CountingReceiver()
        self._plane: Plane = create_plane(plane_name, self._receiver)
        self._error = ""
        self._kernels: dict[str, Kernels] = {}
        self._pools: dict[tuple[KvLayout, int, int, int], PagedKv] = {}
        self._expected: dict[int, tuple[Expect, list[int]]] = {}

    def expect(self, request: Expect) -> Answer:
        """Open a stream into blocks that lie scattered over the pool."""
        layout, pool = request.layout, self._pool(request)
        blocks = list(range(pool.num_blocks))
        random.Random(request.stream_id).shuffle(blocks)
        self._expected[request.stream_id] = request, blocks
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
            head_start=layout.heads_of(request.rank % layout.tp).start,
            alive_every_s=3.0,
            emit=self._hear,
        )
        self._receiver.open(
            request.stream_id,
            1,
            layout=layout,
            rank=request.rank,
            num_cached_tokens=0,
            num_tokens=request.num_tokens,
            sink=sink,
        )
        return Answer(address=self._plane.address)

    def forget(self, request: Forget) -> Answer:
        self._receiver.close(request.stream_id)
        num_slices, self._receiver.num_slices = self._receiver.num_slices, 0
        expected = self._expected.pop(request.stream_id, None)
        if request.look and expected is not None and not self._error:
            self._look(*expected)
        return Answer(num_slices=num_slices, error=self._error)

    def clear(self) -> None:
        self._pools.clear()

    def close(self) -> None:
        self._plane.close()

    def _hear(self, event: GenerationEvent) -> None:
        if isinstance(event, StreamFailed):
            self._error = event.error.message

    def _look(self, request: Expect, blocks: list[int]) -> None:
        """Compare what lies in the stream's blocks with what was sent."""
        layout = request.layout
        cp_rank, tp_rank = divmod(request.rank, layout.tp)
        heads = layout.heads_of(tp_rank)
        tokens_T = held_tokens(layout, cp_rank, range(request.num_tokens))
        span = layout.block_size * layout.cp
        slots_T = torch.tensor(blocks)[tokens_T // span] * layout.block_size + tokens_T % layout.block_size
        landed = self._pool(request).data.flatten(2, 3)
        for layer, sent_2TKD in enumerate(whole_kv(layout, request.num_tokens)):
            wanted = sent_2TKD[:, tokens_T, heads.start : heads.stop]
            if not torch.equal(landed[layer][:, slots_T].view(torch.uint8), wanted.contiguous().view(torch.uint8)):
                self._error = f"stream {request.stream_id}, rank {request.rank}, layer {layer}: not what was sent"
                return

    def _pool(self, request: Expect) -> PagedKv:
        layout, num_tokens = request.layout, request.num_tokens
        key = layout, num_tokens, request.rank, request.part
        if key not in self._pools:
            self._pools[key] = PagedKv(
                num_layers=layout.num_layers,
                num_blocks=-(-num_tokens // (layout.block_size * layout.cp)),
                block_size=layout.block_size,
                num_kv_heads=len(layout.heads_of(request.rank % layout.tp)),
                head_dim=layout.head_dim,
                dtype=DTYPES[layout.dtype],
                device=CPU,
            )
        return self._pools[key]


# A chunk of tokens and this rank's KV of it, `[L, 2, T, K, D]`.
Chunks = list[tuple[range, torch.Tensor]]


class Sending:
    """What a prefill rank has, without a model: its part of a prompt's KV, every layer in its own memory."""

    def __init__(self, plane_name: str) -> None:
        kernels = select_kernels(CPU, torch.bfloat16)
        self._source = KvStreamSource(planes=(plane_name,), configured=plane_name, kernels=kernels)
        self._kept: dict[tuple[KvLayout, int, int, int], Chunks] = {}
        self._next: list[tuple[KvStreamSender, Prepare, Chunks]] = []

    def prepare(self, request: Prepare) -> Answer:
        layout, num_tokens, step = request.layout, request.destination.num_tokens, request.chunk_tokens
        key = layout, num_tokens, request.rank, request.part
        if key not in self._kept:
            self._kept[key] = [
                (chunk, make_kv(layout, request.rank, chunk, num_tokens))
                for start in range(0, num_tokens, step)
                for chunk in (range(start, min(start + step, num_tokens)),)
            ]
        sender = self._source.open(request.destination, source_layout=layout, source_rank=request.rank)
        self._next.append((sender, request, self._kept[key]))
        return Answer()

    def go(self) -> Answer:
        """Chunk by chunk, layer by layer, as prefill does; several streams advance together."""
        streams, self._next = self._next, []
        num_layers = streams[0][1].layout.num_layers
        began_s = time.monotonic()
        for index in range(max(len(chunks) for _, _, chunks in streams)):
            for layer in range(num_layers):
                for sender, request, chunks in streams:
                    if index < len(chunks):
                        chunk, kv_L2TKD = chunks[index]
                        head_start = request.layout.heads_of(request.rank % request.layout.tp).start
                        k_TKD, v_TKD = kv_L2TKD[layer].unbind(0)
                        sender.send_layer(layer, head_start, chunk.start, k_TKD, v_TKD, chunk=chunk)
        for sender, _, _ in streams:
            sender.commit(token_id=0)
        stats = [sender.wait_ack(TIMEOUT_S) for sender, _, _ in streams]
        payload_bytes = sum(one.payload_bytes for one in stats)
        return Answer(began_s=began_s, ended_s=time.monotonic(), payload_bytes=payload_bytes)

    def clear(self) -> None:
        self._kept.clear()

    def close(self) -> None:
        self._source.close()


def whole_kv(layout: KvLayout, num_tokens: int) -> torch.Tensor:
    """K and V of all tokens and heads, the same in every process: `[L, 2, T, K, D]` of random bytes."""
    shape = (layout.num_layers, 2, num_tokens, layout.num_kv_heads, layout.head_dim * layout.element_bytes)
    bytes_ = torch.empty(shape, dtype=torch.uint8).random_(generator=torch.Generator().manual_seed(num_tokens))
    return bytes_.view(DTYPES[layout.dtype])


def held_tokens(layout: KvLayout, cp_rank: int, chunk: range) -> torch.Tensor:
    """Those of a chunk that a CP rank holds: int64 `[T]`, ascending."""
    return torch.tensor([token for run in tokens_of(layout, cp_rank, chunk) for token in run], dtype=torch.int64)


def make_kv(layout: KvLayout, rank: int, chunk: range, num_tokens: int) -> torch.Tensor:
    """K and V of what a rank has of a chunk, all layers: `[L, 2, T, K, D]`."""
    cp_rank, tp_rank = divmod(rank, layout.tp)
    heads = layout.heads_of(tp_rank)
    tokens_T = held_tokens(layout, cp_rank, chunk)
    return whole_kv(layout, num_tokens)[:, :, tokens_T, heads.start : heads.stop].contiguous()


def serve(plane_name: str, core: int) -> None:
    """Answer requests until standard input ends."""
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {core})
    receiving, sending = Receiving(plane_name), Sending(plane_name)
    requests = msgspec.json.Decoder(Request)
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
            case Clear():
                receiving.clear()
                sending.clear()
                answer = Answer()
        sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
        sys.stdout.buffer.flush()
    sending.close()
    receiving.close()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
    os._exit(0)
