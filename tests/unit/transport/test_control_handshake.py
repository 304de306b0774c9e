"""The beginning of a control connection: who proves what, and what becomes of those who cannot."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anabranch.errors import AccessDenied, ConfigError
from anabranch.protocol.workers import Beat, Drain, ToOrchestrator, ToWorker
from tests.support.control import SECRET, dial, proven
from tests.support.waiting import WAIT_S, eventually_async
from transport.control import ControlClient, ControlServer
from transport.control import server as control_server
from transport.control.frames import frame, read_frame
from transport.control.handshake import PROTOCOL, Challenge, Hello, Refused, Welcome, introduce, prove

pytestmark = pytest.mark.unit

BEAT = msgspec.msgpack.encode(Beat())
NONCE = bytes(range(32))


def run(scenario: Callable[[ControlServer], Awaitable[None]], bind: str = "tcp://127.0.0.1:0") -> None:
    """Play with a server, which must serve a real worker in the end."""

    async def main() -> None:
        server = ControlServer(bind, ToOrchestrator, secret=SECRET)
        await server.start()
        await scenario(server)
        client = ControlClient(server.endpoint, ToWorker, secret=SECRET, name="decode-0")
        await client.send(Beat())
        peer, message = await server.recv()
        assert (peer.endswith(b":decode-0"), message) == (True, Beat())
        await server.send(peer, Drain())
        assert await client.recv() == Drain()
        await client.close()
        await server.close()

    asyncio.run(asyncio.wait_for(main(), WAIT_S))


async def answer(endpoint: str, make: Callable[[Challenge], bytes]) -> bytes:
    """Everything that the server says after its challenge to one who says what `make` gives; it then hangs up."""
    reader, writer = await dial(endpoint)
    challenge = msgspec.msgpack.decode(await read_frame(reader, 1024), type=Challenge)
    writer.write(make(challenge))
    async with asyncio.timeout(WAIT_S):
        try:
            said = await reader.read()
        except ConnectionError:
            said = b""
    writer.transport.abort()
    return said


def hello(challenge: Challenge, **changes: object) -> bytes:
    """What one who knows the secret says, but for what a test changes."""
    good = Hello(protocol=PROTOCOL, name="w", nonce=NONCE, proof=prove(SECRET, b"client", challenge, NONCE, "w"))
    return frame(msgspec.msgpack.encode(msgspec.structs.replace(good, **changes)))


ARE_TOLD = {
    "another secret": lambda c: hello(c, proof=prove(b"guess", b"client", c, NONCE, "w")),
    "no secret": lambda c: hello(c, proof=prove(b"", b"client", c, NONCE, "w")),
    "another name's proof": lambda c: hello(c, name="decode-0"),
    "another nonce's proof": lambda c: hello(c, nonce=bytes(32)),
    "the server's own proof": lambda c: hello(c, proof=prove(SECRET, b"server", c, NONCE, "w")),
    "the challenge itself": lambda c: hello(c, proof=c.nonce),
    "zeros": lambda c: hello(c, proof=bytes(32)),
    "messages behind it": lambda c: hello(c, proof=bytes(32)) + frame(BEAT) * 100,
}


@pytest.mark.parametrize("make", ARE_TOLD.values(), ids=ARE_TOLD.keys())
def test_one_who_does_not_know_the_secret_is_told_so_once_and_not_heard(make: Callable[[Challenge], bytes]) -> None:
    async def scenario(server: ControlServer) -> None:
        receiving = asyncio.create_task(server.recv())
        said = await answer(server.endpoint, make)
        refusal = msgspec.msgpack.decode(said[4:], type=Refused)
        assert "secret_file" in refusal.reason
        assert SECRET.decode() not in refusal.reason
        assert server.num_refused == 1
        assert not receiving.done()
        receiving.cancel()

    run(scenario)


ARE_NOT = {
    "a message at once": lambda c: frame(BEAT),
    "an empty frame": lambda c: frame(b""),
    "http": lambda c: b"GET / HTTP/1.1\r\n\r\n",
    "noise": lambda c: b"\0\0\0\x10" + os.urandom(16),
    "a huge frame": lambda c: b"\xff\xff\xff\xff",
    "a frame just too large": lambda c: frame(bytes(1025)),
    "a short proof": lambda c: hello(c, proof=b"x"),
    "an empty proof": lambda c: hello(c, proof=b""),
    "a long name": lambda c: hello(c, name="n" * 101),
    "a short nonce": lambda c: hello(c, nonce=b"n"),
    "nested": lambda c: frame(b"\x91" * 900),
    "its own welcome": lambda c: frame(msgspec.msgpack.encode(Welcome(proof=bytes(32)))),
    "zeromq": lambda c: b"\xff\0\0\0\0\0\0\0\1\x7f\3\0NULL",
}


@pytest.mark.parametrize("make", ARE_NOT.values(), ids=ARE_NOT.keys())
def test_what_is_no_hello_ends_its_connection_without_a_word(make: Callable[[Challenge], bytes]) -> None:
    async def scenario(server: ControlServer) -> None:
        receiving = asyncio.create_task(server.recv())
        assert await answer(server.endpoint, make) == b""
        await eventually_async(lambda: server.num_refused == 1)
        assert not receiving.done()
        receiving.cancel()

    run(scenario)


def test_another_protocol_is_named() -> None:
    async def scenario(server: ControlServer) -> None:
        said = await answer(server.endpoint, lambda c: hello(c, protocol="anabranch.control.9"))
        assert "anabranch.control.9" in msgspec.msgpack.decode(said[4:], type=Refused).reason

    run(scenario)


def test_what_was_overheard_is_of_no_use_on_another_connection() -> None:
    async def scenario(server: ControlServer) -> None:
        heard: list[bytes] = []

        def overheard(challenge: Challenge) -> bytes:
            heard.append(hello(challenge))
            return heard[-1]

        reader, writer = await dial(server.endpoint)
        challenge = msgspec.msgpack.decode(await read_frame(reader, 1024), type=Challenge)
        writer.write(overheard(challenge))
        msgspec.msgpack.decode(await read_frame(reader, 1024), type=Welcome)
        writer.transport.abort()
        said = await answer(server.endpoint, lambda _: heard[0])
        assert "secret" in msgspec.msgpack.decode(said[4:], type=Refused).reason

    run(scenario)


@pytest.mark.parametrize("begin", [b"", b"\0", b"\0\0\0\x40", b"\0\0\0\x40half a hello"])
def test_those_who_say_too_little_keep_nobody_out_and_are_ended_in_time(
    begin: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_server, "HANDSHAKE_TIMEOUT_S", 0.5)

    async def scenario(server: ControlServer) -> None:
        connections = [await dial(server.endpoint) for _ in range(2 * control_server.MAX_PENDING)]
        for _, writer in connections:
            writer.write(begin)
        assert len(server._pending) <= control_server.MAX_PENDING
        _, writer = await proven(server.endpoint)  # while they are there
        writer.transport.abort()
        async with asyncio.timeout(WAIT_S):
            for reader, writer in connections:
                with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                    await reader.readexactly(1 << 16)
                writer.transport.abort()
        assert server.num_refused >= len(connections)

    run(scenario)


def test_the_secret_is_shown_by_nobody(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with caplog.at_level(logging.DEBUG):

        async def scenario(server: ControlServer) -> None:
            wrong = ControlClient(server.endpoint, ToWorker, secret=b"a wrong guess of it")
            with pytest.raises(AccessDenied, match="secret_file"):
                await wrong.recv()
            with pytest.raises(AccessDenied):
                await wrong.send(Beat())
            await wrong.close()

        run(scenario, f"ipc://{tmp_path}/control")
    assert "connections refused" in caplog.text
    assert SECRET.decode() not in caplog.text
    assert "a wrong guess of it" not in caplog.text


@pytest.mark.parametrize("secret", [b"another", b""])
def test_a_server_that_does_not_know_the_secret_hears_nothing(secret: bytes, tmp_path: Path) -> None:
    """Whoever took the address before the orchestrator did."""

    async def main() -> None:
        impostor_heard: list[bytes] = []

        async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            challenge = Challenge(protocol=PROTOCOL, nonce=NONCE)
            writer.write(frame(msgspec.msgpack.encode(challenge)))
            said = msgspec.msgpack.decode(await read_frame(reader, 1024), type=Hello)
            proof = prove(secret, b"server", challenge, said.nonce, said.name)
            writer.write(frame(msgspec.msgpack.encode(Welcome(proof=proof))))
            impostor_heard.append(await reader.read())
            writer.transport.abort()

        server = await asyncio.start_unix_server(impostor, tmp_path / "control")
        client = ControlClient(f"ipc://{tmp_path}/control", ToWorker, secret=SECRET)
        await client.send(Beat())
        with pytest.raises(AccessDenied, match="what listens there does not know"):
            await client.recv()
        await eventually_async(lambda: impostor_heard == [b""])
        await client.close()
        server.close()

    asyncio.run(asyncio.wait_for(main(), WAIT_S))


def test_a_file_mode_may_take_the_secrets_place_on_one_machine(tmp_path: Path) -> None:
    async def main() -> None:
        server = ControlServer(f"ipc://{tmp_path}/control", ToOrchestrator)
        await server.start()
        client = ControlClient(server.endpoint, ToWorker)
        await client.send(Beat())
        assert (await server.recv())[1] == Beat()
        await client.close()
        reader, writer = await dial(server.endpoint)
        with pytest.raises(AccessDenied):  # both or neither
            await introduce(reader, writer, SECRET, "w")
        writer.transport.abort()
        await server.close()

    asyncio.run(asyncio.wait_for(main(), WAIT_S))


def test_tcp_without_a_secret_is_refused_on_both_sides() -> None:
    with pytest.raises(ConfigError, match=r"control_bind: 'tcp://127\.0\.0\.1:0': needs a secret_file"):
        ControlServer("tcp://127.0.0.1:0", ToOrchestrator)
    with pytest.raises(ConfigError, match=r"orchestrator: 'tcp://127\.0\.0\.1:9': needs a secret_file"):
        ControlClient("tcp://127.0.0.1:9", ToWorker)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.binary(max_size=300), min_size=1, max_size=5))
def test_no_bytes_of_a_stranger_are_heard(said: list[bytes]) -> None:
    async def scenario(server: ControlServer) -> None:
        receiving = asyncio.create_task(server.recv())
        for data in said:
            _, writer = await dial(server.endpoint)
            writer.write(data)
            writer.write_eof()
        await eventually_async(lambda: server.num_refused == len(said))
        assert not receiving.done()
        receiving.cancel()

    run(scenario)
