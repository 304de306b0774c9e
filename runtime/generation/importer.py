"""Puts arriving KV slices into the blocks that a reservation holds, on one rank."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from anabranch.cache.paged_kv import PagedKv
from anabranch.errors import AnabranchError
from anabranch.kernels.base import Kernels
from anabranch.protocol.wire_error import WireError
from runtime.generation.commands import GenerationEvent, OpenStream, StreamAlive, StreamCommitted, StreamFailed
from transport.kv_stream import Commit


class KvImport:
    """One stream's `KvSink`; its methods run on a tensor plane's thread.

    Args:
        span: tokens that one block id stands for: the block size times the CP degree.
        head_start: the rank's first KV head in the whole model.
        alive_every_s: shortest time between two StreamAlive.
    """

    def __init__(
        self,
        kv: PagedKv,
        kernels: Kernels,
        stream: OpenStream,
        *,
        span: int,
        head_start: int,
        alive_every_s: float,
        emit: Callable[[GenerationEvent], None],
    ) -> None:
        self.kv = kv
        self.kernels = kernels
        self.stream_id = stream.stream_id
        self._head_start = head_start
        self._alive_every_s = alive_every_s
        self._alive_s = 0.0
        self._emit = emit
        # The slot of every token, also of those that other CP ranks hold under the same block ids.
        token_T = torch.arange(stream.num_tokens)
        blocks = torch.tensor(stream.block_ids, dtype=torch.int64)
        self._slots_T = blocks[token_T // span] * kv.block_size + token_T % kv.block_size
        self._device = kv.data.device
        self._tokens_T: torch.Tensor | None = None
        self._slots_of = self._slots_T

    def place(self, layer: int, head_start: int, tokens_T: torch.Tensor, kv_L2TKD: torch.Tensor) -> None:
        """Copy rows into the pool. See `KvSink.place`."""
        # Consecutive slices bring the same tokens: what is the same for them is made once.
        if tokens_T is not self._tokens_T:
            self._tokens_T, self._slots_of = tokens_T, self._slots_T.index_select(0, tokens_T).to(self._device)
        first = head_start - self._head_start
        pool = self.kv.data[layer : layer + kv_L2TKD.shape[0], ..., first : first + kv_L2TKD.shape[3], :]
        self.kernels.import_kv(kv_L2TKD.to(self._device), pool, self._slots_of)

    def touch(self) -> None:
        now = time.monotonic()
        if now - self._alive_s >= self._alive_every_s:
            self._alive_s = now
            self._emit(StreamAlive(stream_id=self.stream_id))

    def committed(self, commit: Commit) -> None:
        self._emit(StreamCommitted(stream_id=self.stream_id, token_id=commit.token_id, logprob=commit.logprob))

    def failed(self, error: AnabranchError) -> None:
        self._emit(StreamFailed(stream_id=self.stream_id, error=WireError.of(error)))
