"""Whether a request can be taken, and what it becomes; each refusal names the field."""

from __future__ import annotations

import re
import secrets
import uuid
from collections.abc import Sequence

import msgspec

from anabranch.errors import ContextExceeded, InvalidRequest
from anabranch.request.sampling_params import SamplingParams
from orchestrator.context_limit import ContextLimit
from orchestrator.fair_order import MAX_PRIORITY, MIN_PRIORITY
from orchestrator.served_model import Prompt, ServedModel, num_chars_of
from orchestrator.submission import Submission

_NAME = re.compile(r"[!-~]{1,128}")


def drawn_id() -> str:
    """A request's own id, which no other request has or had; a client's id may come twice."""
    return uuid.uuid4().hex


def check_terms(submission: Submission) -> None:
    """Check what a request is called, who asks, and how urgently. Raises InvalidRequest, DeadlineExceeded."""
    names = {
        "request_id": submission.client_id or None,
        "tenant": submission.tenant,
        "idempotency_key": submission.idempotency_key,
    }
    for field, name in names.items():
        if name is not None and not _NAME.fullmatch(name):
            raise InvalidRequest("must have 1 to 128 printable ASCII characters without spaces, or be left out", field)
    if not MIN_PRIORITY <= submission.priority <= MAX_PRIORITY:
        raise InvalidRequest(
            f"is {submission.priority}; give {MIN_PRIORITY} (goes first) to {MAX_PRIORITY}", "priority"
        )
    submission.deadline.check()


def checked_sampling(submission: Submission, model: ServedModel) -> SamplingParams:
    """Sampling parameters, checked; unless the client ignores them, with the model's own stop tokens.

    Raises:
        InvalidRequest: names the field.
    """
    sampling = submission.sampling
    sampling.validate(model.vocab_size)
    if submission.ignore_eos:
        return sampling
    return msgspec.structs.replace(sampling, stop_token_ids=sampling.stop_token_ids.union(model.eos_token_ids))


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


def check_ids(ids: Sequence[int], vocab_size: int, limit: ContextLimit) -> None:
    """Check a prompt of token ids. Raises InvalidRequest, ContextExceeded."""
    if not ids:
        raise InvalidRequest("is empty", "token_ids")
    # Before looking at each, so that a huge list is not walked on the event loop.
    check_num_ids(len(ids), limit)
    for position, token_id in enumerate(ids):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"{token_id} at position {position} is out of range; ids go from 0 to {vocab_size - 1}", "token_ids"
            )


def check_prompt(prompt: Prompt, model: ServedModel, max_chars: int) -> None:
    """Check a text, or a chat's messages. Raises InvalidRequest."""
    field = "text" if isinstance(prompt, str) else "chat"
    if field == "chat" and not model.has_chat_template:
        raise InvalidRequest(f"the model {model.name} has no chat template; send text or token_ids", field)
    if not isinstance(prompt, str):
        for position, (role, _) in enumerate(prompt):
            if not role:
                raise InvalidRequest(f"message {position} has no role", field)
    if not prompt:
        raise InvalidRequest("is empty", field)
    num_chars = num_chars_of(prompt)
    if num_chars > max_chars:
        raise InvalidRequest(f"has {num_chars} characters; max_prompt_chars allows {max_chars}", field)


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
