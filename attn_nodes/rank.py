"""One rank of an attention node: a rank that generates, whose FFN halves are at the FFN nodes.

`python -m attn_nodes.rank` is the process of a rank other than the first, which lives in the worker's own.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import torch

from anabranch.config.worker import WorkerConfig
from anabranch.engine.build import Engine
from anabranch.engine.pending import PendingResult
from anabranch.errors import FfnUnavailable
from anabranch.model.identity import identity_of
from anabranch.model.shared_layers import with_shared
from anabranch.model.size import shared_features
from anabranch.schedule.lane_costs import MAX_LANES
from anabranch.step.plan import StepPlan
from attn_nodes.lane_meter import LaneMeter
from attn_nodes.lanes import Lanes
from attn_nodes.remote_ffn import RemoteFfn
from runtime.generation.commands import GenerationCommand, GenerationEvent, LanesMeasured, Step, UseFfnNodes
from runtime.generation.rank import GenerationRank, generation_room
from runtime.rank import Done
from runtime.rank_process import run_rank
from transport.m2n import create_link_maker
from transport.m2n.base import ChannelShape
from transport.m2n.messages import Combine


class AttnRank(GenerationRank):
    """Lanes and links of one rank; see `GenerationRank` and `LanedRank`."""

    def __init__(self, config: WorkerConfig, engine: Engine, emit: Callable[[GenerationEvent], None]) -> None:
        super().__init__(config, engine, emit)
        self._model = engine.model_config
        dtype = engine.kv.data.dtype
        exact = config.combine == "slots" or (config.combine == "auto" and dtype is torch.float32)
        self._ffn = RemoteFfn(
            create_link_maker(_shape(config, engine), config.ffn_transport, config.listen_host),
            combine=Combine.SLOTS if exact else Combine.SUMS,
            ffn_timeout_s=config.ffn_timeout_s,
            ffn_unavailable_s=config.ffn_unavailable_s,
        )
        world = engine.context.world
        meter: LaneMeter | None = None
        if not config.lanes and world.rank == 0:
            meter = LaneMeter(lambda costs: emit(LanesMeasured(stream_id=0, costs=costs)))
        self._lanes = Lanes(engine.runner, self._ffn, world, config.lanes or MAX_LANES, meter)

    @property
    def busy(self) -> bool:
        """See `LanedRank.busy`."""
        return self._lanes.busy

    def begin(self, plan: StepPlan, done: Done) -> None:
        """See `LanedRank.begin`."""
        self._lanes.begin(plan, done)

    def advance(self) -> None:
        """See `LanedRank.advance`."""
        self._lanes.advance()

    def handle(self, command: GenerationCommand) -> None:
        """Obey a command; see its docstring."""
        match command:
            case UseFfnNodes(placement=placement):
                model = self._model
                nodes = tuple(
                    msgspec.structs.replace(node, holding=with_shared(model, node.holding)) for node in placement.nodes
                )
                self._lanes.use(msgspec.structs.replace(placement, nodes=nodes))
            case Step(plan=plan):
                self.begin(plan, _followed)
            case _:
                super().handle(command)

    def close(self) -> None:
        self._ffn.close()
        super().close()


def _followed(result: PendingResult | Exception) -> None:
    """The end of a step on a rank that reports nothing: what all ranks know of is no fault of this one."""
    if isinstance(result, Exception) and not isinstance(result, FfnUnavailable):
        raise result


def _shape(config: WorkerConfig, engine: Engine) -> ChannelShape:
    model = engine.model_config
    pooled = config.shared_expert == "ffn" and shared_features(model) > 0
    return ChannelShape(
        model=identity_of(config.model, model).model_fingerprint,
        dtype=engine.kv.data.dtype,
        hidden_size=model.hidden_size,
        max_rows=min(config.max_running, config.max_step_tokens),
        max_choices=1 if model.moe is None else model.moe.top_k + pooled,
        shared_expert="ffn" if pooled else "attn",
        # What is out, what was sent again, and what is late and will be answered all the same.
        num_slots=2 * (config.lanes or MAX_LANES) + 2,
    )


ROOM = generation_room("attn_nodes.rank", AttnRank)

if __name__ == "__main__":
    run_rank(ROOM)
