"""KV leaves as soon as it exists: after each layer's KV of a chunk is in the pool, its rows are sent.

Rows are read from the pool, so one path serves computed tokens and tokens that the prefix cache gave, and each
CP rank sends the tokens that it stores; nothing is gathered first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from anabranch.cache.paged_kv import PagedKv
from anabranch.errors import AnabranchError
from anabranch.parallel.context import RankContext
from anabranch.parallel.placement import BlockCyclic
from anabranch.step.plan import StepPlan
from transport.kv_stream import KvStreamSender

Key = tuple[str, int]


@dataclass
class Export:
    """One stream on its way.

    Attributes:
        next_token: first token whose KV has not been sent.
        error: why it failed; no more is sent.
    """

    sender: KvStreamSender
    next_token: int
    error: AnabranchError | None = None


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What one stream sends in the running pass.

    Attributes:
        chunk: tokens that all ranks send.
        slots_T: where this rank holds its part of them, by position.
    """

    export: Export
    chunk: range
    slots_T: torch.Tensor


class KvExporter:
    """The open streams of a prefill rank, by attempt; a `LayerSink` for the pass that is running.

    Args:
        head_start: the rank's first KV head in the whole model.
    """

    def __init__(self, kv: PagedKv, context: RankContext, head_start: int) -> None:
        self.kv = kv
        self._cp_rank = context.cp_rank
        self._head_start = head_start
        self._placement = BlockCyclic(block_size=kv.block_size, cp=context.mesh.cp)
        self._exports: dict[Key, Export] = {}
        self._rows: list[Rows] = []

    def add(self, key: Key, sender: KvStreamSender, first_token: int) -> None:
        """Send the attempt's KV from `first_token` on."""
        self._exports[key] = Export(sender, first_token)

    def remove(self, key: Key) -> None:
        """Send no more of an attempt; one that is not known is left alone."""
        self._exports.pop(key, None)

    def begin_pass(self, plan: StepPlan) -> None:
        """Work out which slots each stream sends in this pass: what is new, and at first what was cached."""
        self._rows = []
        device = self.kv.data.device
        for sequence in plan.sequences:
            export = self._exports.get((sequence.request_id, sequence.epoch))
            if export is None or export.error is not None or export.next_token >= sequence.context_len:
                continue
            chunk = range(export.next_token, sequence.context_len)
            slots_T = self._placement.local_slots(chunk, self._cp_rank, sequence.block_ids, device)
            self._rows.append(Rows(export=export, chunk=chunk, slots_T=slots_T))
            export.next_token = sequence.context_len

    def layer_stored(self, layer: int) -> None:
        """Send this layer's rows. A stream that fails is remembered and does not stop the others."""
        k_slots, v_slots = self.kv.layer(layer).slots()
        for rows in self._rows:
            if rows.export.error is not None or not rows.slots_T.numel():
                continue
            k_TKD, v_TKD = (slots.index_select(0, rows.slots_T) for slots in (k_slots, v_slots))
            try:
                rows.export.sender.send_layer(layer, self._head_start, rows.chunk.start, k_TKD, v_TKD, chunk=rows.chunk)
            except AnabranchError as error:
                rows.export.error = error

    def take_failed(self) -> list[tuple[Key, AnabranchError]]:
        """Streams that have failed, with their errors; they are forgotten here."""
        # A copy: connectors' threads add streams meanwhile.
        exports = list(self._exports.items())
        failed = [(key, export.error) for key, export in exports if export.error is not None]
        for key, _ in failed:
            self.remove(key)
        return failed
