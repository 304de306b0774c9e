"""The FFN worker: rows in, answers out; no requests, no plans, no KV.

    build (check the checkpoint, listen) -> Register -> Place: load experts -> Placed -> attention workers link
    -> calls are computed -> Place: load others, drop some -> ... -> Drain: ends once nobody is linked any more

What it computes are pure functions of rows: it knows no request, and whoever is lost, on either side, is no reason for
anybody else to end.
"""

from __future__ import annotations

import logging

from anabranch.config.worker import WorkerConfig
from anabranch.engine.device import resolve_device, resolve_dtype, resolve_row_exact
from anabranch.engine.fit import rank_config
from anabranch.errors import AnabranchError, ConfigError
from anabranch.kernels.native import select_kernels
from anabranch.kernels.row_exact import RowExact
from anabranch.model.expert_table import ExpertTable
from anabranch.model.load import load_expert_table
from anabranch.parallel.group import SingleRank
from anabranch.protocol.ffn import FfnLoad
from anabranch.protocol.workers import Message, Place, WorkerInfo, WorkerStats
from anabranch.system.clock import awake_s
from ffn_nodes.placing import Placing
from ffn_nodes.serving import Serving
from runtime.info import ffn_worker_info
from runtime.worker import Worker, unexpected
from transport.m2n import create_listener
from transport.m2n.base import ChannelShape

logger = logging.getLogger(__name__)

# `ffn_drain_timeout_s`: attention workers give their links up as soon as they are told where else their rows go.
DRAIN_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 5.0


class FfnWorker(Worker):
    """Holds what `Place` names, and computes for whoever links to it."""

    def __init__(self, config: WorkerConfig) -> None:
        super().__init__(config)
        self._serving: Serving | None = None
        self._placing: Placing | None = None
        self._table: ExpertTable | None = None
        self._began_s = awake_s()
        self._drain_by_s = 0.0

    def build(self) -> WorkerInfo:
        config = rank_config(self.config, 0)
        if config.tp > 1:
            raise ConfigError("tp", config.tp, "an ffn worker has one rank so far; leave it at 1, and add workers")
        device = resolve_device(config.device)
        dtype = resolve_dtype(config.dtype, device)
        kernels = select_kernels(device, dtype, config.native_kernels)
        products = RowExact(kernels) if resolve_row_exact(config.row_exact, dtype) else kernels
        model, table = load_expert_table(
            config.model, dtype=dtype, device=device, products=products, group=SingleRank()
        )
        self._table = table
        shape = ChannelShape(
            model=model.fingerprint(),
            dtype=dtype,
            hidden_size=model.hidden_size,
            max_rows=1,
            max_choices=1 if model.moe is None else model.moe.top_k,
            num_slots=1,
        )
        listener = create_listener(shape, config.ffn_transport, config.listen_host)
        self._serving = Serving(
            listener,
            table,
            num_threads=config.threads,
            merge_wait_s=config.merge_wait_us / 1e6,
            on_failure=self.fail,
        )
        self._placing = Placing(
            table,
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
        logger.info(
            "%s in %s on %s, %s kernels%s, %d threads; rows come by %s",
            config.model,
            str(dtype).removeprefix("torch."),
            device,
            kernels.name,
            " in blocks" if products is not kernels else "",
            config.threads,
            ", ".join(listener.addresses),
        )
        return ffn_worker_info(self.config, model, dtype, device, listener.addresses)

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
            self._drain_by_s = awake_s() + DRAIN_TIMEOUT_S
        super().drain()

    def is_idle(self) -> bool:
        serving = self._serving
        late = self.draining and awake_s() > self._drain_by_s
        return serving is None or not serving.num_links or late

    def tick(self) -> None:
        """Nothing here has a deadline of its own."""

    def close(self) -> None:
        if self._placing is not None and not self._placing.stop(STOP_TIMEOUT_S):
            logger.warning("an expert is still being loaded after %s s", STOP_TIMEOUT_S)
        if self._serving is not None and self._serving.num_links:
            logger.warning("ffn_drain_timeout_s: %d attention ranks are still linked", self._serving.num_links)
        if self._serving is not None and not self._serving.stop(STOP_TIMEOUT_S):
            logger.warning("a product is still being computed after %s s", STOP_TIMEOUT_S)

    def abandon(self, error: AnabranchError) -> None:
        """No request is held here."""
