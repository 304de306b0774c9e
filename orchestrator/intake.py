"""The one way in: a `Submission` becomes a `Generation`, or is refused by name. Knows no protocol of clients.

A request's life here: terms checked -> (a key's answer joined) -> a place in the waiting room -> encoded (in another
process) -> the queue's wait held against the client's deadline -> submitted.
"""

from __future__ import annotations

import asyncio
import math
import time

from anabranch.config.orchestrator import OrchestratorConfig
from anabranch.errors import CapacityError, Draining, InvalidRequest, Overloaded
from anabranch.request.request import Request
from orchestrator.admission import (
    check_fits,
    check_ids,
    check_prompt,
    check_terms,
    checked_sampling,
    drawn_id,
    fitted,
)
from orchestrator.context_limit import ContextLimit
from orchestrator.dispatcher import Dispatcher
from orchestrator.generation import Generation, OwnGeneration
from orchestrator.keyed_answers import KeyedAnswers
from orchestrator.membership import Membership
from orchestrator.served_model import Prompt, PromptEncoder, ServedModel
from orchestrator.submission import Submission


class Intake:
    """Belongs to one event loop.

    Attributes:
        draining: nothing new is taken.
    """

    def __init__(
        self,
        config: OrchestratorConfig,
        model: ServedModel,
        encoder: PromptEncoder,
        membership: Membership,
        dispatcher: Dispatcher,
    ) -> None:
        self._config = config
        self._model = model
        self._encoder = encoder
        self._membership = membership
        self._dispatcher = dispatcher
        self._keyed = KeyedAnswers(
            self._start,
            remember_s=config.idempotency_s,
            grace_s=config.idempotency_grace_s,
            max_answers=config.max_idempotent_answers,
            max_bytes=config.max_idempotent_bytes,
        )
        self.draining = False
        self.num_encoding = 0

    async def accept(self, submission: Submission) -> Generation:
        """Take a request in. Raises AnabranchError; a CapacityError says when to try again."""
        try:
            check_terms(submission)
            if submission.idempotency_key is None:
                return await self._start(submission)
            return await self._keyed.join((submission.tenant or "", submission.idempotency_key), submission)
        except CapacityError as error:
            self.set_retry_time(error)
            raise

    async def tokenize(self, prompt: Prompt, num_bytes: int) -> tuple[int, ...]:
        """A prompt's token ids. Raises AnabranchError."""
        try:
            check_prompt(prompt, self._model, self._config.max_prompt_chars)
            place = self._dispatcher.room.enter(num_bytes)
            try:
                return await self._encode(prompt)
            finally:
                place.leave()
        except CapacityError as error:
            self.set_retry_time(error)
            raise

    def context_limit(self) -> ContextLimit:
        """How long a request may be: what living workers hold, or what the model was made for."""
        return self._membership.context_limit() or ContextLimit(num_tokens=self._model.max_context)

    def set_retry_time(self, error: CapacityError) -> None:
        """Say when to try again, where the error does not: once what waits now has been given to workers."""
        if error.retry_after_s is None:
            error.retry_after_s = self.retry_after_s()

    def retry_after_s(self) -> float:
        """Until what waits now will have been given to workers."""
        return self._dispatcher.queue.retry_after_s(self._dispatcher.queue.num_tokens)

    async def close(self) -> None:
        """End what goes on for nobody."""
        await self._keyed.close()

    def check_integrity(self) -> None:
        """Assert that nothing is left of any request; to be called when idle."""
        assert self.num_encoding == 0, f"{self.num_encoding} prompts being encoded"
        assert self._keyed.num_running == 0, f"{self._keyed.num_running} answers with a key"

    async def _start(self, submission: Submission) -> Generation:
        """Check everything that can be checked without a worker, and start the request. Raises AnabranchError."""
        accepted_at = time.monotonic()
        self._check_open()
        sampling = checked_sampling(submission, self._model)
        prompt = submission.prompt
        if prompt is not None:
            check_prompt(prompt, self._model, self._config.max_prompt_chars)
        place = self._dispatcher.room.enter(submission.num_bytes, submission.tenant or "", submission.priority)
        try:
            self._check_wait(submission)
            if prompt is None:
                check_ids(submission.prompt_ids, self._model.vocab_size, self.context_limit())
                prompt_ids = tuple(submission.prompt_ids)
            else:
                check_fits(prompt, self._model.longest_token_chars, self.context_limit())
                prompt_ids = await self._encode_in_time(prompt, submission)
                self._check_open()
                self._check_wait(submission)
            sampling = fitted(sampling, len(prompt_ids), self.context_limit())
            place.hold_tokens(len(prompt_ids))
        except BaseException:
            place.leave()
            raise
        request = Request(
            request_id=drawn_id(),
            epoch=0,
            prompt_ids=prompt_ids,
            sampling=sampling,
            cache_salt=submission.cache_salt,
        )
        lifecycle = self._dispatcher.submit(
            request,
            accepted_at,
            client_id=submission.client_id,
            place=place,
            tenant=submission.tenant or "",
            priority=submission.priority,
            deadline=submission.deadline,
        )
        return OwnGeneration(lifecycle)

    def _check_open(self) -> None:
        if self.draining:
            raise Draining("the orchestrator is shutting down and takes no new requests")
        if (missing := self._membership.missing()) is not None:
            raise missing

    def _check_wait(self, submission: Submission) -> None:
        """Refuse what would still wait in the queue at its deadline, by the measured rate."""
        remaining_s = submission.deadline.remaining_s
        if remaining_s == math.inf:
            return
        submission.deadline.check()
        wait_s = self._dispatcher.queue.wait_s(submission.tenant or "", submission.priority)
        if wait_s is not None and wait_s > remaining_s:
            error = Overloaded(
                f"deadline: by the rate at which prompts were given to workers lately, this one would wait about "
                f"{wait_s:.1f} s, and the client gave {remaining_s:.1f} s; try again later, or give more"
            )
            error.retry_after_s = self._dispatcher.queue.bounded_retry_s(wait_s - remaining_s)
            raise error

    async def _encode_in_time(self, prompt: Prompt, submission: Submission) -> tuple[int, ...]:
        remaining_s = submission.deadline.remaining_s
        try:
            async with asyncio.timeout(None if remaining_s == math.inf else remaining_s):
                return await self._encode(prompt)
        except TimeoutError:
            # This clock and the loop's may differ by a millisecond.
            raise submission.deadline.error() from None

    async def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        self.num_encoding += 1
        try:
            ids = tuple(await self._encoder.encode(prompt))
        finally:
            self.num_encoding -= 1
        if not ids:
            raise InvalidRequest("has no tokens", "prompt")
        return ids
