"""How links begin and end: hellos that disagree, strangers, bounds, and what is held afterwards."""

from __future__ import annotations

import dataclasses
import gc
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anabranch.errors import ConfigError, DeadlineExceeded, MalformedMessage, PeerLost, TransportUnavailable
from benchmarks.m2n_ends import connect, next_answer
from tests.support.m2n import (
    BACKENDS,
    REASONS,
    SHAPE,
    Channel,
    a_call,
    an_answer,
    assert_same,
    channel,
)
from tests.support.resources import holdings
from tests.support.waiting import eventually
from transport.collectives.segment import make_segment
from transport.m2n import ChannelShape, Listener, create_link_maker, create_listener, hello, listener
from transport.m2n import acceptor as acceptor_module
from transport.m2n.base import Dialled
from transport.m2n.channel import usable_backends
from transport.m2n.hello import SHM_KIND, TCP_KIND, UCX_KIND, Welcome, introduce, read_welcome
from transport.m2n.shm_ends import parse_shm_address
from transport.m2n.shm_pipe import check_segment, layout_of
from transport.planes.handshake import MAX_PENDING_HELLOS, Introduction, encode, parse_address

pytestmark = pytest.mark.unit


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextmanager
def listening(backend: str, shape: ChannelShape = SHAPE) -> Iterator[Listener]:
    made = create_listener(shape, backend)
    try:
        yield made
    finally:
        made.close()


def raw_connection(made: Listener) -> tuple[socket.socket, int, bytes]:
    """A socket at the listener's door, and the kind and token that a hello must show."""
    ((backend, address),) = made.addresses.items()
    if backend == "shm":
        path, token = parse_shm_address(address)
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(path))
        return sock, SHM_KIND, token
    host, port, token = parse_address(backend, address)
    return socket.create_connection((host, port)), TCP_KIND if backend == "tcp" else UCX_KIND, token


def is_closed(made: Listener, sock: socket.socket) -> bool:
    """Whether the listener has closed this connection without a word."""
    assert not made.poll()
    sock.setblocking(False)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def check_listener(made: Listener, backend: str) -> None:
    """It still takes links."""
    maker = create_link_maker(SHAPE, backend)
    try:
        link = connect(made, maker)
        link.send(a_call(1))
        calls = [*made.poll()]
        eventually(lambda: calls or calls.extend(made.poll()), "the call arrives")
        made.answer(calls[0], an_answer(calls[0].call))
        assert_same(next_answer(link, maker), an_answer(a_call(1)))
    finally:
        maker.close()


OTHERS = {
    "model": ("another model", "a model"),
    "dtype": (torch.float16, "float16"),
    "hidden_size": (40, "36"),
    "max_choices": (2, "3"),
    "shared_expert": ("ffn", "attn"),
}


@pytest.mark.parametrize("field", OTHERS)
def test_both_ends_refuse_what_differs_with_both_values(
    backend: str, field: str, caplog: pytest.LogCaptureFixture
) -> None:
    value, _ = OTHERS[field]
    mine = dataclasses.replace(SHAPE, **{field: value})  # type: ignore[arg-type]
    with listening(backend) as made:
        maker = create_link_maker(mine, backend)
        with pytest.raises(ConfigError) as raised:
            connect(made, maker)
        maker.close()
        assert raised.value.key == field
        for text in (str(raised.value), caplog.text):
            assert str(value).removeprefix("torch.") in text
            assert str(getattr(SHAPE, field)).removeprefix("torch.") in text
        check_listener(made, backend)


@pytest.mark.parametrize(
    ("field", "value"), [("max_rows", hello.MAX_ROWS + 1), ("num_slots", hello.MAX_SLOTS + 1), ("num_slots", 0)]
)
def test_sizes_are_bounded_at_the_node(backend: str, field: str, value: int) -> None:
    with listening(backend) as made:
        maker = create_link_maker(dataclasses.replace(SHAPE, **{field: value}), backend)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=field):
            connect(made, maker)
        maker.close()


def test_a_link_whose_slots_are_too_large_is_refused(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hello, "MAX_LINK_BYTES", 1000)
    with listening(backend) as made:
        maker = create_link_maker(SHAPE, backend)
        with pytest.raises(ConfigError, match=r"max_rows.*at most 1000"):
            connect(made, maker)
        maker.close()


def test_a_rank_brings_its_own_sizes(backend: str) -> None:
    with listening(backend, dataclasses.replace(SHAPE, max_rows=1, num_slots=1)) as made:
        check_listener(made, backend)


