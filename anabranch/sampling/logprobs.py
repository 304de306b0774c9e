"""Log-probabilities that are reported with tokens: the model's own, before bias, penalties and temperature."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from anabranch.engine.plan import SampleSpec
from anabranch.protocol.requests import TokenLogprob


def token_logprobs(
    logits_SV: torch.Tensor, tokens_S: torch.Tensor, specs: Sequence[SampleSpec]
) -> list[TokenLogprob | None]:
    """`log_softmax` of the raw logits at each chosen token, with the likeliest `params.logprobs` alternatives.

    Args:
        logits_SV: float32, as the model gave them.
        tokens_S: int64, the chosen tokens.

    Returns:
        One entry for each row; None where the request asks for nothing.
    """
    reported: list[TokenLogprob | None] = [None] * len(specs)
    wanted = {row: count for row, spec in enumerate(specs) if (count := spec.params.logprobs) is not None}
    if not wanted:
        return reported
    rows = torch.tensor(list(wanted)).to(logits_SV.device, non_blocking=True)
    logprobs_RV = logits_SV[rows].log_softmax(dim=-1)
    chosen: list[float] = logprobs_RV.gather(1, tokens_S[rows].unsqueeze(1)).squeeze(1).tolist()
    widest = min(max(wanted.values()), logits_SV.shape[1])
    top = logprobs_RV.topk(widest, dim=-1)
    top_ids: list[list[int]] = top.indices.tolist()
    top_values: list[list[float]] = top.values.tolist()
    for place, (row, count) in enumerate(wanted.items()):
        alternatives = zip(top_ids[place][:count], top_values[place][:count], strict=True)
        reported[row] = TokenLogprob(logprob=chosen[place], top=tuple(alternatives))
    return reported
