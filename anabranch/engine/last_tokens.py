"""The tokens that the last step sampled, kept on the rank's device: what the next step may go on with, unseen."""

from __future__ import annotations

import msgspec
import torch

from anabranch.errors import AnabranchError
from anabranch.step.plan import SampleSpec, SequencePlan, StepPlan


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
        both = torch.tensor((rows, places)).to(token_ids_T.device, non_blocking=True)
        token_ids_T.index_copy_(0, both[0], self._previous().index_select(0, both[1]))

    def specs(self, plan: StepPlan) -> list[SampleSpec]:
        """Of a pass's sequences that sample, with the tokens that they follow where choosing asks for what came before.

        On a GPU that waits for the step before. Raises as `fill_in` does.
        """
        return [self._spec(sequence, sequence.sample) for sequence in plan.sequences if sequence.sample is not None]

    def _spec(self, sequence: SequencePlan, spec: SampleSpec) -> SampleSpec:
        if sequence.follows is None or not spec.params.needs_history:
            return spec
        followed = int(self._previous()[sequence.follows])
        return msgspec.structs.replace(spec, output_ids=(*spec.output_ids, followed))

    def _previous(self) -> torch.Tensor:
        if self._before_S is None:
            raise AnabranchError("the step before failed, and with it the tokens that this one goes on with")
        return self._before_S

    def keep(self, tokens_S: torch.Tensor) -> None:
        """Keep a step's tokens, int64, in the order of its plan's sequences that sample."""
        self._kept_S = tokens_S
