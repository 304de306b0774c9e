"""From a client's message to a request that workers can take, or an error that names the field."""

from __future__ import annotations

import re
import secrets
import uuid
from collections.abc import Sequence

import msgspec

from anabranch.errors import ContextExceeded, InvalidRequest
from anabranch.request.sampling_params import SamplingParams
from anabranch_client.v1 import anabranch_pb2 as pb
from orchestrator.context_limit import ContextLimit
from orchestrator.served_model import ServedModel

_REQUEST_ID = re.compile(r"[!-~]{1,128}")
MAX_CHAT_MESSAGES = 1024

Messages = Sequence[tuple[str, str]]


def request_id_of(request: pb.GenerateRequest) -> str:
    """The client's id, or a drawn one. Raises InvalidRequest."""
    if not request.request_id:
        return uuid.uuid4().hex
    if not _REQUEST_ID.fullmatch(request.request_id):
        raise InvalidRequest("must have 1 to 128 printable ASCII characters without spaces", "request_id")
    return request.request_id


def sampling_of(message: pb.SamplingParams, vocab_size: int) -> SamplingParams:
    """Sampling parameters, checked. Raises InvalidRequest."""
    given: dict[str, object] = {
        field.name: getattr(message, field.name)
        for field in message.DESCRIPTOR.fields
        if field.has_presence and message.HasField(field.name)
    }
    sampling = SamplingParams(
        logit_bias=dict(message.logit_bias),
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
    )
    sampling = msgspec.structs.replace(sampling, **given)
    sampling.validate(vocab_size)
    return sampling


def fitted(sampling: SamplingParams, num_prompt_tokens: int, limit: ContextLimit) -> SamplingParams:
    """Sampling with `max_tokens` and, unless greedy, `seed` set. Raises ContextExceeded with the numbers."""
    room = limit.num_tokens - num_prompt_tokens
    if room < 1:
        raise _too_long(num_prompt_tokens, limit)
    max_tokens = room if sampling.max_tokens is None else sampling.max_tokens
    if max_tokens > room:
        raise ContextExceeded(
            f"is {max_tokens}; with a prompt of {num_prompt_tokens} tokens the context of {limit.num_tokens} "
            f"has room for {room}{limit.remedy}",
            "max_tokens",
        )
    seed = sampling.seed
    if seed is None and not sampling.greedy:
        seed = secrets.randbits(63)
    return msgspec.structs.replace(sampling, max_tokens=max_tokens, seed=seed)


def checked_ids(ids: Sequence[int], vocab_size: int, limit: ContextLimit) -> tuple[int, ...]:
    """A prompt of token ids. Raises InvalidRequest, ContextExceeded."""
    if not ids:
        raise InvalidRequest("is empty", "token_ids")
    # Before looking at each, so that a huge list is not walked on the event loop.
    if len(ids) >= limit.num_tokens:
        raise _too_long(len(ids), limit)
    for position, token_id in enumerate(ids):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"{token_id} at position {position} is out of range; ids go from 0 to {vocab_size - 1}", "token_ids"
            )
    return tuple(ids)


def text_or_messages(request: pb.GenerateRequest | pb.TokenizeRequest) -> str | Messages | None:
    """The prompt that has to be encoded; None for token ids. Raises InvalidRequest."""
    kind = request.WhichOneof("prompt")
    if kind is None:
        fields = [field.name for field in request.DESCRIPTOR.oneofs_by_name["prompt"].fields]
        raise InvalidRequest(f"is missing; set {', '.join(fields[:-1])} or {fields[-1]}", "prompt")
    if kind == "text":
        if not request.text:
            raise InvalidRequest("is empty", "text")
        return request.text
    if kind == "chat":
        messages = [(message.role, message.content) for message in request.chat.messages]
        if not 1 <= len(messages) <= MAX_CHAT_MESSAGES:
            raise InvalidRequest(f"has {len(messages)} messages; it must have 1 to {MAX_CHAT_MESSAGES}", "chat")
        for position, (role, _) in enumerate(messages):
            if not role:
                raise InvalidRequest(f"message {position} has no role", "chat")
        return messages
    return None


def encode(model: ServedModel, prompt: str | Messages) -> list[int]:
    """Token ids of a prompt; takes long for long ones. Raises InvalidRequest."""
    if isinstance(prompt, str):
        return model.encode(prompt)
    if not model.has_chat_template:
        raise InvalidRequest(f"the model {model.name} has no chat template; send text or token_ids", "chat")
    return model.encode_chat(prompt)


def _too_long(num_tokens: int, limit: ContextLimit) -> ContextExceeded:
    return ContextExceeded(
        f"has {num_tokens} tokens; the context holds {limit.num_tokens}, and the answer needs at least 1{limit.remedy}",
        "prompt",
    )
