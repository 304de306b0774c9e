"""Chooses the next token of every row of a step.

    raw logits -> bias and penalties -> greedy rows:  argmax
                                     -> sampled rows: temperature -> top-k -> top-p -> min-p -> argmax(+ noise)

The order is that of transformers. Rows never see each other: a row's token is a function of its logits, its
parameters, its seed and its index alone.

Shape suffixes: S rows, R some of the rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from anabranch.errors import InvalidRequest
from anabranch.request.token import TokenLogprob
from anabranch.sampling.filters import Filters, draw, survivors
from anabranch.sampling.logprobs import token_logprobs
from anabranch.sampling.noise import gumbel_noise, noise_key
from anabranch.sampling.penalties import apply_penalties
from anabranch.step.plan import SampleSpec

# Colder than this a softmax in float32 is an argmax.
_MIN_TEMPERATURE = 1e-5
# On a CPU a dozen passes over fewer logits than this stay in its caches; over more, they go to memory.
_CPU_CHUNK_ELEMENTS = 1 << 17


class Sampler:
    """Samples in torch, on the device of the logits.

    Args:
        plain: filter by sorting, the reference for the faster way that is taken otherwise; the tokens are the same.
    """

    def __init__(self, *, plain: bool = False) -> None:
        self._plain = plain
        self._vocab_ids_1V = torch.empty((1, 0), dtype=torch.int32)

    def sample(self, logits_SV: torch.Tensor, specs: Sequence[SampleSpec]) -> list[tuple[int, TokenLogprob | None]]:
        """Choose one token for each row.

        Args:
            logits_SV: float32; left as they are.
            specs: one for each row.

        Returns:
            `(token id, log-probabilities or None)` for each row.

        Raises:
            InvalidRequest: a row that is not greedy has no seed.
        """
        tokens_S = self.choose(logits_SV, specs)
        reported = token_logprobs(logits_SV, tokens_S, specs).read()
        token_ids: list[int] = tokens_S.tolist()
        return list(zip(token_ids, reported, strict=True))

    def choose(self, logits_SV: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
        """The token of each row, int64 `[S]`, on the logits' device; see `sample`."""
        assert logits_SV.shape[0] == len(specs)
        if not specs:
            return torch.empty(0, dtype=torch.int64, device=logits_SV.device)
        return self._choose(apply_penalties(logits_SV, specs), specs)

    def _choose(self, logits_SV: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
        sampled = [row for row, spec in enumerate(specs) if not spec.params.greedy]
        if len(sampled) < len(specs):
            tokens_S = logits_SV.argmax(dim=-1)
        else:
            tokens_S = torch.empty(len(specs), dtype=torch.int64, device=logits_SV.device)
        max_rows = len(specs)
        if logits_SV.device.type == "cpu":
            max_rows = max(1, _CPU_CHUNK_ELEMENTS // logits_SV.shape[1])
        for first in range(0, len(sampled), max_rows):
            rows = sampled[first : first + max_rows]
            rows_R = torch.tensor(rows).to(logits_SV.device, non_blocking=True)
            tokens_S[rows_R] = self._draw(logits_SV[rows_R], [specs[row] for row in rows])
        return tokens_S

    def _draw(self, logits_RV: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
        scores_RV = _tempered(logits_RV, specs)
        noise_RV = gumbel_noise(_keys(specs), self._vocab_ids(scores_RV))
        filters = Filters.of([spec.params for spec in specs], scores_RV.shape[1], scores_RV.device)
        if self._plain:
            return (survivors(scores_RV, filters) + noise_RV).argmax(dim=-1)
        return draw(scores_RV, noise_RV, filters)

    def _vocab_ids(self, like_RV: torch.Tensor) -> torch.Tensor:
        if self._vocab_ids_1V.shape[1] != like_RV.shape[1] or self._vocab_ids_1V.device != like_RV.device:
            self._vocab_ids_1V = torch.arange(like_RV.shape[1], dtype=torch.int32, device=like_RV.device).unsqueeze(0)
        return self._vocab_ids_1V


def _tempered(logits_RV: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
    """Logits over temperature, shifted so that each row's largest is 0 and nothing overflows."""
    temperatures = [max(spec.params.temperature, _MIN_TEMPERATURE) for spec in specs]
    divisors_R1 = torch.tensor(temperatures).unsqueeze(1).to(logits_RV.device, non_blocking=True)
    return (logits_RV - logits_RV.amax(dim=-1, keepdim=True)) / divisors_R1


def _keys(specs: Sequence[SampleSpec]) -> list[tuple[int, int]]:
    keys = []
    for spec in specs:
        if spec.params.seed is None:
            raise InvalidRequest("is not set; sampling needs one", "seed")
        keys.append(noise_key(spec.params.seed, spec.index))
    return keys
