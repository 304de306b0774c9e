"""KV streams that go wrong at a real decode or prefill worker: a named end, blocks back, the next one served."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from contextlib import asynccontextmanager

import pytest

import transport.kv_stream.sender
from anabranch.errors import PeerLost
from anabranch.protocol.wire_error import WireError
from anabranch.protocol.workers import Cancel, Ended, PrefillEnded
from anabranch_client import Sampling
from tests.support.scripted import ScriptedOrchestrator, changed, play, request
from tests.support.waiting import WAIT_S, eventually_async
from transport.kv_stream import Abort, Commit, KvStreamReceiver, KvStreamSource, Slice
from transport.kv_stream.checksum import checksum
from transport.kv_stream.messages import encode
from transport.planes import create_plane, usable_planes

pytestmark = pytest.mark.distributed

SPLIT = ("prefill", "decode")
PROMPT = tuple(range(7, 77))


@pytest.fixture(params=["inproc", "tcp", "ucx"])
def plane(request) -> str:
    if request.param not in usable_planes():
        pytest.skip(f"the {request.param} plane cannot be used here")
    return request.param


# A prefill worker's KV, streamed by hand -----------------------------------------------------------------------


class Hand:
    """Streams the right KV of `PROMPT` to a decode worker, slice by slice, as the test says."""

    def __init__(self, destination, plane: str) -> None:
        self.destination = destination
        self.source = KvStreamSource(planes=(plane,), configured=plane)
        self.sender = self.source.open(destination, source_layout=destination.layout)
        self.link = self.sender.links[0]
        self.num_slices = 0
        self.payload_bytes = 0

    def slice(self, layer: int, *, spoil: bool = False, **changes: object) -> Future[None]:
        """Send one layer of zeros; `changes` are of the header."""
        layout = self.destination.layout
        first = self.destination.num_cached_tokens
        count = self.destination.num_tokens - first
        payload = bytearray(2 * count * layout.num_kv_heads * layout.head_dim * 4)
        header = Slice(
            stream_id=self.destination.stream_id,
            generation=self.destination.generation,
            source_rank=0,
            seq=self.num_slices,
            layer=layer,
            num_layers=1,
            head_start=0,
            num_heads=layout.num_kv_heads,
            tokens=((first, count),),
            checksum=checksum(memoryview(payload)),
        )
        if spoil:
            payload[len(payload) // 2] ^= 1
        self.num_slices += 1
        self.payload_bytes += len(payload)
        return self.link.send(encode(changed(header, **changes)), memoryview(payload))

    def slices(self) -> None:
        for layer in range(self.destination.layout.num_layers):
            self.slice(layer)

    def commit(self, **changes: object) -> None:
        commit = Commit(
            stream_id=self.destination.stream_id,
            generation=self.destination.generation,
            source_rank=0,
            num_sources=1,
            num_slices=self.num_slices,
            payload_bytes=self.payload_bytes,
            token_id=5,
        )
        self.link.send(encode(changed(commit, **changes)))

    def abort(self) -> None:
        error = WireError.of(PeerLost("the test gives up"))
        message = Abort(stream_id=self.destination.stream_id, generation=self.destination.generation, error=error)
        self.link.send(encode(message))

    def close(self) -> None:
        self.source.close()


def every_layer_but_one(hand: Hand) -> None:
    for layer in range(hand.destination.layout.num_layers - 1):
        hand.slice(layer)
    hand.commit()


def a_layer_twice(hand: Hand) -> None:
    hand.slice(0)
    hand.slice(0)


def spoilt(hand: Hand) -> None:
    hand.slice(0)
    hand.slice(1, spoil=True)


def spoilt_and_committed(hand: Hand) -> None:
    hand.slice(0, spoil=True)
    hand.slice(1)
    hand.slice(2)
    hand.commit()


def half_then_gone(hand: Hand) -> None:
    hand.slice(0).result(WAIT_S)
    next(iter(hand.source._planes.values())).close()


def given_up(hand: Hand) -> None:
    hand.slice(0)
    hand.abort()


WRONG = {
    "checksum": (spoilt, "checksum_mismatch", "slice 1 of source rank 0"),
    "checksum, then all the rest": (spoilt_and_committed, "checksum_mismatch", "slice 0 of source rank 0"),
    "a layer missing": (every_layer_but_one, "malformed_message", "commit of an incomplete stream"),
    "a layer twice": (a_layer_twice, "malformed_message", "came twice"),
    "a layer that is not": (lambda hand: hand.slice(3), "malformed_message", "layers 3 to 3 of 3"),
    "a negative layer": (lambda hand: hand.slice(-1), "malformed_message", "layers -1"),
    "heads that are not": (lambda hand: hand.slice(0, head_start=1), "malformed_message", "heads 1 to 1"),
    "tokens beyond": (lambda hand: hand.slice(0, tokens=((1, 70),)), "malformed_message", "tokens 1 to 70 are not"),
    "a size that disagrees": (lambda hand: hand.slice(0, tokens=((0, 9),)), "malformed_message", "for a slice of"),
    "a slice left out": (lambda hand: hand.slice(0, seq=1), "malformed_message", "slice 1, expected 0"),
    "a commit of nothing": (lambda hand: hand.commit(num_slices=3), "malformed_message", "commit of 3 slices"),
    "the sender gives up": (given_up, "peer_lost", "the test gives up"),
    "the sender vanishes": (half_then_gone, "peer_lost", "the sender of the KV stream is gone"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_stream_that_goes_wrong(known, tmp_path, plane, case) -> None:
    misbehave, code, says = WRONG[case]

    async def scenario() -> None:
        async with ScriptedOrchestrator(tmp_path, known.folder, "decode", kv_transport=plane) as orchestrator:
            await orchestrator.accept()
            destination = await orchestrator.reserve(request(PROMPT, 4))
            assert orchestrator.worker.stats().num_free_blocks < orchestrator.worker.stats().num_total_blocks
            hand = await asyncio.to_thread(Hand, destination, plane)
            misbehave(hand)
            ended = await orchestrator.expect(Ended)
            assert (ended.request_id, ended.epoch, ended.reason) == ("a", 0, "failed")
            assert ended.error is not None
            assert (ended.error.code, says in ended.error.message) == (code, True), ended.error
            await orchestrator.idle()
            # What comes after the end is refused, and the same worker takes the request again.
            if case != "the sender vanishes":
                hand.slice(2)
                hand.commit()
            hand.close()
            again = request(PROMPT, 4, epoch=1)
            hand = await asyncio.to_thread(Hand, await orchestrator.reserve(again), plane)
            hand.slices()
            hand.commit()
            tokens, ended = await orchestrator.answer(again)
            assert (tokens[0], len(tokens), ended.reason) == (5, 4, "length")
            hand.close()
            await orchestrator.idle()

    play(scenario)


def test_an_old_generation_is_refused(known, tmp_path, plane) -> None:
    """Slices for a lease that has ended do not touch the blocks' next holder."""

    async def scenario() -> None:
        options = {"kv_transport": plane, "kv_cache_bytes": 5 * known.block_bytes(16)}
        async with ScriptedOrchestrator(tmp_path, known.folder, "decode", **options) as orchestrator:
            await orchestrator.accept()
            old = await orchestrator.reserve(request(PROMPT, 4, "old"))
            hand = await asyncio.to_thread(Hand, old, plane)
            hand.slice(0)
            await orchestrator.send(Cancel(request_id="old", epoch=0))
            assert (await orchestrator.expect(Ended)).reason == "cancelled"
            await orchestrator.idle()
            new = request(PROMPT, 4, "new")
            destination = await orchestrator.reserve(new)
            assert set(destination.block_ids) == set(old.block_ids)
            assert destination.generation != old.generation
            hand.slice(1)
            hand.slice(2)
            hand.commit()
            # Also one that guesses the stream's number.
            hand.slice(0, stream_id=destination.stream_id)
            other = await asyncio.to_thread(Hand, destination, plane)
            other.slices()
            other.commit()
            assert (await orchestrator.answer(new))[1].reason == "length"
            await orchestrator.idle()
            hand.close()
            other.close()

    play(scenario)


