"""The best token of a vocabulary that is dealt out to ranks is the best of the whole row."""

from __future__ import annotations

import pytest
import torch

from anabranch.kernels.plain import PlainKernels
from anabranch.model.embedding import LmHead
from anabranch.parallel.split import padded_share
from anabranch.parallel.threads import run_ranks

pytestmark = pytest.mark.unit

INF, NAN = float("inf"), float("nan")


def rows(vocab_size: int) -> torch.Tensor:
    """Ties, within a share and across shares; nothing finite; NaN; and chance."""
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn((12, vocab_size), generator=generator)
    last, middle = vocab_size - 1, vocab_size // 2
    logits[0] = 1.5
    logits[1, [middle, last]] = 9.0
    logits[2, [1, middle]] = 9.0
    logits[3] = -INF
    logits[4] = -INF
    logits[4, last] = -1e30
    logits[5, [middle, last]] = NAN
    logits[6] = NAN
    logits[7, [0, last]] = INF
    # Padded columns are zero: every real logit lies below.
    logits[8] = -5.0 - torch.arange(vocab_size).flip(0)
    logits[9] = -INF
    logits[9, middle] = NAN
    return logits


@pytest.mark.parametrize("vocab_size", [9, 12, 101])
@pytest.mark.parametrize("tp", [1, 2, 3, 4])
def test_the_best_is_that_of_the_whole_row(tp: int, vocab_size: int) -> None:
    logits = rows(vocab_size)

    def rank(group) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[no-untyped-def]
        share, held = padded_share(vocab_size, group.size, group.rank)
        head = LmHead(torch.zeros(share, 4), PlainKernels(), group, vocab_size)
        mine = torch.zeros(logits.shape[0], share)
        mine[:, : len(held)] = logits[:, held.start : held.stop]
        return head.argmax(mine), head.gather(mine)

    for best, gathered in run_ranks(tp, rank):
        assert best.dtype == torch.int64
        assert best.tolist() == logits.argmax(-1).tolist()
        torch.testing.assert_close(gathered, logits, equal_nan=True, rtol=0.0, atol=0.0)
