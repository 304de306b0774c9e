"""One request's answer on its way to the client: tokens in order, then one end."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from anabranch.errors import AnabranchError, Overloaded
from anabranch.request.ffn_times import FfnTimes
from anabranch.request.token import TokenLogprob

MAX_CHUNK_TOKENS = 512

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Tokens with consecutive indexes, and the text that became certain with them."""

    first_index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds; `queue_s` from acceptance to prefill's first chunk, `ttft_s` and `e2e_s` from acceptance.

    `recovery_s` is from each failure of a worker to the next token, all together.
    """

    queue_s: float
    prefill_s: float
    kv_stream_s: float
    ttft_s: float
    tpot_s: float
    e2e_s: float
    recovery_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KvTransfer:
    """What the KV streams of all attempts moved; `overlap` is the share of their time that prefill hid."""

    num_bytes: int
    transport: str
    overlap: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteTaken:
    """The workers of one epoch.

    Attributes:
        num_tokens: that it brought.
        left: the code of what ended it before the answer was whole; empty: the answer ended with it.
    """

    workers: tuple[str, ...]
    num_tokens: int
    left: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A complete answer.

    Attributes:
        route: the last of `routes`, which has one for each epoch.
        kv: None where no stream was reported.
        ffn: None where no attention worker said its costs.
        num_recoveries: epochs that workers failed.
    """

    finish_reason: FinishReason
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    timings: Timings
    route: tuple[str, ...]
    kv: KvTransfer | None
    ffn: FfnTimes | None = None
    num_recoveries: int = 0
    routes: tuple[RouteTaken, ...] = ()


class Answer:
    """A bounded queue between the worker's pace and the client's; what waits together leaves together.

    Args:
        max_unread_tokens: most tokens kept for a client that does not read.
    """

    def __init__(self, max_unread_tokens: int) -> None:
        self._max_unread_tokens = max_unread_tokens
        self._unread: deque[Chunk] = deque()
        self._num_unread_tokens = 0
        self._end: Finished | AnabranchError | None = None
        self._news = asyncio.Event()

    @property
    def ended(self) -> bool:
        return self._end is not None

    def add(self, chunk: Chunk) -> None:
        """Append tokens. Raises Overloaded when the client has left too many unread."""
        assert self._end is None, "tokens after the end"
        self._num_unread_tokens += len(chunk.token_ids)
        if self._num_unread_tokens > self._max_unread_tokens:
            raise Overloaded(
                f"max_unread_tokens: the client has left {self._num_unread_tokens} tokens unread, "
                f"more than the {self._max_unread_tokens} that are kept"
            )
        self._unread.append(chunk)
        self._news.set()

    def finish(self, end: Finished) -> None:
        """End well. Exactly one of `finish` and `fail` is called, once."""
        self._close(end)

    def fail(self, error: AnabranchError) -> None:
        """End with an error, which `next` raises once the tokens before it are read."""
        self._close(error)

    def _close(self, end: Finished | AnabranchError) -> None:
        assert self._end is None, "a request ends once"
        self._end = end
        self._news.set()

    async def next(self) -> Chunk | Finished:
        """What the client is told next; the last is Finished. Raises the error that the request ended with."""
        while not self._unread:
            if self._end is not None:
                if isinstance(self._end, AnabranchError):
                    raise self._end
                return self._end
            self._news.clear()
            await self._news.wait()
        return self._take()

    def _take(self) -> Chunk:
        """The oldest chunks as one, up to MAX_CHUNK_TOKENS."""
        chunk, num_taken = merged(self._unread)
        for _ in range(num_taken):
            self._unread.popleft()
        self._num_unread_tokens -= len(chunk.token_ids)
        return chunk


def merged(chunks: Iterable[Chunk]) -> tuple[Chunk, int]:
    """The first chunks as one of up to MAX_CHUNK_TOKENS, and how many they were; at least one, however long."""
    taken: list[Chunk] = []
    num_tokens = 0
    for chunk in chunks:
        num_tokens += len(chunk.token_ids)
        if taken and num_tokens > MAX_CHUNK_TOKENS:
            break
        taken.append(chunk)
    if len(taken) == 1:
        return taken[0], 1
    one = Chunk(
        first_index=taken[0].first_index,
        token_ids=tuple(token_id for chunk in taken for token_id in chunk.token_ids),
        text="".join(chunk.text for chunk in taken),
        logprobs=tuple(logprob for chunk in taken for logprob in chunk.logprobs),
    )
    return one, len(taken)
