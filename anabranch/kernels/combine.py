"""How the answers of a token's chosen experts become one row, wherever the experts are computed.

Shape suffixes: T tokens, S chosen experts of a token, A assignments (a token and one of its experts), C hidden.
"""

from __future__ import annotations

import torch


def combine_slots(answers_TSC: torch.Tensor, weights_TS: torch.Tensor, *, shared: bool = False) -> torch.Tensor:
    """`[T, C]` in the answers' dtype: each token's choices in their order, weighted and summed in float32.

    Args:
        answers_TSC: in the model's dtype.
        weights_TS: float32.
        shared: the last choice is the shared expert: weighted and added in the answers' dtype, after the others' sum,
            as by a layer that has all its experts.
    """
    if shared:
        chosen_TC = combine_slots(answers_TSC[:, :-1], weights_TS[:, :-1])
        return chosen_TC + weights_TS[:, -1:].to(answers_TSC.dtype) * answers_TSC[:, -1]
    return (answers_TSC * weights_TS.unsqueeze(-1)).sum(1).to(answers_TSC.dtype)


def sum_assignments(
    answers_AC: torch.Tensor, weights_A: torch.Tensor, rows_A: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """`[num_rows, C]` float32: the weighted sum of each row's assignments, in the order of the assignments.

    Args:
        answers_AC: in the model's dtype.
        weights_A: float32.
        rows_A: int32 or int64, below `num_rows`.
    """
    sum_TC = torch.zeros((num_rows, answers_AC.shape[1]), dtype=torch.float32, device=answers_AC.device)
    return sum_TC.index_add_(0, rows_A, answers_AC.float() * weights_A.unsqueeze(-1))
