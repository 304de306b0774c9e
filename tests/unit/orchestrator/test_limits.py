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
            assert str(parsed) == f"{name}: has {size} entries; at most {most} are allowed"
