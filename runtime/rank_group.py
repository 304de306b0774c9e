"""The driver's hold on its worker's other ranks: processes that are its children, or threads beside it.

    start (each rank reports that it lives, all join) -> wait_ready (each has loaded) -> send, take events -> close

A rank that dies, fails or falls silent fails the group: the collectives of all ranks are aborted, so that none
waits for it, and `on_failure` hears of it once. The private folder with the sockets is removed as soon as all are
connected, so that nothing is left of it however the worker ends.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic

import msgspec
import zmq

from anabranch.config.worker import WorkerConfig
from anabranch.engine.fit import rank_config
from anabranch.errors import AnabranchError, DeadlineExceeded, WorkerDied
from anabranch.model.config import ModelConfig
from anabranch.parallel.context import RankContext
from anabranch.parallel.mesh import Mesh
from anabranch.parallel.threads import ThreadGroup, thread_groups
from anabranch.system.child_process import python_environment, signal_name
from anabranch.system.clock import awake_s, wait_for
from anabranch.system.private_files import private_folder
from runtime.rank import Command, Event, FollowerRoom
from runtime.rank_channel import (
    END,
    MAX_COMMAND_BYTES,
    NOTICE,
    Context,
    Notice,
    RankFailed,
    RankReady,
    RankStart,
    RankStarted,
    command_address,
    event_address,
)
from runtime.rank_mesh import RankMesh, join_world
from runtime.rank_process import serve_rank
from runtime.running_process import RunningProcess
from runtime.silence import Silence
from runtime.start import SHARED_IMPORTS, start_process
from transport.collectives.base import CollectiveGroup

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 180.0
END_TIMEOUT_S = 2.0
# How long the end of a rank whose collective was aborted, and an error in one here, wait for the failure of the rank
# that died: its reason says more.
NEWS_TIMEOUT_S = 0.5
_POLL_S = 0.2
_RETRY_S = 0.02


class RankGroup(Generic[Command, Event]):
    """All ranks but the driver's own; with one rank it starts nothing and sends nothing.

    Args:
        on_event: takes `(rank, event)`, on the listener's thread.
        on_failure: called once, when the group cannot go on.
    """

    def __init__(
        self,
        config: WorkerConfig,
        room: FollowerRoom[Command, Event],
        on_event: Callable[[int, Event], None],
        on_failure: Callable[[WorkerDied], None],
    ) -> None:
        self.config = config
        self.mesh = Mesh(tp=config.tp, cp=config.cp)
        self._room = room
        self._on_event = on_event
        self._on_failure = on_failure
        self._notices = msgspec.msgpack.Decoder(tuple[int, Notice])
        self._encoder = msgspec.msgpack.Encoder()
        self._folder: Path | None = None
        self._where = "inproc://"
        self._context: Context | None = None
        self._thread_groups: list[ThreadGroup] = []
        # Guards the command sockets, which belong to the engine's thread and at the end to whoever closes.
        self._sending = threading.Lock()
        self._commands: list[zmq.Socket[bytes]] = []
        self._children: dict[int, RunningProcess] = {}
        self._threads: list[threading.Thread] = []
        self._rank_mesh: RankMesh | None = None
        # Guards what follows, and tells of changes.
        self._changed = threading.Condition()
        self._started: set[int] = set()
        self._ready: set[int] = set()
        self._torn: dict[int, str] = {}
        self._failure: WorkerDied | None = None
        self._closing = False

    @property
    def size(self) -> int:
        return self.mesh.world_size

    @property
    def pids(self) -> dict[int, int]:
        """Rank -> process id, of the ranks with a process of their own."""
        return {rank: child.pid for rank, child in sorted(self._children.items())}

    # Start ------------------------------------------------------------------------------------------------

    def start(self, model: ModelConfig) -> RankContext:
        """Start the other ranks and join them; returns the driver's place among them.

        Raises:
            TransportUnavailable, DeadlineExceeded, WorkerDied: a rank did not come up.
        """
        if self.size == 1:
            return RankContext(mesh=self.mesh)
        self._context = Context()
        if self.config.rank_processes:
            self._folder = private_folder()
            self._where = f"ipc://{self._folder}/"
        else:
            self._thread_groups = thread_groups(self.size, self.config.collective_timeout_s)
        self._bind()
        body = self._keep_process if self.config.rank_processes else self._keep_thread
        for rank in range(1, self.size):
            self._spawn(body, rank)
        self._await(self._started, "start")
        self._send(self._encoder.encode(RankStart(config=self.config, model=model)))
        try:
            self._rank_mesh = RankMesh(self._join(), self.mesh)
        except AnabranchError as error:
            raise self.broken(error) from error
        if self._failure is not None:
            self._rank_mesh.abort(str(self._failure))
        return self._rank_mesh.context

    def wait_ready(self) -> None:
        """Wait until every rank has loaded. Raises WorkerDied, DeadlineExceeded."""
        if self.size == 1:
            return
        self._await(self._ready, "load")
        # NCCL reads its store in the folder again when it first reaches a peer; nothing else is read again.
        if self._rank_mesh is not None and self._rank_mesh.world.backend != "nccl":
            self._remove_folder()

    # Work -------------------------------------------------------------------------------------------------

    def send(self, command: Command) -> None:
        """Give every other rank a command. Does nothing once the group has failed."""
        if self._commands and self._failure is None:
            self._send(self._encoder.encode(command))

    def fail(self, error: WorkerDied) -> None:
        """End the group: every wait of every rank ends now. The first error counts."""
        with self._changed:
            if self._failure is not None or self._closing:
                return
            self._failure = error
            self._changed.notify_all()
        self._abort(str(error))
        self._on_failure(error)

    def broken(self, error: Exception) -> WorkerDied:
        """What an error on the driver means: the group's failure, which this is where there was none."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None, NEWS_TIMEOUT_S)
        self.fail(WorkerDied(f"the ranks of {self.config.name} cannot go on: {type(error).__name__}: {error}"))
        return self._failure or WorkerDied(str(error))

    # End --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the other ranks and remove what is left. Idempotent."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
            orderly = self._failure is None and len(self._ready) == self.size - 1
        if self.size == 1:
            return
        if not orderly:
            # A rank may wait for one that will never come.
            self._abort("the worker ends")
            self._kill()
        self._say_end()
        self._join_threads()
        self._kill()
        self._join_threads()
        for socket in self._commands:
            socket.close()
        if self._rank_mesh is not None:
            self._rank_mesh.close()
        if self._context is not None and not any(thread.is_alive() for thread in self._threads):
            self._context.term()
        self._remove_folder()

    # Parts ------------------------------------------------------------------------------------------------

    def _bind(self) -> None:
        assert self._context is not None
        events = self._context.socket(zmq.PULL)
        events.setsockopt(zmq.MAXMSGSIZE, MAX_COMMAND_BYTES)
        events.bind(event_address(self._where))
        for rank in range(1, self.size):
            socket = self._context.socket(zmq.PUSH)
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(command_address(self._where, rank))
            self._commands.append(socket)
        thread = threading.Thread(target=self._listen, args=(events,), name="rank-events", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _send(self, data: bytes) -> None:
        """Put a command into every rank's socket; a rank that is gone or takes nothing fails the group."""
        limit_s = self.config.collective_timeout_s
        deadline_s = awake_s() + limit_s
        with self._sending:
            for rank, socket in enumerate(self._commands, start=1):
                while self._failure is None:
                    try:
                        socket.send(data, zmq.NOBLOCK, copy=False)
                        break
                    except zmq.Again:
                        if awake_s() > deadline_s:
                            self._lose(rank, f"took no command in collective_timeout_s = {limit_s} s")
                    with self._changed:
                        self._changed.wait_for(lambda: self._failure is not None, _RETRY_S)

    def _spawn(self, body: Callable[[int], str], rank: int) -> None:
        def run() -> None:
            try:
                how = body(rank)
            except Exception as error:
                how = f"could not be started or watched: {type(error).__name__}: {error}"
            self._lose(rank, how)

        thread = threading.Thread(target=run, name=f"rank-{rank}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _keep_process(self, rank: int) -> str:
        """Start a rank and wait for its end, in one thread: the kernel ends a child with the thread that forked it."""
        name = f"{self.config.name}.{rank}"
        child = start_process(
            name=name,
            module=self._room.module,
            arguments=(str(self._folder), str(rank)),
            environment=python_environment({"OMP_NUM_THREADS": str(rank_config(self.config, rank).threads)}),
            stdout=1,
            stderr=2,
            new_session=False,
            imports=SHARED_IMPORTS,
        )
        self._children[rank] = child
        if self._closing:
            child.signal(signal.SIGKILL)
        code = child.wait()
        if code < 0:
            return f"(pid {child.pid}) was killed by {signal_name(-code)}"
        return self._last_words(rank) or f"(pid {child.pid}) exited with code {code}"

    def _keep_thread(self, rank: int) -> str:
        assert self._context is not None
        serve_rank(self._room, self._context, self._where, rank, lambda start: self._thread_groups[rank])
        return self._last_words(rank) or "ended"

    def _last_words(self, rank: int) -> str:
        """The reason that a rank gave which ended by itself; it may be on its way, as may the failure of another."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or self._closing, NEWS_TIMEOUT_S)
            return self._torn.get(rank, "")

    def _join(self) -> CollectiveGroup:
        if self._folder is None:
            return self._thread_groups[0]
        return join_world(rank_config(self.config, 0), 0, self._folder)

    def _await(self, ranks: set[int], what: str) -> None:
        with self._changed:
            wait_for(self._changed, lambda: self._failure or len(ranks) == self.size - 1, START_TIMEOUT_S)
            if self._failure is not None:
                raise self._failure
            missing = sorted(set(range(1, self.size)) - ranks)
        if missing:
            raise DeadlineExceeded(f"rank_start_timeout_s: ranks {missing} did not {what} in {START_TIMEOUT_S} s")

    def _listen(self, events: zmq.Socket[bytes]) -> None:
        limit_s = self.config.collective_timeout_s
        silence = Silence(limit_s, look_every_s=_POLL_S)
        try:
            with events:
                while not self._closing:
                    events.poll(int(_POLL_S * 1000))
                    while events.poll(0):
                        kind, data = events.recv_multipart()
                        silence.heard(self._noticed(data) if kind == NOTICE else self._told(data))
                    if (silent := silence.look()) is not None:
                        self._lose(silent, f"was silent for collective_timeout_s = {limit_s} s")
        except Exception as error:
            logger.exception("rank events")
            self.fail(WorkerDied(f"the ranks of {self.config.name} cannot be understood: {error}"))

    def _told(self, data: bytes) -> int:
        rank, event = self._room.events.decode(data)
        self._on_event(rank, event)
        return rank

    def _noticed(self, data: bytes) -> int:
        rank, notice = self._notices.decode(data)
        match notice:
            case RankFailed(message=message, torn=True):
                self._torn[rank] = f"failed: {message}"
            case RankFailed(message=message):
                self._lose(rank, f"failed: {message}")
            case RankStarted() | RankReady():
                with self._changed:
                    (self._started if isinstance(notice, RankStarted) else self._ready).add(rank)
                    self._changed.notify_all()
        return rank

    def _lose(self, rank: int, how: str) -> None:
        self.fail(WorkerDied(f"rank {rank} of {self.config.name} {how}"))

    def _abort(self, reason: str) -> None:
        if self._rank_mesh is not None:
            self._rank_mesh.abort(reason)
        for group in self._thread_groups:
            group.abort(reason)

    def _say_end(self) -> None:
        # Where the engine is stuck in a send, its ranks are gone anyway.
        if self._sending.acquire(timeout=END_TIMEOUT_S):
            for socket in self._commands:
                with contextlib.suppress(zmq.Again):
                    socket.send(END, zmq.NOBLOCK)
            self._sending.release()

    def _kill(self) -> None:
        for child in self._children.values():
            child.signal(signal.SIGKILL)

    def _join_threads(self) -> None:
        deadline_s = time.monotonic() + END_TIMEOUT_S
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))

    def _remove_folder(self) -> None:
        folder, self._folder = self._folder, None
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
