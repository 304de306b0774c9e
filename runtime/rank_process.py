"""The body of a child rank's process: join -> load -> commands until the parent ends it."""

from __future__ import annotations

import logging
import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec
import zmq

from anabranch.config.worker import WorkerConfig
from anabranch.engine.device import pin_process
from anabranch.errors import AnabranchError
from anabranch.parallel.context import RankContext
from anabranch.parallel.mesh import Mesh
from runtime.log import configure_logging
from runtime.rank_group import (
    EVENT,
    MAX_COMMAND_BYTES,
    NOTICE,
    RankFailed,
    RankReady,
    RankStart,
    command_path,
    event_path,
)
from runtime.rank_mesh import RankMesh, rank_cores

logger = logging.getLogger(__name__)

Command = TypeVar("Command")
_Handled = TypeVar("_Handled", contravariant=True)


class RankHandler(Protocol[_Handled]):
    """What a room runs on a rank."""

    def handle(self, command: _Handled) -> None: ...


Emit = Callable[[msgspec.Struct], None]


def run_rank(
    decoder: msgspec.msgpack.Decoder[Command], build: Callable[[WorkerConfig, RankContext, Emit], RankHandler[Command]]
) -> None:
    """Read the start from the command line and serve commands; the process ends with its parent.

    A command that fails ends the rank: its peers would wait for it in the next collective.
    """
    start = msgspec.json.decode(sys.argv[1], type=RankStart)
    config, rank, folder = start.config, start.rank, Path(start.folder)
    configure_logging(f"{config.name}.{rank}")
    pin_process(rank_cores(config, rank), config.threads)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    outbox: queue.SimpleQueue[msgspec.Struct] = queue.SimpleQueue()
    sent = threading.Event()
    threading.Thread(target=_send_events, args=(context, folder, rank, outbox, sent), daemon=True).start()
    commands = context.socket(zmq.PULL)
    commands.setsockopt(zmq.MAXMSGSIZE, MAX_COMMAND_BYTES)
    commands.connect(command_path(folder, rank))
    mesh: RankMesh | None = None
    try:
        mesh = RankMesh(config, Mesh(tp=config.tp, cp=config.cp), rank, folder)
        handler = build(config, mesh.context, outbox.put)
        outbox.put(RankReady())
        while True:
            handler.handle(decoder.decode(commands.recv()))
    except Exception as error:
        if isinstance(error, AnabranchError):
            logger.error("%s", error)
        else:
            logger.exception("rank %d", rank)
        if mesh is not None:
            mesh.abort(f"rank {rank}: {error}")
        sent.clear()
        outbox.put(RankFailed(message=f"{type(error).__name__}: {error}"))
        sent.wait(1.0)
        raise SystemExit(1) from None


def _send_events(
    context: zmq.Context[zmq.Socket[bytes]],
    folder: Path,
    rank: int,
    outbox: queue.SimpleQueue[msgspec.Struct],
    sent: threading.Event,
) -> None:
    """Own the event socket: ZeroMQ sockets belong to one thread, events come from many."""
    encoder = msgspec.msgpack.Encoder()
    socket = context.socket(zmq.PUSH)
    socket.setsockopt(zmq.LINGER, 1000)
    socket.connect(event_path(folder))
    while True:
        event = outbox.get()
        kind = NOTICE if isinstance(event, RankReady | RankFailed) else EVENT
        socket.send_multipart((kind, encoder.encode((rank, event))))
        if isinstance(event, RankFailed):
            socket.close()
            sent.set()
            return
