"""Ragged batches over a paged pool with shuffled blocks, for kernel tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from anabranch.cache.paged_kv import LayerKv, PagedKv
from anabranch.step.batch import ForwardBatch
from anabranch.step.plan import SequencePlan, StepPlan


@dataclass(frozen=True, kw_only=True)
class Case:
    q: torch.Tensor
    kv: LayerKv
    batch: ForwardBatch


def build_case(
    *,
    lens: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """`lens`: per sequence, (new tokens, context length with them). K, V and q are random."""
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-context // block_size) for _, context in lens]
    num_blocks = sum(needed) + 3
    order = torch.randperm(num_blocks, generator=generator).tolist()
    sequences = []
    for b, (num_new, context) in enumerate(lens):
        blocks = tuple(order.pop() for _ in range(needed[b]))
        sequences.append(
            SequencePlan(
                request_id=f"r{b}",
                epoch=0,
                token_ids=tuple(range(num_new)),
                start=context - num_new,
                block_ids=blocks,
            )
        )
    batch = ForwardBatch.from_plan(StepPlan(step=0, sequences=tuple(sequences)), block_size, torch.device("cpu"))
    paged = PagedKv(
        num_layers=2,
        num_blocks=num_blocks,
        block_size=block_size,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    paged.data.copy_(torch.randn(paged.data.shape, generator=generator))
    q = torch.randn((batch.num_tokens, heads, head_dim), generator=generator).to(dtype)
    return Case(q=q, kv=paged.layer(1), batch=batch)


@pytest.fixture
def make_case() -> Callable[..., Case]:
    """`build_case`, for test modules, which cannot import one another."""
    return build_case
