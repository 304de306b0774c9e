"""KV streams between meshes: from any (tp, cp) to any other, against the same bytes from one rank to one.

Every rank is a process with the parts that a worker's rank has: sources, planes and links on one side; planes,
receivers, the importer and a paged pool on the other. A prompt's KV is sent layer by layer in chunks, as prefill
does, and the clock runs from the first rank's first layer to the last rank's acknowledgement. The first stream of
each way is looked at, byte by byte.

Each pair of meshes takes turns with two references that move the same bytes with the same block size; medians.

    same ranks   the same processes at both ends, but every stream goes from one rank to one rank, in one layout, with
                 an even share of every step's tokens: what resharding itself costs, and what the target is for
    one to one   one process at each end: what a mesh costs on this machine, where a side's ranks share one core
                 whatever their number, so that a mesh has no more hands than a single rank
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from anabranch.parallel.layout import KvLayout
from anabranch.parallel.split import split_range
from anabranch.protocol.kv import KvDestination
from anabranch.system.child_process import python_environment, python_module
from benchmarks.report import Figure, parse_options, report
from benchmarks.reshard_peer import CHUNK_TOKENS, TIMEOUT_S, Answer, Clear, Expect, Forget, Go, Prepare, Request
from transport.planes import usable_planes

TARGET = 1.25
MAX_RANKS = 4

# (tp, cp, block size).
Mesh = tuple[int, int, int]


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
    """The process of one rank."""

    def __init__(self, plane_name: str, core: int) -> None:
        self._process = subprocess.Popen(
            python_module("benchmarks.reshard_peer", plane_name, str(core)),
            env=python_environment({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def ask(self, request: Request) -> Answer:
        self.tell(request)
        return self.answer()

    def tell(self, request: Request) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(request) + b"\n")
        self._process.stdin.flush()

    def answer(self) -> Answer:
        assert self._process.stdout is not None
        return msgspec.json.decode(self._process.stdout.readline(), type=Answer)

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


class Bench:
    """Both sides over one plane: the source ranks share a core, and so do the destination ranks."""

    def __init__(self, plane_name: str) -> None:
        self.plane_name = plane_name
        cores = sorted(os.sched_getaffinity(0))
        self._sources = [Peer(plane_name, cores[0]) for _ in range(MAX_RANKS)]
        self._destinations = [Peer(plane_name, cores[-1]) for _ in range(MAX_RANKS)]
        self._stream_id = 0

    def stream(self, source: KvLayout, to: KvLayout, num_tokens: int, look: bool) -> Streamed:
        """Send a prompt's KV once, from mesh to mesh; `look`: and see that every byte is where it belongs."""
        senders, receivers = self._sources[: source.num_ranks], self._destinations[: to.num_ranks]
        destination = self._expect(receivers, to, num_tokens)
        for rank, peer in enumerate(senders):
            peer.ask(Prepare(layout=source, destination=destination, rank=rank))
        return self._run(senders, receivers, [destination.stream_id], look)

    def stream_apart(
        self, single: KvLayout, num_sources: int, num_destinations: int, num_tokens: int, look: bool
    ) -> Streamed:
        """The same bytes between so many ranks, every stream from one to one; all ranks of a side have even shares."""
        senders, receivers = self._sources[:num_sources], self._destinations[:num_destinations]
        num_streams = math.lcm(num_sources, num_destinations)
        num_blocks = num_tokens // single.block_size
        stream_ids = []
        for part in range(num_streams):
            share = len(split_range(num_blocks, num_streams, part)) * single.block_size
            destination = self._expect([receivers[part % num_destinations]], single, share, part)
            chunk_tokens = -(-CHUNK_TOKENS // num_streams)
            senders[part % num_sources].ask(
                Prepare(layout=single, destination=destination, rank=0, chunk_tokens=chunk_tokens, part=part)
            )
            stream_ids.append(destination.stream_id)
        return self._run(senders, receivers, stream_ids, look)

    def clear(self) -> None:
        """Let go of the last shapes' memory."""
        for peer in (*self._sources, *self._destinations):
            peer.ask(Clear())

    def _expect(self, receivers: list[Peer], to: KvLayout, num_tokens: int, part: int = 0) -> KvDestination:
        """Open a stream at its receivers."""
        self._stream_id += 1
        addresses = [
            peer.ask(Expect(stream_id=self._stream_id, num_tokens=num_tokens, layout=to, rank=rank, part=part)).address
            for rank, peer in enumerate(receivers)
        ]
        return KvDestination(
            worker="peer",
            stream_id=self._stream_id,
            generation=1,
            layout=to,
            addresses=tuple({self.plane_name: address} for address in addresses),
            block_ids=(),
            num_cached_tokens=0,
            num_tokens=num_tokens,
            lease_s=TIMEOUT_S,
        )

    def _run(self, senders: list[Peer], receivers: list[Peer], stream_ids: list[int], look: bool) -> Streamed:
        """Send what was prepared."""
        for peer in senders:
            peer.tell(Go())
        sent = [peer.answer() for peer in senders]
        came = [peer.ask(Forget(stream_id=stream_id, look=look)) for stream_id in stream_ids for peer in receivers]
        errors = [answer.error for answer in came if answer.error]
        assert not errors, errors
        return Streamed(
            taken_s=max(answer.ended_s for answer in sent) - min(answer.began_s for answer in sent),
            payload_bytes=sum(answer.payload_bytes for answer in sent),
            num_slices=sum(answer.num_slices for answer in came),
        )

    def close(self) -> None:
        for peer in (*self._sources, *self._destinations):
            peer.close()


def compare(bench: Bench, shape: Shape, pair: tuple[Mesh, Mesh], rounds: int) -> list[Figure]:
    """A pair of meshes in turn with its references: time, bytes and slices."""
    source, to = (shape.layout(mesh) for mesh in pair)
    single = shape.layout((1, 1, to.block_size))
    num_tokens = shape.num_tokens
    ways: tuple[Callable[[bool], Streamed], ...] = (
        lambda look: bench.stream(source, to, num_tokens, look),
        lambda look: bench.stream_apart(single, source.num_ranks, to.num_ranks, num_tokens, look),
        lambda look: bench.stream_apart(single, 1, 1, num_tokens, look),
    )
    kept: tuple[list[Streamed], ...] = ([], [], [])
    bench.clear()
    for turn in range(rounds + 1):
        for place in range(len(ways)):
            way = (turn + place) % len(ways)  # none always follows the same other
            streamed = ways[way](turn == 0)
            if turn:  # the first connects, touches memory and shows that all of it lands
                kept[way].append(streamed)
    ours, same_ranks, _ = kept
    key = f"{bench.plane_name}, {shape.name}: {mesh_text(pair[0])} to {mesh_text(pair[1])}"
    taken_ms = [statistics.median(one.taken_s for one in runs) * 1e3 for runs in kept]
    return [
        Figure(
            key=key,
            value=taken_ms[0],
            unit="ms",
            reference=taken_ms[1],
            reference_name="same ranks",
            target=TARGET,
            higher_is_better=False,
        ),
        Figure(
            key=f"{key}: against one rank",
            value=taken_ms[0],
            unit="ms",
            reference=taken_ms[2],
            reference_name="one to one",
            higher_is_better=False,
        ),
        Figure(
            key=f"{key}: bytes",
            value=ours[0].payload_bytes,
            unit="B",
            reference=same_ranks[0].payload_bytes,
            reference_name="same ranks",
        ),
        Figure(
            key=f"{key}: slices",
            value=statistics.median(one.num_slices for one in ours),
            unit="messages",
            reference=statistics.median(one.num_slices for one in same_ranks),
            reference_name="same ranks",
        ),
    ]


def mesh_text(mesh: Mesh) -> str:
    tp, cp, block_size = mesh
    return f"({tp}, {cp}) blocks of {block_size}"


def main() -> int:
    options = parse_options("reshard", __doc__)
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
