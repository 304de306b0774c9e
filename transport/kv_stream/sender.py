"""Sends one request's KV from one source rank to all destination ranks that need some of it."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError

import torch

from anabranch.errors import AnabranchError, DeadlineExceeded, PeerLost
from anabranch.kernels.base import Kernels
from anabranch.parallel.layout import KvLayout
from anabranch.parallel.reshard import plan_reshard, tokens_of
from anabranch.protocol.kv import KvDestination, KvStreamStats
from anabranch.protocol.wire_error import WireError
from anabranch.request.token import TokenLogprob
from anabranch.system.clock import awake_s, result_of
from transport.kv_stream.checksum import checksum
from transport.kv_stream.incoming import DTYPES
from transport.kv_stream.messages import Abort, Ack, Commit, Slice, encode
from transport.kv_stream.packer import (
    COALESCE_SHARE,
    MAX_COALESCE_BYTES,
    MIN_COALESCE_BYTES,
    Cut,
    PackedSlice,
    Packer,
    RowMap,
)
from transport.kv_stream.staging import Staging, StagingPool
from transport.planes.base import Link

# Heads by their number in the whole model, and what is sent of their rows.
Piece = tuple[range, list[Cut]]


class _Target:
    """One destination rank, as this source rank sees it."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.packer: Packer
        self.num_slices = 0
        self.payload_bytes = 0
        self.acknowledged = False


