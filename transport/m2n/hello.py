"""How a link begins: both ends say what they serve, and the node refuses whom it cannot serve, with its own values.

The frame and the token are the tensor planes' (`transport.planes.handshake`); hello and welcome are its `endpoint`.
"""

from __future__ import annotations

import dataclasses
import secrets
from typing import Annotated

import msgspec
from msgspec import Meta

from anabranch.bounds import Count, Extent, Int63, Name
from anabranch.errors import AnabranchError, ConfigError, MalformedMessage, PeerLost
from transport.m2n.base import ChannelShape
from transport.m2n.header import DTYPES, WIRE_VERSION, max_answer_bytes, max_call_bytes
from transport.planes.handshake import Introduction, my_name

TCP_KIND, SHM_KIND, UCX_KIND = 16, 17, 18
"""Beside the tensor planes' kinds."""
MAX_ROWS = 1 << 20
MAX_SLOTS = 256
MAX_LINK_BYTES = 64 << 30
"""Of address space for the slots of a link; memory is taken for what is sent alone."""


UcxAddress = Annotated[bytes, Meta(max_length=16 << 10)]


class Hello(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What an attention rank says first.

    Attributes:
        incarnation: drawn at random by each end; in every header.
        ucx_address: of its UCX worker, with that backend.
    """

    wire_version: Count
    incarnation: Int63
    model: Name
    dtype: Name
    hidden_size: Extent
    max_rows: Extent
    max_choices: Extent
    num_slots: Extent
    ucx_address: UcxAddress = b""
    shared_expert: Name = "attn"


class Welcome(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the node answers.

    Attributes:
        refused: what it refuses: a field of the hello, or "" for none.
        reason: the node's own value of that field, or what it allows.
        ucx_address: of its UCX worker, with that backend.
    """

    wire_version: Count
    incarnation: Int63
    refused: Name = ""
    reason: Annotated[str, Meta(max_length=256)] = ""
    ucx_address: UcxAddress = b""


class _Version(msgspec.Struct, frozen=True):
    """What is read first, of any version."""

    wire_version: Count


LINKS = "links"
"""In `Welcome.refused`: the node has as many links as it takes."""

_encoder = msgspec.msgpack.Encoder()
_hello_decoder = msgspec.msgpack.Decoder(Hello)
_welcome_decoder = msgspec.msgpack.Decoder(Welcome)
_version_decoder = msgspec.msgpack.Decoder(_Version)


def draw_incarnation() -> int:
    return secrets.randbits(63)


def introduce(shape: ChannelShape, incarnation: int, ucx_address: bytes = b"") -> Introduction:
    """An attention rank's introduction."""
    hello = Hello(
        wire_version=WIRE_VERSION,
        incarnation=incarnation,
        model=shape.model,
        dtype=_name(shape),
        hidden_size=shape.hidden_size,
        max_rows=shape.max_rows,
        max_choices=shape.max_choices,
        num_slots=shape.num_slots,
        ucx_address=ucx_address,
        shared_expert=shape.shared_expert,
    )
    return Introduction(name=my_name(), endpoint=_encoder.encode(hello))


def reply(incarnation: int, refused: str = "", reason: str = "", ucx_address: bytes = b"") -> Introduction:
    """A node's introduction."""
    welcome = Welcome(
        wire_version=WIRE_VERSION,
        incarnation=incarnation,
        refused=refused,
        reason=reason[:256],
        ucx_address=ucx_address,
    )
    return Introduction(name=my_name(), endpoint=_encoder.encode(welcome))


class Refused(Exception):
    """A hello that the node does not take: `field` of the hello is not what `reason` says."""

    def __init__(self, field: str, value: object, reason: str) -> None:
        super().__init__(f"{field}: {value}: {reason}")
        self.field = field
        self.reason = reason


def read_hello(introduction: Introduction, mine: ChannelShape) -> tuple[Hello, ChannelShape]:
    """The hello and the shape of its link: the rank's sizes, and otherwise this node's shape.

    Raises:
        Refused: this node cannot serve it.
        MalformedMessage: it is no hello.
    """
    try:
        version = _version_decoder.decode(introduction.endpoint).wire_version
        if version != WIRE_VERSION:
            raise Refused("wire_version", version, str(WIRE_VERSION))
        hello = _hello_decoder.decode(introduction.endpoint)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedMessage(f"hello: {error}") from None
    for field, own in (
        ("model", mine.model),
        ("dtype", _name(mine)),
        ("hidden_size", mine.hidden_size),
        ("shared_expert", mine.shared_expert),
        ("max_choices", mine.max_choices),
    ):
        value = getattr(hello, field)
        if value != own:
            raise Refused(field, value, str(own))
    for field, most in (("max_rows", MAX_ROWS), ("num_slots", MAX_SLOTS)):
        value = getattr(hello, field)
        if not 1 <= value <= most:
            raise Refused(field, value, f"1 to {most}")
    sizes = dataclasses.replace(mine, max_rows=hello.max_rows, num_slots=hello.num_slots)
    num_bytes = (hello.num_slots + 1) * (max_call_bytes(sizes) + max_answer_bytes(sizes))
    if num_bytes > MAX_LINK_BYTES:
        raise Refused("max_rows", hello.max_rows, f"slots of {num_bytes} bytes, at most {MAX_LINK_BYTES}")
    return hello, sizes


def read_welcome(introduction: Introduction, mine: ChannelShape, peer: str) -> Welcome:
    """The welcome of a node that takes the link.

    Raises:
        ConfigError: it refuses; names both sides' values.
        PeerLost: it has no room for another link.
        MalformedMessage: it is no welcome.
    """
    try:
        version = _version_decoder.decode(introduction.endpoint).wire_version
        if version != WIRE_VERSION:
            raise ConfigError("wire_version", WIRE_VERSION, f"FFN node {peer} has {version}; use one version of both")
        welcome = _welcome_decoder.decode(introduction.endpoint)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise MalformedMessage(f"welcome: {error}") from None
    if welcome.refused:
        raise _refusal(welcome, mine, peer)
    return welcome


def _refusal(welcome: Welcome, mine: ChannelShape, peer: str) -> AnabranchError:
    if welcome.refused == LINKS:
        return PeerLost(f"FFN node {peer} takes no more links: {welcome.reason}")
    own = {"dtype": _name(mine), "wire_version": WIRE_VERSION}
    value = own.get(welcome.refused, getattr(mine, welcome.refused, "?"))
    return ConfigError(welcome.refused, value, f"FFN node {peer} has {welcome.reason}; both must serve the same model")


def _name(shape: ChannelShape) -> str:
    assert shape.dtype in DTYPES, f"dtype: {shape.dtype} does not travel"
    return str(shape.dtype).removeprefix("torch.")