def test_another_wire_version_is_refused_with_both(backend: str) -> None:
    with listening(backend) as made:
        sock, kind, token = raw_connection(made)
        introduction = introduce(SHAPE, 1)
        body = introduction.endpoint.replace(b"\xacwire_version\x01", b"\xacwire_version\x63")
        assert body != introduction.endpoint
        sock.sendall(encode(kind, token, Introduction(name="later", endpoint=body)))
        sock.settimeout(0.01)
        received = bytearray()

        def read() -> bool:
            assert not made.poll()
            try:
                data = sock.recv(4096)
            except TimeoutError:
                return False
            received.extend(data)
            return not data

        eventually(read, "it is refused")
        assert b"wire_version" in received and made.num_links == 0
        sock.close()
    welcome = Welcome(wire_version=99, incarnation=1)
    with pytest.raises(ConfigError, match=r"wire_version: 1: FFN node node has 99"):
        read_welcome(Introduction(name="later", endpoint=msgspec.msgpack.encode(welcome)), SHAPE, "node")


def test_the_number_of_links_is_bounded(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "MAX_LINKS", 2)
    with channel(backend, num_links=2) as pair:
        with pytest.raises(PeerLost, match="takes no more links"):
            pair.connect()
        pair.links[0].close()
        eventually(lambda: not pair.listener.poll() and pair.listener.num_links == 1, "the link ends")
        pair.connect()


@pytest.fixture(scope="module", params=BACKENDS)
def open_listener(request: pytest.FixtureRequest) -> Iterator[Listener]:
    with listening(str(request.param)) as made:
        yield made


@given(data=st.binary(min_size=1, max_size=200), shows_token=st.booleans())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_noise_is_closed_and_makes_no_link(open_listener: Listener, data: bytes, shows_token: bool) -> None:
    sock, kind, token = raw_connection(open_listener)
    with sock:
        if shows_token:
            data = encode(kind, token, Introduction(name="noise", endpoint=data))
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        eventually(lambda: is_closed(open_listener, sock), "it is closed")
    assert open_listener.num_links == 0


def test_a_wrong_token_is_closed(backend: str) -> None:
    with listening(backend) as made:
        sock, kind, token = raw_connection(made)
        with sock:
            sock.sendall(encode(kind, bytes(reversed(token)), introduce(SHAPE, 1)))
            eventually(lambda: is_closed(made, sock), "it is closed")
        check_listener(made, backend)


