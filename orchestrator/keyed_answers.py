"""Answers to requests with an idempotency key: one generation for all calls that give the key.

    under way   a task takes the answer in, and all calls with the key read it from its beginning
    remembered  the answer is whole; later calls read it too, for `remember_s`, while there is room
    gone        it failed, was cancelled, or is forgotten: the next call with the key is a request of its own

A call that ends does not end the request: its client may have lost the connection, and come back. Once no call has read
for `grace_s` the request is cancelled.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from functools import partial

from anabranch.errors import AnabranchError, InvalidRequest, Overloaded, RequestCancelled
from orchestrator.answer import Chunk, Finished, merged
from orchestrator.generation import Generation
from orchestrator.submission import Submission

logger = logging.getLogger(__name__)

Key = tuple[str, str]
"""Tenant and idempotency key."""

# Of a part, of a token's id in it, and of an alternative of a log-probability; about.
_PART_BYTES, _TOKEN_BYTES, _ALTERNATIVE_BYTES = 256, 40, 120


class KeyedAnswers:
    """Owns one task for each answer that is under way.

    Args:
        start: begins a request's generation. Raises AnabranchError.
        max_answers: most that are kept, under way or whole; the oldest whole one makes room for a new one.
        max_bytes: most memory of all, likewise.
    """

    def __init__(
        self,
        start: Callable[[Submission], Awaitable[Generation]],
        *,
        remember_s: float,
        grace_s: float,
        max_answers: int,
        max_bytes: int,
    ) -> None:
        self._start = start
        self._remember_s = remember_s
        self._grace_s = grace_s
        self._max_answers = max_answers
        self._max_bytes = max_bytes
        self._answers: dict[Key, _Shared] = {}
        # Whole ones in the order in which they ended, with when.
        self._whole: OrderedDict[Key, float] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self.num_bytes = 0

    @property
    def num_running(self) -> int:
        return len(self._tasks)

    async def join(self, key: Key, submission: Submission) -> Generation:
        """The answer of the key, which this begins where there is none. Raises AnabranchError."""
        self._forget_old()
        shared = self._answers.get(key)
        if shared is None:
            self._make_room()
            shared = self._answers[key] = _Shared(submission, self._grace_s)
            task = asyncio.create_task(self._run(key, shared), name=f"keyed answer {key[1]}")
            shared.on_abandoned = partial(self._abandon, key, shared, task)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif shared.fingerprint != submission.fingerprint():
            raise InvalidRequest(
                "was given before with another prompt, sampling or cache_salt; give a new one", "idempotency_key"
            )
        else:
            shared.deadline.extend(submission.deadline)
        return await shared.read()

    async def close(self) -> None:
        """Cancel what is under way, and forget everything."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._answers.clear()
        self._whole.clear()
        self.num_bytes = 0

    async def _run(self, key: Key, shared: _Shared) -> None:
        try:
            await self._take_in(shared, await self._start(shared.take_submission()))
            if self._answers.get(key) is shared:
                shared.compact()
                self._whole[key] = time.monotonic()
        except AnabranchError as error:
            shared.fail(error.with_traceback(None))
        except Exception:
            logger.exception("an answer with a key failed")
            shared.fail(AnabranchError("the orchestrator failed; its log says why"))
        finally:
            # Cancelled: whoever still reads is told.
            shared.fail(RequestCancelled("all callers left"))
            if self._answers.get(key) is shared:
                self._count(shared)
                if key not in self._whole:
                    self._forget(key)

    def _abandon(self, key: Key, shared: _Shared, task: asyncio.Task[None]) -> None:
        """No call reads any more: the next one with the key begins anew."""
        if self._answers.get(key) is shared:
            self._forget(key)
        task.cancel()

    def _count(self, shared: _Shared) -> None:
        self.num_bytes += shared.num_bytes - shared.num_counted
        shared.num_counted = shared.num_bytes

    async def _take_in(self, shared: _Shared, generation: Generation) -> None:
        shared.begin(generation)
        try:
            while not shared.ended:
                shared.add(await generation.next())
                self._count(shared)
                while self.num_bytes > self._max_bytes and self._whole:
                    self._forget(next(iter(self._whole)))
                if self.num_bytes > self._max_bytes and not shared.ended:
                    raise Overloaded(
                        f"max_idempotent_bytes: answers with an idempotency key take {self.num_bytes} bytes, more than "
                        f"the {self._max_bytes} that are kept; ask without a key"
                    )
        finally:
            generation.leave(RequestCancelled("nobody reads the answer any more"))

    def _make_room(self) -> None:
        if len(self._answers) < self._max_answers:
            return
        if not self._whole:
            raise Overloaded(f"max_idempotent_answers: {len(self._answers)} requests with a key are under way")
        self._forget(next(iter(self._whole)))

    def _forget_old(self) -> None:
        now_s = time.monotonic()
        while self._whole:
            key, ended_s = next(iter(self._whole.items()))
            if now_s - ended_s <= self._remember_s:
                return
            self._forget(key)

    def _forget(self, key: Key) -> None:
        self._whole.pop(key, None)
        self.num_bytes -= self._answers.pop(key).num_counted


