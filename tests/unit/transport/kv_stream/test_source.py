"""Which plane a KV stream takes, and which links its source keeps."""

from __future__ import annotations

import threading

import msgspec
import pytest
import torch

from anabranch.errors import (
    AnabranchError,
    PeerLost,
    TransportUnavailable,
)
from tests.support.kv_streams import LAYOUT, Pool, Stream, destination_of, make_kv, send_chunks
from tests.support.waiting import WAIT_S
from transport.kv_stream import KvStreamReceiver, KvStreamSource
from transport.planes import Link, create_plane

pytestmark = pytest.mark.unit


def test_addresses_must_fit_the_layout(stream: Stream) -> None:
    destination = msgspec.structs.replace(stream.destination, layout=msgspec.structs.replace(LAYOUT, tp=2))
    with pytest.raises(TransportUnavailable, match="2 ranks"):
        stream.source.open(destination, source_layout=LAYOUT)


class NoPlane:
    """A plane that is usable by itself and joins no two ends, as UCX where they do not share memory."""

    address = "tcp:127.0.0.1:1:" + "00" * 16

    def __init__(self, error: AnabranchError) -> None:
        self.error = error

    def connect(self, address: str, timeout_s: float) -> Link:
        raise self.error

    def close(self) -> None:
        pass


@pytest.mark.parametrize("error", [TransportUnavailable("no transport"), PeerLost("refused")])
def test_with_auto_a_plane_that_does_not_reach_is_passed_over(
    error: AnabranchError, caplog: pytest.LogCaptureFixture
) -> None:
    kv = make_kv(LAYOUT, 8)
    receiver, pool = KvStreamReceiver(), Pool(LAYOUT, 8)
    plane = create_plane("tcp", receiver)
    receiver.open(1, 1, layout=LAYOUT, rank=0, num_cached_tokens=0, num_tokens=8, sink=pool)
    destination = msgspec.structs.replace(
        destination_of(LAYOUT, [plane], 8), addresses=({"ucx": "ucx:nowhere", "tcp": plane.address},)
    )
    source = KvStreamSource(planes=("ucx", "tcp"))
    source._planes["ucx"] = NoPlane(error)
    sender = source.open(destination, source_layout=LAYOUT)
    send_chunks(sender, kv, [range(8)])
    sender.commit(token_id=1)
    assert sender.wait_ack(WAIT_S).transport == "tcp"
    assert torch.equal(pool.kv, kv)
    assert f"ucx does not reach decode-0: {error}; another plane is tried" in caplog.text
    source.close()
    plane.close()


@pytest.mark.parametrize(("configured", "planes"), [("ucx", ("ucx", "tcp")), ("auto", ("ucx",))])
def test_a_named_plane_and_the_only_one_are_not_passed_over(configured: str, planes: tuple[str, ...]) -> None:
    source = KvStreamSource(planes=planes, configured=configured)
    source._planes["ucx"] = NoPlane(TransportUnavailable("no transport"))
    destination = msgspec.structs.replace(
        destination_of(LAYOUT, [], 8), addresses=({"ucx": "ucx:nowhere", "tcp": NoPlane.address},)
    )
    with pytest.raises(TransportUnavailable, match="no transport"):
        source.open(destination, source_layout=LAYOUT)
    source.close()


def test_nothing_is_kept_of_addresses_that_were_connected_to() -> None:
    receiver = KvStreamReceiver()
    planes = [create_plane("tcp", receiver) for _ in range(4)]
    source = KvStreamSource(planes=("tcp",))
    for port in range(1, 4):
        with pytest.raises(PeerLost):
            source._link("tcp", f"tcp:127.0.0.1:{port}:" + "00" * 16)
    for plane in planes:
        together = [threading.Thread(target=source._link, args=("tcp", plane.address)) for _ in range(5)]
        for thread in together:
            thread.start()
        for thread in together:
            thread.join(WAIT_S)
    assert len(source._links) == len(planes)
    assert source._connecting == {}
    source.close()
    for plane in planes:
        plane.close()
