"""Which backends there are here, and how to make either end of the channel."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from anabranch.errors import ConfigError, TransportUnavailable
from transport.m2n.base import ChannelShape, LinkMaker, Listener
from transport.m2n.build import load_library
from transport.m2n.ends import Dialler, Door
from transport.m2n.link_maker import PipeLinkMaker
from transport.m2n.listener import PipeListener
from transport.m2n.shm_ends import SHM, ShmDialler, ShmDoor
from transport.m2n.tcp_ends import TCP, TcpDialler, TcpDoor
from transport.m2n.ucx_ends import UCX, UcxDialler, UcxDoor
from transport.ucx.status import ucx_status

logger = logging.getLogger(__name__)

AUTO = "auto"
CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way for messages. Each function takes `listen_host`.

    Attributes:
        check: raises TransportUnavailable, with the remedy, where it cannot be had here.
        open_door: the node's side.
        make_dialler: the rank's side.
    """

    check: Callable[[str], object]
    open_door: Callable[[str], Door]
    make_dialler: Callable[[str], Dialler]


def _check_ucx(listen_host: str) -> None:
    status = ucx_status(listen_host, "ffn_transport")
    if status.reason:
        raise TransportUnavailable(f"ffn_transport: ucx cannot be used: {status.reason}; {status.remedy}")


BACKENDS = {
    SHM: Backend(
        check=lambda host: load_library(), open_door=lambda host: ShmDoor(), make_dialler=lambda host: ShmDialler()
    ),
    TCP: Backend(check=lambda host: None, open_door=TcpDoor, make_dialler=lambda host: TcpDialler()),
    UCX: Backend(check=_check_ucx, open_door=UcxDoor, make_dialler=UcxDialler),
}
# Of auto, best first. UCX is taken by name alone: within a host shared memory is faster, between hosts without RDMA
# it would send over TCP itself, and each end would pay its start.
PREFERENCE = (SHM, TCP)


def usable_backends(transport: str, listen_host: str = "127.0.0.1") -> tuple[str, ...]:
    """The backends that may be used here, best first.

    Args:
        transport: auto (shared memory within a host where it can be built, else TCP), or a backend's name.
        listen_host: the interface of this end.

    Raises:
        ConfigError: there is none of that name.
        TransportUnavailable: it was asked for by name and cannot be had here.
    """
    if transport != AUTO:
        if transport not in BACKENDS:
            raise ConfigError("ffn_transport", transport, f"must be one of {AUTO}, {', '.join(BACKENDS)}")
        BACKENDS[transport].check(listen_host)
        return (transport,)
    usable: list[str] = []
    for name in PREFERENCE:
        try:
            BACKENDS[name].check(listen_host)
            usable.append(name)
        except TransportUnavailable as error:
            logger.warning("ffn_transport auto passes over %s: %s", name, error)
    return tuple(usable)


def create_listener(shape: ChannelShape, transport: str = AUTO, listen_host: str = "127.0.0.1") -> Listener:
    """An FFN node's end, with an address for each backend that can be used here.

    Args:
        shape: what the node serves; `max_rows` and `num_slots` are each attention rank's own.
        listen_host: interface to listen on, for TCP and UCX.

    Raises:
        ConfigError, TransportUnavailable: see `usable_backends`; or it cannot listen.
    """
    doors: list[Door] = []
    try:
        for name in usable_backends(transport, listen_host):
            doors.append(BACKENDS[name].open_door(listen_host))
        return PipeListener(shape, doors)
    except BaseException:
        for door in doors:
            door.close()
        raise


def create_link_maker(
    shape: ChannelShape,
    transport: str = AUTO,
    listen_host: str = "127.0.0.1",
    connect_timeout_s: float = CONNECT_TIMEOUT_S,
) -> LinkMaker:
    """An attention rank's end.

    Args:
        listen_host: interface of this end: beyond loopback UCX reaches other hosts.

    Raises:
        ConfigError, TransportUnavailable: see `usable_backends`.
    """
    names = usable_backends(transport, listen_host)
    return PipeLinkMaker(shape, [BACKENDS[name].make_dialler(listen_host) for name in names], connect_timeout_s)
