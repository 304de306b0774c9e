"""One request from acceptance to its one end, as a state machine that workers' messages drive.

    queued       waits for a route                                  queue_timeout_s
    reserving    the decode worker looks for KV blocks              reserve_timeout_s
    prefilling   the prompt is computed and its KV streams          prefill_timeout_s
    decoding     tokens come                                        token_timeout_s (from token to token)
    preempted    the worker has no KV blocks for it just now        preempted_timeout_s (until the next token)
    finishing    the answer is whole, what prefill cost is not in   report_timeout_s
    ended

A colocated worker goes from queued to prefilling. A worker that gives the request back (its blocks ran out, or
it drains) or that fails it (`orchestrator.worker_failure`; the stages' deadlines are workers' failures too) sends it to
queued again, ahead of the others, as a new epoch that goes on where the last one stopped, away from those that
failed it (`orchestrator.history`). Whatever ends an epoch, workers that still hold something of it are told to cancel.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Literal

import msgspec

from anabranch.config.orchestrator import OrchestratorConfig
from anabranch.errors import (
    AnabranchError,
    Draining,
    MalformedMessage,
    RequestCancelled,
    WorkerDied,
)
from anabranch.protocol.wire_error import WireError
from anabranch.protocol.workers import (
    Cancel,
    Ended,
    Generate,
    Preempted,
    Prefill,
    PrefillEnded,
    Reserve,
    Reserved,
    ToWorker,
)
from anabranch.request.request import Request
from anabranch.request.token import Token, TokenLogprob
from orchestrator.answer import Answer, Chunk, Finished, FinishReason
from orchestrator.attempt import Attempt
from orchestrator.history import History
from orchestrator.inbox import Assigned, FromWorker, Inbox, Lost, Overran, Said, StageLate
from orchestrator.member import Member
from orchestrator.membership import Membership
from orchestrator.request_queue import RequestQueue
from orchestrator.request_timings import RequestTimings
from orchestrator.served_model import TextStream
from orchestrator.standing import Standing
from orchestrator.waiting_room import Place
from orchestrator.worker_failure import WorkerFailure, death, is_workers_failure, lateness, misconduct, report

logger = logging.getLogger(__name__)

State = Literal["queued", "reserving", "prefilling", "decoding", "preempted", "finishing", "ended"]
Outcome = Literal["stop", "length", "again"]


class Lifecycle:
    """Drives one request; `run` is its only task, all else puts something into its `inbox`.

    Args:
        request: epoch 0; `sampling.max_tokens` is set.
        client_id: the client's name for the request; empty: it goes by the request's own id.
        standing: decides when its turn comes; its tenant is charged the answer's tokens, and nothing is ordered once
            its deadline is over.
        place: among the requests that wait for their first token; left with that token, or at the end.
        text: turns its tokens into text.
    """

    def __init__(
        self,
        request: Request,
        *,
        client_id: str,
        standing: Standing,
        place: Place,
        text: TextStream,
        queue: RequestQueue,
        membership: Membership,
        config: OrchestratorConfig,
        accepted_at: float,
    ) -> None:
        assert request.sampling.max_tokens is not None
        self.request = request
        self.client_id = client_id or request.request_id
        # For logs: what workers call it, and what the client does.
        self.name = f"{request.request_id} ({client_id})" if client_id else request.request_id
        self.state: State = "queued"
        self.answer = Answer(config.max_unread_tokens)
        self.inbox = Inbox()
        self._standing = standing
        self._place = place
        self._text = text
        # They end the answer and have no text.
        self._silent_ids = request.sampling.stop_token_ids
        self._queue = queue
        self._membership = membership
        self._config = config
        self._max_tokens = request.sampling.max_tokens
        self._output_ids: list[int] = list(request.output_ids)
        # Why workers gave the last epoch back.
        self._gave_back = ""
        self._history = History(max_recoveries=config.max_recoveries, max_given_back=config.max_retries)
        self._timings = RequestTimings(accepted_at)

    # The machine ------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Drive the request to its end; never raises."""
        try:
            self.answer.finish(await self._drive())
        except AnabranchError as error:
            logger.info("request %s ended in %s: %s", self.name, self.state, error)
            self.answer.fail(error)
        except Exception:
            logger.exception("request %s failed in %s", self.name, self.state)
            self.answer.fail(AnabranchError("the orchestrator failed; its log says why"))
        finally:
            self.state = "ended"
            self._place.leave()
            self._queue.withdraw(self.inbox)
            self._queue.pump()
            if not self.answer.ended:
                self.answer.fail(Draining("the orchestrator ends"))

    async def _drive(self) -> Finished:
        while True:
            self._enter("queued", "queue_timeout_s", self._config.queue_timeout_s)
            self._queue.put(self.request, self.inbox, self._standing, self._history)
            try:
                attempt = await self._queued()
                try:
                    outcome = await self._follow(attempt)
                    if outcome == "again":
                        self._history.given_back(attempt, self._gave_back)
                except WorkerFailure as failure:
                    outcome = self._failed(attempt, failure)
            finally:
                await self._end_attempt()
            if outcome != "again":
                return self._finished(outcome, attempt)
            self.request = msgspec.structs.replace(
                self.request, epoch=self.request.epoch + 1, output_ids=tuple(self._output_ids)
            )
            logger.info("request %s goes on as epoch %d", self.name, self.request.epoch)

    async def _end_attempt(self) -> None:
        attempt = self.inbox.attempt
        if attempt is not None:
            await self._cancel(attempt)
            attempt.close()
            self.inbox.attempt = None

    def _failed(self, attempt: Attempt, failure: WorkerFailure) -> Outcome:
        """What a worker's failure brings: another epoch, or the end where that one was too many."""
        logger.warning("request %s: a worker failed it in %s: %s", self.name, self.state, failure.error)
        self._timings.failed(time.monotonic())
        if failure.suspect is not None:
            self._membership.failed(failure.suspect, failure.error)
        # All that is missing may be the word that the answer is whole.
        if self._output_ids and self._output_ids[-1] in self._silent_ids:
            return "stop"
        if len(self._output_ids) >= self._max_tokens:
            return "length"
        self._history.failed(attempt, failure)
        return "again"

    async def _queued(self) -> Attempt:
        while True:
            event = await self.inbox.next()
            if isinstance(event, Assigned):
                return event.attempt

    async def _follow(self, attempt: Attempt) -> Outcome:
        """Give the request to its workers and follow what they say."""
        await self._give(attempt)
        finished: Outcome | None = None
        while True:
            try:
                event = await self.inbox.next()
            except StageLate as error:
                if finished is None:
                    self._standing.deadline.check()
                    raise lateness(attempt, self.state, error) from None
                logger.warning("request %s: %s", self.name, error)
                return finished
            if isinstance(event, Lost):
                if finished is None and attempt.depends_on(event.member):
                    raise death(event.member, event.error)
                if event.member is attempt.route.computes_prompt:
                    attempt.prefill_open = attempt.report_due = False
            elif isinstance(event, Overran):
                if finished is None:
                    raise misconduct(event.member, event.error)
            elif isinstance(event, Said):
                outcome = await self._said(attempt, event.member, event.message)
                if outcome == "again":
                    return outcome
                finished = finished or outcome
            if finished is not None:
                await self._cancel_decode(attempt)
                if not attempt.report_due:
                    return finished
                if self.state != "finishing":
                    self._enter("finishing", "report_timeout_s", self._config.report_timeout_s)

    async def _give(self, attempt: Attempt) -> None:
        self._standing.deadline.check()
        config = self._config
        decode = attempt.route.decode
        if attempt.route.prefill is None:
            self._enter(
                "prefilling",
                "reserve_timeout_s + prefill_timeout_s",
                config.reserve_timeout_s + config.prefill_timeout_s,
            )
            attempt.ordered_at = time.monotonic()
            await self._order(decode, Generate(request=attempt.request))
            attempt.report_due = True
        else:
            self._enter("reserving", "reserve_timeout_s", config.reserve_timeout_s)
            await self._order(decode, Reserve(request=attempt.request))
        attempt.decode_open = True

    async def _order(self, member: Member, message: ToWorker) -> None:
        try:
            await self._membership.send(member, message)
        except WorkerDied as error:
            raise death(member, error) from None

    # What workers say -------------------------------------------------------------------------------------

    async def _said(self, attempt: Attempt, member: Member, message: FromWorker) -> Outcome | None:
        """The outcome that a message brings, or None. Messages of older epochs change nothing."""
        if isinstance(message, tuple):
            return self._on_tokens(attempt, member, message)
        if message.epoch != attempt.request.epoch:
            return None
        if isinstance(message, Reserved):
            if member is attempt.route.decode:
                await self._on_reserved(attempt, message)
            return None
        if isinstance(message, Preempted):
            # Said once, however often it is heard: the deadline stays where it is.
            if member is attempt.route.decode and self.state == "decoding":
                self._enter("preempted", "preempted_timeout_s", self._config.preempted_timeout_s)
            return None
        if isinstance(message, PrefillEnded):
            return self._on_prefill_ended(attempt, message) if member is attempt.route.prefill else None
        return self._on_ended(attempt, message) if member is attempt.route.decode else None

    async def _on_reserved(self, attempt: Attempt, message: Reserved) -> None:
        prefill = attempt.route.prefill
        if prefill is None or self.state != "reserving":
            return
        self._standing.deadline.check()
        self._enter("prefilling", "prefill_timeout_s", self._config.prefill_timeout_s)
        attempt.ordered_at = time.monotonic()
        await self._order(prefill, Prefill(request=attempt.request, destination=message.destination))
        attempt.prefill_open = attempt.report_due = True

    def _on_prefill_ended(self, attempt: Attempt, message: PrefillEnded) -> Outcome | None:
        if not attempt.prefill_open:
            return None
        assert attempt.route.prefill is not None
        attempt.prefill_open = attempt.report_due = False
        if message.error is None:
            self._timings.prefilled(attempt, message)
            self._membership.served(attempt.route.prefill)
            attempt.prompt_computed()
            self._queue.pump()
        elif attempt.committed:
            logger.warning("request %s: prefill's report: %s", self.name, message.error.message)
        else:
            return self._given_back_or_raise(attempt, attempt.route.prefill, message.error)
        return None

    def _on_ended(self, attempt: Attempt, message: Ended) -> Outcome | None:
        if attempt.route.prefill is None:
            attempt.report_due = False
            if attempt.committed:
                self._timings.prefilled(attempt, message)
        if not attempt.decode_open:
            return None
        attempt.decode_open = False
        self._timings.generated(message)
        member = attempt.route.decode
        match message.reason:
            case "stop" | "length":
                if not self._output_ids:
                    said = f"worker {member.name} ended the answer ({message.reason}) without a token"
                    raise misconduct(member, MalformedMessage(said))
                self._membership.served(member)
                return message.reason
            case "preempted":
                self._gave_back = "preempted"
                return "again"
            case "failed":
                error = message.error or WireError(code="internal", message=f"worker {member.name} gave no reason")
                return self._given_back_or_raise(attempt, member, error)
            case "cancelled":
                said = f"worker {member.name} cancelled the request, which nobody asked for"
                raise misconduct(member, RequestCancelled(said))

    def _given_back_or_raise(self, attempt: Attempt, member: Member, wire_error: WireError) -> Outcome:
        """A worker that drains has changed nothing and others can take over; all else is raised."""
        error = wire_error.to_error()
        if isinstance(error, Draining):
            self._membership.mark_draining(member)
            self._gave_back = error.code
            return "again"
        if is_workers_failure(error):
            raise report(attempt, member, error)
        raise error

    def _on_tokens(self, attempt: Attempt, member: Member, tokens: Sequence[Token]) -> Outcome | None:
        if member is not attempt.route.decode or not attempt.decode_open:
            return None
        first_index = len(self._output_ids)
        texts: list[str] = []
        logprobs: list[TokenLogprob] = []
        stopped = False
        wrong: WorkerFailure | None = None
        for token in tokens:
            if token.epoch != attempt.request.epoch or token.index < len(self._output_ids) or stopped:
                continue
            if token.index > len(self._output_ids) or token.index >= self._max_tokens:
                said = f"token {token.index} where {len(self._output_ids)} of at most {self._max_tokens} was due"
                wrong = misconduct(member, MalformedMessage(f"worker {member.name} sent {said}"))
                break
            self._output_ids.append(token.token_id)
            if token.logprob is not None:
                logprobs.append(token.logprob)
            if token.token_id not in self._silent_ids:
                text, stopped = self._text.push(token.token_id)
                texts.append(text)
        if len(self._output_ids) > first_index:
            self._give_out(attempt, first_index, "".join(texts), tuple(logprobs))
        if wrong is not None:
            raise wrong
        if stopped:
            self._membership.served(member)
        return "stop" if stopped else None

    def _give_out(self, attempt: Attempt, first_index: int, text: str, logprobs: tuple[TokenLogprob, ...]) -> None:
        """Give the client the tokens from `first_index` on."""
        self._standing.account.charge(len(self._output_ids) - first_index)
        self._timings.tokens_came(time.monotonic())
        self._place.leave()
        if not attempt.committed:
            attempt.committed = True
            attempt.prompt_computed()
            self._queue.pump()
        if attempt.brought(len(self._output_ids) - first_index):
            self._membership.served(attempt.route.decode)
            self._queue.pump()
        self.answer.add(
            Chunk(
                first_index=first_index,
                token_ids=tuple(self._output_ids[first_index:]),
                text=text,
                logprobs=logprobs,
            )
        )
        self._enter("decoding", "token_timeout_s", self._config.token_timeout_s)

    # Ends -------------------------------------------------------------------------------------------------

    def _finished(self, reason: FinishReason, attempt: Attempt) -> Finished:
        self._history.ended(attempt)
        rest = self._text.finish()
        if rest:
            self.answer.add(Chunk(first_index=len(self._output_ids), token_ids=(), text=rest, logprobs=()))
        return self._timings.finished(
            reason,
            num_prompt_tokens=len(self.request.prompt_ids),
            num_output_tokens=len(self._output_ids),
            history=self._history,
            now=time.monotonic(),
        )

    async def _cancel(self, attempt: Attempt) -> None:
        """Tell the workers that still hold something of the attempt to let go of it."""
        await self._cancel_decode(attempt)
        if attempt.prefill_open and attempt.route.prefill is not None:
            attempt.prefill_open = False
            await self._send_cancel(attempt, attempt.route.prefill)

    async def _cancel_decode(self, attempt: Attempt) -> None:
        if attempt.decode_open:
            attempt.decode_open = False
            await self._send_cancel(attempt, attempt.route.decode)

    async def _send_cancel(self, attempt: Attempt, member: Member) -> None:
        cancel = Cancel(request_id=attempt.request.request_id, epoch=attempt.request.epoch)
        try:
            await self._membership.send(member, cancel)
        except AnabranchError as error:
            logger.debug("cancel of %s not sent: %s", self.name, error)

    def _enter(self, state: State, name: str, timeout_s: float) -> None:
        self.state = state
        self.inbox.allow(name, timeout_s, state)
