"""What a client may say about how tokens are chosen."""

from __future__ import annotations

import math
from typing import Annotated

import msgspec
from msgspec import Meta

from anabranch.bounds import Extent, Int63
from anabranch.errors import InvalidRequest

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKEN_IDS = 256
# Of a model, beside a client's.
MAX_MODEL_STOP_IDS = 64

StopString = Annotated[str, Meta(max_length=MAX_STOP_STRING_CHARS)]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sampling of one request.

    Attributes:
        max_tokens: most tokens to generate; None: up to the end of the context.
        temperature: 0 is greedy.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens whose probabilities reach p; 1 keeps all.
        min_p: drop tokens less likely than this share of the likeliest; 0 drops none.
        repetition_penalty: over prompt and output; 1 is none.
        presence_penalty: subtracted once for each token already generated.
        frequency_penalty: subtracted for every time that a token was generated.
        seed: makes sampling repeat; None draws one.
        logit_bias: token id -> value added to its logit.
        logprobs: number of likeliest alternatives to report with each token; None reports nothing.
        stop: strings that end the answer; the string itself is not returned.
        stop_token_ids: ids that end the answer, and have no text: the client's and, unless it asked to go on past
            them, the model's. Workers know no others.
    """

    max_tokens: Int63 | None = None
    temperature: float = 0.0
    top_k: Int63 = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: Int63 | None = None
    logit_bias: Annotated[dict[Extent, float], Meta(max_length=MAX_LOGIT_BIAS)] = {}
    logprobs: Extent | None = None
    stop: Annotated[tuple[StopString, ...], Meta(max_length=MAX_STOP_STRINGS)] = ()
    stop_token_ids: Annotated[frozenset[Extent], Meta(max_length=MAX_STOP_TOKEN_IDS + MAX_MODEL_STOP_IDS)] = frozenset()

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def needs_history(self) -> bool:
        """Whether choosing a token looks at the tokens before it."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def needs_all_logits(self) -> bool:
        """Whether choosing or reporting a token takes more than finding the largest of the model's logits."""
        return not self.greedy or self.needs_history or bool(self.logit_bias) or self.logprobs is not None

    def validate(self, vocab_size: int) -> None:
        """Raise InvalidRequest, naming the first field that is out of range."""

        def check(ok: bool, field: str, rule: str) -> None:
            if not ok:
                raise InvalidRequest(f"is {getattr(self, field)!r}; it must be {rule}", field)

        for field in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            check(math.isfinite(getattr(self, field)), field, "a finite number")
        check(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1")
        check(0.0 <= self.temperature <= 100.0, "temperature", "between 0 and 100")
        check(self.top_k >= 0, "top_k", "at least 0 (0 keeps all tokens)")
        check(0.0 < self.top_p <= 1.0, "top_p", "above 0 and at most 1")
        check(0.0 <= self.min_p <= 1.0, "min_p", "between 0 and 1")
        check(0.0 < self.repetition_penalty <= 100.0, "repetition_penalty", "above 0 and at most 100")
        check(abs(self.presence_penalty) <= 100.0, "presence_penalty", "between -100 and 100")
        check(abs(self.frequency_penalty) <= 100.0, "frequency_penalty", "between -100 and 100")
        check(self.seed is None or 0 <= self.seed < 2**63, "seed", "between 0 and 2**63 - 1")
        check(self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, "logprobs", f"between 0 and {MAX_LOGPROBS}")
        check(len(self.logit_bias) <= MAX_LOGIT_BIAS, "logit_bias", f"at most {MAX_LOGIT_BIAS} entries")
        check(
            all(0 <= token < vocab_size and math.isfinite(bias) for token, bias in self.logit_bias.items()),
            "logit_bias",
            f"finite values for ids from 0 to {vocab_size - 1}",
        )
        check(len(self.stop) <= MAX_STOP_STRINGS, "stop", f"at most {MAX_STOP_STRINGS} strings")
        check(
            all(0 < len(text) <= MAX_STOP_STRING_CHARS for text in self.stop),
            "stop",
            f"strings of 1 to {MAX_STOP_STRING_CHARS} characters",
        )
        most = MAX_STOP_TOKEN_IDS + MAX_MODEL_STOP_IDS
        check(len(self.stop_token_ids) <= most, "stop_token_ids", f"at most {most} ids")
        check(
            all(0 <= token < vocab_size for token in self.stop_token_ids),
            "stop_token_ids",
            f"ids from 0 to {vocab_size - 1}",
        )
