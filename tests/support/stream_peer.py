"""The other process of the KV stream's tests: receives one stream, or sends one.

Every line of JSON is answered with one.
    {"do": "address"}                                    -> {"stream": address}
    {"do": "open", "num_tokens": n, "layout": ...}       -> {}          KV stream 1, generation 1
    {"do": "stream"}                                     -> {"committed": token or null, "failed": code, "crc": n}
    {"do": "send_stream", "destination": ..., "commit": bool} -> {"error": code or null}
"""

from __future__ import annotations

import json
import sys
import zlib

import msgspec
import torch

from anabranch.errors import AnabranchError
from anabranch.parallel.layout import KvLayout
from anabranch.protocol.kv import KvDestination
from transport.kv_stream import Commit, KvStreamReceiver, KvStreamSource
from transport.planes import create_plane


def make_kv(layout: KvLayout, num_tokens: int) -> torch.Tensor:
    """`[layers, 2, tokens, heads, head_dim]`, the same in every process."""
    shape = (layout.num_layers, 2, num_tokens, layout.num_kv_heads, layout.head_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def crc_of(kv: torch.Tensor) -> int:
    return zlib.crc32(memoryview(kv.contiguous().view(torch.uint8).flatten().numpy()).cast("B"))


class Pool:
    """A sink that keeps what was placed."""

    def __init__(self, layout: KvLayout, num_tokens: int) -> None:
        self.kv = torch.zeros_like(make_kv(layout, num_tokens))
        self.token: int | None = None
        self.code: str | None = None

    def place(self, layer: int, head_start: int, tokens_T: torch.Tensor, kv_L2TKD: torch.Tensor) -> None:
        self.kv[layer : layer + kv_L2TKD.shape[0], :, tokens_T] = kv_L2TKD

    def touch(self) -> None: ...

    def committed(self, commit: Commit) -> None:
        self.token = commit.token_id

    def failed(self, error: AnabranchError) -> None:
        self.code = error.code


def main(name: str) -> None:
    torch.set_num_threads(1)
    receiver = KvStreamReceiver()
    plane = create_plane(name, receiver)
    pool: Pool | None = None
    for line in sys.stdin:
        command = json.loads(line)
        answer: dict[str, object] = {}
        match command["do"]:
            case "address":
                answer = {"stream": plane.address}
            case "open":
                layout = msgspec.convert(command["layout"], KvLayout)
                pool = Pool(layout, command["num_tokens"])
                receiver.open(
                    1, 1, layout=layout, rank=0, num_cached_tokens=0, num_tokens=command["num_tokens"], sink=pool
                )
            case "stream":
                assert pool is not None
                answer = {"committed": pool.token, "failed": pool.code, "crc": crc_of(pool.kv)}
            case "send_stream":
                answer = {"error": send_stream(name, command)}
        print(json.dumps(answer), flush=True)


def send_stream(name: str, command: dict[str, object]) -> str | None:
    destination = msgspec.convert(command["destination"], KvDestination)
    layout, num_tokens = destination.layout, destination.num_tokens
    kv = make_kv(layout, num_tokens)
    sender = KvStreamSource(planes=(name,)).open(destination, source_layout=layout)
    layers = layout.num_layers if command["commit"] else layout.num_layers - 1
    try:
        for layer in range(layers):
            sender.send_layer(layer, 0, 0, kv[layer, 0], kv[layer, 1])
        if command["commit"]:
            sender.commit(token_id=11)
            sender.wait_ack(20.0)
    except AnabranchError as error:
        return error.code
    return None


if __name__ == "__main__":
    main(sys.argv[1])