class _Shared:
    """One answer, which any number of calls read."""

    def __init__(self, submission: Submission, grace_s: float) -> None:
        self.fingerprint = submission.fingerprint()
        self.deadline = submission.deadline
        self._submission: Submission | None = submission
        self._grace_s = grace_s
        # Called when nobody has read for `grace_s`; set before anybody reads.
        self.on_abandoned: Callable[[], None] = lambda: None
        self.generation: Generation | None = None
        self._begun = asyncio.Event()
        self.parts: list[Chunk | Finished] = []
        self._error: AnabranchError | None = None
        self.news = asyncio.Event()
        self.num_bytes = 0
        # What the owner has counted of these.
        self.num_counted = 0
        self._num_readers = 0
        self._grace: asyncio.TimerHandle | None = None

    @property
    def ended(self) -> bool:
        return self._error is not None or (bool(self.parts) and isinstance(self.parts[-1], Finished))

    # What the task does -----------------------------------------------------------------------------------

    def take_submission(self) -> Submission:
        """The request, which is kept no longer than until it is begun."""
        submission, self._submission = self._submission, None
        assert submission is not None
        return submission

    def begin(self, generation: Generation) -> None:
        self.generation = generation
        self._begun.set()

    def add(self, part: Chunk | Finished) -> None:
        self.parts.append(part)
        self.num_bytes += _bytes_of(part)
        self._tell()

    def fail(self, error: AnabranchError) -> None:
        """End with an error, unless it has ended."""
        if not self.ended:
            self._error = error
        self._begun.set()
        self._tell()

    def compact(self) -> None:
        """Keep a whole answer in few parts; who reads already goes on with those that were there."""
        *chunks, end = self.parts
        self.parts = []
        while chunks:
            chunk, num_taken = merged([chunk for chunk in chunks if isinstance(chunk, Chunk)])
            self.parts.append(chunk)
            del chunks[:num_taken]
        self.parts.append(end)
        self.num_bytes = sum(map(_bytes_of, self.parts))

    def _tell(self) -> None:
        self.news.set()
        self.news = asyncio.Event()

    # What calls do ----------------------------------------------------------------------------------------

    async def read(self) -> Generation:
        """A reader, once the request is accepted. Raises what it was refused with."""
        self._num_readers += 1
        if self._grace is not None:
            self._grace.cancel()
        try:
            await self._begun.wait()
        except BaseException:
            self.left()
            raise
        if self.generation is None:
            assert self._error is not None
            self.left()
            raise self._error
        return _Reader(self, self.generation)

    def left(self) -> None:
        """A call reads no more."""
        self._num_readers -= 1
        if self._num_readers == 0 and not self.ended:
            self._grace = asyncio.get_running_loop().call_later(self._grace_s, self.on_abandoned)

    def check(self) -> None:
        """Raise what the answer ended with, if it did not end well."""
        if self._error is not None:
            raise self._error


class _Reader:
    """One call's way through a shared answer."""

    def __init__(self, shared: _Shared, generation: Generation) -> None:
        self._shared = shared
        self.request_id = generation.request_id
        self.num_prompt_tokens = generation.num_prompt_tokens
        self._parts = shared.parts
        self._num_read = 0
        self._left = False

    async def next(self) -> Chunk | Finished:
        while self._num_read == len(self._parts):
            self._shared.check()
            await self._shared.news.wait()
        part = self._parts[self._num_read]
        if isinstance(part, Finished):
            return part
        waiting = self._parts[self._num_read : self._num_read + 512]
        chunk, num_taken = merged([part for part in waiting if isinstance(part, Chunk)])
        self._num_read += num_taken
        return chunk

    def leave(self, reason: AnabranchError) -> None:
        if not self._left:
            self._left = True
            self._shared.left()


def _bytes_of(part: Chunk | Finished) -> int:
    if isinstance(part, Finished):
        return _PART_BYTES
    alternatives = sum(1 + len(item.top) for item in part.logprobs)
    return _PART_BYTES + _TOKEN_BYTES * len(part.token_ids) + 4 * len(part.text) + _ALTERNATIVE_BYTES * alternatives
