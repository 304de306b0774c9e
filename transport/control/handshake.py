"""How a connection of the control channel begins: both ends prove that they know the secret, which never travels.

    server -> client    Challenge: protocol, a fresh random nonce
    client -> server    Hello: name, a fresh random nonce, HMAC(secret, "client", both nonces, name)
    server -> client    Welcome: HMAC(secret, "server", both nonces, name), or Refused: why

The nonces are new on every connection, so what was overheard on one is of no use on another. The secret may be empty
on a Unix socket, where the file's mode keeps others out.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from anabranch.errors import AccessDenied, MalformedMessage
from transport.control.frames import frame, read_frame

PROTOCOL = "anabranch.control.2"
NONCE_BYTES = 32
MAX_NAME_CHARS = 100
# All that is read of a stranger.
MAX_GREETING_BYTES = 1024

Nonce = Annotated[bytes, Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
Proof = Annotated[bytes, Meta(min_length=32, max_length=32)]
Text = Annotated[str, Meta(max_length=MAX_NAME_CHARS)]

REMEDY = "give the orchestrator and all workers the same secret_file"


class Greeting(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """Base of the messages before a connection is established."""


class Challenge(Greeting, frozen=True, kw_only=True, tag="challenge"):
    protocol: Text
    nonce: Nonce


class Hello(Greeting, frozen=True, kw_only=True, tag="hello"):
    """`name` is for logs alone."""

    protocol: Text
    name: Text
    nonce: Nonce
    proof: Proof


class Welcome(Greeting, frozen=True, kw_only=True, tag="welcome"):
    proof: Proof


class Refused(Greeting, frozen=True, kw_only=True, tag="refused"):
    reason: Annotated[str, Meta(max_length=500)]


G = TypeVar("G", bound=Greeting)

_encoder = msgspec.msgpack.Encoder()
_challenges = msgspec.msgpack.Decoder(Challenge)
_hellos = msgspec.msgpack.Decoder(Hello)
_answers: msgspec.msgpack.Decoder[Welcome | Refused] = msgspec.msgpack.Decoder(Welcome | Refused)


def prove(secret: bytes, side: bytes, challenge: Challenge, nonce: bytes, name: str) -> bytes:
    """The proof that `side` (`client` or `server`, so that neither can send back the other's) knows the secret."""
    return hmac.digest(secret, side + challenge.nonce + nonce + name.encode(), "sha256")


async def admit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes) -> str:
    """The server's part; returns the client's name.

    Raises:
        AccessDenied: the client does not know the secret, or speaks another protocol; it has been told.
        MalformedMessage, FrameTooLarge, PeerLost: it is no client of this channel.
    """
    challenge = Challenge(protocol=PROTOCOL, nonce=secrets.token_bytes(NONCE_BYTES))
    _write(writer, challenge)
    hello = _decode(_hellos, await read_frame(reader, MAX_GREETING_BYTES))
    if hello.protocol != PROTOCOL:
        reason = f"it speaks {hello.protocol!r}, the orchestrator {PROTOCOL!r}; run the same release everywhere"
    elif not hmac.compare_digest(hello.proof, prove(secret, b"client", challenge, hello.nonce, hello.name)):
        reason = f"it does not know the control channel's secret; {REMEDY}"
    else:
        _write(writer, Welcome(proof=prove(secret, b"server", challenge, hello.nonce, hello.name)))
        return hello.name
    _write(writer, Refused(reason=reason))
    raise AccessDenied(f"{hello.name!r}: {reason}")


async def introduce(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes, name: str) -> None:
    """The client's part.

    Raises:
        AccessDenied: the server refused, speaks another protocol, or does not know the secret itself.
        MalformedMessage, FrameTooLarge, PeerLost: it is no server of this channel.
    """
    challenge = _decode(_challenges, await read_frame(reader, MAX_GREETING_BYTES))
    if challenge.protocol != PROTOCOL:
        raise AccessDenied(f"the orchestrator speaks {challenge.protocol!r}, this worker {PROTOCOL!r}")
    nonce = secrets.token_bytes(NONCE_BYTES)
    proof = prove(secret, b"client", challenge, nonce, name)
    _write(writer, Hello(protocol=PROTOCOL, name=name, nonce=nonce, proof=proof))
    answer = _decode(_answers, await read_frame(reader, MAX_GREETING_BYTES))
    if isinstance(answer, Refused):
        raise AccessDenied(f"the orchestrator refused {name!r}: {answer.reason}")
    if not hmac.compare_digest(answer.proof, prove(secret, b"server", challenge, nonce, name)):
        raise AccessDenied(f"what listens there does not know the control channel's secret; {REMEDY}")


def _write(writer: asyncio.StreamWriter, greeting: Greeting) -> None:
    if not writer.is_closing():
        writer.write(frame(_encoder.encode(greeting)))


def _decode(decoder: msgspec.msgpack.Decoder[G], data: bytes) -> G:
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise MalformedMessage(f"no greeting of the control channel: {error}") from None
