"""One destination rank that waits for a stream, over every plane."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from anabranch.protocol.kv import KvDestination
from tests.support.kv_streams import LAYOUT, NUM_CACHED, NUM_TOKENS, Pool, Stream
from tests.support.planes import PLANES
from transport.kv_stream import KvStreamReceiver, KvStreamSource
from transport.planes import create_plane


@pytest.fixture(params=PLANES)
def stream(request: pytest.FixtureRequest) -> Iterator[Stream]:
    receiver = KvStreamReceiver(max_staging_bytes=64 << 20)
    plane = create_plane(request.param, receiver)
    source = KvStreamSource(planes=(request.param,), configured=request.param, send_timeout_s=5.0)
    pool = Pool(LAYOUT, NUM_TOKENS)
    receiver.open(7, 3, layout=LAYOUT, rank=0, num_cached_tokens=NUM_CACHED, num_tokens=NUM_TOKENS, sink=pool)
    destination = KvDestination(
        worker="decode-0",
        stream_id=7,
        generation=3,
        layout=LAYOUT,
        addresses=({request.param: plane.address},),
        block_ids=(0, 1, 2, 3, 4, 5),
        num_cached_tokens=NUM_CACHED,
        num_tokens=NUM_TOKENS,
        lease_s=10.0,
    )
    yield Stream(request.param, receiver, plane, source, pool, destination)
    source.close()
    plane.close()
    receiver.close(7)
    assert receiver.num_streams == 0
    assert receiver.staging_bytes == 0
    assert source.staging_bytes == 0
