"""The life of a rank other than the first: started -> join -> load -> commands -> the driver's word to end.

Its process takes no notice of SIGINT and SIGTERM: a signal to the whole group drains the worker, which its first
rank does, and the others compute until then. The kernel ends it with the driving rank's process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from anabranch.engine.device import pin_process
from anabranch.engine.fit import rank_config
from anabranch.errors import AnabranchError, Overloaded, PeerLost
from anabranch.parallel.mesh import Mesh
from anabranch.system.logs import configure_logging
from runtime.rank import Command, Event, Follower, FollowerRoom, LanedRank
from runtime.rank_channel import END, Context, RankChannel, RankFailed, RankReady, RankStart, RankStarted
from runtime.rank_mesh import RankMesh, join_world
from transport.collectives.base import CollectiveGroup

logger = logging.getLogger(__name__)

JoinWorld = Callable[[RankStart], CollectiveGroup]


def run_rank(room: FollowerRoom[Command, Event]) -> None:
    """The body of `python -m <room>.rank FOLDER RANK`."""
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def join(start: RankStart) -> CollectiveGroup:
        configure_logging(f"{start.config.name}.{rank}")
        own = rank_config(start.config, rank)
        pin_process(own.cores, own.threads)
        return join_world(own, rank, folder)

    context = Context()
    ended_well = serve_rank(room, context, f"ipc://{folder}/", rank, join)
    context.term()
    sys.stderr.flush()
    # Not the interpreter's own end, which would wait for threads that may hang with a lost peer.
    os._exit(0 if ended_well else 1)


def serve_rank(room: FollowerRoom[Command, Event], context: Context, where: str, rank: int, join_: JoinWorld) -> bool:
    """Be rank `rank` until the driver says that it is over; False where it failed.

    A command that fails ends the rank: its peers would wait for it in the next collective.

    Args:
        where: beginning of the driver's sockets' addresses.
        join_: meets the other ranks.
    """
    channel = RankChannel(context, where, rank)
    mesh: RankMesh | None = None
    local: Follower[Command] | None = None
    try:
        channel.emit(RankStarted())
        first = channel.receive()
        if first == END:
            return True
        start = msgspec.msgpack.decode(first, type=RankStart)
        own = rank_config(start.config, rank)
        mesh = RankMesh(join_(start), Mesh(tp=own.tp, cp=own.cp))
        torch.set_num_threads(own.threads)
        local = room.follow(own, mesh.context, start.model, channel.emit)
        channel.emit(RankReady())
        laned = local if isinstance(local, LanedRank) else None
        while (command := channel.poll() if laned is not None and laned.busy else channel.receive()) != END:
            if command is not None:
                local.handle(room.commands.decode(command))
            elif laned is not None:
                laned.advance()
        return True
    except Exception as error:
        if isinstance(error, AnabranchError):
            logger.error("rank %d: %s", rank, error)
        else:
            logger.exception("rank %d", rank)
        with contextlib.suppress(Overloaded):  # where the driver takes nothing, the end of this process has to say it
            channel.emit(RankFailed(message=f"{type(error).__name__}: {error}", torn=isinstance(error, PeerLost)))
        if mesh is not None:
            mesh.abort(f"rank {rank}: {error}")
        return False
    finally:
        if local is not None:
            local.close()
        if mesh is not None:
            mesh.close()
        channel.close()
