"""How much each field of a client's message may hold, checked before anything walks it.

Every string and every repeated field (maps included) of a message that clients send is named here, with its limit or
with what limits it instead; a test holds that against the `.proto` file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from anabranch.bounds import MAX_SALT_CHARS
from anabranch.errors import InvalidRequest
from anabranch.request.sampling_params import (
    MAX_LOGIT_BIAS,
    MAX_STOP_STRING_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
)
from orchestrator.wire import BYTES, num_varints, wire_fields

MAX_CHAT_MESSAGES = 1024
MAX_NAME_CHARS = 128
MAX_ROLE_CHARS = 64
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
    "ChatMessage.role": MAX_ROLE_CHARS,
    "GenerateRequest.request_id": MAX_NAME_CHARS,
    "GenerateRequest.cache_salt": MAX_SALT_CHARS,
    "GenerateRequest.tenant": MAX_NAME_CHARS,
    "GenerateRequest.idempotency_key": MAX_NAME_CHARS,
    "SamplingParams.stop": MAX_STOP_STRING_CHARS,
    "ReportExitRequest.worker": MAX_NAME_CHARS,
    "ReportExitRequest.how": MAX_REASON_CHARS,
    "DrainRequest.worker": MAX_NAME_CHARS,
    "CordonRequest.worker": MAX_NAME_CHARS,
    "UncordonRequest.worker": MAX_NAME_CHARS,
}

# What is as long as the prompt: `max_request_bytes` limits the text, and the context the ids.
_IDS = "TokenIds.ids"
PROMPTS = frozenset({"GenerateRequest.text", "TokenizeRequest.text", "ChatMessage.content", _IDS})

_STRINGS = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)


# Of a whole message, those of messages within it included: what all limits together allow, twice over.
MAX_FIELDS = 16_384


def check_entries(kind: Descriptor, data: bytes, check_num_ids: Callable[[int], None]) -> None:
    """Raise InvalidRequest, naming the field, for one with too many entries.

    Looks at the bytes, for parsing millions of entries takes long and much memory; stops at the first one too many.

    Args:
        kind: what `data` shall be parsed as.
        check_num_ids: raises InvalidRequest for too many prompt ids.

    Raises:
        ValueError: the bytes are no message.
    """
    _count(kind, memoryview(data), Counter(), check_num_ids)


def _count(kind: Descriptor, data: memoryview, counts: Counter[str], check_num_ids: Callable[[int], None]) -> None:
    """Add the fields of a message to `counts`, which is kept over all parts: protobuf merges what comes twice."""
    for number, wire_type, value in wire_fields(data):
        counts[""] += 1
        if counts[""] > MAX_FIELDS:
            raise InvalidRequest(f"the message has more than {MAX_FIELDS} fields; send lists of numbers packed")
        field = kind.fields_by_number.get(number)
        if field is None:
            continue
        if field.is_repeated:
            key = f"{kind.name}.{field.name}"
            packed = wire_type == BYTES and field.type not in (FieldDescriptor.TYPE_MESSAGE, *_STRINGS)
            counts[key] += num_varints(value) if packed else 1
            if key == _IDS:
                check_num_ids(counts[key])
            elif counts[key] > MAX_ENTRIES.get(key, counts[key]):
                raise InvalidRequest(f"has more than the {MAX_ENTRIES[key]} entries that are allowed", field.name)
        if wire_type == BYTES and field.message_type is not None:
            _count(field.message_type, value, counts, check_num_ids)


def check_chars(message: Message) -> None:
    """Raise InvalidRequest, naming the field, for a string that is too long; looks only at those that have limits."""
    kind = cast(Descriptor, message.DESCRIPTOR)
    for field in kind.fields:
        most = MAX_CHARS.get(f"{kind.name}.{field.name}")
        if most is None and (field.message_type is None or field.message_type.GetOptions().map_entry):
            continue
        if not field.is_repeated and field.message_type is not None and not message.HasField(field.name):
            continue
        value = getattr(message, field.name)
        for item in value if field.is_repeated else (value,):
            if most is None:
                check_chars(item)
            elif len(item) > most:
                raise InvalidRequest(f"has {len(item)} characters; at most {most} are allowed", field.name)
