"""One rank of a prefill worker: computes its part of a step and streams its part of the KV cache.

The worker's scheduler drives it with commands (`open`, `step`, `commit`, `abort`); news of streams comes back
as events, from any thread. A stream's life: open -> StreamOpened -> its layers leave during steps -> commit
-> StreamAcknowledged; StreamFailed may come instead at any time, once.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from anabranch.config.worker import WorkerConfig
from anabranch.engine.build import Engine
from anabranch.engine.plan import SampledToken, StepPlan, StepResult
from anabranch.engine.sequence import Sequence
from anabranch.errors import AnabranchError
from anabranch.protocol.kv import KvDestination, KvStreamStats
from prefill.export import KvExporter
from transport.kv_stream import KvStreamSender, KvStreamSource

NUM_CONNECTORS = 4

Key = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class StreamOpened:
    """The destination's ranks are connected; steps may compute the request."""

    key: Key


@dataclass(frozen=True, kw_only=True)
class StreamFailed:
    key: Key
    error: AnabranchError


@dataclass(frozen=True, kw_only=True)
class StreamAcknowledged:
    """The decode worker has committed."""

    key: Key
    stats: KvStreamStats


StreamEvent = StreamOpened | StreamFailed | StreamAcknowledged


class PrefillRank:
    """Runner, streams and links of one rank.

    Args:
        planes: tensor planes usable here.
        on_event: hears of streams; called from any thread.
    """

    def __init__(
        self,
        config: WorkerConfig,
        engine: Engine,
        planes: tuple[str, ...],
        on_event: Callable[[StreamEvent], None],
        rank: int = 0,
    ) -> None:
        self.engine = engine
        self.exporter = KvExporter(engine.kv)
        self._rank = rank
        self._on_event = on_event
        self._senders: dict[Key, KvStreamSender] = {}
        self._source = KvStreamSource(planes=planes, configured=config.kv_transport, listen_host=config.listen_host)
        self._connectors = ThreadPoolExecutor(NUM_CONNECTORS, thread_name_prefix="connect")

    def open(self, key: Key, destination: KvDestination) -> None:
        """Connect in the background: a peer that is slow to answer stops no other request."""
        self._connectors.submit(self._connect, key, destination)

    def step(self, plan: StepPlan) -> StepResult:
        """Compute a step; the KV of each layer is sent while the next one computes."""
        self.exporter.begin_step(plan)
        result = self.engine.runner.execute(plan, self.exporter)
        for key, error in self.exporter.take_failed():
            self._on_event(StreamFailed(key=key, error=error))
        return result

    def commit(self, sequence: Sequence, token: SampledToken) -> None:
        """All of the request's KV has been sent; its first token follows."""
        key = sequence.key
        sender = self._senders.get(key)
        if sender is None:
            return
        self.exporter.remove(key)
        try:
            done = sender.commit(
                token_id=token.token_id,
                logprob=token.logprob,
                queue_s=sequence.queue_s,
                prefill_s=sequence.prefill_s,
                num_cached_tokens=sequence.num_cached_tokens,
            )
        except AnabranchError as error:
            self._on_event(StreamFailed(key=key, error=error))
            return
        done.add_done_callback(lambda future: self._acknowledged(key, future))

    def abort(self, key: Key, error: AnabranchError) -> None:
        """End a stream in whatever state; one that is not known is left alone."""
        self.exporter.remove(key)
        sender = self._senders.pop(key, None)
        if sender is not None:
            sender.abort(error)

    def forget(self, key: Key) -> None:
        """Drop what is kept of an acknowledged stream."""
        self._senders.pop(key, None)

    def close(self) -> None:
        self._connectors.shutdown(wait=False, cancel_futures=True)
        self._source.close()

    def _connect(self, key: Key, destination: KvDestination) -> None:
        try:
            sender = self._source.open(destination, source_layout=self.engine.layout, source_rank=self._rank)
        except AnabranchError as error:
            self._on_event(StreamFailed(key=key, error=error))
            return
        self._senders[key] = sender
        self.exporter.add(key, sender, destination.num_cached_tokens)
        self._on_event(StreamOpened(key=key))

    def _acknowledged(self, key: Key, future: Future[KvStreamStats]) -> None:
        error = future.exception()
        if error is None:
            self._on_event(StreamAcknowledged(key=key, stats=future.result()))
        else:
            failure = error if isinstance(error, AnabranchError) else AnabranchError(str(error))
            self._on_event(StreamFailed(key=key, error=failure))
