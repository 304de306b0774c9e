"""Ring attention: exact attention of a prompt's chunk whose queries and KV are spread over CP ranks.

Pass-KV: KV shards travel. At step i a rank holds the shard of rank `r - i`; it posts that shard to `r + 1`
and the receipt of the next one from `r - 1`, attends to the shard that it holds, then waits. Each new
token's KV passes every rank, and the rank that owns it takes it into its pool on the way.

Pass-Q: queries travel the same way and KV stays. At step i a rank attends with the queries of rank `r - i`
to its own shard and posts the partial result home, with the new KV that the home rank owns. What arrived
from all ranks is merged at the end.

In both, every query meets every key that it may see exactly once, and partial results meet by their LSE.

Source: Ring Attention (Liu et al. 2023); Context Parallelism for Scalable Million-Token Inference (2024),
section 3.5. Shape suffixes: T this rank's rows, C rows of a shard, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from anabranch.attention.accumulate import Accumulator
from anabranch.attention.cp_batch import RingBatch
from anabranch.attention.segments import attend_segments
from anabranch.cache.paged_kv import LayerKv, PagedKv
from anabranch.kernels.base import Kernels
from anabranch.parallel.exchange import Exchange, Handle

Variant = Literal["pass_kv", "pass_q"]


@dataclass(frozen=True, kw_only=True)
class _Homeward:
    """A pass-Q partial result on its way to its home rank, and one's own from `helper`.

    `sent` is kept until the transfer is over. Both are `(out, lse, new K, new V)`.
    """

    handle: Handle
    helper: int
    sent: tuple[torch.Tensor, ...]
    received: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class RingAttention:
    """Attention of one forward pass on one CP rank.

    Args:
        kv: this rank's pool; every layer's new KV is in its owner's pool when `attend` returns.
        batch: this rank's share of the step.
        exchange: the CP group's.
        variant: which of the two travels; the same on every rank.
    """

    def __init__(
        self,
        kernels: Kernels,
        kv: PagedKv,
        batch: RingBatch,
        exchange: Exchange,
        variant: Variant,
    ) -> None:
        assert (exchange.rank, exchange.size) == (batch.rank, batch.geometry.cp)
        self.kernels = kernels
        self.kv = kv
        self.batch = batch
        self.geometry = batch.geometry
        self.exchange = exchange
        self.variant = variant
        self._buffers: dict[str, torch.Tensor] = {}

    def attend(
        self,
        layer: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Every rank calls it for the same layers in the same order, also a rank without rows.

        Returns:
            `(out [T, H, D] in q's dtype, lse [T, H] float32)` of this rank's rows over the whole context.

        Raises:
            PeerLost, DeadlineExceeded: see `Handle.wait`.
        """
        kv = self.kv.layer(layer)
        run = self._pass_kv if self.variant == "pass_kv" else self._pass_q
        total = run(kv, q_THD, k_TKD, v_TKD, scale, window)
        return total.out_THD.to(q_THD.dtype), total.lse_TH

    def _pass_kv(
        self,
        kv: LayerKv,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> Accumulator:
        rank, size = self.exchange.rank, self.exchange.size
        shard = self._own_shard(kv, k_TKD, v_TKD, window)
        total: Accumulator | None = None
        for step in range(size):
            source = (rank - step) % size
            travel: Handle | None = None
            incoming = shard
            if step < size - 1:
                incoming = self._shard_buffer((rank - step - 1) % size, window, k_TKD, slot=(step + 1) % 2)
                travel = self._post(shard, (rank + 1) % size, incoming, (rank - 1) % size)
            if total is None:
                total = self._attend_own(q_THD, shard, scale, window)
            else:
                segments = self.geometry.segments(rank, source, window)
                attend_segments(self.kernels, segments, q_THD, shard[0], shard[1], scale, total)
            rows, slots = self.geometry.owned(source, rank)
            if rows.numel():
                fresh = self.geometry.shard(source, window).fresh_rows_T[rows]
                self.kernels.store_kv(shard[0][fresh], shard[1][fresh], kv, slots)
            if travel is not None:
                travel.wait()
            shard = incoming
        assert total is not None
        return total

    def _pass_q(
        self,
        kv: LayerKv,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> Accumulator:
        rank, size = self.exchange.rank, self.exchange.size
        shard = self._own_shard(kv, k_TKD, v_TKD, window)
        self._store(kv, k_TKD, v_TKD)
        queries = q_THD.contiguous()
        total: Accumulator | None = None
        homeward: list[_Homeward] = []
        for step in range(size):
            home = (rank - step) % size
            travel: Handle | None = None
            incoming = queries
            if step < size - 1:
                shape = (self.geometry.num_rows((rank - step - 1) % size), *q_THD.shape[1:])
                incoming = self._buffer(f"q{step % 2}", shape, q_THD)
                travel = self._post([queries], (rank + 1) % size, [incoming], (rank - 1) % size)
            if total is None:
                total = self._attend_own(q_THD, shard, scale, window)
            else:
                part = Accumulator.like(queries)
                attend_segments(
                    self.kernels, self.geometry.segments(home, rank, window), queries, shard[0], shard[1], scale, part
                )
                homeward.append(self._send_home(step, home, part, q_THD, k_TKD, v_TKD))
            if travel is not None:
                travel.wait()
            queries = incoming
        assert total is not None
        # In the order of steps, whatever arrives first: the sum is the same in every run.
        for arrival in homeward:
            arrival.handle.wait()
            out_THD, lse_TH, k_new, v_new = arrival.received
            if out_THD.shape[0]:
                total.add(slice(0, out_THD.shape[0]), out_THD, lse_TH)
            _, slots = self.geometry.owned(arrival.helper, rank)
            if slots.numel():
                self.kernels.store_kv(k_new, v_new, kv, slots)
        return total

    def _attend_own(
        self, q_THD: torch.Tensor, shard: tuple[torch.Tensor, torch.Tensor], scale: float, window: int | None
    ) -> Accumulator:
        """This rank's rows over its own shard."""
        rank = self.exchange.rank
        if window is not None or not q_THD.shape[0]:
            total = Accumulator.like(q_THD)
            attend_segments(
                self.kernels, self.geometry.segments(rank, rank, window), q_THD, shard[0], shard[1], scale, total
            )
            return total
        blocks = LayerKv(shard[0].unsqueeze(1), shard[1].unsqueeze(1))
        out_THD, lse_TH = self.kernels.paged_attention(q_THD, blocks, self.geometry.own_batch(rank), scale, None)
        return Accumulator(out_THD.float(), lse_TH)

    def _send_home(
        self, step: int, home: int, part: Accumulator, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor
    ) -> _Homeward:
        """Post a partial result, and the new KV that `home` owns, to `home`; and the receipt of one's own."""
        rank, size = self.exchange.rank, self.exchange.size
        helper = (rank + step) % size
        rows, _ = self.geometry.owned(rank, home)
        num_owned = self.geometry.owned(helper, rank)[0].numel()
        sent = (part.out_THD.to(q_THD.dtype), part.lse_TH, k_TKD[rows], v_TKD[rows])
        received = (
            self._buffer(f"out{step}", q_THD.shape, q_THD),
            self._buffer(f"lse{step}", q_THD.shape[:2], part.lse_TH),
            self._buffer(f"k{step}", (num_owned, *k_TKD.shape[1:]), k_TKD),
            self._buffer(f"v{step}", (num_owned, *v_TKD.shape[1:]), v_TKD),
        )
        handle = self._post(sent, home, received, helper)
        return _Homeward(handle=handle, helper=helper, sent=sent, received=received)

    def _store(self, kv: LayerKv, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> None:
        """Take the new KV that this rank both computed and owns into the pool."""
        rows, slots = self.geometry.owned(self.exchange.rank, self.exchange.rank)
        if rows.numel():
            self.kernels.store_kv(k_TKD[rows], v_TKD[rows], kv, slots)

    def _own_shard(
        self, kv: LayerKv, k_TKD: torch.Tensor, v_TKD: torch.Tensor, window: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's cached tokens from its pool and its new ones, as `Shard` orders them."""
        rank = self.exchange.rank
        layout = self.geometry.shard(rank, window)
        shard = self._shard_buffer(rank, window, k_TKD, slot=0)
        for part, pool, new in zip(shard, kv.slots(), (k_TKD, v_TKD), strict=True):
            for index, share in enumerate(self.geometry.shares[rank]):
                first, count = layout.starts[index], layout.num_cached[index]
                if count:
                    slots = self.geometry.cached_slots(rank, index, window)
                    torch.index_select(pool, 0, slots, out=part[first : first + count])
                part[first + count : first + count + share.num_rows] = new[share.start : share.stop]
        return shard

    def _shard_buffer(
        self, rank: int, window: int | None, like: torch.Tensor, *, slot: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (self.geometry.shard(rank, window).num_rows, *like.shape[1:])
        return self._buffer(f"shard_k{slot}", shape, like), self._buffer(f"shard_v{slot}", shape, like)

    def _buffer(self, name: str, shape: tuple[int, ...] | torch.Size, like: torch.Tensor) -> torch.Tensor:
        """A contiguous buffer by name, kept for later layers; its first rows where it is larger."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape[0] < shape[0]:
            buffer = self._buffers[name] = self.exchange.buffer_like(like.new_empty(shape))
        return buffer[: shape[0]]

    def _post(self, send: Sequence[torch.Tensor], to: int, receive: Sequence[torch.Tensor], source: int) -> Handle:
        """Post what is not empty: both ends know the sizes, so neither waits for nothing."""
        return self.exchange.post([t for t in send if t.numel()], to, [t for t in receive if t.numel()], source)
