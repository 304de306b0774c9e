"""Messages between a worker's driving rank and its other ranks, and the other ranks' end of the channel.

    driver -> rank    RankStart, then the room's commands; an empty frame is the end
    rank -> driver    RankStarted, RankReady, the room's events, at last RankFailed; a RankBeat where it is silent

ZeroMQ sockets, one for each rank's commands and one for all ranks' events, in a private folder for processes and
in the process's memory for threads; MessagePack, typed, size-limited. Tensors and sums go through the mesh's
collectives.
"""

from __future__ import annotations

import contextlib
import threading

import msgspec
import zmq

from anabranch.config.worker import WorkerConfig
from anabranch.model.config import ModelConfig
from runtime.outbox import Outbox

MAX_COMMAND_BYTES = 64 << 20
BEAT_S = 1.0
FAREWELL_TIMEOUT_S = 1.0
END = b""
# First frame of what a rank sends: about itself, or its room's event.
NOTICE, EVENT = b"n", b"e"

Context = zmq.Context[zmq.Socket[bytes]]


class RankStart(msgspec.Struct, frozen=True, kw_only=True):
    """A rank's first command: what to be.

    Attributes:
        config: the worker's.
        model: its configuration, read once by the driver.
    """

    config: WorkerConfig
    model: ModelConfig


class RankNotice(msgspec.Struct, frozen=True, kw_only=True, tag_field="n"):
    """Base of what a rank says of itself."""


class RankStarted(RankNotice, frozen=True, kw_only=True, tag="started"):
    """The rank lives and is about to join the others."""


class RankReady(RankNotice, frozen=True, kw_only=True, tag="ready"):
    """The rank has loaded its part and takes commands."""


class RankBeat(RankNotice, frozen=True, kw_only=True, tag="beat"):
    """A sign of life, whatever the rank computes meanwhile."""


class RankFailed(RankNotice, frozen=True, kw_only=True, tag="failed"):
    """The rank ends, and why.

    Attributes:
        torn: its collective was aborted: the reason of another rank says more.
    """

    message: str
    torn: bool = False


Notice = RankStarted | RankReady | RankBeat | RankFailed


def command_address(where: str, rank: int) -> str:
    return f"{where}c{rank}"


def event_address(where: str) -> str:
    return f"{where}e"


class RankChannel:
    """A rank's end: commands in, on the thread that made it; notices and events out, from any thread.

    Args:
        where: beginning of the sockets' addresses.
    """

    def __init__(self, context: Context, where: str, rank: int) -> None:
        self._context = context
        self._where = where
        self._rank = rank
        self._closing = False
        self._emitted = threading.Event()
        self._outbox = Outbox[tuple[bytes, bytes]](f"events of rank {rank}", self._emitted.set)
        self._commands = context.socket(zmq.PULL)
        self._commands.setsockopt(zmq.MAXMSGSIZE, MAX_COMMAND_BYTES)
        self._commands.setsockopt(zmq.LINGER, 0)
        self._commands.connect(command_address(where, rank))
        # ZeroMQ sockets belong to one thread, and events come from many.
        self._sender = threading.Thread(target=self._send, name=f"rank-{rank}-events", daemon=True)
        self._sender.start()

    def receive(self) -> bytes:
        """The next command; waits without a deadline, for an idle driver has none to give."""
        return self._commands.recv()

    def poll(self) -> bytes | None:
        """The next command where there is one."""
        try:
            return self._commands.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None

    def emit(self, event: msgspec.Struct) -> None:
        """Send a notice or an event; from any thread, never blocking. Raises Overloaded where the driver takes none."""
        kind = NOTICE if isinstance(event, RankNotice) else EVENT
        data = msgspec.msgpack.encode((self._rank, event))
        self._outbox.put((kind, data), len(data))

    def close(self) -> None:
        """Send what has been emitted, and end."""
        self._closing = True
        self._emitted.set()
        self._sender.join(FAREWELL_TIMEOUT_S)
        self._commands.close()

    def _send(self) -> None:
        beat = (NOTICE, msgspec.msgpack.encode((self._rank, RankBeat())))
        with contextlib.suppress(zmq.ContextTerminated), self._context.socket(zmq.PUSH) as socket:
            socket.setsockopt(zmq.LINGER, int(FAREWELL_TIMEOUT_S * 1000))
            socket.connect(event_address(self._where))
            while True:
                silent = not self._emitted.wait(BEAT_S)
                self._emitted.clear()
                closing = self._closing  # before the last look: what was emitted before `close` is sent
                while (event := self._outbox.take()) is not None:
                    socket.send_multipart(event)
                if closing:
                    return
                if silent:
                    socket.send_multipart(beat)
