"""The life of every worker process, whatever it computes.

    build (load, allocate) -> connect -> Register -> Registered -> serve: handle messages, beat -> drain -> close

Threads: the event loop's (control channel), the engine's (schedulers), the driving rank's (compute), the tensor
planes', and one that looks whether the first three hang: a piece of work that lasts longer than `step_stall_s` ends
the worker.
A room's subclass says what to build and what a message means; everything it sends goes through `post`,
which any thread may call, and leaves in the order in which it was posted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable

import msgspec

from anabranch.config.worker import WorkerConfig
from anabranch.engine.activity import Activity
from anabranch.engine.faults import Faults
from anabranch.engine.loop import EngineLoop
from anabranch.errors import AnabranchError, DeadlineExceeded, MalformedMessage, Overloaded, WorkerDied
from anabranch.protocol.wire_error import WireError
from anabranch.protocol.workers import (
    Beat,
    Drain,
    Failing,
    Message,
    Register,
    Registered,
    Shutdown,
    ToOrchestrator,
    ToWorker,
    WorkerInfo,
    WorkerStats,
)
from anabranch.system.clock import loop_clock, timeout
from anabranch.system.private_files import read_secret
from runtime.outbox import Outbox
from runtime.watchdog import Watchdog
from transport.control import ControlClient

logger = logging.getLogger(__name__)

TICK_S = 0.25
ENGINE_STOP_TIMEOUT_S = 5.0
FAREWELL_TIMEOUT_S = 2.0
# Far more than the requests that an orchestrator lets in: only an engine that hangs lets so many wait.
MAX_WAITING_COMMANDS = 16_384


class Worker(ABC):
    """One worker of any role.

    Args:
        config: read once, at the entry.
    """

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self.draining = False
        self._failed = asyncio.Event()
        self._failure: AnabranchError | None = None
        self._engine_loop: EngineLoop | None = None
        self._step_faults = Faults("a step")
        # The compute thread's and the engine's, once there are any.
        self._activities: list[Activity] = []
        self._looping = Activity("the event loop")
        self._heard_s = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._posted = asyncio.Event()
        self._outbox = Outbox[ToOrchestrator]("messages to the orchestrator", self._ring)

    # What a room supplies -------------------------------------------------------------------------------

    @abstractmethod
    def build(self) -> WorkerInfo:
        """Load the model, allocate, start threads. Blocking; called once."""

    @abstractmethod
    def handle(self, message: Message) -> None:
        """Act on a message that is about requests. Must not block."""

    @abstractmethod
    def stats(self) -> WorkerStats:
        """The load now."""

    @abstractmethod
    def is_idle(self) -> bool:
        """Whether no request is held in any stage."""

    @abstractmethod
    def tick(self) -> None:
        """Called a few times a second: expire what has a deadline."""

    @abstractmethod
    def close(self) -> None:
        """End threads, release sockets. Blocking; called once, also after a failed build."""

    @abstractmethod
    def abandon(self, error: AnabranchError) -> None:
        """End every request with `error`. On the engine's thread."""

    # The engine's thread ---------------------------------------------------------------------------------

    def start_engine(self, step: Callable[[], bool], compute: Activity) -> None:
        """Start the thread that schedules; see `EngineLoop`.

        Args:
            compute: of the thread that computes steps.
        """
        self._engine_loop = EngineLoop("engine", step, self._give_up_on_steps)
        # The engine's thread may wait for the other one.
        self.watch(compute, self._engine_loop.activity)
        self._engine_loop.start()

    def watch(self, *activities: Activity) -> None:
        """Fail where one piece of work of these threads takes too long; those that wait for others come after them."""
        self._activities = list(activities)

    def submit(self, command: Callable[[], None]) -> None:
        """Run `command` on the engine's thread, between steps; from any thread."""
        loop = self._engine_loop
        if loop is not None:
            if loop.num_waiting >= MAX_WAITING_COMMANDS:
                self.fail(WorkerDied(f"the engine has not come to {MAX_WAITING_COMMANDS} commands that wait for it"))
                return
            loop.submit(command)

    def step_passed(self) -> None:
        """A step's result has come. On the engine's thread."""
        self._step_faults.passed()

    def step_failed(self, step: int, error: Exception) -> None:
        """A step has raised; where all do, for no reason that has a name, the worker fails. On the engine's thread."""
        logger.debug("step %d: %s", step, error)
        if isinstance(error, AnabranchError):
            self._step_faults.log(error)
        elif self._step_faults.failed(error):
            self._give_up_on_steps(error)

    def _give_up_on_steps(self, error: Exception) -> None:
        self.fail(WorkerDied(f"every step fails, at last with {type(error).__name__}: {error}"))

    def stop_engine(self) -> None:
        """End the engine's thread; a build that failed has none."""
        if self._engine_loop is not None:
            self._engine_loop.stop(ENGINE_STOP_TIMEOUT_S)

    # The life --------------------------------------------------------------------------------------------

    def post(self, message: ToOrchestrator) -> None:
        """Send `message` to the orchestrator; from any thread, in order, never blocking.

        A worker whose messages pile up fails: its requests would get only a part of their answers.
        """
        try:
            self._outbox.put(message, len(msgspec.msgpack.encode(message)))
        except Overloaded as error:
            self.fail(WorkerDied(str(error)))

    def _ring(self) -> None:
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._posted.set)

    def drain(self) -> None:
        """Take no new work and end once idle. From the event loop's thread."""
        if not self.draining:
            logger.info("draining")
            self.draining = True

    def fail(self, error: AnabranchError) -> None:
        """End the worker because it cannot go on: its requests end with `error`, then `run` raises it. Any thread."""
        self._failure = self._failure or error
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._failed.set)

    async def run(self) -> None:
        """Serve until drained, shut down, or abandoned by the orchestrator.

        Raises:
            ConfigError: the secret's file cannot be used.
            AccessDenied: the orchestrator knows another secret.
            DeadlineExceeded: no answer to Register in time.
            WorkerDied: the orchestrator fell silent, or refused this worker.
        """
        self._loop = asyncio.get_running_loop()
        client: ControlClient | None = None
        # Before the model is loaded, so that a file that is not there shows at once.
        secret = read_secret("secret_file", self.config.secret_file) if self.config.secret_file else b""
        try:
            info = await self._build()
            client = ControlClient(self.config.orchestrator, ToWorker, secret=secret, name=self.config.name)
            await self._register(client, info)
            await self._serve(client)
        finally:
            await asyncio.to_thread(self.close)
            if client is not None:
                await client.close()

    async def _build(self) -> WorkerInfo:
        """`build` on a thread; a worker that is cancelled meanwhile waits for it, or it would outlive `close`."""
        building = asyncio.create_task(asyncio.to_thread(self.build))
        try:
            return await asyncio.shield(building)
        except asyncio.CancelledError:
            await asyncio.gather(building, return_exceptions=True)
            raise

    async def _register(self, client: ControlClient, info: WorkerInfo) -> None:
        await client.send(Register(worker=info))
        wait_s = self.config.orchestrator_timeout_s
        try:
            async with timeout(wait_s):
                while not isinstance(answer := await client.recv(), Registered):
                    logger.debug("before registration: dropped %s", type(answer).__name__)
        except TimeoutError:
            raise DeadlineExceeded(
                f"orchestrator_timeout_s: {self.config.orchestrator} did not answer the registration in {wait_s} s"
            ) from None
        if answer.error is not None:
            raise WorkerDied(f"refused by the orchestrator: {answer.error.message}")
        self._heard_s = loop_clock().now()
        logger.info("registered at %s on %s", self.config.orchestrator, socket.gethostname())

    async def _serve(self, client: ControlClient) -> None:
        tasks = [
            asyncio.create_task(self._receive(client), name="receive"),
            asyncio.create_task(self._send(client), name="send"),
            asyncio.create_task(self._beat(), name="beat"),
            asyncio.create_task(self._watch(), name="watch"),
            asyncio.create_task(self._give_up(), name="give up"),
        ]
        watchdog = Watchdog([*self._activities, self._looping], self.config.step_stall_s, self._stalled)
        watchdog.start()
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            watchdog.stop()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _receive(self, client: ControlClient) -> None:
        while True:
            message = await client.recv()
            self._heard_s = loop_clock().now()
            match message:
                case Shutdown():
                    logger.info("shutdown")
                    return
                case Drain():
                    self.drain()
                case Registered(error=error):
                    if error is not None:
                        # Whoever has said that it fails is taken for dead at once: the reason is what it said.
                        raise self._failure or WorkerDied(f"refused by the orchestrator: {error.message}")
                case Beat():
                    pass
                case _:
                    try:
                        self.handle(message)
                    except AnabranchError as error:
                        logger.warning("%s: %s", type(message).__name__, error)

    async def _send(self, client: ControlClient) -> None:
        while True:
            self._posted.clear()
            while (message := self._outbox.take()) is not None:
                await client.send(message)
            await self._posted.wait()

    async def _give_up(self) -> None:
        """Once the worker has failed: end its requests, get that out, and raise."""
        await self._failed.wait()
        assert self._failure is not None
        error = self._failure
        logger.error("%s", error)
        self.draining = True
        self.submit(lambda: self.abandon(error))
        with contextlib.suppress(TimeoutError):
            async with timeout(FAREWELL_TIMEOUT_S):
                while not self.is_idle():
                    await asyncio.sleep(0.01)
        # Whatever could not be ended, because its thread hangs, ends with this.
        self.post(Failing(error=WireError.of(error)))
        with contextlib.suppress(TimeoutError):
            async with timeout(FAREWELL_TIMEOUT_S):
                while self._outbox:
                    await asyncio.sleep(0.01)
        raise error

    def _stalled(self, activity: Activity, age_s: float) -> None:
        """On the watchdog's thread."""
        limit_s = self.config.step_stall_s
        reason = (
            f"step_stall_s: {activity.what} has been at one thing for {age_s:.1f} s, longer than {limit_s:g} s; "
            "where steps take so long, raise step_stall_s or lower max_step_tokens"
        )
        if activity is not self._looping:
            self.fail(WorkerDied(reason))
            return
        # There is nothing left that could end the worker in order, and the orchestrator has long missed its beats.
        logger.critical("%s", reason)
        sys.stderr.flush()
        os._exit(1)

    async def _beat(self) -> None:
        while True:
            stats = msgspec.structs.replace(
                self.stats(),
                num_done=sum(activity.num_done for activity in self._activities),
                work_age_s=max((activity.age_s for activity in self._activities), default=0.0),
            )
            self.post(Beat(stats=stats))
            await asyncio.sleep(self.config.heartbeat_s)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._looping.begin()
            self.tick()
            silence_s = loop_clock().now() - self._heard_s
            if silence_s > self.config.orchestrator_timeout_s:
                raise WorkerDied(
                    f"orchestrator_timeout_s: silence for {silence_s:.1f} s from {self.config.orchestrator}"
                )
            # One that has failed takes no new work either, but its end is no orderly one: see `_give_up`.
            if self.draining and self._failure is None and self.is_idle() and not self._outbox:
                logger.info("drained")
                return


def unexpected(message: Message, role: str) -> MalformedMessage:
    """The error for a message that a role has no use for."""
    return MalformedMessage(f"a {role} worker takes no {type(message).__name__}")
