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
from orchestrator.served_model import Messages, Prompt, ServedModel, num_chars_of

_CLIENT_ID = re.compile(r"[!-~]{1,128}")


def drawn_id() -> str:
    """A request's own id, which no other request has or had; a client's id may come twice."""
    return uuid.uuid4().hex


def client_id_of(request: pb.GenerateRequest) -> str:
    """The client's name for its request, "" where it gave none. Raises InvalidRequest."""
    if request.request_id and not _CLIENT_ID.fullmatch(request.request_id):
        raise InvalidRequest("must have 1 to 128 printable ASCII characters without spaces", "request_id")
    return request.request_id


def sampling_of(message: pb.SamplingParams, vocab_size: int, eos_token_ids: Sequence[int]) -> SamplingParams:
    """Sampling parameters, checked; unless the client ignores them, with the model's own stop tokens.

    Raises:
        InvalidRequest: names the field.
    """
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
    sampling = msgspec.structs.replace(sampling, **given)
    sampling.validate(vocab_size)
    if message.ignore_eos:
        return sampling
    return msgspec.structs.replace(sampling, stop_token_ids=sampling.stop_token_ids.union(eos_token_ids))


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


def check_num_ids(num_ids: int, limit: ContextLimit) -> None:
    """Raise ContextExceeded for more prompt tokens than the context has room for."""
    if num_ids >= limit.num_tokens:
        raise _too_long(num_ids, limit)


def checked_ids(ids: Sequence[int], vocab_size: int, limit: ContextLimit) -> tuple[int, ...]:
    """A prompt of token ids. Raises InvalidRequest, ContextExceeded."""
    if not ids:
        raise InvalidRequest("is empty", "token_ids")
    # Before looking at each, so that a huge list is not walked on the event loop.
    check_num_ids(len(ids), limit)
    for position, token_id in enumerate(ids):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"{token_id} at position {position} is out of range; ids go from 0 to {vocab_size - 1}", "token_ids"
            )
    return tuple(ids)


def text_or_messages(
    request: pb.GenerateRequest | pb.TokenizeRequest, model: ServedModel, max_chars: int
) -> Prompt | None:
    """The prompt that has to be encoded, of bounded size; None for token ids. Raises InvalidRequest."""
    kind = request.WhichOneof("prompt")
    if kind is None:
        fields = [field.name for field in request.DESCRIPTOR.oneofs_by_name["prompt"].fields]
        raise InvalidRequest(f"is missing; set {', '.join(fields[:-1])} or {fields[-1]}", "prompt")
    if kind == "token_ids":
        return None
    prompt = _messages(request.chat, model) if kind == "chat" else request.text
    if not prompt:
        raise InvalidRequest("is empty", kind)
    num_chars = num_chars_of(prompt)
    if num_chars > max_chars:
        raise InvalidRequest(f"has {num_chars} characters; max_prompt_chars allows {max_chars}", kind)
    return prompt


def _messages(chat: pb.Chat, model: ServedModel) -> Messages:
    if not model.has_chat_template:
        raise InvalidRequest(f"the model {model.name} has no chat template; send text or token_ids", "chat")
    messages = [(message.role, message.content) for message in chat.messages]
    for position, (role, _) in enumerate(messages):
        if not role:
            raise InvalidRequest(f"message {position} has no role", "chat")
    return messages


def check_fits(prompt: Prompt, longest_token_chars: int | None, limit: ContextLimit) -> None:
    """Refuse a text that no tokenizing could fit into the context. Raises ContextExceeded.

    A chat may pass: its template may leave messages out.
    """
    if longest_token_chars is None or not isinstance(prompt, str):
        return
    if len(prompt) > limit.num_tokens * longest_token_chars:
        raise ContextExceeded(
            f"has {len(prompt)} characters; a token has at most {longest_token_chars}, and the context holds "
            f"{limit.num_tokens} tokens{limit.remedy}",
            "prompt",
        )


def _too_long(num_tokens: int, limit: ContextLimit) -> ContextExceeded:
    return ContextExceeded(
        f"has {num_tokens} tokens; the context holds {limit.num_tokens}, and the answer needs at least 1{limit.remedy}",
        "prompt",
    )