def test_a_lease_runs_out(known, tmp_path, plane) -> None:
    async def scenario() -> None:
        options = {"kv_transport": plane, "lease_s": 2.0}
        async with ScriptedOrchestrator(tmp_path, known.folder, "decode", **options) as orchestrator:
            await orchestrator.accept()
            destination = await orchestrator.reserve(request(PROMPT, 4))
            assert destination.lease_s == 2.0
            hand = await asyncio.to_thread(Hand, destination, plane)
            await asyncio.sleep(0.3)  # the subject: a slice lets the lease last on from here
            loop = asyncio.get_running_loop()
            begin = loop.time()
            hand.slice(0)
            ended = await orchestrator.expect(Ended)
            lasted_s = loop.time() - begin
            assert ended.error is not None
            assert ended.error.code == "deadline_exceeded"
            assert ended.error.message.startswith("lease_s: no KV arrived for 2.0 s")
            assert lasted_s >= 2.0
            await orchestrator.idle()
            # The rank closes the stream when it obeys, later than the books say so.
            receiver = orchestrator.worker.ranks._local._receiver  # type: ignore[attr-defined]
            await eventually_async(lambda: receiver.num_streams == 0)
            hand.slice(1)
            hand.commit()
            with pytest.raises(Exception, match=r"is not open here|the receiver closed the stream"):
                await asyncio.to_thread(hand.sender.wait_ack, 5.0)
            hand.close()

    play(scenario)


