"""When a sequence is over, by token ids. Stop strings are found where tokens become text."""

from __future__ import annotations

from typing import Literal

from anabranch.request.sampling_params import SamplingParams

StopReason = Literal["stop", "length"]


class StopChecker:
    """Knows where the context ends.

    Args:
        max_context: most tokens, prompt and answer, of one request.
    """

    def __init__(self, max_context: int) -> None:
        self.max_context = max_context

    def check(self, params: SamplingParams, token_id: int, *, num_output: int, num_tokens: int) -> StopReason | None:
        """Whether `token_id`, just generated, is the last one.

        Args:
            num_output: generated tokens, this one included.
            num_tokens: prompt and generated tokens, this one included.

        Returns:
            stop: one of the request's stop tokens; length: `max_tokens` or the context is reached; None: go on.
        """
        if token_id in params.stop_token_ids:
            return "stop"
        return "length" if self.is_full(params, num_output=num_output, num_tokens=num_tokens) else None

    def is_full(self, params: SamplingParams, *, num_output: int, num_tokens: int) -> bool:
        """Whether an answer of this length ends whatever its last token is; see `check`."""
        return (params.max_tokens is not None and num_output >= params.max_tokens) or num_tokens >= self.max_context
