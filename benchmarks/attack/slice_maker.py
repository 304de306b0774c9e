"""KV slices, commits and aborts that are wrong in one way each."""

from __future__ import annotations

import random

import msgspec

from anabranch.protocol.kv import KvDestination
from anabranch.protocol.wire_error import WireError
from benchmarks.attack.fuzz import mutated
from transport.kv_stream import Abort, Commit, Slice
from transport.kv_stream.checksum import checksum
from transport.kv_stream.messages import encode


class SliceMaker:
    """Makes the messages for one order."""

    def __init__(self, rng: random.Random, destination: KvDestination) -> None:
        self._rng = rng
        self._destination = destination

    def make(self) -> tuple[bytes, bytes]:
        """A header and a payload; one of the two, or their match, is wrong."""
        rng = self._rng
        slice_, payload = self._slice()
        draw = rng.random()
        if draw < 0.35:
            return encode(self._wrong(slice_)), payload
        if draw < 0.55:
            return mutated(rng, encode(slice_)), payload
        if draw < 0.7:
            return encode(slice_), rng.randbytes(rng.choice((0, 1, len(payload), len(payload) + 1)))
        if draw < 0.8:
            return self._commit(), b""
        if draw < 0.9:
            other = msgspec.structs.replace(slice_, stream_id=rng.getrandbits(63), generation=rng.getrandbits(40))
            return encode(other), payload
        if draw < 0.95:
            ids = {"stream_id": rng.getrandbits(63), "generation": 1}
            return encode(Abort(**ids, error=WireError(code="x", message="made up"))), b""
        return rng.randbytes(rng.choice((0, 1, 100, 4096))), payload[: rng.randrange(100)]

    def _slice(self) -> tuple[Slice, bytes]:
        """One layer, all heads, of the first tokens that the stream waits for; right but for the values."""
        destination, layout = self._destination, self._destination.layout
        first = destination.num_cached_tokens
        count = max(1, min(4, destination.num_tokens - first))
        num_bytes = 2 * count * layout.num_kv_heads * layout.head_dim * layout.element_bytes
        payload = self._rng.randbytes(num_bytes)
        slice_ = Slice(
            stream_id=destination.stream_id,
            generation=destination.generation,
            source_rank=0,
            seq=0,
            layer=0,
            num_layers=1,
            head_start=0,
            num_heads=layout.num_kv_heads,
            tokens=((first, count),),
            checksum=checksum(memoryview(payload)),
        )
        return slice_, payload

    def _wrong(self, slice_: Slice) -> Slice:
        number = self._rng.choice((-1, 7, 2**31, 2**62, -(2**62)))
        changes: tuple[dict[str, object], ...] = (
            {"seq": number},
            {"source_rank": number},
            {"layer": number},
            {"num_layers": number},
            {"head_start": number},
            {"num_heads": number},
            {"checksum": number},
            {"generation": slice_.generation + 1},
            {"tokens": ((number, 1),)},
            {"tokens": ((0, number),)},
            {"tokens": ()},
            {"tokens": ((0, 1),) * 300},
        )
        return msgspec.structs.replace(slice_, **self._rng.choice(changes))

    def _commit(self) -> bytes:
        rng, destination = self._rng, self._destination
        number = rng.choice((0, 1, -1, 2**62))
        return encode(
            Commit(
                stream_id=destination.stream_id,
                generation=destination.generation,
                source_rank=rng.choice((0, number)),
                num_sources=rng.choice((1, number)),
                num_slices=number,
                payload_bytes=number,
                token_id=rng.choice((5, number)),
            )
        )
