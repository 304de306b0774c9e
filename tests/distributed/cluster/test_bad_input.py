"""Bad requests and noise on every port of a real cluster: a named error, and the cluster goes on."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest

from anabranch.protocol.wire_error import WireError
from anabranch.system.private_files import write_secret
from anabranch_client import ClientError, ContextExceeded, InvalidRequest, Sampling
from tests.support.control import proven
from tests.support.families import VOCAB
from tests.support.in_process import wait_until
from tests.support.waiting import WAIT_S
from transport.control.frames import frame
from transport.kv_stream.messages import Abort, Commit, encode
from transport.planes import create_plane, usable_planes
from transport.planes.handshake import MAX_BODY_BYTES, Introduction
from transport.planes.handshake import encode as introduce
from transport.planes.tcp import KIND
from transport.planes.tcp_link import MAGIC, PREFIX, VERSION

pytestmark = pytest.mark.distributed

ERROR = WireError(code="internal", message="x")
COLOCATED = ("colocated",)
SPLIT = ("prefill", "decode")
BOTH = pytest.mark.parametrize("roles", [COLOCATED, SPLIT], ids=["colocated", "split"])

# What is wrong -> prompt, sampling, kind of error, what it says.
BAD: dict[str, tuple[object, Sampling, type[ClientError], str]] = {
    "no prompt": ((), Sampling(), InvalidRequest, "token_ids: is empty"),
    "empty text": ("", Sampling(), InvalidRequest, "text: is empty"),
    "id above the vocabulary": (
        (1, VOCAB),
        Sampling(),
        InvalidRequest,
        f"token_ids: {VOCAB} at position 1 is out of range; ids go from 0 to {VOCAB - 1}",
    ),
    "id below zero": ((-1,), Sampling(), InvalidRequest, "token_ids: -1 at position 0 is out of range"),
    "prompt of the whole context": (
        (5,) * 256,
        Sampling(),
        ContextExceeded,
        "prompt: has 256 tokens; the context holds 256, and the answer needs at least 1",
    ),
    "prompt beyond the context": ((5,) * 100_000, Sampling(), ContextExceeded, "prompt: has 100000 tokens"),
    "text beyond the context": ("w5 " * 300, Sampling(), ContextExceeded, "prompt: has 300 tokens"),
    "max_tokens 0": ((1,), Sampling(max_tokens=0), InvalidRequest, "max_tokens: is 0; it must be at least 1"),
    "max_tokens below 0": ((1,), Sampling(max_tokens=-5), InvalidRequest, "max_tokens: is -5; it must be at least 1"),
    "max_tokens beyond the context": (
        (1,) * 6,
        Sampling(max_tokens=251),
        ContextExceeded,
        "max_tokens: is 251; with a prompt of 6 tokens the context of 256 has room for 250",
    ),
    "max_tokens huge": ((1,), Sampling(max_tokens=2**31 - 1), ContextExceeded, "max_tokens: is 2147483647"),
    "max_tokens of 41 bits": ((1,), Sampling(max_tokens=2**40), ContextExceeded, "max_tokens: is 1099511627776"),
    "max_tokens of 71 bits": ((1,), Sampling(max_tokens=2**70), InvalidRequest, "max_tokens: "),
    "temperature NaN": ((1,), Sampling(temperature=float("nan")), InvalidRequest, "temperature: is nan; it must be a "),
    "temperature infinite": ((1,), Sampling(temperature=float("inf")), InvalidRequest, "temperature: is inf"),
    "temperature below 0": ((1,), Sampling(temperature=-1.0), InvalidRequest, "temperature: is -1.0"),
    "top_p 0": ((1,), Sampling(top_p=0.0), InvalidRequest, "top_p: is 0.0"),
    "bias for no token": ((1,), Sampling(logit_bias={VOCAB: 1.0}), InvalidRequest, "logit_bias: "),
    "stop id for no token": ((1,), Sampling(stop_token_ids=[VOCAB]), InvalidRequest, "stop_token_ids: "),
}


@BOTH
def test_bad_requests_are_refused_by_name(serve, still_serves, roles) -> None:
    # The pool is smaller than the model's context: it sets the limit.
    cluster, client = serve(*roles, max_context=256)
    for case, (prompt, sampling, kind, says) in BAD.items():
        with pytest.raises(ClientError) as caught:
            client.complete(prompt, sampling)
        assert type(caught.value) is kind, case
        assert str(caught.value).startswith(says), f"{case}: {caught.value}"
    still_serves(cluster, client)
    assert client.complete((1,) * 6, Sampling(max_tokens=250, ignore_eos=True)).usage.num_output_tokens == 250
    still_serves(cluster, client)


@BOTH
def test_the_pool_sets_the_context(serve, still_serves, known, roles) -> None:
    cluster, client = serve(*roles, kv_cache_bytes=10 * known.block_bytes(16), block_size=16)
    assert client.model().max_context == 160
    with pytest.raises(ContextExceeded, match="the context of 160 has room for 60"):
        client.complete((3,) * 100, Sampling(max_tokens=61))
    assert client.complete((3,) * 100, Sampling(max_tokens=60, ignore_eos=True)).usage.num_output_tokens == 60
    assert client.complete((3,) * 159, Sampling(ignore_eos=True)).usage.num_output_tokens == 1
    still_serves(cluster, client)


# Noise on the control port -----------------------------------------------------------------------------------


def noise() -> list[bytes]:
    beat = msgspec.msgpack.encode({"type": "beat", "stats": None})
    return [
        b"",
        b"\xc1",
        os.urandom(1000),
        beat[:-1],
        beat * 2,
        msgspec.msgpack.encode({"type": "launch"}),
        msgspec.msgpack.encode({"type": "tokens", "tokens": [{"request_id": 5}]}),
        msgspec.msgpack.encode({"type": "ended", "request_id": "x", "epoch": 0, "reason": "tired"}),
        msgspec.msgpack.encode({"type": "beat", "stats": None, "more": 1}),
        b"\x91" * 5000,  # arrays in arrays
        b"\xdd\xff\xff\xff\xff",  # an array of 4 G entries
        bytes(9 << 20),
        bytes(20 << 20),
    ]


async def say(endpoint: str, secret: bytes, *messages: bytes, ends: bool = True) -> bytes:
    """What the orchestrator answers to a stranger that knows the secret, until it hangs up.

    Args:
        ends: whether the stranger ends its side once it has said all, as well.
    """
    reader, writer = await proven(endpoint, secret)
    try:
        for data in messages:
            writer.write(frame(data))
        if ends:
            writer.write_eof()
        return await asyncio.wait_for(reader.read(), WAIT_S)
    except ConnectionError:
        return b""
    finally:
        writer.transport.abort()


def test_noise_on_the_control_port(serve, still_serves, good, tmp_path) -> None:
    secret_file = write_secret(tmp_path / "control.secret")
    secret = secret_file.read_bytes().strip()
    cluster, client = serve(
        *SPLIT,
        orchestrator={"control_bind": "tcp://127.0.0.1:0", "secret_file": str(secret_file)},
        secret_file=str(secret_file),
    )
    control = cluster.orchestrator.control_endpoint
    assert control.startswith("tcp://127.0.0.1:")
    stop = threading.Event()

    def serve_on() -> None:
        while not stop.is_set():
            for prompt, answer in good.items():
                found = client.complete(prompt, Sampling(max_tokens=len(answer), temperature=0.0, ignore_eos=True))
                assert found.token_ids == answer

    try:
        with ThreadPoolExecutor(1) as pool:
            serving = pool.submit(serve_on)
            for data in noise():
                asyncio.run(say(control, secret, data))
            host, port = control.removeprefix("tcp://").split(":")
            strange = (b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096), b"\xff" + b"\0" * 8 + b"\x7f")
            for data in strange:
                with socket.create_connection((host, int(port)), timeout=WAIT_S) as raw:
                    raw.sendall(data)
            channel = cluster.orchestrator._control
            wait_until(lambda: channel.num_malformed == len(noise()), "the noise to be read")
            wait_until(lambda: channel.num_refused == len(strange), "the strangers to be refused")
            stop.set()
            serving.result(WAIT_S)
    finally:
        stop.set()
    assert len(client.model().pools) == 2
    still_serves(cluster, client)


def test_a_stranger_cannot_speak_for_a_worker(serve, still_serves, good) -> None:
    """Tokens and ends from a connection that never registered change no answer."""
    cluster, client = serve(*COLOCATED)
    with cluster.throttled("colocated-0") as throttle:
        prompt, answer = next(iter(good.items()))
        stream = client.generate(prompt, Sampling(max_tokens=12, ignore_eos=True), request_id="mine")
        throttle.allow(3)
        (request_id,) = cluster.names()
        token = {"request_id": request_id, "epoch": 0, "index": 3, "token_id": 1}
        tokens = msgspec.msgpack.encode({"type": "tokens", "tokens": [token]})
        ended = msgspec.msgpack.encode({"type": "ended", "request_id": request_id, "epoch": 0, "reason": "stop"})
        # It is told to go, so what it said has been read.
        said = asyncio.run(say(cluster.orchestrator.control_endpoint, b"", tokens, ended, ends=False))
        assert msgspec.msgpack.decode(said[4:])["error"]["code"] == "worker_died"
    ids = [token for event in stream if hasattr(event, "token_ids") for token in event.token_ids]
    assert tuple(ids) == answer
    still_serves(cluster, client)


# Noise on the tensor planes' ports ---------------------------------------------------------------------------


class Nobody:
    """A plane's handler that remembers what it lost."""

    def __init__(self) -> None:
        self.lost = threading.Event()

    def on_header(self, link, header, payload_bytes):
        return None

    def on_payload(self, link, header, buffer) -> None: ...

    def on_lost(self, link, error) -> None:
        self.lost.set()


