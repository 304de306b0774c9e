"""KV leaves as soon as it exists: after each layer's KV of a chunk is in the pool, its rows are sent.

Rows are read from the pool, so one path serves computed tokens and tokens that the prefix cache gave.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from anabranch.cache.paged_kv import PagedKv
from anabranch.engine.plan import SequencePlan, StepPlan
from anabranch.errors import AnabranchError
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


class KvExporter:
    """The open streams of a prefill rank, by attempt; a `LayerSink` for the step that is running."""

    def __init__(self, kv: PagedKv) -> None:
        self.kv = kv
        self._exports: dict[Key, Export] = {}
        self._rows: list[tuple[Export, int, torch.Tensor]] = []

    def add(self, key: Key, sender: KvStreamSender, first_token: int) -> None:
        """Send the attempt's KV from `first_token` on."""
        self._exports[key] = Export(sender, first_token)

    def remove(self, key: Key) -> None:
        """Send no more of an attempt; one that is not known is left alone."""
        self._exports.pop(key, None)

    def begin_step(self, plan: StepPlan) -> None:
        """Work out which slots each stream sends in this step: what is new, and at first what was cached."""
        self._rows = []
        for sequence in plan.sequences:
            export = self._exports.get((sequence.request_id, sequence.epoch))
            if export is not None and export.error is None and export.next_token < sequence.context_len:
                self._rows.append((export, export.next_token, self._slots(sequence, export.next_token)))
                export.next_token = sequence.context_len

    def layer_stored(self, layer: int) -> None:
        """Send this layer's rows. A stream that fails is remembered and does not stop the others."""
        k_slots, v_slots = self.kv.layer(layer).slots()
        for export, first_token, slots_T in self._rows:
            if export.error is not None:
                continue
            try:
                export.sender.send_layer(
                    layer, 0, first_token, k_slots.index_select(0, slots_T), v_slots.index_select(0, slots_T)
                )
            except AnabranchError as error:
                export.error = error

    def take_failed(self) -> list[tuple[Key, AnabranchError]]:
        """Streams that have failed, with their errors; they are forgotten here."""
        failed = [(key, export.error) for key, export in self._exports.items() if export.error is not None]
        for key, _ in failed:
            del self._exports[key]
        return failed

    def _slots(self, sequence: SequencePlan, first_token: int) -> torch.Tensor:
        size = self.kv.block_size
        table = sequence.block_ids
        slots = [table[t // size] * size + t % size for t in range(first_token, sequence.context_len)]
        return torch.tensor(slots, dtype=torch.int64, device=self.kv.data.device)
