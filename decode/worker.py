"""The decode worker: generates from KV caches that prefill workers computed; as `colocated` it computes prompts too."""

from __future__ import annotations

from anabranch.config.worker import WorkerConfig
from decode.rank import ROOM
from runtime.generation.worker import GenerationWorker


class DecodeWorker(GenerationWorker):
    """A worker whose ranks hold whole layers: attention and FFN."""

    def __init__(self, config: WorkerConfig) -> None:
        super().__init__(config, ROOM)
