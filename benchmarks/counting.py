"""An exchange that counts: what a benchmark compares with a formula."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from anabranch.parallel.exchange import Exchange, Handle


class CountingExchange:
    """Passes everything on to `inner` and counts.

    Attributes:
        sent_bytes: handed to `post` for sending.
        sent_bytes_to: the same by rank.
        num_messages: posts that send something.
        num_rounds: times that a post followed a wait (or nothing): steps that cannot overlap.
    """

    def __init__(self, inner: Exchange) -> None:
        self._inner = inner
        self._waited = True
        self.sent_bytes_to: Counter[int] = Counter()
        self.num_messages = 0
        self.num_rounds = 0

    @property
    def sent_bytes(self) -> int:
        return self.sent_bytes_to.total()

    @property
    def rank(self) -> int:
        return self._inner.rank

    @property
    def size(self) -> int:
        return self._inner.size

    def post(self, send: Sequence[torch.Tensor], to: int, receive: Sequence[torch.Tensor], source: int) -> Handle:
        """See `Exchange.post`."""
        if send:
            self.sent_bytes_to[to] += sum(tensor.nbytes for tensor in send)
        self.num_messages += bool(send)
        if send or receive:
            self.num_rounds += self._waited
            self._waited = False
        return _CountingHandle(self, self._inner.post(send, to, receive, source))

    def buffer_like(self, x: torch.Tensor) -> torch.Tensor:
        """See `Exchange.buffer_like`."""
        return self._inner.buffer_like(x)

    def waited(self) -> None:
        """A handle was waited for: the next post opens a round."""
        self._waited = True


class _CountingHandle:
    def __init__(self, exchange: CountingExchange, inner: Handle) -> None:
        self._exchange = exchange
        self._inner = inner

    def wait(self) -> None:
        """See `Handle.wait`."""
        self._inner.wait()
        self._exchange.waited()
