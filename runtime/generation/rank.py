"""One rank of a worker that generates: receives its part of KV caches, keeps it, and computes its part of each step."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from anabranch.config.worker import WorkerConfig
from anabranch.engine.build import Engine
from anabranch.engine.pending import PendingResult
from anabranch.errors import AnabranchError
from anabranch.step.plan import StepPlan
from runtime.generation.commands import (
    CloseStream,
    GenerationCommand,
    GenerationEvent,
    Offload,
    OpenStream,
    RankListens,
    Restore,
    Step,
    StreamOpened,
    UseFfnNodes,
)
from runtime.generation.importer import KvImport
from runtime.rank import RankRoom
from transport.kv_stream import KvStreamReceiver
from transport.planes import Plane, configured_planes, create_plane


class GenerationRank:
    """Runner, planes and receiver of one rank.

    Args:
        emit: takes news of streams; called from any thread.
    """

    def __init__(self, config: WorkerConfig, engine: Engine, emit: Callable[[GenerationEvent], None]) -> None:
        self.engine = engine
        self._emit = emit
        self._lease_s = config.lease_s
        self._receiver = KvStreamReceiver()
        self._planes: dict[str, Plane] = {}
        if config.role != "colocated":
            for name in configured_planes(config.kv_transport, config.listen_host):
                self._planes[name] = create_plane(name, self._receiver, listen_host=config.listen_host)
        addresses = {name: plane.address for name, plane in self._planes.items()}
        copy_bytes_per_s = 0.0 if engine.host is None else engine.host.measure()
        emit(RankListens(stream_id=0, addresses=addresses, copy_bytes_per_s=copy_bytes_per_s))

    def handle(self, command: GenerationCommand) -> None:
        """Obey a command; see its docstring."""
        match command:
            case OpenStream():
                self._open(command)
            case CloseStream(stream_id=stream_id):
                self._receiver.close(stream_id)
            case Step(plan=plan):
                self.step(plan)
            case Offload(pairs=pairs):
                assert self.engine.host is not None
                self.engine.host.store(pairs)
            case Restore(pairs=pairs):
                assert self.engine.host is not None
                self.engine.host.load(pairs)
            case UseFfnNodes():
                raise AnabranchError("rows stay here: this rank holds whole layers")

    def step(self, plan: StepPlan) -> PendingResult:
        """Compute a step; see `Rank.step`."""
        return self.engine.runner.launch(plan)

    def close(self) -> None:
        for plane in self._planes.values():
            plane.close()

    def _open(self, command: OpenStream) -> None:
        engine = self.engine
        sink = KvImport(
            engine.kv,
            engine.runner.kernels,
            command,
            span=engine.kv.block_size * engine.context.mesh.cp,
            head_start=engine.layout.heads_of(engine.context.tp_rank).start,
            alive_every_s=self._lease_s / 20,
            emit=self._emit,
        )
        self._receiver.open(
            command.stream_id,
            command.generation,
            layout=engine.layout,
            rank=engine.context.rank,
            num_cached_tokens=command.num_cached_tokens,
            num_tokens=command.num_tokens,
            sink=sink,
        )
        self._emit(StreamOpened(stream_id=command.stream_id))


def generation_room(
    module: str, make_rank: Callable[[WorkerConfig, Engine, Callable[[GenerationEvent], None]], GenerationRank]
) -> RankRoom[GenerationCommand, GenerationEvent]:
    """What the ranks of a room that generates have in common; `python -m MODULE` is the process of one of them."""
    return RankRoom[GenerationCommand, GenerationEvent](
        module=module,
        commands=msgspec.msgpack.Decoder(GenerationCommand),
        events=msgspec.msgpack.Decoder(tuple[int, GenerationEvent]),
        make_step=lambda plan: Step(plan=plan),
        make_rank=make_rank,
    )
