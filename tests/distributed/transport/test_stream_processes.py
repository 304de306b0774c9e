"""KV streams between processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec
import pytest

from anabranch.errors import PeerLost
from anabranch.parallel.layout import KvLayout
from anabranch.protocol.kv import KvDestination
from tests.support import stream_peer
from tests.support.peer_process import WAIT_S, PeerProcess, peer_processes
from tests.support.waiting import eventually
from transport.kv_stream import KvStreamReceiver, KvStreamSource
from transport.planes import available_planes, create_plane

pytestmark = pytest.mark.distributed

STATUS = {status.name: status for status in available_planes()}
needs_ucx = pytest.mark.skipif(not STATUS["ucx"].usable, reason=f"UCX cannot be had: {STATUS['ucx'].reason}")
STREAM_KINDS = ["tcp", pytest.param("ucx", marks=needs_ucx)]

LAYOUT = KvLayout(dtype="float32", num_layers=4, num_kv_heads=4, head_dim=64, block_size=16)
NUM_TOKENS = 3000


@pytest.fixture
def start(kind: str) -> Iterator[Callable[[], PeerProcess]]:
    with peer_processes("tests.support.stream_peer", kind) as start:
        yield start


def destination_at(address: str, kind: str) -> KvDestination:
    return KvDestination(
        worker="decode-0",
        stream_id=1,
        generation=1,
        layout=LAYOUT,
        addresses=({kind: address},),
        block_ids=(),
        num_cached_tokens=0,
        num_tokens=NUM_TOKENS,
        lease_s=10.0,
    )


@pytest.mark.parametrize("kind", STREAM_KINDS)
def test_a_kv_stream_crosses_processes(kind: str, start: Callable[[], PeerProcess]) -> None:
    peer = start()
    peer.ask(do="open", num_tokens=NUM_TOKENS, layout=msgspec.to_builtins(LAYOUT))
    source = KvStreamSource(planes=(kind,))
    sender = source.open(destination_at(str(peer.addresses["stream"]), kind), source_layout=LAYOUT)
    kv = stream_peer.make_kv(LAYOUT, NUM_TOKENS)
    for start_token in range(0, NUM_TOKENS, 700):
        rows = slice(start_token, min(start_token + 700, NUM_TOKENS))
        for layer in range(LAYOUT.num_layers):
            sender.send_layer(layer, 0, start_token, kv[layer, 0, rows], kv[layer, 1, rows])
    sender.commit(token_id=42)
    assert sender.wait_ack(WAIT_S).payload_bytes == kv.nbytes
    assert peer.ask(do="stream") == {"committed": 42, "failed": None, "crc": stream_peer.crc_of(kv)}
    source.close()
    assert source.staging_bytes == 0


@pytest.mark.parametrize("kind", STREAM_KINDS)
def test_a_receiver_that_is_killed_fails_the_stream_at_the_sender(kind: str, start: Callable[[], PeerProcess]) -> None:
    peer = start()
    peer.ask(do="open", num_tokens=NUM_TOKENS, layout=msgspec.to_builtins(LAYOUT))
    source = KvStreamSource(planes=(kind,))
    sender = source.open(destination_at(str(peer.addresses["stream"]), kind), source_layout=LAYOUT)
    kv = stream_peer.make_kv(LAYOUT, NUM_TOKENS)
    sender.send_layer(0, 0, 0, kv[0, 0], kv[0, 1])
    peer.kill()
    with pytest.raises(PeerLost):
        sender.wait_ack(WAIT_S)
    with pytest.raises(PeerLost):
        sender.send_layer(1, 0, 0, kv[1, 0], kv[1, 1])
    source.close()
    eventually(lambda: source.staging_bytes == 0, "buffers return")


@pytest.mark.parametrize("kind", STREAM_KINDS)
@pytest.mark.parametrize("commit", [True, False])
def test_a_sender_in_another_process(kind: str, commit: bool, start: Callable[[], PeerProcess]) -> None:
    receiver = KvStreamReceiver()
    plane = create_plane(kind, receiver)
    pool = stream_peer.Pool(LAYOUT, NUM_TOKENS)
    receiver.open(1, 1, layout=LAYOUT, rank=0, num_cached_tokens=0, num_tokens=NUM_TOKENS, sink=pool)
    peer = start()
    destination = msgspec.to_builtins(destination_at(plane.address, kind))
    assert peer.ask(do="send_stream", destination=destination, commit=commit) == {"error": None}
    if commit:
        assert pool.token == 11
        assert stream_peer.crc_of(pool.kv) == stream_peer.crc_of(stream_peer.make_kv(LAYOUT, NUM_TOKENS))
    peer.kill()
    if not commit:
        eventually(lambda: pool.code is not None, "the stream fails", WAIT_S)
        assert pool.code == PeerLost.code
    plane.close()
    receiver.close(1)
    assert receiver.staging_bytes == 0
