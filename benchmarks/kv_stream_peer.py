"""The receiving process of `benchmarks.kv_stream`.

It listens on one plane and follows lines of JSON on standard input, each answered with one on standard output:
    {}                                          -> {"plane": address, "stream": address}
    {"stream_id", "num_tokens", "layout"}       -> {}          a KV stream may come
    {"close": stream_id}                        -> {}
Messages on the plane: `d` + payload is received into one buffer, `e` + payload is sent back, `f` is answered.
"""

from __future__ import annotations

import json
import os
import sys

import msgspec
import torch

from anabranch.cache.paged_kv import PagedKv
from anabranch.errors import AnabranchError
from anabranch.kernels.base import Kernels
from anabranch.kernels.native import select_kernels
from anabranch.parallel.layout import KvLayout
from transport.kv_stream import Commit, KvStreamReceiver
from transport.kv_stream.incoming import DTYPES
from transport.planes import Link, create_plane

MAX_BYTES = 64 << 20


class BenchHandler:
    """Takes every payload into the same buffer, as ucx_perftest does."""

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(MAX_BYTES))

    def on_header(self, link: Link, header: bytes, payload_bytes: int) -> memoryview | None:
        if header == b"f":
            link.send(b"f")
            return None
        if not payload_bytes:
            link.send(b"e")
            return None
        return self._buffer[:payload_bytes]

    def on_payload(self, link: Link, header: bytes, buffer: memoryview) -> None:
        if header == b"e":
            link.send(b"e", buffer)

    def on_lost(self, link: Link, error: Exception) -> None: ...


class PoolSink:
    """Places slices into a paged pool, blocks in shuffled order, as a decode worker does."""

    def __init__(self, kv: PagedKv, kernels: Kernels, num_tokens: int) -> None:
        self._kv = kv
        self._kernels = kernels
        blocks_N = torch.randperm(kv.num_blocks)[: -(-num_tokens // kv.block_size)]
        self._slots_T = (blocks_N[:, None] * kv.block_size + torch.arange(kv.block_size)).flatten()

    def place(self, layer: int, head_start: int, tokens_T: torch.Tensor, kv_L2TKD: torch.Tensor) -> None:
        pool = self._kv.data[layer : layer + kv_L2TKD.shape[0]]
        self._kernels.import_kv(kv_L2TKD, pool, self._slots_T[tokens_T])

    def touch(self) -> None: ...

    def committed(self, commit: Commit) -> None: ...

    def failed(self, error: AnabranchError) -> None:
        print(f"the stream failed: {error}", file=sys.stderr, flush=True)


def serve(name: str) -> None:
    """Answer commands until standard input ends."""
    torch.set_num_threads(1)
    receiver = KvStreamReceiver()
    plane, stream_plane = create_plane(name, BenchHandler()), create_plane(name, receiver)
    pools: dict[str, PagedKv] = {}
    for line in sys.stdin:
        command = json.loads(line)
        answer: dict[str, str] = {}
        if "close" in command:
            receiver.close(command["close"])
        elif "layout" in command:
            layout = msgspec.convert(command["layout"], KvLayout)
            key = json.dumps(command["layout"]) + str(command["num_tokens"])
            if key not in pools:
                pools.clear()
                pools[key] = PagedKv(
                    num_layers=layout.num_layers,
                    num_blocks=command["num_tokens"] // layout.block_size + 64,
                    block_size=layout.block_size,
                    num_kv_heads=layout.num_kv_heads,
                    head_dim=layout.head_dim,
                    dtype=DTYPES[layout.dtype],
                    device=torch.device("cpu"),
                )
                pools[key].data.fill_(0.0)  # a pool's pages are there before the first stream comes
            receiver.open(
                command["stream_id"],
                1,
                layout=layout,
                rank=0,
                num_cached_tokens=0,
                num_tokens=command["num_tokens"],
                sink=PoolSink(
                    pools[key], select_kernels(torch.device("cpu"), DTYPES[layout.dtype]), command["num_tokens"]
                ),
            )
        else:
            answer = {"plane": plane.address, "stream": stream_plane.address}
        print(json.dumps(answer), flush=True)
    plane.close()
    stream_plane.close()


if __name__ == "__main__":
    serve(sys.argv[1])
    os._exit(0)