# A prefill worker and a destination by hand ------------------------------------------------------------------


class Sink:
    """A destination that keeps what comes."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.placed = 0

    def place(self, layer, head_start, tokens_T, kv_L2TKD) -> None:
        self.placed += kv_L2TKD.shape[0] * kv_L2TKD.shape[2]

    def touch(self) -> None: ...

    def committed(self, commit) -> None:
        self.ended.set()

    def failed(self, error) -> None:
        self.ended.set()


@asynccontextmanager
async def prefill_worker(known, tmp_path, plane: str, **options: object):
    """A prefill worker, a receiver that it can stream to, and what a decode worker would answer."""
    receiver = KvStreamReceiver()
    own = create_plane(plane, receiver)
    options = {"kv_transport": plane, "max_step_tokens": 32, **options}
    try:
        async with ScriptedOrchestrator(tmp_path, known.folder, "prefill", **options) as orchestrator:
            await orchestrator.accept()
            # Another worker's reservation, for its form.
            async with ScriptedOrchestrator(tmp_path, known.folder, "decode", kv_transport=plane) as decode:
                await decode.accept()
                destination = await decode.reserve(request(PROMPT, 4))
            destination = changed(destination, addresses=({plane: own.address},))
            yield orchestrator, receiver, destination
            await orchestrator.idle()
    finally:
        own.close()


def expect_stream(receiver: KvStreamReceiver, destination, sink) -> None:
    receiver.open(
        destination.stream_id,
        destination.generation,
        layout=destination.layout,
        rank=0,
        num_cached_tokens=0,
        num_tokens=destination.num_tokens,
        sink=sink,
    )


async def check_good_stream(orchestrator, receiver, destination) -> None:
    good = changed(destination, stream_id=99)
    sink = Sink()
    expect_stream(receiver, good, sink)
    await orchestrator.prefill(request(PROMPT, 4, "good"), good)
    ended = await orchestrator.expect(PrefillEnded)
    assert (ended.request_id, ended.error) == ("good", None)
    assert sink.placed == good.layout.num_layers * len(PROMPT)
    assert ended.kv is not None
    assert ended.kv.payload_bytes == good.num_tokens * good.layout.token_bytes
    receiver.close(99)


def test_a_destination_that_is_not_open(known, tmp_path, plane) -> None:
    async def scenario() -> None:
        async with prefill_worker(known, tmp_path, plane) as (orchestrator, receiver, destination):
            await orchestrator.prefill(request(PROMPT, 4), destination)
            ended = await orchestrator.expect(PrefillEnded)
            assert ended.error is not None
            assert ended.error.code == "stale_lease"
            await check_good_stream(orchestrator, receiver, destination)

    play(scenario)


def test_a_destination_that_cannot_be_reached(known, tmp_path) -> None:
    async def scenario() -> None:
        async with prefill_worker(known, tmp_path, "tcp") as (orchestrator, receiver, destination):
            head, _, token = destination.addresses[0]["tcp"].rpartition(":")
            for addresses, code in (
                (({"tcp": f"{head}:{'0' * len(token)}"},), "peer_lost"),
                (({"tcp": f"tcp:127.0.0.1:1:{token}"},), "peer_lost"),
                (({"tcp": "tcp:nonsense"},), "config"),
                (({"ucx": "ucx:127.0.0.1:1:00"},), "transport_unavailable"),
                (({},), "transport_unavailable"),
                ((), "transport_unavailable"),
            ):
                await orchestrator.prefill(request(PROMPT, 4), changed(destination, addresses=addresses))
                ended = await orchestrator.expect(PrefillEnded)
                assert ended.error is not None, addresses
                assert ended.error.code == code, ended.error
            await check_good_stream(orchestrator, receiver, destination)

    play(scenario)


def test_a_destination_that_refuses_in_the_middle(known, tmp_path, plane) -> None:
    class Refuses(Sink):
        def place(self, layer, head_start, tokens_T, kv_L2TKD) -> None:
            super().place(layer, head_start, tokens_T, kv_L2TKD)
            if layer + kv_L2TKD.shape[0] > 1:
                raise RuntimeError("the pool is on fire")

    async def scenario() -> None:
        async with prefill_worker(known, tmp_path, plane) as (orchestrator, receiver, destination):
            sink = Refuses()
            expect_stream(receiver, destination, sink)
            await orchestrator.prefill(request(PROMPT, 4), destination)
            ended = await orchestrator.expect(PrefillEnded)
            assert ended.error is not None
            assert "the pool is on fire" in ended.error.message
            assert sink.ended.wait(WAIT_S)
            receiver.close(destination.stream_id)
            await check_good_stream(orchestrator, receiver, destination)

    play(scenario)


def test_a_destination_that_never_acknowledges(known, tmp_path, plane) -> None:
    """The receiver's thread hangs in the last layer: the prefill worker gives up after `ack_timeout_s`."""
    go_on = threading.Event()

    class Hangs(Sink):
        def committed(self, commit) -> None:
            go_on.wait(WAIT_S)
            super().committed(commit)

    async def scenario() -> None:
        async with prefill_worker(known, tmp_path, plane, ack_timeout_s=0.5) as (orchestrator, receiver, destination):
            expect_stream(receiver, destination, Hangs())
            try:
                await orchestrator.prefill(request(PROMPT, 4), destination)
                ended = await orchestrator.expect(PrefillEnded)
                assert ended.error is not None
                assert ended.error.message.startswith("ack_timeout_s: the KV stream was not acknowledged in 0.5 s")
                assert orchestrator.worker.is_idle()
            finally:
                go_on.set()
            receiver.close(destination.stream_id)
            await check_good_stream(orchestrator, receiver, destination)

    play(scenario)


# Corruption on the way, as a client sees it ------------------------------------------------------------------


@pytest.mark.parametrize("victim", [0, 4])
def test_a_request_whose_stream_was_corrupt_goes_on(serve, still_serves, monkeypatch, plane, victim) -> None:
    cluster, client = serve(*SPLIT, kv_transport=plane, max_step_tokens=20)
    still_serves(cluster, client)
    count = 0

    def flip(data: memoryview) -> int:
        nonlocal count
        count += 1
        return checksum(data) ^ (count - 1 == victim)

    # Small slices, so that there are several.
    for key in ("MIN_COALESCE_BYTES", "MAX_COALESCE_BYTES"):
        monkeypatch.setattr(transport.kv_stream.sender, key, 1)
    monkeypatch.setattr(transport.kv_stream.sender, "checksum", flip)
    # Nobody else is there, so the same two try again.
    done = client.complete(PROMPT, Sampling(max_tokens=4, ignore_eos=True))
    assert [route.left for route in done.routes] == ["checksum_mismatch", ""]
    monkeypatch.undo()
    assert done.token_ids == client.complete(PROMPT, Sampling(max_tokens=4, ignore_eos=True)).token_ids
    still_serves(cluster, client)
