"""A sequence batch with known K and V, in the pools of CP ranks and as whole tensors to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec
import pytest
import torch

from anabranch.cache.paged_kv import PagedKv
from anabranch.kernels.plain import attend
from anabranch.parallel.placement import BlockCyclic
from anabranch.request.sampling_params import SamplingParams
from anabranch.step.plan import SampleSpec, SequencePlan, StepPlan

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class World:
    """A step over sequences whose q, K and V of all positions are known, `[tokens, heads, D]` per sequence."""

    plan: StepPlan
    placement: BlockCyclic
    num_blocks: int
    q: list[torch.Tensor]
    k: list[torch.Tensor]
    v: list[torch.Tensor]

    @property
    def new(self) -> list[tuple[int, int]]:
        """(sequence, position) of every new token, in the plan's order."""
        return [(b, p) for b, s in enumerate(self.plan.sequences) for p in range(s.start, s.context_len)]

    def rows(self, tensors: list[torch.Tensor], tokens: list[tuple[int, int]]) -> torch.Tensor:
        """The rows of `(sequence, position)` tokens."""
        if not tokens:
            return tensors[0][:0]
        return torch.stack([tensors[b][p] for b, p in tokens])

    def pool(self, rank: int, *, all_tokens: bool = False) -> PagedKv:
        """Rank's pool: cached tokens (or all that the step leaves there) in their slots, NaN elsewhere."""
        pool = PagedKv(
            num_layers=1,
            num_blocks=self.num_blocks,
            block_size=self.placement.block_size,
            num_kv_heads=self.k[0].shape[1],
            head_dim=self.k[0].shape[2],
            dtype=self.k[0].dtype,
            device=CPU,
        )
        pool.data.fill_(torch.nan)
        k_slots, v_slots = pool.layer(0).slots()
        for b, sequence in enumerate(self.plan.sequences):
            for p in range(sequence.context_len if all_tokens else sequence.start):
                if self.placement.owner(p) == rank:
                    block = sequence.block_ids[p // self.placement.span]
                    slot = block * self.placement.block_size + p % self.placement.block_size
                    k_slots[slot], v_slots[slot] = self.k[b][p], self.v[b][p]
        return pool

    def in_chunks(self, size: int) -> Iterator[StepPlan]:
        """The plan cut into steps of at most `size` tokens of each sequence."""
        step = 0
        while any(s.start + step * size < s.context_len for s in self.plan.sequences):
            parts = []
            for s in self.plan.sequences:
                first = s.start + step * size
                ids = s.token_ids[step * size : (step + 1) * size]
                if ids:
                    parts.append(msgspec.structs.replace(s, start=first, token_ids=ids))
            step += 1
            yield StepPlan(step=step, sequences=tuple(parts))

    def expected(self, scale: float, window: int | None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """`(out, lse)` of each sequence at every position (zeros before the first new one), in float32."""
        outs, lses = [], []
        for b, sequence in enumerate(self.plan.sequences):
            q, start = self.q[b].float(), sequence.start
            out, lse = torch.zeros_like(q), torch.zeros(q.shape[:2])
            out[start:], lse[start:] = attend(q[start:], self.k[b].float(), self.v[b].float(), start, scale, window)
            outs.append(out)
            lses.append(lse)
        return outs, lses


def build_world(
    *,
    lens: list[tuple[int, int]],
    cp: int,
    block_size: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> World:
    """`lens`: per sequence, (new tokens, cached tokens)."""
    generator = torch.Generator().manual_seed(seed)
    placement = BlockCyclic(block_size=block_size, cp=cp)
    needed = [-(-(new + cached) // placement.span) for new, cached in lens]
    num_blocks = sum(needed) + 2
    order = torch.randperm(num_blocks, generator=generator).tolist()
    sequences = tuple(
        SequencePlan(
            request_id=f"r{b}",
            epoch=0,
            token_ids=tuple(100 * b + t for t in range(new)),
            start=cached,
            block_ids=tuple(order.pop() for _ in range(needed[b])),
            sample=SampleSpec(params=SamplingParams(), index=0) if b % 2 == 0 else None,
        )
        for b, (new, cached) in enumerate(lens)
    )

    def draw(num_heads: int) -> list[torch.Tensor]:
        return [torch.randn((new + cached, num_heads, head_dim), generator=generator).to(dtype) for new, cached in lens]

    return World(
        plan=StepPlan(step=1, sequences=sequences),
        placement=placement,
        num_blocks=num_blocks,
        q=draw(heads),
        k=draw(kv_heads),
        v=draw(kv_heads),
    )


@pytest.fixture
def make_world() -> Callable[..., World]:
    """`build_world`, for test modules, which cannot import one another."""
    return build_world
