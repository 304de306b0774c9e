"""One KV stream from a source to a rank whose sink keeps what was placed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from anabranch.errors import (
    AnabranchError,
)
from anabranch.parallel.layout import KvLayout
from anabranch.protocol.kv import KvDestination
from transport.kv_stream import Ack, Commit, KvStreamReceiver, KvStreamSender, KvStreamSource
from transport.kv_stream.messages import decode_to_sender
from transport.planes import Link, Plane, create_plane

LAYOUT = KvLayout(dtype="float32", num_layers=3, num_kv_heads=4, head_dim=8, block_size=4)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def make_kv(layout: KvLayout, num_tokens: int, seed: int = 0) -> torch.Tensor:
    """`[layers, 2, tokens, heads, head_dim]`, every element different."""
    shape = (layout.num_layers, 2, num_tokens, layout.num_kv_heads, layout.head_dim)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DTYPES[layout.dtype])


@dataclass
class Pool:
    """A sink that keeps what was placed, and how often."""

    layout: KvLayout
    num_tokens: int
    kv: torch.Tensor = field(init=False)
    times: torch.Tensor = field(init=False)
    commits: list[Commit] = field(default_factory=list)
    failures: list[AnabranchError] = field(default_factory=list)
    num_touched: int = 0
    before_place: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.kv = torch.zeros_like(make_kv(self.layout, self.num_tokens))
        self.times = torch.zeros(self.layout.num_layers, self.num_tokens, self.layout.num_kv_heads, dtype=torch.int64)

    def place(self, layer: int, head_start: int, tokens_T: torch.Tensor, kv_L2TKD: torch.Tensor) -> None:
        self.before_place()
        layers = slice(layer, layer + kv_L2TKD.shape[0])
        heads = slice(head_start, head_start + kv_L2TKD.shape[3])
        self.kv[layers, :, tokens_T, heads] = kv_L2TKD
        self.times[layers, tokens_T, heads] += 1

    def touch(self) -> None:
        self.num_touched += 1

    def committed(self, commit: Commit) -> None:
        self.commits.append(commit)

    def failed(self, error: AnabranchError) -> None:
        self.failures.append(error)


@dataclass
class Stream:
    """One destination rank that waits for stream 7, generation 3, and a source that can open it."""

    name: str
    receiver: KvStreamReceiver
    plane: Plane
    source: KvStreamSource
    pool: Pool
    destination: KvDestination

    def open(self) -> KvStreamSender:
        return self.source.open(self.destination, source_layout=LAYOUT)

    def raw_link(self) -> tuple[Link, RawHandler]:
        """A link to the receiver that is driven by hand."""
        handler = RawHandler()
        plane = create_plane(self.name, handler)
        handler.plane = plane
        return plane.connect(self.plane.address, 5.0), handler


class RawHandler:
    """Keeps the Acks that come back."""

    plane: Plane

    def __init__(self) -> None:
        self.acks: list[Ack] = []
        self.lost: list[Exception] = []

    def on_header(self, link: Link, header: bytes, payload_bytes: int) -> memoryview | None:
        self.acks.append(decode_to_sender(header))
        return None

    def on_payload(self, link: Link, header: bytes, buffer: memoryview) -> None:
        raise AssertionError("nobody sends payloads back")

    def on_lost(self, link: Link, error: Exception) -> None:
        self.lost.append(error)

    @property
    def codes(self) -> list[str | None]:
        return [ack.error.code if ack.error is not None else None for ack in self.acks]


NUM_TOKENS = 21
NUM_CACHED = 5


def send_chunks(sender: KvStreamSender, kv: torch.Tensor, chunks: list[range]) -> None:
    for chunk in chunks:
        for layer in range(kv.shape[0]):
            rows = slice(chunk.start, chunk.stop)
            sender.send_layer(layer, 0, chunk.start, kv[layer, 0, rows].clone(), kv[layer, 1, rows].clone())


def chunks_of(start: int, stop: int, size: int) -> list[range]:
    return [range(first, min(first + size, stop)) for first in range(start, stop, size)]


def destination_of(layout: KvLayout, planes: list[Plane], num_tokens: int, cached: int = 0) -> KvDestination:
    return KvDestination(
        worker="decode-0",
        stream_id=1,
        generation=1,
        layout=layout,
        addresses=tuple({plane.name: plane.address} for plane in planes),
        block_ids=(),
        num_cached_tokens=cached,
        num_tokens=num_tokens,
        lease_s=10.0,
    )
