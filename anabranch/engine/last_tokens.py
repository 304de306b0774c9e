"""The tokens that the last step sampled, kept on the rank's device: what the next step may go on with, unseen."""

from __future__ import annotations

import torch

from anabranch.engine.plan import StepPlan
from anabranch.errors import AnabranchError


class LastTokens:
    """One rank's; steps `begin`, fill in what they follow, and `keep` what they sample."""

    def __init__(self) -> None:
        self._before_S: torch.Tensor | None = None
        self._kept_S: torch.Tensor | None = None

    def begin(self) -> None:
        """A step begins: what was kept is now the step's before. Should it fail, nothing can follow it."""
        self._before_S, self._kept_S = self._kept_S, None

    def fill_in(self, plan: StepPlan, token_ids_T: torch.Tensor) -> None:
        """Write the tokens that sequences of `plan` follow in their places.

        Args:
            plan: all sequences of a pass; those that follow have one new token.
            token_ids_T: int64, the pass's new tokens in the plan's order.

        Raises:
            AnabranchError: the step before failed.
        """
        rows: list[int] = []
        places: list[int] = []
        row = 0
        for sequence in plan.sequences:
            if sequence.follows is not None:
                rows.append(row)
                places.append(sequence.follows)
            row += len(sequence.token_ids)
        if not rows:
            return
        if self._before_S is None:
            raise AnabranchError("the step before failed, and with it the tokens that this one goes on with")
        both = torch.tensor((rows, places)).to(token_ids_T.device, non_blocking=True)
        token_ids_T.index_copy_(0, both[0], self._before_S.index_select(0, both[1]))

    def keep(self, tokens_S: torch.Tensor) -> None:
        """Keep a step's tokens, int64, in the order of its plan's sequences that sample."""
        self._kept_S = tokens_S
