"""Client bytes that are no message, or whose strings are no text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import InvalidRequest
from anabranch_client.v1 import anabranch_pb2 as pb
from orchestrator.parsing import parser

pytestmark = pytest.mark.unit

parse = parser(pb.GenerateRequest)


def test_a_message_is_parsed():
    message = pb.GenerateRequest(text="é", sampling=pb.SamplingParams(stop=["x"], logit_bias={1: 2.0}, top_p=0.5))
    assert parse(message.SerializeToString()) == message


@given(st.binary(max_size=60))
def test_no_bytes_raise(data):
    result = parse(data)
    assert isinstance(result, pb.GenerateRequest | InvalidRequest)


@given(st.text(max_size=20), st.integers(0, 19), st.sampled_from(["text", "request_id"]))
def test_a_string_with_a_broken_byte_is_named(text, at, field):
    message = pb.GenerateRequest(include_timings=True, sampling=pb.SamplingParams(temperature=0.5, top_k=3))
    good = ("~" * at + text).encode()
    setattr(message, field, "~" * at + text + "z")
    data = message.SerializeToString().replace(good + b"z", good + b"\xff")
    assert str(parse(data)) == f"{field}: is not valid UTF-8"


def test_the_path_leads_to_nested_fields():
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="ok"), pb.ChatMessage(role="uZer", content="ok")])
    data = pb.GenerateRequest(chat=chat).SerializeToString().replace(b"uZer", b"u\x80er")
    assert str(parse(data)) == "chat.messages.role: is not valid UTF-8"