class KvStreamSender:
    """One stream of one source rank. Made by `KvStreamSource.open`; `send_layer` and `commit` from one thread.

    Args:
        links: one for each destination rank.
        forget: called once, when the stream has ended.

    Attributes:
        transport: the plane's name.
    """

    def __init__(
        self,
        links: Sequence[Link],
        destination: KvDestination,
        *,
        source_layout: KvLayout,
        source_rank: int,
        transport: str,
        kernels: Kernels,
        pool: StagingPool,
        max_in_flight_bytes: int,
        send_timeout_s: float,
        forget: Callable[[KvStreamSender], None],
    ) -> None:
        self.destination = destination
        self.transport = transport
        self._source_layout = source_layout
        self._source_rank = source_rank
        self._dtype = DTYPES[destination.layout.dtype]
        self._pool = pool
        self._max_in_flight_bytes = max_in_flight_bytes
        self._send_timeout_s = send_timeout_s
        self._forget = forget
        # Held while packing, so that whoever ends the stream can take back what is packed and not sent.
        self._packing = threading.RLock()
        self._changed = threading.Condition()
        self._in_flight_bytes = 0
        self._error: AnabranchError | None = None
        self._ended = False
        self._done: Future[KvStreamStats] = Future()
        self._first_slice_s = 0.0
        self._commit_s = 0.0
        self._plan_key: tuple[range, range | None, range] | None = None
        self._plan: list[list[Piece]] = []
        self._targets = [_Target(link) for link in links]
        for target in self._targets:
            send = functools.partial(self._post, target)
            target.packer = Packer(kernels, self._take, self._give, send, self._coalesce_bytes)

    @property
    def links(self) -> list[Link]:
        return [target.link for target in self._targets]

    @property
    def error(self) -> AnabranchError | None:
        """Why the stream failed; None while it goes on and when it committed."""
        return self._error

    def send_layer(
        self,
        layer: int,
        head_start: int,
        token_start: int,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        *,
        chunk: range | None = None,
    ) -> None:
        """Post one layer's KV; the tensors may be reused when this returns.

        Args:
            head_start: number of the tensors' first head in the whole model.
            token_start: position of the tensors' first row.
            chunk: on one of several CP ranks, the run of tokens that all ranks send now. The tensors' rows are
                those of them that this rank holds, by position; None: the rows are consecutive tokens.

        Raises:
            AnabranchError: the stream's error, once it has failed.
            DeadlineExceeded: the receiver is too slow.
        """
        self._check()
        assert k_TKD.dtype == v_TKD.dtype == self._dtype, f"{k_TKD.dtype} in a stream of {self._dtype}"
        assert k_TKD.shape == v_TKD.shape, "K and V differ in shape"
        num_rows, num_heads = k_TKD.shape[:2]
        heads = range(head_start, head_start + num_heads)
        try:
            with self._packing:
                plan = self._pieces(range(token_start, token_start + num_rows), chunk, heads)
                for target, pieces in zip(self._targets, plan, strict=True):
                    for wanted, cuts in pieces:
                        span = slice(wanted.start - head_start, wanted.stop - head_start)
                        target.packer.add(layer, wanted.start, k_TKD, v_TKD, span, cuts)
        except AnabranchError as error:
            self._end(error, tell=True)
            raise

    def commit(
        self,
        *,
        token_id: int,
        logprob: TokenLogprob | None = None,
        queue_s: float = 0.0,
        prefill_s: float = 0.0,
        num_cached_tokens: int = 0,
    ) -> Future[KvStreamStats]:
        """Say that everything was sent; the future is done when all destination ranks have acknowledged.

        Never raises: a stream that has failed gives a future that has failed.
        """
        self._commit_s = time.monotonic()
        try:
            self._check()
            for target in self._targets:
                with self._packing:
                    target.packer.flush()
                commit = Commit(
                    stream_id=self.destination.stream_id,
                    generation=self.destination.generation,
                    source_rank=self._source_rank,
                    num_sources=self._source_layout.num_ranks,
                    num_slices=target.num_slices,
                    payload_bytes=target.payload_bytes,
                    token_id=token_id,
                    logprob=logprob,
                    queue_s=queue_s,
                    prefill_s=prefill_s,
                    num_cached_tokens=num_cached_tokens,
                )
                target.link.send(encode(commit)).add_done_callback(self._sent_header)
        except AnabranchError as error:
            self._end(error, tell=True)
        return self._done

    def wait_ack(self, timeout_s: float) -> KvStreamStats:
        """Wait for the commit's acknowledgement. Raises DeadlineExceeded, or the stream's error."""
        try:
            return result_of(self._done, timeout_s)
        except TimeoutError:
            raise DeadlineExceeded(
                f"acknowledgement of KV stream {self.destination.stream_id}: {timeout_s} s"
            ) from None

    def abort(self, error: AnabranchError) -> None:
        """Give up: tells the receivers, frees buffers, fails the future. Idempotent; never raises."""
        self._end(error, tell=True)

    # What the source calls, on the plane's progress thread ----------------------------------------------

    def acknowledged(self, link: Link, ack: Ack) -> None:
        """A destination rank says how the stream ended there."""
        self._knows(link)
        if ack.error is not None:
            self._end(ack.error.to_error(), tell=True)
        elif all(target.acknowledged for target in self._targets):
            self._end(None, tell=False)

    def lost(self, link: Link, error: Exception) -> None:
        """A link is gone."""
        self._knows(link)
        self._end(PeerLost(f"the receiver of the KV stream is gone: {error}"), tell=True)

    def _knows(self, link: Link) -> None:
        for target in self._targets:
            target.acknowledged = target.acknowledged or target.link is link

    # Slices ---------------------------------------------------------------------------------------------

    def _pieces(self, rows: range, chunk: range | None, heads: range) -> list[list[Piece]]:
        """For each destination rank, the heads of `heads` and the rows that this rank has to send it.

        `rows`: as many consecutive tokens as there are rows, which they are unless there is a `chunk`.
        """
        key = (rows, chunk, heads)
        if key == self._plan_key:  # the same for every layer
            return self._plan
        if chunk is None:
            chunk, held = rows, [rows]
        else:
            held = tokens_of(self._source_layout, self._source_rank // self._source_layout.tp, chunk)
        assert len(rows) == sum(map(len, held)), "rows and tokens differ in number"
        tokens = range(held[0].start, held[-1].stop) if held else range(0)
        row_map = RowMap(held)
        layout = self.destination.layout
        plan: list[list[Piece]] = []
        for asked in self._asked(tokens, chunk):
            pieces: list[Piece] = []
            for wanted, runs in asked:
                sent = range(max(wanted.start, heads.start), min(wanted.stop, heads.stop))
                if sent:
                    row_bytes = 2 * len(sent) * layout.head_dim * layout.element_bytes
                    pieces.append((sent, row_map.cuts(runs, row_bytes)))
            plan.append(pieces)
        self._plan_key, self._plan = key, plan
        return plan

    def _asked(self, tokens: range, chunk: range) -> list[list[tuple[range, list[tuple[int, int]]]]]:
        """For each destination rank, the heads and runs of `tokens` that are this rank's to send."""
        to = self.destination
        wanted = range(to.num_cached_tokens, to.num_tokens)
        asked: list[list[tuple[range, list[tuple[int, int]]]]] = [[] for _ in self._targets]
        if self._source_layout.num_ranks == 1 == to.layout.num_ranks:
            start, stop = max(tokens.start, wanted.start), min(tokens.stop, wanted.stop)
            if start < stop:
                asked[0].append((range(to.layout.num_kv_heads), [(start, stop - start)]))
            return asked
        for copy in plan_reshard(self._source_layout, to.layout, chunk, wanted=wanted, source_rank=self._source_rank):
            start, stop = max(tokens.start, copy.tokens.start), min(tokens.stop, copy.tokens.stop)
            if start >= stop:
                continue
            pieces = asked[copy.destination]
            if pieces and pieces[-1][0] == copy.heads:
                pieces[-1][1].append((start, stop - start))
            else:
                pieces.append((copy.heads, [(start, stop - start)]))
        return asked

    def _coalesce_bytes(self) -> int:
        """Up to what size layers share a slice that is begun now."""
        source, to = self._source_layout, self.destination.layout
        stream_bytes = (self.destination.num_tokens - self.destination.num_cached_tokens) * to.token_bytes
        # Pairs of ranks between which something goes.
        num_pairs = max(source.tp, to.tp) * source.cp * to.cp
        wanted_bytes = min(MAX_COALESCE_BYTES, int(COALESCE_SHARE * stream_bytes / num_pairs))
        # Nobody gives back the buffer of a slice that waits for more layers, so all of these together must leave
        # room for what is on its way: of all streams of this rank, and of this one.
        if self._pool.used_bytes > self._pool.max_bytes // 2:
            wanted_bytes = 0
        return min(max(MIN_COALESCE_BYTES, wanted_bytes), self._max_in_flight_bytes // (4 * len(self._targets)))

    def _take(self, num_bytes: int) -> Staging:
        """A staging buffer, once the stream's share of bytes in flight allows it."""
        deadline = awake_s() + self._send_timeout_s
        with self._changed:
            while self._error is None:
                if not self._in_flight_bytes or self._in_flight_bytes + num_bytes <= self._max_in_flight_bytes:
                    staging = self._pool.take(num_bytes)
                    if staging is not None:
                        self._in_flight_bytes += staging.capacity
                        return staging
                left = deadline - awake_s()
                # Woken by this stream's own bytes; another stream's, in the shared pool, are looked for now and then.
                if left <= 0 or (not self._changed.wait(min(left, 0.05)) and awake_s() >= deadline):
                    raise DeadlineExceeded(
                        f"KV stream {self.destination.stream_id} to {self.destination.worker}: "
                        f"{self._in_flight_bytes} bytes in flight for {self._send_timeout_s} s"
                    )
            raise self._error

    def _give(self, staging: Staging) -> None:
        self._pool.give(staging)
        with self._changed:
            self._in_flight_bytes -= staging.capacity
            self._changed.notify_all()

    def _post(self, target: _Target, packed: PackedSlice) -> None:
        staging = packed.staging
        payload = staging.view[: packed.num_bytes]
        slice_ = Slice(
            stream_id=self.destination.stream_id,
            generation=self.destination.generation,
            source_rank=self._source_rank,
            seq=target.num_slices,
            layer=packed.layer,
            num_layers=packed.num_layers,
            head_start=packed.head_start,
            num_heads=packed.num_heads,
            tokens=packed.cut.runs,
            checksum=checksum(payload),
        )
        target.num_slices += 1
        target.payload_bytes += packed.num_bytes
        self._first_slice_s = self._first_slice_s or time.monotonic()

        def sent(future: Future[None]) -> None:
            self._give(staging)
            self._sent_header(future)

        target.link.send(encode(slice_), payload).add_done_callback(sent)

    def _sent_header(self, future: Future[None]) -> None:
        error = future.exception()
        if error is not None:
            named = error if isinstance(error, AnabranchError) else PeerLost(str(error))
            self._end(named, tell=True)

    # The end --------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        assert not self._ended, "the KV stream has ended"

    def _end(self, error: AnabranchError | None, *, tell: bool) -> None:
        """End once: wake who waits, tell the destination ranks that do not know, resolve the future."""
        with self._changed:
            if self._ended:
                return
            self._ended = True
            self._error = error
            self._changed.notify_all()
        now = time.monotonic()
        self._forget(self)
        with self._packing:
            for target in self._targets:
                target.packer.drop()
        if error is not None and tell:
            abort = encode(
                Abort(
                    stream_id=self.destination.stream_id,
                    generation=self.destination.generation,
                    error=WireError.of(error),
                )
            )
            for target in self._targets:
                if not target.acknowledged:
                    target.link.send(abort)
        with contextlib.suppress(InvalidStateError):  # its owner cancelled it
            if error is not None:
                self._done.set_exception(error)
                return
            self._done.set_result(
                KvStreamStats(
                    payload_bytes=sum(target.payload_bytes for target in self._targets),
                    transport=self.transport,
                    stream_s=now - min(self._first_slice_s or self._commit_s, self._commit_s),
                    exposed_s=now - self._commit_s,
                )
            )