def test_those_who_say_nothing_are_bounded_in_time_and_number(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(backend) as made:
        before = holdings()
        silent = [raw_connection(made)[0] for _ in range(MAX_PENDING_HELLOS + 10)]
        try:
            eventually(lambda: is_closed(made, silent[9]), "the oldest give way")
            assert not is_closed(made, silent[10])
            check_listener(made, backend)
        finally:
            for sock in silent:
                sock.close()
        eventually(lambda: not made.poll() and not holdings().beyond(before), "all are closed")
        monkeypatch.setattr(acceptor_module, "HELLO_TIMEOUT_S", 0.05)
        with raw_connection(made)[0] as sock:
            eventually(lambda: is_closed(made, sock), "the late one is closed")


def mappings() -> int:
    """This process's mappings of segments."""
    return Path("/proc/self/maps").read_text().count("memfd:anabranch")


def test_nothing_is_held_when_both_ends_are_closed(backend: str) -> None:
    gc.collect()
    before, mapped = holdings(), mappings()
    for _ in range(3):
        with channel(backend, num_links=3) as pair:
            pair.links[0].send(a_call(1))
            (arrived,) = pair.arrived()
            pair.listener.answer(arrived, an_answer(arrived.call))
            next_answer(pair.links[0], pair.maker)
            path = parse_shm_address(pair.listener.addresses["shm"])[0] if backend == "shm" else None
        del pair, arrived
        gc.collect()
        assert path is None or not path.parent.exists()
    assert not holdings().beyond(before) and mappings() == mapped


def test_a_link_that_ends_is_unmapped_while_the_others_go_on(backend: str) -> None:
    with channel(backend, num_links=2) as pair:
        gc.collect()
        before, mapped = holdings(), mappings()
        pair.connect()
        pair.links.pop().close()
        eventually(lambda: not pair.listener.poll() and pair.listener.num_links == 2, "the node drops it")
        gc.collect()
        assert not holdings().beyond(before) and mappings() == mapped


def test_auto_prefers_shared_memory_and_falls_back_to_tcp() -> None:
    if "shm" not in usable_backends("auto"):
        pytest.skip("no shared memory here")
    with listening("auto") as made:
        assert set(made.addresses) == {"shm", "tcp"}
        maker = create_link_maker(SHAPE)
        before = mappings()
        connect(made, maker)
        assert mappings() == before + 2  # both ends are in this process
        away = {**made.addresses, "shm": f"shm:{'00' * 16}:/nowhere/m2n.sock"}
        made._addresses = away  # type: ignore[attr-defined]
        connect(made, maker)
        assert mappings() == before + 2 and made.num_links == 2
        maker.close()


def test_no_backend_in_common_is_said() -> None:
    with listening("tcp") as made:
        maker = create_link_maker(SHAPE, "tcp")
        with pytest.raises(TransportUnavailable, match="node offers shm, this rank has tcp"):
            maker.dial({"shm": "shm:00:/x"}, "node")
        maker.close()
        assert list(made.addresses) == ["tcp"]
    with pytest.raises(ConfigError, match="ffn_transport"):
        create_listener(SHAPE, "rdma")


def test_nobody_there_is_a_lost_peer(backend: str) -> None:
    with listening(backend) as made:
        addresses = dict(made.addresses)
    maker = create_link_maker(SHAPE, backend)
    with pytest.raises(PeerLost):
        maker.dial(addresses, "node")
    maker.close()


def test_a_node_that_does_not_answer_is_given_up_in_time(backend: str) -> None:
    with listening(backend) as made:
        maker = create_link_maker(SHAPE, backend, connect_timeout_s=0.05)
        with pytest.raises(DeadlineExceeded, match=r"0\.05 s"):
            maker.dial(made.addresses, "node")
        maker.close()
        check_listener(made, backend)


@pytest.mark.parametrize("address", ["tcp:1", "shm:00:/x", "shm:zz:/x", f"shm:{'00' * 16}:"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    if address.startswith("shm"):
        with pytest.raises(ConfigError, match="must be shm:TOKEN:PATH"):
            parse_shm_address(address)
    else:
        maker = create_link_maker(SHAPE, "tcp")
        with pytest.raises(ConfigError, match="must be tcp:"):
            maker.dial({"tcp": address}, "node")
        maker.close()


def test_a_segment_that_could_shrink_is_refused() -> None:
    if "shm" not in usable_backends("auto"):
        pytest.skip("no shared memory here")
    layout = layout_of(SHAPE)
    right, short, unsealed = make_segment(layout.total), make_segment(4096), os.memfd_create("other")
    os.ftruncate(unsealed, layout.total)
    try:
        check_segment(right, layout)
        for wrong in (short, unsealed):
            with pytest.raises(MalformedMessage, match="segment"):
                check_segment(wrong, layout)
    finally:
        for fd in (right, short, unsealed):
            os.close(fd)


def test_closing_twice_does_nothing(backend: str) -> None:
    pair = Channel(backend)
    pair.close()
    pair.close()


@pytest.mark.parametrize("node_goes", [False, True], ids=["given up", "node gone"])
def test_a_connection_that_is_given_up_leaves_nothing(backend: str, node_goes: bool) -> None:
    with listening(backend) as made:
        maker = create_link_maker(SHAPE, backend)
        eventually(lambda: not made.poll())
        before, mapped = holdings(), mappings()
        dialled: list[Dialled] = []
        dials = threading.Thread(target=lambda: dialled.append(maker.dial(made.addresses, "node")))
        dials.start()
        while dials.is_alive():
            assert not made.poll()
        if node_goes:
            made.close()
            link = dialled[0].attach()
            with pytest.raises(PeerLost):
                next_answer(link, maker)
            link.close()
        else:
            dialled[0].close()
            dialled[0].close()
            eventually(lambda: not made.poll() and not made.num_links, "the node notices")
        gc.collect()
        assert not holdings().beyond(before) and mappings() == mapped
        maker.close()


def test_a_link_maker_closes_what_was_reached_and_never_became_a_link(backend: str) -> None:
    with listening(backend) as made:
        check_listener(made, backend)  # what a process makes once
        eventually(lambda: not made.poll() and not made.num_links, "that link ends")
        gc.collect()
        before, mapped = holdings(), mappings()
        maker = create_link_maker(SHAPE, backend)
        dialled: list[Dialled] = []
        dials = threading.Thread(target=lambda: dialled.append(maker.dial(made.addresses, "node")))
        dials.start()
        while dials.is_alive():
            assert not made.poll()
        maker.close()
        eventually(lambda: not made.poll() and not made.num_links, "the node notices")
        with pytest.raises(PeerLost, match="given up"):
            dialled[0].attach()
        dialled[0].close()
        gc.collect()
        assert not holdings().beyond(before, spare_threads=1) and mappings() == mapped


def test_a_link_maker_that_is_closed_while_it_dials_keeps_nothing(backend: str) -> None:
    with listening(backend) as made:
        maker = create_link_maker(SHAPE, backend)
        refused: list[str] = []

        def dial() -> None:
            try:
                maker.dial(made.addresses, "node")
            except PeerLost as error:
                refused.append(str(error))

        dials = threading.Thread(target=dial)
        dials.start()
        maker.close()  # nobody has answered the hello yet
        eventually(lambda: not made.poll() and not dials.is_alive(), "the dial ends")
        assert "this end of the channel is closed" in refused[0]
        eventually(lambda: not made.poll() and not made.num_links, "the node notices")


def test_a_hello_without_a_ucx_address_is_closed() -> None:
    if REASONS["ucx"]:
        pytest.skip(REASONS["ucx"])
    with listening("ucx") as made:
        sock, kind, token = raw_connection(made)
        with sock:
            sock.sendall(encode(kind, token, introduce(SHAPE, 1)))
            eventually(lambda: is_closed(made, sock), "it is closed")
        check_listener(made, "ucx")
