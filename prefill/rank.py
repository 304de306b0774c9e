"""One rank of a prefill worker: computes its part of a step and streams its part of the KV cache.

`python -m prefill.rank` is the process of a rank other than the first, which lives in the worker's own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec

from anabranch.config.worker import WorkerConfig
from anabranch.engine.build import Engine
from anabranch.engine.pending import PendingResult
from anabranch.errors import RequestCancelled
from anabranch.protocol.kv import KvStreamStats
from anabranch.protocol.wire_error import WireError
from anabranch.step.plan import StepPlan
from prefill.commands import (
    CommitStream,
    EndStream,
    Key,
    OpenStream,
    PrefillCommand,
    PrefillEvent,
    Step,
    StreamAcknowledged,
    StreamFailed,
    StreamOpened,
)
from prefill.export import KvExporter
from runtime.rank import RankRoom
from runtime.rank_process import run_rank
from transport.kv_stream import KvStreamSender, KvStreamSource
from transport.planes import configured_planes

NUM_CONNECTORS = 4
SEND_TIMEOUT_S = 30.0


class PrefillRank:
    """Runner, streams and links of one rank.

    Args:
        emit: takes news of streams; called from any thread.
    """

    def __init__(self, config: WorkerConfig, engine: Engine, emit: Callable[[PrefillEvent], None]) -> None:
        self.engine = engine
        self._emit = emit
        self._rank = engine.context.rank
        heads = engine.layout.heads_of(engine.context.tp_rank)
        self._exporter = KvExporter(engine.kv, engine.context, heads.start)
        # Guards what follows: connector threads open streams, the compute thread ends them.
        self._lock = threading.Lock()
        self._opening: set[Key] = set()
        self._senders: dict[Key, KvStreamSender] = {}
        self._source = KvStreamSource(
            planes=configured_planes(config.kv_transport, config.listen_host),
            kernels=engine.runner.kernels,
            configured=config.kv_transport,
            listen_host=config.listen_host,
            # While one rank waits for a slow destination, the others wait for it: that must end first.
            send_timeout_s=min(SEND_TIMEOUT_S, config.collective_timeout_s / 4),
        )
        self._connectors = ThreadPoolExecutor(NUM_CONNECTORS, thread_name_prefix="connect")

    def handle(self, command: PrefillCommand) -> None:
        """Obey a command; see its docstring."""
        match command:
            case OpenStream():
                # In the background: a peer that is slow to answer stops no other request.
                self._opening.add(command.key)
                self._connectors.submit(self._connect, command)
            case Step(plan=plan):
                self.step(plan)
            case CommitStream():
                self._commit(command)
            case EndStream(key=key, error=error):
                with self._lock:
                    self._opening.discard(key)
                    self._exporter.remove(key)
                    sender = self._senders.pop(key, None)
                if sender is not None:
                    sender.abort(error.to_error())

    def step(self, plan: StepPlan) -> PendingResult:
        """Compute a step; the KV of each layer is sent while the next one computes."""
        result = self.engine.runner.launch(plan, self._exporter)
        for key, error in self._exporter.take_failed():
            self._emit(StreamFailed(key=key, error=WireError.of(error)))
        return result

    def close(self) -> None:
        self._connectors.shutdown(wait=False, cancel_futures=True)
        self._source.close()

    def _commit(self, command: CommitStream) -> None:
        key = command.key
        self._exporter.remove(key)
        sender = self._senders.get(key)
        if sender is None:
            return
        done = sender.commit(
            token_id=command.token_id,
            logprob=command.logprob,
            queue_s=command.queue_s,
            prefill_s=command.prefill_s,
            num_cached_tokens=command.num_cached_tokens,
        )
        done.add_done_callback(lambda future: self._acknowledged(key, future))

    def _connect(self, command: OpenStream) -> None:
        destination = command.destination
        try:
            sender = self._source.open(destination, source_layout=self.engine.layout, source_rank=self._rank)
        except Exception as error:  # whatever it is: nobody else would tell the request
            self._emit(StreamFailed(key=command.key, error=WireError.of(error)))
            return
        with self._lock:
            wanted = command.key in self._opening
            self._opening.discard(command.key)
            if wanted:
                self._senders[command.key] = sender
                self._exporter.add(command.key, sender, destination.num_cached_tokens)
        if not wanted:
            sender.abort(RequestCancelled("the request ended before its stream was open"))
            return
        self._emit(StreamOpened(key=command.key))

    def _acknowledged(self, key: Key, future: Future[KvStreamStats]) -> None:
        error = future.exception()
        if error is None:
            self._emit(StreamAcknowledged(key=key, stats=future.result()))
        else:
            self._emit(StreamFailed(key=key, error=WireError.of(error)))


ROOM = RankRoom[PrefillCommand, PrefillEvent](
    module="prefill.rank",
    commands=msgspec.msgpack.Decoder(PrefillCommand),
    events=msgspec.msgpack.Decoder(tuple[int, PrefillEvent]),
    make_step=lambda plan: Step(plan=plan),
    make_rank=PrefillRank,
)

if __name__ == "__main__":
    run_rank(ROOM)
