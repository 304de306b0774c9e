"""A plan as tensors: every token at its position and slot, whatever the mixture of prompts and decode rows."""

from __future__ import annotations

import pytest
import torch

from anabranch.request.sampling_params import SamplingParams
from anabranch.step.batch import ForwardBatch
from anabranch.step.plan import SampleSpec, SequencePlan, StepPlan

pytestmark = pytest.mark.unit

SAMPLE = SampleSpec(params=SamplingParams(), index=0)


def part(
    name: str, token_ids: tuple[int, ...], start: int, block_ids: tuple[int, ...], *, sampled: bool
) -> SequencePlan:
    return SequencePlan(
        request_id=name,
        epoch=0,
        token_ids=token_ids,
        start=start,
        block_ids=block_ids,
        sample=SAMPLE if sampled else None,
    )


def batch_of(*parts: SequencePlan, block_size: int = 4) -> ForwardBatch:
    return ForwardBatch.from_plan(StepPlan(step=1, sequences=parts), block_size, torch.device("cpu"))


def test_a_chunk_a_decode_row_and_a_whole_prompt() -> None:
    batch = batch_of(
        part("chunk", (11, 12, 13), 2, (7, 3), sampled=False),
        part("decode", (21,), 9, (5, 0, 8), sampled=True),
        part("prompt", (31, 32), 0, (2,), sampled=True),
    )
    assert batch.token_ids_T.tolist() == [11, 12, 13, 21, 31, 32]
    assert batch.positions_T.tolist() == [2, 3, 4, 9, 0, 1]
    # Block id x 4 + offset: the chunk crosses from block 7 to block 3.
    assert batch.slots_T.tolist() == [30, 31, 12, 33, 8, 9]
    assert (batch.query_starts, batch.context_lens) == ((0, 3, 4, 6), (5, 10, 2))
    assert batch.query_starts_B1.tolist() == [0, 3, 4, 6]
    assert batch.context_lens_B.tolist() == [5, 10, 2]
    assert batch.block_tables_BN.tolist() == [[7, 3, 0], [5, 0, 8], [2, 0, 0]]
    assert batch.sample_rows_S.tolist() == [3, 5]
    assert (batch.num_sequences, batch.num_tokens) == (3, 6)


def test_dtypes_are_those_that_kernels_read() -> None:
    batch = batch_of(part("a", (1,), 0, (0,), sampled=True))
    for name in ("token_ids_T", "positions_T", "slots_T", "sample_rows_S"):
        assert getattr(batch, name).dtype == torch.int64
    for name in ("query_starts_B1", "context_lens_B", "block_tables_BN"):
        assert getattr(batch, name).dtype == torch.int32


def test_nothing_is_sampled_within_a_prompt() -> None:
    batch = batch_of(part("a", (1, 2), 0, (0,), sampled=False))
    assert batch.sample_rows_S.shape == (0,)
    assert batch.sample_rows_S.dtype == torch.int64


def test_blocks_beyond_what_is_computed_are_in_the_table_and_in_no_slot() -> None:
    batch = batch_of(part("a", (1, 2), 0, (9, 4, 6), sampled=False))
    assert batch.slots_T.tolist() == [36, 37]
    assert batch.block_tables_BN.tolist() == [[9, 4, 6]]
