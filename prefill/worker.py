"""The prefill worker: prompts in, KV caches and first tokens out.

    Prefill -> connecting -> scheduled: chunks, each layer's KV leaves as it is computed
            -> first token sampled, commit sent -> acknowledging -> PrefillEnded

A failed stream, a cancelled request or a missing acknowledgement ends the attempt with PrefillEnded(error).
Blocks are free as soon as the last chunk is computed, for what is on its way has been copied.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from anabranch.config.worker import WorkerConfig
from anabranch.engine.build import Engine
from anabranch.errors import AnabranchError, DeadlineExceeded, Draining, RequestCancelled
from anabranch.protocol.kv import KvDestination, KvStreamStats
from anabranch.protocol.wire_error import WireError
from anabranch.protocol.workers import Cancel, Message, Prefill, PrefillEnded, WorkerInfo, WorkerStats
from anabranch.request.request import Request
from anabranch.schedule.intake import check_request
from anabranch.schedule.sequence import Sequence
from anabranch.step.plan import SampledToken, StepPlan
from anabranch.system.clock import awake_s
from prefill.commands import (
    CommitStream,
    EndStream,
    OpenStream,
    PrefillEvent,
    StreamAcknowledged,
    StreamFailed,
    StreamOpened,
)
from prefill.ranks import PrefillRanks
from prefill.scheduler import PrefillScheduler
from runtime.info import worker_info
from runtime.worker import Worker, unexpected
from transport.planes import usable_planes

Key = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class Acknowledging:
    """A computed prompt whose commit is on its way to the decode worker."""

    sequence: Sequence
    deadline_s: float


class PrefillWorker(Worker):
    """Computes prompts in chunks and streams each layer's KV to the decode worker that reserved room."""

    def __init__(self, config: WorkerConfig) -> None:
        super().__init__(config)
        self._connecting: dict[Key, Sequence] = {}
        self._acknowledging: dict[Key, Acknowledging] = {}
        self.ranks = PrefillRanks(config, self._on_stream, self.fail)

    def build(self) -> WorkerInfo:
        self.engine: Engine = self.ranks.start()
        self.scheduler = PrefillScheduler(
            self.engine.cache, max_step_tokens=self.config.max_step_tokens, max_running=self.config.max_running
        )
        info = worker_info(self.config, self.engine, usable_planes(self.config.listen_host))
        self.start_engine(self._step, self.ranks.activity)
        return info

    def handle(self, message: Message) -> None:
        match message:
            case Prefill(request=request, destination=destination):
                arrival_s = time.monotonic()
                self.submit(lambda: self._accept(request, destination, arrival_s))
            case Cancel(request_id=request_id, epoch=epoch):
                error = RequestCancelled(f"request {request_id} was cancelled")
                self.submit(lambda: self._end((request_id, epoch), error))
            case _:
                raise unexpected(message, "prefill")

    def stats(self) -> WorkerStats:
        return WorkerStats(
            num_free_blocks=self.engine.cache.pool.num_free,
            num_total_blocks=self.engine.kv.num_blocks,
            num_running=len(self.scheduler.prompts.computing),
            num_waiting=len(self.scheduler.prompts.waiting) + len(self._connecting),
            num_leases=len(self._acknowledging),
            queued_tokens=self.scheduler.prompts.queued_tokens,
        )

    def is_idle(self) -> bool:
        return not (self._connecting or len(self.scheduler) or self._acknowledging)

    def tick(self) -> None:
        if self._acknowledging:
            self.submit(self._expire)

    def close(self) -> None:
        self.stop_engine()
        self.ranks.close()

    def abandon(self, error: AnabranchError) -> None:
        for key in [*self._connecting, *self._acknowledging, *self.scheduler.attempts()]:
            self._end(key, error)

    # On the engine's thread -----------------------------------------------------------------------------

    def _accept(self, request: Request, destination: KvDestination, arrival_s: float) -> None:
        try:
            if self.draining:
                raise Draining(f"{self.config.name} takes no new requests")
            check_request(request, vocab_size=self.engine.model_config.vocab_size, max_context=self.engine.max_context)
        except AnabranchError as error:
            self._report(request.key, error)
            return
        self._connecting[request.key] = Sequence(request, arrival_s)
        self.ranks.send(OpenStream(key=request.key, destination=destination))

    def _stream_event(self, rank: int, event: PrefillEvent) -> None:
        match self.ranks.gather(rank, event):
            case StreamOpened(key=key):
                sequence = self._connecting.pop(key, None)
                if sequence is not None:
                    self.scheduler.add(sequence)
            case StreamFailed(key=key, error=error):
                self._end(key, error.to_error())
            case StreamAcknowledged(key=key, stats=stats):
                self._acknowledged(key, stats)

    def _step(self) -> bool:
        plan = self.scheduler.schedule()
        if plan is None:
            return False
        try:
            result = self.ranks.step(plan)
        except Exception as error:
            self.step_failed(plan.step, error)
            self._fail_step(plan, error)
            return True
        self.step_passed()
        for sequence, token in self.scheduler.update(plan, result):
            self._commit(sequence, token)
        return True

    def _commit(self, sequence: Sequence, token: SampledToken) -> None:
        deadline_s = awake_s() + self.config.ack_timeout_s
        self._acknowledging[sequence.key] = Acknowledging(sequence=sequence, deadline_s=deadline_s)
        self.ranks.send(
            CommitStream(
                key=sequence.key,
                token_id=token.token_id,
                logprob=token.logprob,
                queue_s=sequence.queue_s,
                prefill_s=sequence.prefill_s,
                num_cached_tokens=sequence.num_cached_tokens,
            )
        )

    def _acknowledged(self, key: Key, stats: KvStreamStats) -> None:
        self._end_stream(key, RequestCancelled("the stream is over"))
        held = self._acknowledging.pop(key, None)
        if held is None:
            return
        self.post(
            PrefillEnded(
                request_id=key[0],
                epoch=key[1],
                queue_s=held.sequence.queue_s,
                prefill_s=held.sequence.prefill_s,
                num_cached_tokens=held.sequence.num_cached_tokens,
                kv=stats,
            )
        )

    def _end(self, key: Key, error: AnabranchError) -> None:
        """End an attempt wherever it is; one that has ended is left alone."""
        self._end_stream(key, error)
        connecting = self._connecting.pop(key, None)
        acknowledging = self._acknowledging.pop(key, None)
        scheduled = self.scheduler.remove(key)
        if connecting or acknowledging or scheduled:
            self._report(key, error)

    def _end_stream(self, key: Key, error: AnabranchError) -> None:
        self.ranks.send(EndStream(key=key, error=WireError.of(error)))

    def _expire(self) -> None:
        now = awake_s()
        limit_s = self.config.ack_timeout_s
        for key, held in list(self._acknowledging.items()):
            if now > held.deadline_s:
                self._end(key, DeadlineExceeded(f"ack_timeout_s: the KV stream was not acknowledged in {limit_s} s"))

    def _fail_step(self, plan: StepPlan, error: Exception) -> None:
        failure = error if isinstance(error, AnabranchError) else AnabranchError(f"prefill step failed: {error}")
        for sequence in plan.sequences:
            self._end((sequence.request_id, sequence.epoch), failure)

    def _report(self, key: Key, error: AnabranchError) -> None:
        self.post(PrefillEnded(request_id=key[0], epoch=key[1], error=WireError.of(error)))

    # On any thread --------------------------------------------------------------------------------------

    def _on_stream(self, rank: int, event: PrefillEvent) -> None:
        self.submit(lambda: self._stream_event(rank, event))
