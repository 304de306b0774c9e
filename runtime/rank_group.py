"""The ranks of one worker: rank 0 is the worker's own process, the others are its children.

    rank 0: start -> join the mesh's groups -> send commands (all ranks, in order), hear events -> close
    rank r: join -> command, command, ... (waits without a deadline while idle) -> ends with its parent

Commands go down and events come up over ZeroMQ sockets in a private folder, typed and size-limited like every
control message; tensors and sums go through the mesh's collectives. A rank that dies or fails aborts the
collectives of all, so that no rank waits for it, and `on_failure` hears of it once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import msgspec
import zmq

from anabranch.config.worker import WorkerConfig
from anabranch.errors import DeadlineExceeded, WorkerDied
from anabranch.parallel.context import RankContext
from anabranch.parallel.mesh import Mesh
from runtime.rank_mesh import RankMesh

logger = logging.getLogger(__name__)

MAX_COMMAND_BYTES = 64 << 20
START_TIMEOUT_S = 180.0
TERM_TIMEOUT_S = 2.0
_POLL_MS = 200

Command = TypeVar("Command", bound=msgspec.Struct)
Event = TypeVar("Event", bound=msgspec.Struct)


class RankStart(msgspec.Struct, frozen=True, kw_only=True):
    """What a child rank is told on its command line, as JSON."""

    config: WorkerConfig
    rank: int
    folder: str


# First frame of what a rank sends: about itself, or its room's event.
NOTICE, EVENT = b"n", b"e"


class RankFailed(msgspec.Struct, frozen=True, kw_only=True, tag="rank_failed"):
    """A rank's last event."""

    message: str


class RankReady(msgspec.Struct, frozen=True, kw_only=True, tag="rank_ready"):
    """A rank has loaded its part and takes commands."""


def command_path(folder: Path, rank: int) -> str:
    return f"ipc://{folder}/commands-{rank}"


def event_path(folder: Path) -> str:
    return f"ipc://{folder}/events"


class RankGroup(Generic[Command, Event]):
    """Rank 0's hold on its worker's other ranks; with one rank it starts nothing and sends nothing.

    Args:
        module: what `python -m` runs for a rank.
        event_type: what the room's ranks send: `tuple[int, union of events]`, the rank first.
        on_event: hears `(rank, event)`, on the listener's thread.
        on_failure: hears once that the group cannot go on.
    """

    def __init__(
        self,
        config: WorkerConfig,
        module: str,
        event_type: type[tuple[int, Event]],
        on_event: Callable[[int, Event], None],
        on_failure: Callable[[WorkerDied], None],
    ) -> None:
        self.config = config
        self.mesh = Mesh(tp=config.tp, cp=config.cp)
        self._module = module
        self._events = msgspec.msgpack.Decoder(event_type)
        self._notices = msgspec.msgpack.Decoder(tuple[int, RankReady | RankFailed])
        self._encoder = msgspec.msgpack.Encoder()
        self._on_event = on_event
        self._on_failure = on_failure
        self._folder: Path | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._commands: list[zmq.Socket[bytes]] = []
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._ready: set[int] = set()
        self._changed = threading.Condition()
        self._failure: WorkerDied | None = None
        self._closing = False
        self._threads: list[threading.Thread] = []
        self._rank_mesh: RankMesh | None = None

    @property
    def size(self) -> int:
        return self.mesh.world_size

    def start(self) -> RankContext:
        """Start the other ranks and join them; returns rank 0's place among them.

        Raises:
            TransportUnavailable, DeadlineExceeded, WorkerDied: a rank did not come up.
        """
        if self.size == 1:
            return RankContext(mesh=self.mesh)
        self._folder = Path(tempfile.mkdtemp(prefix="anabranch-ranks-"))
        self._context = zmq.Context()
        events = self._context.socket(zmq.PULL)
        events.setsockopt(zmq.MAXMSGSIZE, MAX_COMMAND_BYTES)
        events.bind(event_path(self._folder))
        for rank in range(1, self.size):
            socket = self._context.socket(zmq.PUSH)
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(command_path(self._folder, rank))
            self._commands.append(socket)
        self._spawn(lambda: self._listen(events), "rank-events")
        for rank in range(1, self.size):
            self._spawn(lambda rank=rank: self._keep(rank), f"rank-{rank}")  # type: ignore[misc]
        self._rank_mesh = RankMesh(self.config, self.mesh, 0, self._folder)
        return self._rank_mesh.context

    def wait_ready(self) -> None:
        """Wait until every rank has loaded. Raises WorkerDied, DeadlineExceeded."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure or len(self._ready) == self.size - 1, START_TIMEOUT_S)
            if self._failure is not None:
                raise self._failure
            missing = sorted(set(range(1, self.size)) - self._ready)
        if missing:
            raise DeadlineExceeded(f"rank_start_timeout_s: ranks {missing} were not ready in {START_TIMEOUT_S} s")

    def send(self, command: Command) -> None:
        """Give every other rank a command; one thread only. Says nothing more once the group has failed."""
        if self._commands and self._failure is None:
            data = self._encoder.encode(command)
            for socket in self._commands:
                socket.send(data, copy=False)

    def fail(self, error: WorkerDied) -> None:
        """End the group: every wait of every rank ends now. The first error counts."""
        with self._changed:
            if self._failure is not None or self._closing:
                return
            self._failure = error
            self._changed.notify_all()
        if self._rank_mesh is not None:
            self._rank_mesh.abort(str(error))
        self._on_failure(error)

    def close(self) -> None:
        """End the other ranks and remove the folder. Idempotent."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
        if self._rank_mesh is not None:
            self._rank_mesh.abort("the worker ends")
        for child in self._children.values():
            with contextlib.suppress(ProcessLookupError):
                child.terminate()
        deadline_s = time.monotonic() + TERM_TIMEOUT_S
        for child in self._children.values():
            try:
                child.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
        for thread in self._threads:
            thread.join(TERM_TIMEOUT_S)
        for socket in self._commands:
            socket.close()
        if self._context is not None:
            self._context.term()
        if self._rank_mesh is not None:
            self._rank_mesh.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _spawn(self, target: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _keep(self, rank: int) -> None:
        """Start a rank and wait for its end, in one thread: the kernel ends a child with the thread that forked it."""
        start = RankStart(config=self.config, rank=rank, folder=str(self._folder))
        environment = dict(os.environ)
        if self.config.threads:
            environment["OMP_NUM_THREADS"] = str(self.config.threads)
        child = subprocess.Popen(
            [
                *(sys.executable, "-m", "runtime.child", str(os.getpid()), f"{self.config.name}.{rank}"),
                *(self._module, msgspec.json.encode(start).decode()),
            ],
            env=environment,
            stdin=subprocess.DEVNULL,
        )
        self._children[rank] = child
        code = child.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        self.fail(WorkerDied(f"rank {rank} of {self.config.name} (pid {child.pid}) {how}"))

    def _listen(self, events: zmq.Socket[bytes]) -> None:
        with events:
            while not self._closing:
                if not events.poll(_POLL_MS):
                    continue
                kind, data = events.recv_multipart()
                if kind == NOTICE:
                    self._noticed(*self._notices.decode(data))
                else:
                    self._on_event(*self._events.decode(data))

    def _noticed(self, rank: int, notice: RankReady | RankFailed) -> None:
        if isinstance(notice, RankFailed):
            self.fail(WorkerDied(f"rank {rank} of {self.config.name}: {notice.message}"))
            return
        with self._changed:
            self._ready.add(rank)
            self._changed.notify_all()
