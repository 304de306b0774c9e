"""How much each field of a client's message may hold, checked before anything walks it.

Every string and every repeated field (maps included) of a message that clients send is named here, with its limit or
with what limits it instead; a test holds that against the `.proto` file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from anabranch.bounds import MAX_SALT_CHARS
from anabranch.errors import InvalidRequest
from anabranch.sampling.params import MAX_LOGIT_BIAS, MAX_STOP_STRING_CHARS, MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS

MAX_CHAT_MESSAGES = 1024
MAX_NAME_CHARS = 128
MAX_REASON_CHARS = 10_000

# Most entries of repeated fields, by message and field.
MAX_ENTRIES: Mapping[str, int] = {
    "Chat.messages": MAX_CHAT_MESSAGES,
    "SamplingParams.logit_bias": MAX_LOGIT_BIAS,
    "SamplingParams.stop": MAX_STOP_STRINGS,
    "SamplingParams.stop_token_ids": MAX_STOP_TOKEN_IDS,
}

# Most characters of a string, of each one where the field is repeated.
MAX_CHARS: Mapping[str, int] = {
    "ChatMessage.role": MAX_NAME_CHARS,
    "GenerateRequest.request_id": MAX_NAME_CHARS,
    "GenerateRequest.cache_salt": MAX_SALT_CHARS,
    "SamplingParams.stop": MAX_STOP_STRING_CHARS,
    "ReportExitRequest.worker": MAX_NAME_CHARS,
    "ReportExitRequest.how": MAX_REASON_CHARS,
    "DrainRequest.worker": MAX_NAME_CHARS,
}

# What is as long as the prompt: `max_request_bytes` limits the text, and the context the ids, whose number
# `admission.checked_ids` looks at first.
PROMPTS = frozenset({"GenerateRequest.text", "TokenizeRequest.text", "ChatMessage.content", "TokenIds.ids"})


def check_limits(message: Message) -> None:
    """Raise InvalidRequest, naming the field, for one that holds too much; looks only at fields that have limits."""
    kind = cast(Descriptor, message.DESCRIPTOR)
    for field in kind.fields:
        key = f"{kind.name}.{field.name}"
        if field.is_repeated:
            _check_entries(key, field, getattr(message, field.name))
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            if message.HasField(field.name):
                check_limits(getattr(message, field.name))
        elif key in MAX_CHARS:
            _check_chars(key, field, getattr(message, field.name))


def _check_entries(key: str, field: FieldDescriptor, entries: Sequence[object]) -> None:
    most = MAX_ENTRIES.get(key)
    if most is not None and len(entries) > most:
        raise InvalidRequest(f"has {len(entries)} entries; at most {most} are allowed", field.name)
    if key in MAX_CHARS:
        for text in entries:
            _check_chars(key, field, cast(str, text))
    elif field.message_type is not None and not field.message_type.GetOptions().map_entry:
        for inner in entries:
            check_limits(cast(Message, inner))


def _check_chars(key: str, field: FieldDescriptor, text: str) -> None:
    most = MAX_CHARS[key]
    if len(text) > most:
        raise InvalidRequest(f"has {len(text)} characters; at most {most} are allowed", field.name)
