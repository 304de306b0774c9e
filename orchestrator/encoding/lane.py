"""Prompts of one kind, first come, first served, and the processes that encode them.

A job's life: queued -> taken by an encoder -> answered. A job whose caller goes away leaves the queue; one that is
being encoded already is encoded to its end, within its time limit, for nobody.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from anabranch.errors import AnabranchError, DeadlineExceeded, InvalidRequest, Overloaded
from orchestrator.awake_timer import AwakeTimer
from orchestrator.encoding.encoder import Encoder
from orchestrator.encoding.messages import ToEncoder

logger = logging.getLogger(__name__)

_START_RETRY_S = 1.0


@dataclass(frozen=True, eq=False, kw_only=True)
class _Job:
    request: ToEncoder
    num_chars: int
    answer: asyncio.Future[list[int]]


class Lane:
    """Owns one task for each encoder; `tasks` are for the owner to watch and to cancel.

    Args:
        start_encoder: starts a process of the given name.
        max_queued_chars: most characters of all prompts that wait; the first may be longer.
        queue_timeout_s: longest wait of a prompt for an encoder.

    Attributes:
        ready: set once the first encoder runs.
    """

    def __init__(
        self,
        name: str,
        num_encoders: int,
        start_encoder: Callable[[str], Awaitable[Encoder]],
        *,
        max_queued_chars: int,
        queue_timeout_s: float,
    ) -> None:
        self.name = name
        self._num_encoders = num_encoders
        self._start_encoder = start_encoder
        self._max_queued_chars = max_queued_chars
        self._queue_timeout_s = queue_timeout_s
        self._queue: deque[_Job] = deque()
        self._num_queued_chars = 0
        self._news = asyncio.Event()
        self.ready = asyncio.Event()
        self.tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self.tasks = [
            asyncio.create_task(self._serve(), name=f"encode {self.name} {number}")
            for number in range(self._num_encoders)
        ]

    async def encode(self, request: ToEncoder, num_chars: int) -> list[int]:
        """Token ids of a prompt. Raises Overloaded, and see `Encoder.encode`."""
        if self._queue and self._num_queued_chars + num_chars > self._max_queued_chars:
            raise Overloaded(
                f"prompts of {self._num_queued_chars} characters wait to be tokenised already; try again later"
            )
        answer: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        job = _Job(request=request, num_chars=num_chars, answer=answer)
        expiry = AwakeTimer(self._queue_timeout_s, partial(self._expire, job))
        self._queue.append(job)
        self._num_queued_chars += num_chars
        self._news.set()
        try:
            return await answer
        finally:
            expiry.cancel()
            self._withdraw(job)

    def fail_all(self, error: AnabranchError) -> None:
        """End every prompt that waits."""
        for job in self._queue:
            if not job.answer.done():
                job.answer.set_exception(error)

    def _expire(self, job: _Job) -> None:
        if job in self._queue and not job.answer.done():
            job.answer.set_exception(
                DeadlineExceeded(
                    f"queue_timeout_s: no process was free to tokenise the prompt within {self._queue_timeout_s:g} s"
                )
            )

    def _withdraw(self, job: _Job) -> None:
        if job in self._queue:
            self._queue.remove(job)
            self._num_queued_chars -= job.num_chars

    def _pop(self) -> _Job | None:
        """The oldest prompt that somebody still waits for."""
        while self._queue:
            job = self._queue[0]
            self._withdraw(job)
            if not job.answer.done():
                return job
        return None

    async def _serve(self) -> None:
        """Give prompts to one encoder after another, for ever."""
        while True:
            try:
                encoder = await self._start_encoder(f"encode-{self.name}")
            except AnabranchError as error:
                logger.error("a process that encodes %s cannot be started: %s", self.name, error)
                await asyncio.sleep(_START_RETRY_S)
                continue
            self.ready.set()
            try:
                while encoder.alive:
                    if (job := self._pop()) is not None:
                        await self._run(job, encoder)
                        continue
                    self._news.clear()
                    await self._news.wait()
                await encoder.end()
            finally:
                encoder.disconnect()

    async def _run(self, job: _Job, encoder: Encoder) -> None:
        try:
            ids = await encoder.encode(job.request)
        except Exception as error:
            if not isinstance(error, InvalidRequest):
                logger.warning("a prompt of %d characters is not encoded: %s", job.num_chars, error)
            if not job.answer.done():
                job.answer.set_exception(error)
        except BaseException:
            job.answer.cancel()
            raise
        else:
            if not job.answer.done():
                job.answer.set_result(ids)
