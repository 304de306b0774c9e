"""Planes by name: which there are here, which to use, how to make one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from anabranch.errors import ConfigError, TransportUnavailable
from transport.planes import inproc
from transport.planes.base import Plane, PlaneHandler
from transport.ucx.status import INSTALL, ucx_status

logger = logging.getLogger(__name__)

PREFERENCE = ("inproc", "ucx", "tcp")


@dataclass(frozen=True, kw_only=True)
class PlaneStatus:
    """What `anabranch doctor` shows of a plane.

    Attributes:
        reason: why it cannot be used; empty when usable.
        remedy: what to do about it; empty when usable.
        detail: versions and transports, for people.
        broken: it is installed, and does not work.
    """

    name: str
    usable: bool
    reason: str = ""
    remedy: str = ""
    detail: str = ""
    broken: bool = False


def _make_inproc(handler: PlaneHandler, listen_host: str) -> Plane:
    return inproc.InprocPlane(handler)


def _make_tcp(handler: PlaneHandler, listen_host: str) -> Plane:
    from transport.planes.tcp import TcpPlane

    return TcpPlane(handler, listen_host=listen_host)


def _make_ucx(handler: PlaneHandler, listen_host: str) -> Plane:
    from transport.planes.ucx import UcxPlane

    return UcxPlane(handler, listen_host=listen_host)


_FACTORIES: dict[str, Callable[[PlaneHandler, str], Plane]] = {
    "inproc": _make_inproc,
    "ucx": _make_ucx,
    "tcp": _make_tcp,
}


def _ucx_status(listen_host: str) -> PlaneStatus:
    found = ucx_status(listen_host, "kv_transport")
    return PlaneStatus(
        name="ucx",
        usable=not found.reason,
        reason=found.reason,
        remedy=found.remedy,
        detail=found.detail,
        broken=found.broken,
    )


def available_planes(listen_host: str = "127.0.0.1") -> list[PlaneStatus]:
    """Every plane that Anabranch knows, best first, and whether it can be used here (UCX is tried once)."""
    return [
        PlaneStatus(name="inproc", usable=True, detail="memory copy between workers of one process"),
        _ucx_status(listen_host),
        PlaneStatus(name="tcp", usable=True, detail="sockets"),
    ]


def usable_planes(listen_host: str = "127.0.0.1") -> tuple[str, ...]:
    """Names of the planes that can be used here, best first."""
    return tuple(status.name for status in available_planes(listen_host) if status.usable)


def configured_planes(configured: str, listen_host: str) -> tuple[str, ...]:
    """The planes that a process starts with: the one that is named, or with auto all that can be used.

    With auto, a plane that is installed and does not work is passed over, and the log says why and what to do.

    Raises:
        ConfigError: no plane has that name.
        TransportUnavailable: the named plane cannot be used here; the message gives the remedy.
    """
    if configured != "auto":
        if configured not in PREFERENCE:
            raise ConfigError("kv_transport", configured, f"must be auto or one of {', '.join(PREFERENCE)}")
        status = next(status for status in available_planes(listen_host) if status.name == configured)
        if not status.usable:
            raise TransportUnavailable(f"kv_transport: {configured} cannot be used: {status.reason}; {status.remedy}")
        return (configured,)
    statuses = available_planes(listen_host)
    for status in statuses:
        if status.broken:
            logger.warning("kv_transport auto passes over %s: %s; %s", status.name, status.reason, status.remedy)
    return tuple(status.name for status in statuses if status.usable)


def reachable_planes(addresses: Mapping[str, str]) -> tuple[str, ...]:
    """Names of a peer's planes that this process can connect to: inproc only within the process."""
    return tuple(name for name, address in addresses.items() if name != "inproc" or inproc.is_local(address))


def choose_plane(configured: str, ours: tuple[str, ...], theirs: tuple[str, ...]) -> str:
    """The plane to use between two processes.

    Args:
        configured: a plane's name, or auto: the best that both ends have.
        ours: names usable here.
        theirs: names of the peer that can be reached from here (`reachable_planes`).

    Raises:
        ConfigError: no plane has that name.
        TransportUnavailable: an end lacks it; the message says which and gives the remedy.
    """
    if configured == "auto":
        for name in PREFERENCE:
            if name in ours and name in theirs:
                return name
        raise TransportUnavailable(f"no plane in common: here {', '.join(ours)}; the peer {', '.join(theirs)}")
    if configured not in PREFERENCE:
        raise ConfigError("kv_transport", configured, f"must be auto or one of {', '.join(PREFERENCE)}")
    for side, names in (("here", ours), ("at the peer", theirs)):
        if configured not in names:
            raise TransportUnavailable(f"{configured} cannot be used {side}: {_remedy(configured, side)}")
    return configured


def _remedy(name: str, side: str) -> str:
    if name == "inproc":
        return "it joins workers of one process only; use auto, ucx or tcp"
    if name == "ucx":
        status = _ucx_status("127.0.0.1")
        if side == "here" and not status.usable:
            return f"{status.reason}; {status.remedy}"
        return INSTALL
    return f"start the worker with kv_transport auto or {name}"


def create_plane(name: str, handler: PlaneHandler, *, listen_host: str = "127.0.0.1") -> Plane:
    """Make the plane called `name`; it listens at once.

    Raises:
        ConfigError: no plane has that name.
        TransportUnavailable: it cannot be had here; the message gives the remedy.
    """
    factory = _FACTORIES.get(name)
    if factory is None:
        raise ConfigError("kv_transport", name, f"must be one of {', '.join(_FACTORIES)}")
    if name == "ucx":
        status = _ucx_status(listen_host)
        if not status.usable:
            raise TransportUnavailable(f"{status.reason}; {status.remedy}")
    return factory(handler, listen_host)
