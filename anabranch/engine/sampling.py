"""Sampling on the ranks: every rank of a mesh ends a step with the tokens that it sampled, and so can begin the next.

    first CP rank:  greedy rows    each TP rank's best of its share of the vocabulary -> (logit, id) to all -> the best
                    other rows     gathered over the TP ranks -> the first of them chooses -> its choice to all
    other CP ranks: told by the first one of their TP rank

So a greedy row costs 16 bytes a rank where its logits would cost four bytes a token of the vocabulary. Ranks may
differ in CPU or number of threads, and with these the last bits of a matrix product or of a sum of probabilities;
that is why nothing is worked out twice: either ranks choose from the same gathered numbers by comparisons alone,
which are exact, or one rank chooses and the others are told.

Shape suffixes: S sampled rows, R some of them, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from anabranch.model.embedding import LmHead
from anabranch.parallel.context import RankContext
from anabranch.sampling.logprobs import Logprobs, token_logprobs
from anabranch.sampling.sampler import Sampler
from anabranch.step.plan import SampleSpec


class RankSampler:
    """One rank's part; every rank of the mesh calls it for the same rows in the same order.

    Args:
        lm_head: gathers and compares the shares that it computes.
        context: the rank's place in its mesh.
    """

    def __init__(self, lm_head: LmHead, context: RankContext, device: torch.device) -> None:
        self._lm_head = lm_head
        self._context = context
        self._device = device
        self._sampler = Sampler()

    @property
    def needs_logits(self) -> bool:
        """Whether this rank has to compute its share of the logits."""
        return self._context.cp_rank == 0

    def sample(self, share_SV: torch.Tensor, specs: Sequence[SampleSpec]) -> tuple[torch.Tensor, Logprobs]:
        """Choose one token for each row.

        Args:
            share_SV: this rank's share of the logits; not looked at where none are needed.

        Returns:
            The tokens, int64 `[S]` on the rank's device, the same on every rank; and what is to be reported with
            them, on the driving rank (elsewhere there may be less).

        Raises:
            InvalidRequest: a row that is not greedy has no seed.
            PeerLost, DeadlineExceeded: see `Handle.wait`.
        """
        if not specs:
            return self._room(0), _nothing(specs)
        if self.needs_logits:
            tokens_S, logprobs = self._choose(share_SV, specs)
        else:
            tokens_S, logprobs = self._room(len(specs)), _nothing(specs)
        self._tell(tokens_S)
        return tokens_S, logprobs

    def _choose(self, share_SV: torch.Tensor, specs: Sequence[SampleSpec]) -> tuple[torch.Tensor, Logprobs]:
        tp = self._context.tp
        rows = [row for row, spec in enumerate(specs) if spec.params.needs_all_logits]
        if tp.size == 1 and rows:
            logits_SV = self._lm_head.gather(share_SV)
            tokens_S = self._sampler.choose(logits_SV, specs)
            return tokens_S, token_logprobs(logits_SV, tokens_S, specs)
        tokens_S = self._room(len(specs)) if len(rows) == len(specs) else self._lm_head.argmax(share_SV)
        if not rows:
            return tokens_S, _nothing(specs)
        rows_R = torch.tensor(rows).to(self._device, non_blocking=True)
        logits_RV = self._lm_head.gather(share_SV.index_select(0, rows_R))
        theirs = [specs[row] for row in rows]
        chosen_R, logprobs = self._room(len(rows)), _nothing(specs)
        if tp.rank == 0:
            chosen_R = self._sampler.choose(logits_RV, theirs)
            reported = token_logprobs(logits_RV, chosen_R, theirs)
            wanted = {rows[row]: count for row, count in reported.wanted.items()}
            logprobs = replace(reported, num_rows=len(specs), wanted=wanted)
        tokens_S.index_copy_(0, rows_R, tp.all_gather(chosen_R.unsqueeze(0), 0)[0])
        return tokens_S, logprobs

    def _tell(self, tokens_S: torch.Tensor) -> None:
        cp = self._context.cp
        if cp is None:
            return
        if cp.rank:
            cp.post((), 0, [tokens_S], 0).wait()
            return
        handles = [cp.post([tokens_S], rank, (), 0) for rank in range(1, cp.size)]
        for handle in handles:
            handle.wait()

    def _room(self, num_rows: int) -> torch.Tensor:
        return torch.zeros(num_rows, dtype=torch.int64, device=self._device)


def _nothing(specs: Sequence[SampleSpec]) -> Logprobs:
    return Logprobs(num_rows=len(specs), wanted={})
