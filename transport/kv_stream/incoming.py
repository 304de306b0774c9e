"""One KV stream at its receiver: what has come, from whom, and how it ended."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from anabranch.errors import AnabranchError, ChecksumMismatch, MalformedMessage
from anabranch.parallel.layout import KvLayout
from transport.kv_stream.checksum import checksum
from transport.kv_stream.coverage import Coverage
from transport.kv_stream.messages import Commit, Slice
from transport.kv_stream.sink import KvSink
from transport.kv_stream.staging import Staging
from transport.planes.base import Link

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_SOURCES = 4096


@dataclass
class Source:
    """What one source rank has sent."""

    link: Link
    num_slices: int = 0
    payload_bytes: int = 0
    commit: Commit | None = None


class IncomingStream:
    """A stream that is open. Every method and attribute is used with `lock` held.

    Attributes:
        error: why it failed; None while it goes on and when it committed.
        ended: committed, failed or closed: nothing more is placed.
        told: links whose end knows how the stream ended.
    """

    def __init__(
        self,
        *,
        stream_id: int,
        generation: int,
        layout: KvLayout,
        rank: int,
        num_cached_tokens: int,
        num_tokens: int,
        sink: KvSink,
    ) -> None:
        self.stream_id = stream_id
        self.generation = generation
        self.layout = layout
        self.sink = sink
        # Reentrant: the sink may close its stream from within `committed` or `failed`.
        self.lock = threading.RLock()
        self.error: AnabranchError | None = None
        self.ended = False
        self.sources: dict[int, Source] = {}
        self.told: set[Link] = set()
        self._coverage = Coverage(layout, rank, num_cached_tokens, num_tokens)
        self._dtype = DTYPES[layout.dtype]

    def source(self, source_rank: int, link: Link) -> Source:
        """The source rank's record. Raises MalformedMessage if it speaks over two links."""
        source = self.sources.get(source_rank)
        if source is None:
            if not 0 <= source_rank < MAX_SOURCES:
                raise MalformedMessage(f"source rank {source_rank}")
            source = self.sources[source_rank] = Source(link)
        elif source.link is not link:
            raise MalformedMessage(f"source rank {source_rank} speaks over two links")
        return source

    def expect(self, slice_: Slice, payload_bytes: int, link: Link) -> None:
        """Check a slice's header before its payload is received. Raises MalformedMessage."""
        source = self.source(slice_.source_rank, link)
        if source.commit is not None:
            raise MalformedMessage("a slice after the commit")
        if slice_.seq != source.num_slices:
            raise MalformedMessage(f"slice {slice_.seq}, expected {source.num_slices}")
        self._coverage.check(slice_.layer, slice_.num_layers, slice_.head_start, slice_.num_heads)
        num_tokens = self._coverage.tokens(slice_.tokens).positions_T.shape[0]
        expected = 2 * slice_.num_layers * num_tokens * slice_.num_heads * self.layout.head_dim
        expected *= self.layout.element_bytes
        if payload_bytes != expected:
            raise MalformedMessage(f"a payload of {payload_bytes} bytes for a slice of {expected}")
        source.num_slices += 1
        source.payload_bytes += payload_bytes

    def place(self, slice_: Slice, staging: Staging, payload_bytes: int) -> None:
        """Verify a payload and hand its rows to the sink. Raises ChecksumMismatch, MalformedMessage."""
        found = checksum(staging.view[:payload_bytes])
        if found != slice_.checksum:
            raise ChecksumMismatch(
                f"slice {slice_.seq} of source rank {slice_.source_rank}: {found:016x}, expected {slice_.checksum:016x}"
            )
        tokens = self._coverage.tokens(slice_.tokens)
        self._coverage.add(slice_.layer, slice_.num_layers, slice_.head_start, slice_.num_heads, tokens)
        positions_T = tokens.positions_T
        kv_L2TKD = (
            staging.data[:payload_bytes]
            .view(self._dtype)
            .view(slice_.num_layers, 2, positions_T.shape[0], slice_.num_heads, self.layout.head_dim)
        )
        self.sink.place(slice_.layer, slice_.head_start, positions_T, kv_L2TKD)

    def commit(self, commit: Commit, link: Link) -> bool:
        """Note a source's commit; whether it was the last one and the stream is complete.

        Raises:
            MalformedMessage: counts differ, or something is missing.
        """
        source = self.source(commit.source_rank, link)
        if source.commit is not None:
            raise MalformedMessage("a second commit")
        if (commit.num_slices, commit.payload_bytes) != (source.num_slices, source.payload_bytes):
            raise MalformedMessage(
                f"commit of {commit.num_slices} slices, {commit.payload_bytes} bytes; "
                f"{source.num_slices} slices, {source.payload_bytes} bytes came"
            )
        source.commit = commit
        commits = [known.commit for known in self.sources.values() if known.commit is not None]
        if any((c.num_sources, c.token_id) != (commit.num_sources, commit.token_id) for c in commits):
            raise MalformedMessage("source ranks disagree about the stream's end")
        if len(commits) < commit.num_sources:
            return False
        if missing := self._coverage.missing:
            raise MalformedMessage(f"commit of an incomplete stream: {missing}")
        return True
