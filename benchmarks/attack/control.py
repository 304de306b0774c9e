"""Strangers on the control channel: some prove nothing, some know the secret and are no worker."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import msgspec

from anabranch.errors import TransportError
from anabranch.protocol.wire_error import WireError
from anabranch.protocol.workers import (
    Beat,
    Ended,
    Failing,
    Message,
    Preempted,
    Register,
    Tokens,
    WorkerInfo,
    WorkerStats,
)
from anabranch.request.token import Token
from benchmarks.attack.channel import dial, proven
from benchmarks.attack.fuzz import mutated
from benchmarks.attack.tally import Tally
from transport.control.frames import frame, read_frame
from transport.control.handshake import MAX_GREETING_BYTES, PROTOCOL, Hello

NUM_AT_ONCE = 8
# Longer than a handshake may take; what is still open then has been forgotten.
CLOSE_TIMEOUT_S = 15.0
MAX_MESSAGES = 110
ACCEPTED = "register.ACCEPTED"
HUNG = "hung"
_MAX_ANSWER_BYTES = 1 << 20


class Strangers:
    """Makes what strangers say.

    Args:
        info: of a worker that could register; what is sent differs in a field that must be refused.
        living: the name of a worker that lives.
    """

    def __init__(self, seed: int, info: WorkerInfo, living: str) -> None:
        self._rng = random.Random(f"{seed}/control")
        self._info = info
        self._living = living

    def unproven(self) -> bytes:
        """Bytes of who has proved nothing."""
        rng = self._rng
        hello = Hello(protocol=PROTOCOL, name="stranger", nonce=rng.randbytes(32), proof=rng.randbytes(32))
        data = msgspec.msgpack.encode(hello)
        match rng.randrange(7):
            case 0:
                return frame(data)
            case 1:
                return mutated(rng, frame(data))
            case 2:
                return frame(mutated(rng, data))
            case 3:
                return frame(data)[: rng.randrange(len(data))]
            case 4:
                return rng.randbytes(rng.choice((1, 4, 100, 10_000)))
            case 5:
                return rng.choice((2**32 - 1, 2**31, MAX_GREETING_BYTES + 1)).to_bytes(4, "big") + rng.randbytes(10)
            case _:
                return b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"

    def nonsense(self) -> bytes:
        """A message that cannot be read, or should not be."""
        rng = self._rng
        data = msgspec.msgpack.encode(self.message())
        match rng.randrange(4):
            case 0:
                return rng.randbytes(rng.choice((0, 1, 30, 3000)))
            case 1:
                return rng.choice((b"\x91" * 5000, b"\xdd\xff\xff\xff\xff", b"\xc1", data * 2, data[:-1]))
            case _:
                return mutated(rng, data)

    def message(self) -> Message:
        """A message that a worker could send; its sender is none."""
        rng = self._rng
        name, epoch = rng.choice(("x", "", "again", "y" * 128)), rng.choice((0, 1, 2**53))
        match rng.randrange(6):
            case 0:
                return Beat()
            case 1:
                numbers: dict[str, Any] = {field: rng.randrange(2**31) for field in WorkerStats.__struct_fields__[:6]}
                return Beat(stats=WorkerStats(**numbers))
            case 2:
                return Tokens(tokens=(Token(request_id=name, epoch=epoch, index=0, token_id=1),))
            case 3:
                return Ended(request_id=name, epoch=epoch, reason="stop")
            case 4:
                return Preempted(request_id=name, epoch=epoch)
            case _:
                return Failing(error=WireError(code="internal", message="made up"))

    def register(self) -> bytes:
        """A registration that must be refused."""
        changes: tuple[dict[str, object], ...] = (
            {"model_fingerprint": ""},
            {"model_fingerprint": "f" * 64},
            {"vocab_size": self._info.vocab_size + 1},
            {"num_layers": 0},
            {"kv_dtype": "bfloat16"},
            {"kv_dtype": ""},
            {"name": self._living},
            {"name": ""},
            {"block_size": 0},
            {"num_blocks": 0},
            {"max_context": 0},
        )
        change = self._rng.choice(changes)
        data = msgspec.msgpack.encode(Register(worker=msgspec.structs.replace(self._info, **change)))
        if change.get("model_fingerprint") == "f" * 64 and self._rng.random() < 0.7:
            return mutated(self._rng, data)
        return data

    def burst(self) -> list[bytes]:
        """What one proven stranger says; at the end something that is answered, unless it has been sent away."""
        rng = self._rng
        said = [self.nonsense() for _ in range(rng.choice((0, 3, 20, MAX_MESSAGES)))]
        said.append(self.register() if rng.random() < 0.6 else msgspec.msgpack.encode(self.message()))
        said.append(msgspec.msgpack.encode(Beat()))
        return said


async def attack(
    endpoint: str, secret: bytes, seed: int, info: WorkerInfo, living: str, num_messages: int, tally: Tally
) -> None:
    """Say so many things, `NUM_AT_ONCE` strangers at a time; counted as `control`."""
    strangers = Strangers(seed, info, living)
    rng = random.Random(f"{seed}/control/order")
    left = num_messages

    async def speak_on() -> None:
        nonlocal left
        while left > 0:
            if rng.random() < 0.5:
                left -= 1
                tally.count("control", "unproven." + await _unproven(endpoint, strangers.unproven()))
            else:
                said = strangers.burst()
                left -= len(said)
                tally.count("control", "messages", len(said))
                tally.count("control", await _proven(endpoint, secret, said))

    await asyncio.gather(*(speak_on() for _ in range(NUM_AT_ONCE)))


async def _unproven(endpoint: str, data: bytes) -> str:
    reader, writer = await dial(endpoint)
    try:
        writer.write(data)
        writer.write_eof()
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            while await reader.read(1 << 16):
                pass
        return "closed"
    except OSError:
        return "closed"
    except TimeoutError:
        return HUNG
    finally:
        writer.transport.abort()


async def _proven(endpoint: str, secret: bytes, said: list[bytes]) -> str:
    """What the orchestrator answers first, once it has hung up."""
    try:
        reader, writer = await proven(endpoint, secret, "stranger")
    except TransportError:
        return "proven.lost"
    ends: list[str] = []
    try:
        for data in said:
            writer.write(frame(data))
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            while ACCEPTED not in ends:
                ends.append(_end_of(await read_frame(reader, _MAX_ANSWER_BYTES)))
    except (OSError, TransportError):
        pass
    except TimeoutError:
        return HUNG
    finally:
        writer.transport.abort()
    return ACCEPTED if ACCEPTED in ends else next(iter(ends), "proven.closed")


def _end_of(answer: bytes) -> str:
    """How an answer reads: a refusal's code, or that somebody was let in."""
    told = msgspec.msgpack.decode(answer)
    if told.get("type") != "registered":
        return f"proven.{told.get('type')}"
    return ACCEPTED if told["error"] is None else f"proven.{told['error']['code']}"
