"""Requests as a client sends them, with the time at which each token came."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

from anabranch_client import AsyncClient, Finished, Sampling, Tokens


@dataclass
class Answer:
    """One streamed answer.

    Attributes:
        sent_s: `time.perf_counter()` when the request was sent.
        token_s: the same clock, when each token came; tokens of one event share a time.
        token_ids: the tokens.
    """

    sent_s: float
    token_s: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finished: Finished | None = None

    @property
    def ttft_s(self) -> float:
        return self.token_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        """Times between tokens, with the time at which each gap ended left out."""
        return [after - before for before, after in zip(self.token_s, self.token_s[1:], strict=False)]

    def gaps_between_s(self, start_s: float, stop_s: float) -> list[float]:
        """Inter-token times of the tokens that came from `start_s` to `stop_s`."""
        pairs = zip(self.token_s, self.token_s[1:], strict=False)
        return [after - before for before, after in pairs if start_s <= after <= stop_s]


def random_prompt(rng: random.Random, num_tokens: int, vocab_size: int) -> list[int]:
    """Token ids that no prefix cache has seen."""
    return [rng.randrange(1000, vocab_size) for _ in range(num_tokens)]


async def ask(client: AsyncClient, prompt: list[int], max_tokens: int, answer: Answer | None = None) -> Answer:
    """Stream one greedy answer of exactly `max_tokens` tokens; `answer` fills up as tokens come."""
    answer = answer or Answer(sent_s=time.perf_counter())
    sampling = Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    async with client.generate(prompt, sampling) as stream:
        async for event in stream:
            match event:
                case Tokens():
                    answer.token_ids.extend(event.token_ids)
                    answer.token_s.extend([time.perf_counter()] * len(event.token_ids))
                case Finished():
                    answer.finished = event
    return answer


def quantile(values: list[float], share: float) -> float:
    """The value below which `share` of `values` lie, by nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
