"""Log-probabilities that are reported with tokens: the model's own, before bias, penalties and temperature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from anabranch.request.token import TokenLogprob
from anabranch.step.plan import SampleSpec


@dataclass(frozen=True, kw_only=True)
class Logprobs:
    """What is reported with a step's tokens, while it is tensors.

    Shape suffixes: R rows that report, K alternatives of the row with most.

    Attributes:
        num_rows: rows of the step.
        wanted: row -> number of alternatives.
        chosen_R, top_RK: float32; None where no row reports.
        top_ids_RK: int64.
    """

    num_rows: int
    wanted: dict[int, int]
    chosen_R: torch.Tensor | None = None
    top_RK: torch.Tensor | None = None
    top_ids_RK: torch.Tensor | None = None

    def to_host(self) -> Logprobs:
        """The same on its way to the CPU's memory: complete once the device has come so far."""
        if self.chosen_R is None or self.top_RK is None or self.top_ids_RK is None:
            return self
        return Logprobs(
            num_rows=self.num_rows,
            wanted=self.wanted,
            chosen_R=self.chosen_R.to("cpu", non_blocking=True),
            top_RK=self.top_RK.to("cpu", non_blocking=True),
            top_ids_RK=self.top_ids_RK.to("cpu", non_blocking=True),
        )

    def read(self) -> list[TokenLogprob | None]:
        """One entry for each row; None where the request asks for nothing."""
        reported: list[TokenLogprob | None] = [None] * self.num_rows
        if self.chosen_R is None or self.top_RK is None or self.top_ids_RK is None:
            return reported
        chosen: list[float] = self.chosen_R.tolist()
        top_ids: list[list[int]] = self.top_ids_RK.tolist()
        top_values: list[list[float]] = self.top_RK.tolist()
        for place, (row, count) in enumerate(self.wanted.items()):
            alternatives = zip(top_ids[place][:count], top_values[place][:count], strict=True)
            reported[row] = TokenLogprob(logprob=chosen[place], top=tuple(alternatives))
        return reported


def token_logprobs(logits_SV: torch.Tensor, tokens_S: torch.Tensor, specs: Sequence[SampleSpec]) -> Logprobs:
    """`log_softmax` of the raw logits at each chosen token, with the likeliest `params.logprobs` alternatives.

    Args:
        logits_SV: float32, as the model gave them.
        tokens_S: int64, the chosen tokens.
    """
    wanted = {row: count for row, spec in enumerate(specs) if (count := spec.params.logprobs) is not None}
    if not wanted:
        return Logprobs(num_rows=len(specs), wanted=wanted)
    rows = torch.tensor(list(wanted)).to(logits_SV.device, non_blocking=True)
    logprobs_RV = logits_SV[rows].log_softmax(dim=-1)
    top = logprobs_RV.topk(min(max(wanted.values()), logits_SV.shape[1]), dim=-1)
    return Logprobs(
        num_rows=len(specs),
        wanted=wanted,
        chosen_R=logprobs_RV.gather(1, tokens_S[rows].unsqueeze(1)).squeeze(1),
        top_RK=top.values,
        top_ids_RK=top.indices,
    )