def raw(address: str) -> tuple[socket.socket, bytes]:
    """A connection to a plane's socket, and its token."""
    _, host, port, token = address.split(":")
    return socket.create_connection((host, int(port)), timeout=WAIT_S), bytes.fromhex(token)


def closed(connection: socket.socket) -> bool:
    """Whether the other end hangs up."""
    connection.settimeout(8)
    try:
        while connection.recv(4096):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize("plane", ["tcp", "ucx"])
def test_noise_on_a_planes_port(serve, still_serves, plane) -> None:
    if plane not in usable_planes():
        pytest.skip(f"the {plane} plane cannot be used here")
    cluster, client = serve(*SPLIT, kv_transport=plane)
    still_serves(cluster, client)
    address = cluster.worker("decode-1").ranks.addresses[0][plane]
    token = bytes.fromhex(address.rsplit(":", 1)[1])
    kind = {"tcp": 1, "ucx": 2}[plane]
    hello = introduce(kind, token, Introduction(name="stranger"))
    wrong = {
        "garbage": os.urandom(4096).replace(b"ANBP", b"anbp"),
        "http": b"GET / HTTP/1.1\r\n\r\n",
        "wrong token": introduce(kind, bytes(16), Introduction(name="stranger")),
        "wrong plane": introduce(3 - kind, token, Introduction(name="stranger")),
        "wrong version": hello[:4] + b"\x63" + hello[5:],
        "oversized introduction": hello[:24] + struct.pack("!I", MAX_BODY_BYTES + 1),
        "introduction that is none": hello[:24] + struct.pack("!I", 3) + b"\xc1\xc1\xc1",
    }
    for case, data in wrong.items():
        connection, _ = raw(address)
        with connection:
            connection.sendall(data)
            assert closed(connection), case
    # Flood of connections that say nothing.
    silent = [raw(address)[0] for _ in range(80)]
    still_serves(cluster, client)
    for connection in silent:
        connection.close()
    still_serves(cluster, client)


