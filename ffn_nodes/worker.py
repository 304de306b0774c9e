"""The FFN worker: rows in, answers out; no requests, no plans, no KV.

    build (check the checkpoint, listen) -> Register -> Place: load experts -> Placed -> attention workers link
    -> calls are computed -> Place: load others, drop some -> ... -> Drain: ends once nobody is linked any more
    (SIGTERM -> Leaving: its experts go to others -> Drain)

What it computes are pure functions of rows: it knows no request, and whoever is lost, on either side, is no reason for
anybody else to end.
"""

from __future__ import annotations

import logging

from anabranch.config.worker import WorkerConfig
from anabranch.engine.fit import rank_config
from anabranch.errors import AnabranchError
from anabranch.model.expert_table import ExpertTable
from anabranch.model.size import shared_features, smallest_held
from anabranch.model.sources import resolve_model
from anabranch.parallel.split import check_tp
from anabranch.protocol.ffn import FfnLoad
from anabranch.protocol.workers import ExpertRows, Leaving, Message, Place, WorkerInfo, WorkerStats
from anabranch.system.clock import awake_s
from ffn_nodes.commands import AnyCommand, Loaded
from ffn_nodes.experts import NodeExperts
from ffn_nodes.placing import Placing
from ffn_nodes.rank import ROOM
from ffn_nodes.ranked_experts import RankedExperts
from ffn_nodes.serving import Serving
from ffn_nodes.table import make_table
from runtime.info import ffn_worker_info
from runtime.rank_group import RankGroup
from runtime.worker import Worker, unexpected
from transport.m2n import create_listener
from transport.m2n.base import ChannelShape

logger = logging.getLogger(__name__)

# `ffn_drain_timeout_s`: first for others to load what is held here, then, from Drain on, for attention workers to give
# their links up, which they do as soon as they are told where else their rows go.
DRAIN_TIMEOUT_S = 60.0
# Between two reports of the rows that each expert has computed.
REPORT_S = 5.0
STOP_TIMEOUT_S = 5.0


class FfnWorker(Worker):
    """Holds what `Place` names, and computes for whoever links to it."""

    def __init__(self, config: WorkerConfig) -> None:
        super().__init__(config)
        self._ranks = RankGroup[AnyCommand, Loaded](config, ROOM, self._heard, self.fail)
        self._experts: RankedExperts | None = None
        self._serving: Serving | None = None
        self._placing: Placing | None = None
        self._table: ExpertTable | None = None
        self._began_s = awake_s()
        self._drain_by_s = 0.0
        self._report_at_s = self._began_s + REPORT_S

    def build(self) -> WorkerInfo:
        config = rank_config(self.config, 0)
        source = resolve_model(config.model)
        model = source.config()
        check_tp(config.tp, config.tp, smallest_held(model, shared=config.shared_expert == "ffn"))
        context = self._ranks.start(model)
        table = make_table(config, model, context.tp)
        if config.tp > 1:
            self._experts = RankedExperts(table, self._ranks)
        self._ranks.wait_ready()
        experts = self._experts or NodeExperts(table)
        self._table = table
        model = table.config
        pooled = config.shared_expert == "ffn" and shared_features(model) > 0
        shape = ChannelShape(
            model=model.fingerprint(),
            dtype=table.dtype,
            hidden_size=model.hidden_size,
            # These two are each attention rank's own.
            max_rows=1,
            num_slots=1,
            max_choices=1 if model.moe is None else model.moe.top_k + pooled,
            shared_expert="ffn" if pooled else "attn",
        )
        listener = create_listener(shape, config.ffn_transport, config.listen_host)
        self._serving = Serving(
            listener,
            experts,
            num_threads=config.threads,
            merge_wait_s=config.merge_wait_us / 1e6,
            on_failure=self.fail,
        )
        self._placing = Placing(
            experts,
            self._serving,
            capacity_bytes=config.capacity_bytes,
            num_threads=config.threads,
            stall_s=config.step_stall_s,
            keep_s=config.ffn_timeout_s,
            post=self.post,
        )
        self._began_s = awake_s()
        self._serving.start()
        self._placing.start()
        self.watch(self._serving.activity)
        logger.info("rows come by %s", ", ".join(listener.addresses))
        return ffn_worker_info(self.config, model, table.dtype, table.device, listener.addresses)

    def handle(self, message: Message) -> None:
        match message:
            case Place() if self._placing is not None:
                self._placing.place(message)
            case _:
                raise unexpected(message, "ffn")

    def stats(self) -> WorkerStats:
        serving = self._serving
        return WorkerStats(
            num_free_blocks=0,
            num_total_blocks=0,
            num_running=0 if serving is None else serving.num_computing,
            num_waiting=0 if serving is None else serving.num_waiting,
            num_leases=0,
            queued_tokens=0,
            ffn_load=None if serving is None else self._load(serving),
        )

    def _load(self, serving: Serving) -> FfnLoad:
        assert self._table is not None
        return FfnLoad(
            num_products=serving.num_products,
            num_rows=serving.num_rows,
            busy_s=serving.busy_s,
            up_s=awake_s() - self._began_s,
            num_bytes=self._table.num_bytes,
        )

    def drain(self) -> None:
        if not self.draining:
            # It may be a signal that says so, of which the orchestrator knows nothing.
            self.post(Leaving())
        self._drain_by_s = awake_s() + DRAIN_TIMEOUT_S
        super().drain()

    def is_idle(self) -> bool:
        serving = self._serving
        late = self.draining and awake_s() > self._drain_by_s
        return serving is None or not serving.num_links or late

    def tick(self) -> None:
        """Report which experts have computed how much."""
        if self._serving is None or awake_s() < self._report_at_s:
            return
        self._report_at_s = awake_s() + REPORT_S
        rows = self._serving.take_row_counts()
        if rows is not None:
            self.post(ExpertRows(rows=rows))

    def close(self) -> None:
        if self._placing is not None and not self._placing.stop(STOP_TIMEOUT_S):
            logger.warning("an expert is still being loaded after %s s", STOP_TIMEOUT_S)
        if self._serving is not None and self._serving.num_links:
            logger.warning("ffn_drain_timeout_s: %d attention ranks are still linked", self._serving.num_links)
        stopped = self._serving is None or self._serving.stop(STOP_TIMEOUT_S)
        # Where a product waits for the other ranks, their end is what ends it.
        self._ranks.close()
        if self._serving is not None and not stopped and not self._serving.stop(STOP_TIMEOUT_S):
            logger.warning("a product is still being computed after %s s", STOP_TIMEOUT_S)

    def abandon(self, error: AnabranchError) -> None:
        """No request is held here."""

    def _heard(self, rank: int, event: Loaded) -> None:
        if self._experts is not None:
            self._experts.heard(rank, event)
