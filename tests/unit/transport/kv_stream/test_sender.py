"""Slices and bytes in flight of a KV stream's sender."""

from __future__ import annotations

from concurrent.futures import Future

import msgspec
import pytest
import torch

from anabranch.errors import (
    DeadlineExceeded,
)
from anabranch.kernels.plain import PlainKernels
from anabranch.parallel.layout import KvLayout
from tests.support.kv_streams import destination_of
from tests.support.waiting import WAIT_S
from transport.kv_stream import Abort, KvStreamSender
from transport.kv_stream.messages import decode_to_receiver
from transport.kv_stream.staging import StagingPool

pytestmark = pytest.mark.unit


class DeafLink:
    """A link whose messages never leave."""

    peer = "nobody"

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, Future[None]]] = []

    def send(self, header: bytes, payload: memoryview | None = None) -> Future[None]:
        future: Future[None] = Future()
        self.sent.append((header, future))
        return future

    def close(self) -> None: ...


def test_bytes_in_flight_are_bounded_and_the_wait_has_a_deadline() -> None:
    layout = KvLayout(dtype="float32", num_layers=64, num_kv_heads=4, head_dim=64, block_size=16)
    link, pool = DeafLink(), StagingPool(1 << 30)
    sender = KvStreamSender(
        [link],
        destination_of(layout, [], 1000),
        source_layout=layout,
        source_rank=0,
        transport="deaf",
        kernels=PlainKernels(),
        pool=pool,
        max_in_flight_bytes=8 << 20,
        send_timeout_s=0.1,
        forget=lambda sender: None,
    )
    kv = torch.zeros(512, 4, 64)
    for layer in range(8):
        sender.send_layer(layer, 0, 0, kv, kv)
    with pytest.raises(DeadlineExceeded, match="in flight"):
        sender.send_layer(8, 0, 0, kv, kv)
    assert pool.used_bytes <= 8 << 20
    for _, future in link.sent:
        future.set_result(None)
    assert pool.used_bytes == 0
    assert isinstance(decode_to_receiver(link.sent[-1][0]), Abort)


def test_slices_that_wait_for_layers_leave_room_for_many_destinations() -> None:
    # One small layer: every destination's slice waits for more, and none comes before they all have a buffer.
    to = KvLayout(dtype="float32", num_layers=2, num_kv_heads=4, head_dim=64, block_size=4, cp=32)
    links, pool = [DeafLink() for _ in range(to.num_ranks)], StagingPool(1 << 30)
    sender = KvStreamSender(
        links,
        destination_of(to, [], 128),
        source_layout=msgspec.structs.replace(to, cp=1),
        source_rank=0,
        transport="deaf",
        kernels=PlainKernels(),
        pool=pool,
        max_in_flight_bytes=4 << 20,
        send_timeout_s=0.1,
        forget=lambda sender: None,
    )
    kv = torch.zeros(128, 4, 64)
    for layer in range(to.num_layers):
        sender.send_layer(layer, 0, 0, kv, kv)
    assert pool.used_bytes <= 2 << 20
    sender.commit(token_id=1)
    assert all(len(link.sent) == 2 for link in links)  # both layers in one slice, and the commit


@pytest.mark.parametrize(("num_tokens", "slices"), [(64, 12), (256, 15), (1024, 60)])
def test_layers_share_slices_of_at_most_a_share_of_the_stream(num_tokens: int, slices: int) -> None:
    layout = KvLayout(dtype="bfloat16", num_layers=60, num_kv_heads=3, head_dim=64, block_size=16)
    link = DeafLink()
    sender = KvStreamSender(
        [link],
        destination_of(layout, [], num_tokens),
        source_layout=layout,
        source_rank=0,
        transport="deaf",
        kernels=PlainKernels(),
        pool=StagingPool(1 << 30),
        max_in_flight_bytes=1 << 29,
        send_timeout_s=WAIT_S,
        forget=lambda sender: None,
    )
    kv = torch.zeros(min(num_tokens, 512), 3, 64, dtype=torch.bfloat16)
    for start in range(0, num_tokens, 512):
        for layer in range(layout.num_layers):
            sender.send_layer(layer, 0, start, kv, kv)
    sender.commit(token_id=1)
    assert len(link.sent) - 1 == slices
