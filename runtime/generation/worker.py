"""A worker that generates: KV caches and first tokens in, tokens out.

    Reserve -> waiting for blocks -> leased (Reserved sent; slices arrive) -> committed -> running -> Ended
    Generate (colocated) -> prompt chunks -> running -> Ended
                                             ^     |
                                             +-- offloaded: blocks ran out, the KV waits in host memory

Steps are launched and their results taken in when they come; the ranks compute one while the next one is scheduled.

    commands -> take in each lane's oldest step -> admit, schedule, launch -> (two in flight: wait for the inbox)

A lease that hears nothing for `lease_s`, a refused slice, a cancel or a lost peer ends the attempt with Ended;
its blocks are free before Ended is sent.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque

from anabranch.cache.lease import LeaseBook
from anabranch.config.worker import WorkerConfig
from anabranch.engine.build import Engine
from anabranch.errors import AnabranchError, DeadlineExceeded, Draining
from anabranch.protocol.kv import KvDestination
from anabranch.protocol.wire_error import WireError
from anabranch.protocol.workers import (
    Cancel,
    Ended,
    Generate,
    Message,
    Preempted,
    Reserve,
    Reserved,
    Tokens,
    WorkerInfo,
    WorkerStats,
)
from anabranch.request.ffn_times import FfnTraffic
from anabranch.request.request import EndReason, Request
from anabranch.request.token import Token
from anabranch.sampling.stop import StopChecker
from anabranch.schedule.generation import GenerationScheduler, StepOutcome
from anabranch.schedule.host_offload import HostOffload
from anabranch.schedule.intake import check_request
from anabranch.schedule.preemption import PreemptionRule
from anabranch.schedule.reservations import Reservation, Reservations
from anabranch.schedule.sequence import Sequence
from anabranch.step.plan import SampledToken, StepPlan
from runtime.compute import Launched
from runtime.generation.commands import (
    CloseStream,
    GenerationCommand,
    GenerationEvent,
    LanesMeasured,
    Offload,
    OpenStream,
    Restore,
    StreamAlive,
    StreamCommitted,
    StreamFailed,
    StreamOpened,
)
from runtime.generation.ranks import GenerationRanks
from runtime.info import worker_info
from runtime.rank import RankRoom
from runtime.ranks import STEP_TIMEOUT_S
from runtime.worker import Worker, unexpected

logger = logging.getLogger(__name__)

Key = tuple[str, int]


class GenerationWorker(Worker):
    """Generates with continuous batching; as `colocated` it computes prompts too.

    Args:
        room: what its ranks run.
        num_lanes: most lanes, see `GenerationScheduler`; fewer are taken where ranks measure what they cost.
    """

    def __init__(
        self,
        config: WorkerConfig,
        room: RankRoom[GenerationCommand, GenerationEvent],
        *,
        num_lanes: int = 1,
    ) -> None:
        super().__init__(config)
        self.num_lanes = num_lanes
        self.colocated = config.role == "colocated"
        self.ranks = GenerationRanks(config, room, self._on_stream, self.fail)
        self._preempted: set[tuple[str, int, int]] = set()
        # Steps of each lane, the oldest first.
        self._in_flight: defaultdict[int, deque[Launched]] = defaultdict(deque)
        self._ffn_traffic: FfnTraffic | None = None
        # Lanes in which a step has failed, and those that were launched behind it are not over.
        self._recovering: set[int] = set()

    def build(self) -> WorkerInfo:
        self.engine: Engine = self.ranks.start()
        cache = self.engine.cache
        stop = StopChecker(max_context=self.engine.max_context)
        self.scheduler = GenerationScheduler(
            cache,
            stop,
            computes_prompts=self.colocated,
            max_running=self.config.max_running,
            max_step_tokens=self.config.max_step_tokens,
            offload=self._host_offload(),
            ahead=self.config.schedule_ahead,
            lanes=self.num_lanes,
        )
        self.leases = LeaseBook()
        self.reservations = Reservations(cache, self.leases, self.config.lease_s)
        info = worker_info(self.config, self.engine, tuple(self.ranks.addresses[0]))
        self.start_engine(self._step, self.ranks.activity)
        return info

    def handle(self, message: Message) -> None:
        arrival_s = time.monotonic()
        match message:
            case Reserve(request=request) if not self.colocated:
                self.submit(lambda: self._accept(request, arrival_s))
            case Generate(request=request) if self.colocated:
                self.submit(lambda: self._accept(request, arrival_s))
            case Cancel(request_id=request_id, epoch=epoch):
                self.submit(lambda: self._cancel((request_id, epoch)))
            case _:
                raise unexpected(message, self.config.role)

    def stats(self) -> WorkerStats:
        offload = self.scheduler.offload
        return WorkerStats(
            num_free_blocks=self.engine.cache.pool.num_free,
            num_total_blocks=self.engine.kv.num_blocks,
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.prompts.waiting) + len(self.reservations.waiting),
            num_leases=self.reservations.num_leases,
            queued_tokens=self.scheduler.prompts.queued_tokens,
            num_offloaded=0 if offload is None else len(offload),
            num_free_host_blocks=0 if offload is None else offload.pool.num_free,
            num_total_host_blocks=0 if offload is None else offload.pool.num_blocks,
            ffn_traffic=self._ffn_traffic,
        )

    def is_idle(self) -> bool:
        return not (len(self.scheduler) or len(self.reservations))

    def tick(self) -> None:
        if self.reservations.num_leases:
            self.submit(self._expire)
        if len(self.scheduler):
            self.submit(self._say_preempted)

    def close(self) -> None:
        self.stop_engine()
        self.ranks.close()

    def abandon(self, error: AnabranchError) -> None:
        for stream_id in self.reservations.streams():
            self._abort(stream_id, "failed", error)
        for sequence in tuple(self.reservations.waiting):
            self.reservations.forget_waiting(sequence.key)
            self._end(sequence.key, "failed", error)
        for key in self.scheduler.attempts():
            self.scheduler.remove(key)
            self._end(key, "failed", error)

    # On the engine's thread -----------------------------------------------------------------------------

    def _accept(self, request: Request, arrival_s: float) -> None:
        if self._is_known(request.key):
            logger.warning("request %s, epoch %d, came twice", *request.key)
            return
        try:
            if self.draining:
                raise Draining(f"{self.config.name} takes no new requests")
            check_request(request, vocab_size=self.engine.model_config.vocab_size, max_context=self.engine.max_context)
        except AnabranchError as error:
            self._end(request.key, "failed", error)
            return
        sequence = Sequence(request, arrival_s)
        if self.colocated:
            self.scheduler.add_prompt(sequence)
        else:
            self.reservations.add(sequence)

    def _step(self) -> bool:
        landed = self._take_in()
        for reservation in self.reservations.admit(self.scheduler.num_places):
            self._open_stream(reservation)
        return self._launch() or landed

    def _take_in(self) -> bool:
        """Take in the result of each lane's oldest step; False where there is none yet."""
        landed = [flights.popleft() for flights in self._in_flight.values() if flights and flights[0].done]
        for launched in landed:
            try:
                result = launched.result(STEP_TIMEOUT_S)
            except Exception as error:
                self.step_failed(launched.plan.step, error)
                self._fail_step(launched.plan, error)
            else:
                self.step_passed()
                self._ffn_traffic = result.ffn_traffic
                self._publish(self.scheduler.update(launched.plan, result))
        return bool(landed)

    def _launch(self) -> bool:
        if any(self._in_flight[lane] for lane in self._recovering):
            return False
        self._recovering.clear()
        plan, sent_away = self.scheduler.schedule()
        for sequence in sent_away:
            self._end(sequence.key, "preempted", sequence=sequence)
        if plan is None:
            return False
        launched = self.ranks.launch(plan)
        self._in_flight[plan.lane].append(launched)
        # Its end wakes the engine.
        launched.future.add_done_callback(lambda _: self.submit(_wake))
        return True

    def _host_offload(self) -> HostOffload | None:
        host = self.engine.host
        if host is None:
            return None
        rule = PreemptionRule(
            self.config.preemption, block_bytes=host.block_bytes, copy_bytes_per_s=self.ranks.copy_bytes_per_s
        )
        return HostOffload(
            num_blocks=host.num_blocks,
            rule=rule,
            copy_out=lambda pairs: self.ranks.send(Offload(pairs=pairs)),
            copy_in=lambda pairs: self.ranks.send(Restore(pairs=pairs)),
        )

    def _open_stream(self, reservation: Reservation) -> None:
        sequence, lease = reservation.sequence, reservation.lease
        self.ranks.send(
            OpenStream(
                stream_id=lease.stream_id,
                generation=lease.generation,
                block_ids=lease.table.block_ids,
                num_cached_tokens=sequence.num_cached_tokens,
                num_tokens=sequence.num_tokens,
            )
        )

    def _stream_event(self, rank: int, event: GenerationEvent) -> None:
        match self.ranks.gather(rank, event):
            case StreamOpened(stream_id=stream_id):
                self._reserved(stream_id)
            case StreamAlive(stream_id=stream_id):
                self.reservations.touch(stream_id)
            case StreamCommitted() as committed:
                self._commit(committed)
            case StreamFailed(stream_id=stream_id, error=error):
                self._abort(stream_id, "failed", error.to_error())
            case LanesMeasured(costs=costs):
                self.scheduler.deal(costs.best(len(self.scheduler.running), self.scheduler.num_lanes))

    def _reserved(self, stream_id: int) -> None:
        reservation = self.reservations.get(stream_id)
        if reservation is None:
            return
        sequence, lease = reservation.sequence, reservation.lease
        self.post(
            Reserved(
                request_id=sequence.request.request_id,
                epoch=sequence.request.epoch,
                destination=KvDestination(
                    worker=self.config.name,
                    stream_id=stream_id,
                    generation=lease.generation,
                    layout=self.engine.layout,
                    addresses=self.ranks.addresses,
                    block_ids=lease.table.block_ids,
                    num_cached_tokens=sequence.num_cached_tokens,
                    num_tokens=sequence.num_tokens,
                    lease_s=self.config.lease_s,
                ),
            )
        )

    def _commit(self, committed: StreamCommitted) -> None:
        self.ranks.send(CloseStream(stream_id=committed.stream_id))
        sequence = self.reservations.commit(committed.stream_id)
        if sequence is None:
            return
        first = SampledToken(
            request_id=sequence.request.request_id,
            epoch=sequence.request.epoch,
            index=sequence.num_output,
            token_id=committed.token_id,
            logprob=committed.logprob,
        )
        self._publish(self.scheduler.join(sequence, first))

    def _abort(self, stream_id: int, reason: EndReason, error: AnabranchError | None) -> None:
        self.ranks.send(CloseStream(stream_id=stream_id))
        sequence = self.reservations.abort(stream_id)
        if sequence is not None:
            self._end(sequence.key, reason, error)

    def _cancel(self, key: Key) -> None:
        stream_id = self.reservations.find(key)
        if stream_id is not None:
            self._abort(stream_id, "cancelled", None)
            return
        sequence = self.reservations.forget_waiting(key) or self.scheduler.remove(key)
        if sequence is not None:
            self._end(key, "cancelled", sequence=sequence)

    def _expire(self) -> None:
        for lease in self.leases.expired():
            error = DeadlineExceeded(
                f"lease_s: no KV arrived for {self.config.lease_s} s; the reservation was given up"
            )
            self._abort(lease.stream_id, "failed", error)

    def _say_preempted(self) -> None:
        """Tell of those that wait in the middle of their answer, once for each token that they wait for."""
        waits = {(*sequence.key, sequence.num_output) for sequence in self.scheduler.preempted()}
        for request_id, epoch, _ in waits - self._preempted:
            self.post(Preempted(request_id=request_id, epoch=epoch))
        self._preempted = waits

    def _publish(self, outcome: StepOutcome) -> None:
        if outcome.tokens:
            self.post(
                Tokens(
                    tokens=tuple(
                        Token(
                            request_id=token.request_id,
                            epoch=token.epoch,
                            index=token.index,
                            token_id=token.token_id,
                            logprob=token.logprob,
                        )
                        for token in outcome.tokens
                    )
                )
            )
        for sequence, reason in outcome.ended:
            self._end(sequence.key, reason, sequence=sequence)

    def _fail_step(self, plan: StepPlan, error: Exception) -> None:
        sequences = self.scheduler.withdraw(plan)
        if plan.lane in self._recovering:
            return  # it went on with what has failed; who joined it only then is not to blame, and is scheduled again
        self._recovering.add(plan.lane)
        failure = error if isinstance(error, AnabranchError) else AnabranchError(f"decode step failed: {error}")
        for sequence in sequences:
            self.scheduler.remove(sequence.key)
            self._end(sequence.key, "failed", failure)

    def _end(
        self, key: Key, reason: EndReason, error: AnabranchError | None = None, sequence: Sequence | None = None
    ) -> None:
        """Send the attempt's one terminal message; `sequence` adds what it cost."""
        measured = sequence if self.colocated else None
        self.post(
            Ended(
                request_id=key[0],
                epoch=key[1],
                reason=reason,
                error=None if error is None else WireError.of(error),
                queue_s=0.0 if measured is None else measured.queue_s,
                prefill_s=0.0 if measured is None else measured.prefill_s,
                num_cached_tokens=0 if measured is None else measured.num_cached_tokens,
                ffn=None if sequence is None else sequence.ffn,
            )
        )

    def _is_known(self, key: Key) -> bool:
        return key in self.scheduler or key in self.reservations

    # On other threads -----------------------------------------------------------------------------------

    def _on_stream(self, rank: int, event: GenerationEvent) -> None:
        self.submit(lambda: self._stream_event(rank, event))


def _wake() -> None:
    """What the engine is told when there is something to take in."""
