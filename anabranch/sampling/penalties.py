"""What a request adds to its logits before anything is drawn: bias, and penalties for repeating."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from anabranch.step.plan import SampleSpec


def apply_penalties(logits_SV: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
    """Logit bias, then repetition, then presence and frequency penalty.

    Repetition divides positive and multiplies negative logits of every token in prompt or output (Keskar et al.
    2019, CTRL, section 4.1); presence and frequency are subtracted for tokens of the output alone.

    Returns:
        The changed logits; `logits_SV` itself, untouched, when no request asks for a change.
    """
    rows = [row for row, spec in enumerate(specs) if spec.params.logit_bias or spec.params.needs_history]
    if not rows:
        return logits_SV
    logits_SV = logits_SV.clone()
    vocab_size = logits_SV.shape[1]
    for row in rows:
        spec, logits_V = specs[row], logits_SV[row]
        params = spec.params
        if params.logit_bias:
            ids, biases = _columns(params.logit_bias, logits_V)
            logits_V[ids] += biases
        if params.repetition_penalty != 1.0:
            seen = {*spec.prompt_ids, *spec.output_ids}
            ids, _ = _columns(dict.fromkeys((i for i in seen if i < vocab_size), 0.0), logits_V)
            scores = logits_V[ids]
            penalty = params.repetition_penalty
            logits_V[ids] = torch.where(scores < 0, scores * penalty, scores / penalty)
        if params.presence_penalty or params.frequency_penalty:
            counts = Counter(token_id for token_id in spec.output_ids if token_id < vocab_size)
            losses = {i: params.presence_penalty + params.frequency_penalty * count for i, count in counts.items()}
            ids, amounts = _columns(losses, logits_V)
            logits_V[ids] -= amounts
    return logits_SV


def _columns(values: dict[int, float], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor(list(values), dtype=torch.int64).to(like.device, non_blocking=True)
    amounts = torch.tensor(list(values.values()), dtype=like.dtype).to(like.device, non_blocking=True)
    return ids, amounts
