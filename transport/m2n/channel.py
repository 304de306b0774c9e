"""Which backends there are here, and how to make either end of the channel."""

from __future__ import annotations

import logging
from collections.abc import Callable

from anabranch.errors import ConfigError, TransportUnavailable
from transport.m2n.base import ChannelShape, LinkMaker, Listener
from transport.m2n.build import load_library
from transport.m2n.doors import SHM, TCP, Door, open_shm_door, open_tcp_door
from transport.m2n.link_maker import PipeLinkMaker
from transport.m2n.listener import PipeListener

logger = logging.getLogger(__name__)

AUTO = "auto"
CONNECT_TIMEOUT_S = 5.0


def usable_backends(transport: str) -> tuple[str, ...]:
    """The backends that may be used here, best first.

    Args:
        transport: auto (shared memory within a host where it can be built, else TCP), shm or tcp.

    Raises:
        ConfigError: there is none of that name.
        TransportUnavailable: it was asked for by name and cannot be had here.
    """
    if transport not in (AUTO, SHM, TCP):
        raise ConfigError("ffn_transport", transport, f"must be {AUTO}, {SHM} or {TCP}")
    if transport == TCP:
        return (TCP,)
    try:
        load_library()
    except TransportUnavailable as error:
        if transport == SHM:
            raise
        logger.warning("shared memory cannot be used between attention and FFN nodes: %s", error)
        return (TCP,)
    return (SHM,) if transport == SHM else (SHM, TCP)


def create_listener(shape: ChannelShape, transport: str = AUTO, listen_host: str = "127.0.0.1") -> Listener:
    """An FFN node's end, with an address for each backend that can be used here.

    Args:
        shape: what the node serves; `max_rows` and `num_slots` are each attention rank's own.
        listen_host: interface to listen on, for TCP.

    Raises:
        ConfigError, TransportUnavailable: see `usable_backends`; or it cannot listen.
    """
    open_door: dict[str, Callable[[], Door]] = {SHM: open_shm_door, TCP: lambda: open_tcp_door(listen_host)}
    doors: list[Door] = []
    try:
        for backend in usable_backends(transport):
            doors.append(open_door[backend]())
        return PipeListener(shape, doors)
    except BaseException:
        for door in doors:
            door.close()
        raise


def create_link_maker(
    shape: ChannelShape, transport: str = AUTO, connect_timeout_s: float = CONNECT_TIMEOUT_S
) -> LinkMaker:
    """An attention rank's end.

    Raises:
        ConfigError, TransportUnavailable: see `usable_backends`.
    """
    return PipeLinkMaker(shape, usable_backends(transport), connect_timeout_s)
