"""KV streams between meshes: from any (tp, cp) to any other, against the same bytes from one rank to one.

Two processes: all ranks of the prefill side in this one, each with its source and planes; all ranks of the
decode side in the other, each with its receiver, plane and paged pool. A prompt's KV is sent layer by layer in
chunks, as prefill does, and the clock runs from the first layer to the last rank's acknowledgement. Each
pair of meshes takes turns with one rank to one rank, which moves the same bytes with the same block size;
medians. One thread posts for all source ranks in turn, so on two cores a mesh has no more threads that
compute than one rank has.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import msgspec
import torch

from anabranch.parallel.layout import KvLayout
from anabranch.parallel.reshard import tokens_of
from anabranch.protocol.kv import KvDestination
from benchmarks.report import Figure, parse_options, report
from benchmarks.reshard_peer import Answer, CloseRequest, OpenRequest
from transport.kv_stream import KvStreamSource
from transport.kv_stream.incoming import DTYPES
from transport.planes import usable_planes

TIMEOUT_S = 60.0
TARGET = 1.25
CHUNK_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class Shape:
    """KV of a model, and how much of it is streamed."""

    name: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_tokens: int

    def layout(self, mesh: Mesh) -> KvLayout:
        tp, cp, block_size = mesh
        return KvLayout(
            dtype="bfloat16",
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            block_size=block_size,
            tp=tp,
            cp=cp,
        )


# (tp, cp, block size).
Mesh = tuple[int, int, int]
SMOLLM2 = Shape(name="SmolLM2-135M", num_layers=30, num_kv_heads=3, head_dim=64, num_tokens=4096)
LLAMA = Shape(name="Llama-3-8B", num_layers=32, num_kv_heads=8, head_dim=128, num_tokens=1024)
PAIRS: tuple[tuple[Mesh, Mesh], ...] = (
    ((2, 1, 16), (1, 2, 16)),
    ((1, 2, 16), (2, 1, 16)),
    ((2, 2, 16), (1, 1, 16)),
    ((1, 1, 16), (2, 2, 16)),
    ((3, 1, 16), (1, 2, 16)),
    ((1, 3, 16), (2, 2, 16)),
    ((1, 2, 16), (1, 2, 16)),
    ((1, 2, 16), (1, 2, 64)),
    ((1, 2, 64), (1, 4, 16)),
    ((2, 2, 8), (1, 3, 32)),
)
QUICK_PAIRS = PAIRS[:5]


class Peer:
    """The receiving process."""

    def __init__(self, plane_name: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.reshard_peer", plane_name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def ask(self, request: OpenRequest | CloseRequest) -> Answer:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(msgspec.json.encode(request) + b"\n")
        stdin.flush()
        return msgspec.json.decode(stdout.readline(), type=Answer)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(TIMEOUT_S)


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """One stream: seconds, K and V bytes over all ranks, and slices."""

    taken_s: float
    payload_bytes: int
    num_slices: int


class SourceRank:
    """One prefill rank's KV: every layer its own memory, as in a pool."""

    def __init__(self, layout: KvLayout, rank: int, num_tokens: int) -> None:
        self.rank = rank
        self.heads = layout.heads_of(rank % layout.tp)
        self.chunks: list[tuple[range, torch.Tensor]] = []
        for start in range(0, num_tokens, CHUNK_TOKENS):
            chunk = range(start, min(start + CHUNK_TOKENS, num_tokens))
            held = sum(map(len, tokens_of(layout, rank // layout.tp, chunk)))
            shape = (layout.num_layers, 2, held, len(self.heads), layout.head_dim)
            self.chunks.append((chunk, torch.randn(shape).to(DTYPES[layout.dtype])))


class Bench:
    """Both ends over one plane."""

    def __init__(self, plane_name: str) -> None:
        self.plane_name = plane_name
        self._peer = Peer(plane_name)
        self._sources: dict[int, KvStreamSource] = {}
        self._stream_id = 0

    def stream(self, source: KvLayout, to: KvLayout, ranks: list[SourceRank], num_tokens: int) -> Streamed:
        """Send a prompt's KV once."""
        self._stream_id += 1
        opened = self._peer.ask(OpenRequest(stream_id=self._stream_id, num_tokens=num_tokens, layout=to))
        destination = KvDestination(
            worker="peer",
            stream_id=self._stream_id,
            generation=1,
            layout=to,
            addresses=tuple({self.plane_name: address} for address in opened.addresses[: to.num_ranks]),
            block_ids=(),
            num_cached_tokens=0,
            num_tokens=num_tokens,
            lease_s=TIMEOUT_S,
        )
        senders = [self._source(r.rank).open(destination, source_layout=source, source_rank=r.rank) for r in ranks]
        began_s = time.perf_counter()
        for index, (chunk, _) in enumerate(ranks[0].chunks):
            for layer in range(source.num_layers):
                for sender, rank in zip(senders, ranks, strict=True):
                    k_TKD, v_TKD = rank.chunks[index][1][layer].unbind(0)
                    sender.send_layer(layer, rank.heads.start, chunk.start, k_TKD, v_TKD, chunk=chunk)
        for sender in senders:
            sender.commit(token_id=0)
        stats = [sender.wait_ack(TIMEOUT_S) for sender in senders]
        taken_s = time.perf_counter() - began_s
        closed = self._peer.ask(CloseRequest(stream_id=self._stream_id))
        assert not closed.error, closed.error
        return Streamed(
            taken_s=taken_s,
            payload_bytes=sum(part.payload_bytes for part in stats),
            num_slices=closed.num_slices,
        )

    def close(self) -> None:
        for source in self._sources.values():
            source.close()
        self._peer.close()

    def _source(self, rank: int) -> KvStreamSource:
        if rank not in self._sources:
            self._sources[rank] = KvStreamSource(planes=(self.plane_name,), configured=self.plane_name)
        return self._sources[rank]


def compare(bench: Bench, shape: Shape, pair: tuple[Mesh, Mesh], rounds: int) -> list[Figure]:
    """A pair of meshes in turn with one-to-one: time, bytes and slices."""
    source, to = (shape.layout(mesh) for mesh in pair)
    single = shape.layout((1, 1, to.block_size))
    num_tokens = shape.num_tokens
    meshed = [SourceRank(source, rank, num_tokens) for rank in range(source.num_ranks)]
    alone = [SourceRank(single, 0, num_tokens)]
    ours, theirs = [], []
    for turn in range(rounds + 1):
        both = bench.stream(single, single, alone, num_tokens), bench.stream(source, to, meshed, num_tokens)
        if turn:  # the first connects and touches memory
            theirs.append(both[0])
            ours.append(both[1])
    key = f"{bench.plane_name}, {shape.name}: {mesh_text(pair[0])} to {mesh_text(pair[1])}"
    return [
        Figure(
            key=key,
            value=statistics.median(streamed.taken_s for streamed in ours) * 1e3,
            unit="ms",
            reference=statistics.median(streamed.taken_s for streamed in theirs) * 1e3,
            reference_name="one to one",
            target=TARGET,
            higher_is_better=False,
        ),
        Figure(
            key=f"{key}: bytes",
            value=ours[0].payload_bytes,
            unit="B",
            reference=theirs[0].payload_bytes,
            reference_name="one to one",
        ),
        Figure(
            key=f"{key}: slices",
            value=ours[0].num_slices,
            unit="messages",
            reference=theirs[0].num_slices,
            reference_name="one to one",
        ),
    ]


def mesh_text(mesh: Mesh) -> str:
    tp, cp, block_size = mesh
    return f"({tp}, {cp}) blocks of {block_size}"


def main() -> int:
    options = parse_options("reshard", __doc__)
    torch.set_num_threads(1)
    figures: list[Figure] = []
    planes = [name for name in ("ucx", "tcp") if name in usable_planes()]
    for name in planes[:1] if options.quick else planes:
        bench = Bench(name)
        shapes = (SMOLLM2,) if options.quick else (SMOLLM2, LLAMA)
        for shape in shapes:
            for pair in QUICK_PAIRS if options.quick else PAIRS:
                figures += compare(bench, shape, pair, rounds=5 if options.quick else 9)
        bench.close()
    return report("reshard", figures, options.json)


if __name__ == "__main__":
    sys.exit(main())