def test_frames_that_are_too_large_or_malformed_end_their_link_alone(serve, still_serves) -> None:
    cluster, client = serve(*SPLIT, kv_transport="tcp")
    still_serves(cluster, client)
    address = cluster.worker("decode-1").ranks.addresses[0]["tcp"]

    def frame(header: bytes, payload_bytes: int = 0, header_bytes: int | None = None) -> bytes:
        size = len(header) if header_bytes is None else header_bytes
        return PREFIX.pack(MAGIC, VERSION, 0, size, 0, payload_bytes) + header

    wrong = {
        "payload of 2 EB": frame(b"x", 1 << 61),
        "payload above the limit": frame(b"x", (1 << 30) + 1),
        "header above the limit": frame(b"", 0, 4097),
        "not a frame": os.urandom(64).replace(b"AM", b"am"),
        "header that is no message": frame(b"\xc1"),
        "message with a wrong field": frame(msgspec.msgpack.encode({"t": "s", "stream_id": "x"})),
        "commit with a payload": frame(
            encode(
                Commit(
                    stream_id=1,
                    generation=1,
                    source_rank=0,
                    num_sources=1,
                    num_slices=0,
                    payload_bytes=0,
                    token_id=0,
                )
            ),
            10,
        ),
    }
    for case, data in wrong.items():
        connection, token = raw(address)
        with connection:
            connection.sendall(introduce(KIND, token, Introduction(name="stranger")) + data)
            assert closed(connection), case
    still_serves(cluster, client)


@pytest.mark.parametrize("plane", ["tcp", "ucx"])
def test_a_peer_that_talks_nonsense_over_a_good_link(serve, still_serves, plane) -> None:
    if plane not in usable_planes():
        pytest.skip(f"the {plane} plane cannot be used here")
    cluster, client = serve(*SPLIT, kv_transport=plane)
    still_serves(cluster, client)
    address = cluster.worker("decode-1").ranks.addresses[0][plane]
    for header in (b"\xc1", b"", os.urandom(4096), encode(Abort(stream_id=9, generation=9, error=ERROR)) + b"\0"):
        nobody = Nobody()
        own = create_plane(plane, nobody)
        try:
            link = own.connect(address, 5.0)
            link.send(header, memoryview(bytes(100_000)))
            assert nobody.lost.wait(WAIT_S), header[:10]
        finally:
            own.close()
    still_serves(cluster, client)
