"""From a client's gRPC message to a `Submission`, or an error that names the field."""

from __future__ import annotations

import msgspec
from google.protobuf.message import Message

from anabranch.errors import InvalidRequest
from anabranch.request.sampling_params import SamplingParams
from anabranch_client.v1 import anabranch_pb2 as pb
from orchestrator.client_deadline import ClientDeadline
from orchestrator.served_model import Prompt
from orchestrator.submission import Submission

# While a call lasts, gRPC keeps the bytes that came and the message that was parsed from them.
WIRE_FACTOR = 2


def message_bytes(message: Message) -> int:
    """About what a client's message takes, in bytes, for as long as its call lasts."""
    return WIRE_FACTOR * message.ByteSize()


def submission_of(message: pb.GenerateRequest, remaining_s: float | None) -> Submission:
    """What a client asks for.

    Args:
        remaining_s: until the call's deadline; None: it has none.

    Raises:
        InvalidRequest: there is no prompt.
    """
    return Submission(
        prompt=prompt_of(message),
        prompt_ids=message.token_ids.ids,
        sampling=_sampling_of(message.sampling),
        ignore_eos=message.sampling.ignore_eos,
        client_id=message.request_id,
        cache_salt=message.cache_salt,
        priority=message.priority,
        tenant=message.tenant if message.HasField("tenant") else None,
        idempotency_key=message.idempotency_key if message.HasField("idempotency_key") else None,
        deadline=ClientDeadline(remaining_s),
        num_bytes=message_bytes(message),
    )


def prompt_of(request: pb.GenerateRequest | pb.TokenizeRequest) -> Prompt | None:
    """The prompt that has to be encoded; None for token ids. Raises InvalidRequest."""
    kind = request.WhichOneof("prompt")
    if kind is None:
        fields = [field.name for field in request.DESCRIPTOR.oneofs_by_name["prompt"].fields]
        raise InvalidRequest(f"is missing; set {', '.join(fields[:-1])} or {fields[-1]}", "prompt")
    if kind == "token_ids":
        return None
    if kind == "text":
        return request.text
    return [(message.role, message.content) for message in request.chat.messages]


def _sampling_of(message: pb.SamplingParams) -> SamplingParams:
    given: dict[str, object] = {
        field.name: getattr(message, field.name)
        for field in message.DESCRIPTOR.fields
        if field.has_presence and message.HasField(field.name)
    }
    sampling = SamplingParams(
        logit_bias=dict(message.logit_bias),
        stop=tuple(message.stop),
        stop_token_ids=frozenset(message.stop_token_ids),
    )
    return msgspec.structs.replace(sampling, **given)
