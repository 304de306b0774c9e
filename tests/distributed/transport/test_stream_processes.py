"""KV streams between processes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from anabranch.errors import PeerLost
from anabranch.parallel.layout import KvLayout
from anabranch.protocol.kv import KvDestination
from transport.kv_stream import KvStreamReceiver, KvStreamSource
from transport.planes import available_planes, create_plane

pytestmark = pytest.mark.distributed

WAIT_S = 30.0
NOTICE_S = 3.0
STATUS = {status.name: status for status in available_planes()}
needs_ucx = pytest.mark.skipif(not STATUS["ucx"].usable, reason=f"UCX cannot be had: {STATUS['ucx'].reason}")
STREAM_KINDS = ["tcp", pytest.param("ucx", marks=needs_ucx)]
PEER = Path(__file__).with_name("stream_peer.py")

LAYOUT = KvLayout(dtype="float32", num_layers=4, num_kv_heads=4, head_dim=64, block_size=16)
NUM_TOKENS = 3000


def load_peer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("stream_peer", PEER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


peer_module = load_peer()


def eventually(condition: Callable[[], bool], what: str, within_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {within_s} s"
        time.sleep(0.002)


class Peer:
    """The other process."""

    def __init__(self, kind: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(PEER), kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.addresses = self.ask(do="address")

    def ask(self, **command: object) -> dict[str, object]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        self.process.stdin.flush()
        answer: dict[str, object] = json.loads(self.process.stdout.readline())
        return answer

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


@pytest.fixture
def start(kind: str) -> Iterator[Callable[[], Peer]]:
    peers: list[Peer] = []

    def start() -> Peer:
        peers.append(Peer(kind))
        return peers[-1]

    yield start
    for peer in peers:
        if peer.process.returncode is None:
            peer.kill()


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
def test_a_kv_stream_crosses_processes(kind: str, start: Callable[[], Peer]) -> None:
    peer = start()
    peer.ask(do="open", num_tokens=NUM_TOKENS, layout=msgspec.to_builtins(LAYOUT))
    source = KvStreamSource(planes=(kind,))
    sender = source.open(destination_at(str(peer.addresses["stream"]), kind), source_layout=LAYOUT)
    kv = peer_module.make_kv(LAYOUT, NUM_TOKENS)
    for start_token in range(0, NUM_TOKENS, 700):
        rows = slice(start_token, min(start_token + 700, NUM_TOKENS))
        for layer in range(LAYOUT.num_layers):
            sender.send_layer(layer, 0, start_token, kv[layer, 0, rows], kv[layer, 1, rows])
    sender.commit(token_id=42)
    assert sender.wait_ack(WAIT_S).payload_bytes == kv.nbytes
    assert peer.ask(do="stream") == {"committed": 42, "failed": None, "crc": peer_module.crc_of(kv)}
    source.close()
    assert source.staging_bytes == 0


@pytest.mark.parametrize("kind", STREAM_KINDS)
def test_a_receiver_that_is_killed_fails_the_stream_at_the_sender(kind: str, start: Callable[[], Peer]) -> None:
    peer = start()
    peer.ask(do="open", num_tokens=NUM_TOKENS, layout=msgspec.to_builtins(LAYOUT))
    source = KvStreamSource(planes=(kind,))
    sender = source.open(destination_at(str(peer.addresses["stream"]), kind), source_layout=LAYOUT)
    kv = peer_module.make_kv(LAYOUT, NUM_TOKENS)
    sender.send_layer(0, 0, 0, kv[0, 0], kv[0, 1])
    peer.kill()
    with pytest.raises(PeerLost):
        sender.wait_ack(NOTICE_S)
    with pytest.raises(PeerLost):
        sender.send_layer(1, 0, 0, kv[1, 0], kv[1, 1])
    source.close()
    eventually(lambda: source.staging_bytes == 0, "buffers return")


@pytest.mark.parametrize("kind", STREAM_KINDS)
@pytest.mark.parametrize("commit", [True, False])
def test_a_sender_in_another_process(kind: str, commit: bool, start: Callable[[], Peer]) -> None:
    receiver = KvStreamReceiver()
    plane = create_plane(kind, receiver)
    pool = peer_module.Pool(LAYOUT, NUM_TOKENS)
    receiver.open(1, 1, layout=LAYOUT, rank=0, num_cached_tokens=0, num_tokens=NUM_TOKENS, sink=pool)
    peer = start()
    destination = msgspec.to_builtins(destination_at(plane.address, kind))
    assert peer.ask(do="send_stream", destination=destination, commit=commit) == {"error": None}
    if commit:
        assert pool.token == 11
        assert peer_module.crc_of(pool.kv) == peer_module.crc_of(peer_module.make_kv(LAYOUT, NUM_TOKENS))
    peer.kill()
    if not commit:
        eventually(lambda: pool.code is not None, "the stream fails", NOTICE_S)
        assert pool.code == PeerLost.code
    plane.close()
    receiver.close(1)
    assert receiver.staging_bytes == 0
