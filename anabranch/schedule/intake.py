"""What an engine accepts: the last check before a request takes room."""

from __future__ import annotations

from anabranch.errors import ContextExceeded, InvalidRequest
from anabranch.request.request import Request


def check_request(request: Request, *, vocab_size: int, max_context: int) -> None:
    """Raise InvalidRequest, naming the field, for what this engine can never compute."""
    if not request.prompt_ids:
        raise InvalidRequest("must not be empty", "prompt_ids")
    if not all(0 <= token < vocab_size for token in request.token_ids):
        raise InvalidRequest(f"must be from 0 to {vocab_size - 1}", "prompt_ids")
    if request.sampling.max_tokens is None:
        raise InvalidRequest("must be set before a request reaches a worker", "max_tokens")
    if len(request.output_ids) >= request.sampling.max_tokens:
        raise InvalidRequest("is reached by the tokens already delivered", "max_tokens")
    num_tokens = len(request.prompt_ids) + request.sampling.max_tokens
    if num_tokens > max_context:
        raise ContextExceeded(
            f"{len(request.prompt_ids)} prompt tokens and {request.sampling.max_tokens} new ones exceed "
            f"the context of {max_context} tokens",
            "max_tokens",
        )
    request.sampling.validate(vocab_size)
