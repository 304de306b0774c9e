"""An attention rank's side of a link's beginning."""

from __future__ import annotations

import os
import socket

from anabranch.errors import DeadlineExceeded, MalformedMessage, PeerLost, TransportError
from anabranch.system.clock import awake_s
from transport.m2n.doors import SHM, parse_shm_address
from transport.m2n.hello import SHM_KIND
from transport.planes.handshake import NO_TOKEN, HelloReader, Introduction, encode

_MAX_FDS = 4


def dial_shm(
    address: str, introduction: Introduction, timeout_s: float
) -> tuple[socket.socket, Introduction, int | None]:
    """Connect, show the token, wait for the welcome and the segment that comes with it.

    Returns:
        The socket, non-blocking; what the node said; the segment's descriptor, None where it refuses.

    Raises:
        PeerLost, DeadlineExceeded, MalformedMessage.
    """
    path, token = parse_shm_address(address)
    deadline = awake_s() + timeout_s
    fds: list[int] = []
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        sock.connect(str(path))
        sock.sendall(encode(SHM_KIND, token, introduction))
        reader = HelloReader(SHM_KIND, NO_TOKEN)
        welcome: Introduction | None = None
        while welcome is None:
            sock.settimeout(max(0.001, deadline - awake_s()))
            try:
                data, more, _, _ = socket.recv_fds(sock, reader.num_missing, _MAX_FDS)
            except TimeoutError:
                if awake_s() < deadline:  # this process was stopped meanwhile
                    continue
                raise
            fds += more
            if not data:
                raise PeerLost(f"{SHM} peer at {path} refused the connection")
            welcome = reader.feed(data)
        if len(fds) > 1:
            raise MalformedMessage(f"{len(fds)} descriptors with a welcome, at most one")
        sock.setblocking(False)
        return sock, welcome, fds[0] if fds else None
    except TimeoutError:
        error: TransportError | DeadlineExceeded = DeadlineExceeded(
            f"connecting to {SHM} peer at {path}: connect_timeout_s = {timeout_s} s"
        )
    except OSError as failed:
        error = PeerLost(f"{SHM} peer at {path}: {failed}")
    except TransportError as failed:
        error = failed
    sock.close()
    for fd in fds:
        os.close(fd)
    raise error
