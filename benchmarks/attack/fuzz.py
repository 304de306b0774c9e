"""Random and mutated bytes: what all phases make their inputs of. Everything comes from the generator that is given."""

from __future__ import annotations

import random

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

INTEGERS = (0, 1, -1, 2, 3, 100, 101, 255, 256, 2**31 - 1, 2**31, -(2**31), 2**53, 2**63 - 1, -(2**63))
FLOATS = (0.0, -0.0, 1.0, 0.5, -1.0, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"))
TEXTS = ("", "w5 w6", "\0", "\U0001f600" * 3, "w1 " * 300, "x" * 129, "x" * 257, "\u202e", "{{ 7 }}", "a" * 5000)
MAX_LIST = 20


def mutated(rng: random.Random, data: bytes) -> bytes:
    """The bytes with one to four changes: a bit flipped, a piece cut out, doubled, replaced, an end cut off."""
    found = bytearray(data or rng.randbytes(8))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(found) + 1)
        until = min(len(found), at + rng.choice((1, 1, 2, 4, 16)))
        match rng.randrange(6):
            case 0 if at < len(found):
                found[at] ^= 1 << rng.randrange(8)
            case 1:
                del found[at:until]
            case 2:
                found[at:at] = found[at:until]
            case 3:
                found[at:until] = rng.randbytes(until - at)
            case 4:
                found[at:at] = rng.choice((b"\xff" * 5, b"\x80" * 9 + b"\x01", b"\0" * 4, b"\x7f\xff\xff\xff"))
            case _:
                del found[at:]
    return bytes(found)


def varint(value: int) -> bytes:
    """An unsigned integer as protobuf writes it."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def wrong_types(rng: random.Random) -> bytes:
    """Fields with numbers that exist and wire types that are drawn."""
    out = b""
    for _ in range(rng.randint(1, 8)):
        wire_type = rng.randrange(8)
        out += varint(rng.randint(0, 20) << 3 | wire_type)
        match wire_type:
            case 0:
                out += varint(rng.getrandbits(rng.choice((1, 7, 31, 64))))
            case 1:
                out += rng.randbytes(8)
            case 2:
                data = rng.randbytes(rng.choice((0, 1, 5, 40)))
                out += varint(rng.choice((len(data), len(data), 2**31, 2**60))) + data
            case 5:
                out += rng.randbytes(4)
    return out


def fill(rng: random.Random, message: Message, share: float = 0.4) -> None:
    """Set about this share of a message's fields, and of those within, to values that are likely to be wrong."""
    descriptor: Descriptor = message.DESCRIPTOR  # type: ignore[assignment]
    for field in descriptor.fields:
        if rng.random() > share:
            continue
        if field.is_repeated:
            _fill_repeated(rng, getattr(message, field.name), field, share)
        elif field.message_type is not None:
            getattr(message, field.name).SetInParent()
            fill(rng, getattr(message, field.name), share)
        else:
            setattr(message, field.name, _scalar(rng, field))


def _fill_repeated(rng: random.Random, entries: object, field: FieldDescriptor, share: float) -> None:
    number = rng.choice((1, 2, MAX_LIST))
    if field.message_type is None:
        entries.extend(_scalar(rng, field) for _ in range(number))  # type: ignore[attr-defined]
    elif field.message_type.GetOptions().map_entry:
        key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
        for _ in range(number):
            entries[_scalar(rng, key)] = _scalar(rng, value)  # type: ignore[index]
    else:
        for _ in range(number):
            fill(rng, entries.add(), share)  # type: ignore[attr-defined]


def _scalar(rng: random.Random, field: FieldDescriptor) -> int | float | str | bool:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            return rng.choice(TEXTS)
        case FieldDescriptor.CPPTYPE_BOOL:
            return rng.random() < 0.5
        case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
            return rng.choice(FLOATS)
        case _:
            return rng.choice(INTEGERS) if rng.random() < 0.5 else rng.randrange(101)
