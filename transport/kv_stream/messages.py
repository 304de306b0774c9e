"""The KV stream's headers: MessagePack, typed, forward (Slice, Commit, Abort) and back (Ack)."""

from __future__ import annotations

import msgspec

from anabranch.errors import MalformedMessage
from anabranch.protocol.wire_error import WireError
from anabranch.request.token import TokenLogprob


class StreamMessage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="t", gc=False):
    """Base: every message names its stream and the lease generation that it was meant for."""

    stream_id: int
    generation: int


class Slice(StreamMessage, frozen=True, kw_only=True, tag="s", gc=False):
    """K and V of some layers, heads and tokens; the payload follows the header.

    The payload is, for each layer, K then V, each `[sum of token counts, num_heads, head_dim]` in the layout's
    dtype, token ranges one after the other.

    Attributes:
        source_rank: the sender's rank; `seq` counts from 0 for each (source rank, destination rank).
        layer, num_layers: consecutive layers.
        head_start, num_heads: KV heads, by their number in the whole model.
        tokens: (first position, count) ranges, ascending.
        checksum: xxh3-64 of the payload.
    """

    source_rank: int
    seq: int
    layer: int
    num_layers: int
    head_start: int
    num_heads: int
    tokens: tuple[tuple[int, int], ...]
    checksum: int


class Commit(StreamMessage, frozen=True, kw_only=True, tag="c", gc=False):
    """A source rank has sent everything; carries the first token.

    Attributes:
        source_rank: the sender's rank.
        num_sources: source ranks that send to this destination rank; it commits when all have said so.
        num_slices, payload_bytes: what this source rank sent to this destination rank.
        token_id, logprob: the first sampled token, the same from every source rank.
        queue_s, prefill_s, num_cached_tokens: as in PrefillEnded.
    """

    source_rank: int
    num_sources: int
    num_slices: int
    payload_bytes: int
    token_id: int
    logprob: TokenLogprob | None = None
    queue_s: float = 0.0
    prefill_s: float = 0.0
    num_cached_tokens: int = 0


class Abort(StreamMessage, frozen=True, kw_only=True, tag="a", gc=False):
    """The sender gives up; the receiver fails the stream with `error`."""

    error: WireError


class Ack(StreamMessage, frozen=True, kw_only=True, tag="k", gc=False):
    """The receiver's one answer to a stream on a link: committed, or refused with `error`."""

    error: WireError | None = None


ToReceiver = Slice | Commit | Abort

_encoder = msgspec.msgpack.Encoder()
_to_receiver = msgspec.msgpack.Decoder(ToReceiver)
_to_sender = msgspec.msgpack.Decoder(Ack)


def encode(message: ToReceiver | Ack) -> bytes:
    return _encoder.encode(message)


def decode_to_receiver(header: bytes) -> ToReceiver:
    """Raises MalformedMessage."""
    try:
        message: ToReceiver = _to_receiver.decode(header)
        return message
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedMessage(f"kv stream header: {error}") from None


def decode_to_sender(header: bytes) -> Ack:
    """Raises MalformedMessage."""
    try:
        return _to_sender.decode(header)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedMessage(f"kv stream acknowledgement: {error}") from None
