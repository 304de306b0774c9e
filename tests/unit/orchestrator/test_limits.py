"""Every field of every message that clients send has a limit, and the table names no field that is gone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from anabranch.errors import InvalidRequest
from anabranch_client.v1 import anabranch_pb2 as pb
from orchestrator.limits import MAX_CHARS, MAX_ENTRIES, PROMPTS
from orchestrator.parsing import parser

pytestmark = pytest.mark.unit

STRINGS = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)


def asked() -> Iterator[Descriptor]:
    """The messages that clients send, each with all that it is made of."""
    todo = [method.input_type for service in pb.DESCRIPTOR.services_by_name.values() for method in service.methods]
    seen = set()
    while todo:
        kind = todo.pop()
        if kind.full_name not in seen:
            seen.add(kind.full_name)
            yield kind
            todo += [field.message_type for field in kind.fields if field.message_type is not None]


def fields(*, repeated: bool) -> set[str]:
    return {
        f"{kind.name}.{field.name}"
        for kind in asked()
        for field in kind.fields
        if (field.is_repeated if repeated else field.type in STRINGS)
    }


def test_every_repeated_field_has_a_limit() -> None:
    found = fields(repeated=True)
    assert {"SamplingParams.stop_token_ids", "SamplingParams.logit_bias", "Chat.messages"} <= found
    assert found - PROMPTS == set(MAX_ENTRIES)


def test_every_string_has_a_limit() -> None:
    found = fields(repeated=False)
    assert {"GenerateRequest.cache_salt", "SamplingParams.stop", "DrainRequest.worker"} <= found
    assert found - PROMPTS == set(MAX_CHARS)


def test_no_prompt_is_listed_that_is_gone() -> None:
    assert fields(repeated=True) | fields(repeated=False) >= PROMPTS


def within(holder: Message) -> Message:
    """A message that clients send, with `holder` at its place in it."""
    if isinstance(holder, pb.SamplingParams):
        return pb.GenerateRequest(text="x", sampling=holder)
    if isinstance(holder, pb.Chat):
        return pb.TokenizeRequest(chat=holder)
    if isinstance(holder, pb.ChatMessage):
        return pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user"), holder]))
    return holder


def with_string(key: str, num_chars: int) -> Message:
    kind, _, name = key.partition(".")
    text = "x" * num_chars
    repeated = getattr(pb, kind).DESCRIPTOR.fields_by_name[name].is_repeated
    return within(getattr(pb, kind)(**{name: [text] if repeated else text}))


def with_entries(key: str, num_entries: int) -> Message:
    kind, _, name = key.partition(".")
    entries = {
        "Chat.messages": [pb.ChatMessage()] * num_entries,
        "SamplingParams.logit_bias": dict.fromkeys(range(num_entries), 1.0),
        "SamplingParams.stop": ["x"] * num_entries,
        "SamplingParams.stop_token_ids": [1] * num_entries,
    }
    return within(getattr(pb, kind)(**{name: entries[key]}))


@pytest.mark.parametrize("key", sorted(MAX_CHARS))
def test_a_string_that_is_too_long_is_named(key: str) -> None:
    name = key.partition(".")[2]
    most = MAX_CHARS[key]
    for size in (most, most + 1):
        message = with_string(key, size)
        parsed = parser(type(message))(message.SerializeToString())
        if size == most:
            assert parsed == message
        else:
            assert isinstance(parsed, InvalidRequest)
            assert str(parsed) == f"{name}: has {size} characters; at most {most} are allowed"


@pytest.mark.parametrize("key", sorted(MAX_ENTRIES))
def test_a_field_with_too_many_entries_is_named(key: str) -> None:
    name = key.partition(".")[2]
    most = MAX_ENTRIES[key]
    for size in (most, most + 1, 50 * most):
        message = with_entries(key, size)
        parsed = parser(type(message))(message.SerializeToString())
        if size == most:
            assert parsed == message
        else:
            assert isinstance(parsed, InvalidRequest)
            assert str(parsed) == f"{name}: has more than the {most} entries that are allowed"


def unpacked(number: int, count: int) -> bytes:
    """A field of integers with a tag before each, as protobuf allows."""
    return bytes((number << 3, 1)) * count


def inside(number: int, data: bytes) -> bytes:
    """A message as the field of another one."""
    length, varint = len(data), bytearray()
    while length > 0x7F:
        varint.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes((number << 3 | 2,)) + bytes((*varint, length)) + data


SAMPLING, STOP_IDS, TOKEN_IDS = 5, 13, 3
TEXT = pb.GenerateRequest(text="x").SerializeToString()
TOO_MANY_STOP_IDS = "stop_token_ids: has more than the 256 entries that are allowed"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (TEXT + inside(SAMPLING, unpacked(STOP_IDS, 257)), TOO_MANY_STOP_IDS),
        # Protobuf merges what comes twice.
        (TEXT + inside(SAMPLING, inside(STOP_IDS, b"\x01" * 200)) * 2, TOO_MANY_STOP_IDS),
        (TEXT + inside(SAMPLING, inside(STOP_IDS, b"\x01" * 100)) * 1000, TOO_MANY_STOP_IDS),
        (TEXT + b"\x78\x01" * 2_000_000, "the message has more than 16384 fields"),
        (TEXT + b"\x7b\x7c" + inside(SAMPLING, inside(STOP_IDS, b"\x01" * 4_000_000)), "the message cannot be parsed"),
        (inside(TOKEN_IDS, inside(1, b"\x85\x01" * 2_000_000)), "prompt: 2000000"),
        (inside(TOKEN_IDS, inside(1, b"\x01" * 600)) * 2, "prompt: 1200"),
    ],
    ids=["unpacked", "twice", "a thousand times", "unknown fields", "a group", "ids", "ids in parts"],
)
def test_nothing_gets_past_the_limits(data: bytes, says: str) -> None:
    """Whatever the encoding, refused before it is parsed."""

    def check_num_ids(num_ids: int) -> None:
        if num_ids > 1000:
            raise InvalidRequest(f"{num_ids}", "prompt")

    parsed = parser(pb.GenerateRequest, check_num_ids)(data)
    assert isinstance(parsed, InvalidRequest)
    assert str(parsed).startswith(says)


def test_what_is_within_the_limits_is_parsed_in_any_encoding() -> None:
    data = TEXT + inside(SAMPLING, unpacked(STOP_IDS, 100) + inside(STOP_IDS, b"\x01" * 100)) + b"\x78\x01"
    parsed = parser(pb.GenerateRequest)(data)
    assert isinstance(parsed, pb.GenerateRequest)
    assert len(parsed.sampling.stop_token_ids) == 200


def test_a_refusal_does_not_keep_the_message() -> None:
    parsed = parser(pb.GenerateRequest)(pb.GenerateRequest(request_id="x" * 1_000_000).SerializeToString())
    assert isinstance(parsed, InvalidRequest)
    assert parsed.__traceback__ is None
