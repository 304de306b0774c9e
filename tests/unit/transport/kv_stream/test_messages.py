"""Headers of a KV stream."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import (
    MalformedMessage,
)
from transport.kv_stream.messages import decode_to_receiver, decode_to_sender

pytestmark = pytest.mark.unit


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_no_header_raises_anything_but_malformed(header: bytes) -> None:
    for decode in (decode_to_receiver, decode_to_sender):
        with contextlib.suppress(MalformedMessage):
            decode(header)
