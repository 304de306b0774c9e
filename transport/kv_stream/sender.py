"""Sends one request's KV from one source rank to all destination ranks that need some of it."""

from __future__ import annotations

from concurrent.futures import Future

import torch

from anabranch.errors import AnabranchError
from anabranch.protocol.kv import KvStreamStats
from anabranch.protocol.requests import TokenLogprob


class KvStreamSender:
    """One stream of one source rank. Made by `KvStreamSource.open`.

    Attributes:
        transport: the plane's name.
    """

    transport: str

    def send_layer(
        self, layer: int, head_start: int, token_start: int, k_TKD: torch.Tensor, v_TKD: torch.Tensor
    ) -> None:
        """Post one layer's KV of consecutive tokens; the tensors may be reused when this returns.

        Raises the stream's error once it has failed, and DeadlineExceeded when the receiver is too slow.
        """

    def commit(
        self,
        *,
        token_id: int,
        logprob: TokenLogprob | None = None,
        queue_s: float = 0.0,
        prefill_s: float = 0.0,
        num_cached_tokens: int = 0,
    ) -> Future[KvStreamStats]:
        """Say that everything was sent; the future is done when all destination ranks have acknowledged."""
        raise NotImplementedError

    def wait_ack(self, timeout_s: float) -> KvStreamStats:
        """Wait for the commit's acknowledgement. Raises DeadlineExceeded, or the stream's error."""
        raise NotImplementedError

    def abort(self, error: AnabranchError) -> None:
        """Give up: tells the receivers, frees buffers, fails the future. Idempotent; never raises."""
