"""The attention node: a generation worker that holds requests and their KV, and whose FFN halves are elsewhere."""

from __future__ import annotations

from anabranch.config.worker import WorkerConfig
from anabranch.protocol.workers import FfnNodes, Message
from anabranch.schedule.lane_costs import MAX_LANES
from attn_nodes.rank import ROOM
from runtime.generation.commands import UseFfnNodes
from runtime.generation.worker import GenerationWorker


class AttnWorker(GenerationWorker):
    """A worker whose ranks hold attention halves, embedding and LM head."""

    def __init__(self, config: WorkerConfig) -> None:
        super().__init__(config, ROOM, num_lanes=config.lanes or MAX_LANES)

    def handle(self, message: Message) -> None:
        if isinstance(message, FfnNodes):
            self.submit(lambda: self.ranks.send(UseFfnNodes(placement=message.placement)))
        else:
            super().handle(message)
