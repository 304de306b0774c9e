"""Prompts by ring attention, answers by tree attention, over one placement of KV: transformers' tokens."""

from __future__ import annotations

import pytest
import torch

from anabranch.attention.cp_batch import RingBatch, TreeBatch
from anabranch.attention.ring import RingAttention
from anabranch.attention.tree import TreeAttention
from anabranch.attention.tree_reduce import TreeReduction
from anabranch.cache.paged_kv import PagedKv
from anabranch.kernels.plain import PlainKernels
from anabranch.parallel.mesh import Mesh
from anabranch.parallel.threads import run_ranks
from anabranch.request.sampling_params import SamplingParams
from anabranch.step.plan import SampleSpec, SequencePlan, StepPlan

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")
BLOCK_SIZE = 3
NUM_OUTPUT = 12
GREEDY = SampleSpec(params=SamplingParams(), index=0)


class MeshRank:
    """One rank of a `tp x cp` mesh that runs step plans."""

    def __init__(self, group, mesh: Mesh, load, folder) -> None:
        self.cp_rank, self.cp = mesh.cp_rank(group.rank), mesh.cp
        self.tp_group = group.split(self.cp_rank)
        self.cp_group = group.split(mesh.tp_rank(group.rank))
        self.model = load(folder, self.tp_group)
        half = self.model.attention.layers[0]
        self.kv = PagedKv(
            num_layers=len(self.model.attention.layers),
            num_blocks=64,
            block_size=BLOCK_SIZE,
            num_kv_heads=half.num_kv_heads,
            head_dim=self.model.attention.config.head_dim,
            dtype=torch.float32,
            device=CPU,
        )
        self.reduction = TreeReduction(self.cp_group)
        self.step = 0

    def prompt_step(self, sequences: list[SequencePlan]) -> torch.Tensor:
        """Logits of the sampled rows on CP rank 0, none elsewhere."""
        self.step += 1
        plan = StepPlan(step=self.step, sequences=tuple(sequences))
        batch = RingBatch.from_plan(plan, BLOCK_SIZE, self.cp_rank, self.cp, CPU)
        variant = "pass_kv" if self.step % 2 else "pass_q"
        attention = RingAttention(PlainKernels(), self.kv, batch, self.cp_group, variant)
        share_SV = self.model.run(
            self.model.attention.forward(batch.token_ids_T, batch.positions_T, attention, batch.sample_rows_S)
        )
        return self.model.attention.lm_head.gather(share_SV)

    def decode_step(self, sequences: list[SequencePlan]) -> torch.Tensor:
        """Logits of the sampled rows, on every rank."""
        self.step += 1
        plan = StepPlan(step=self.step, sequences=tuple(sequences))
        batch = TreeBatch.from_plan(plan, BLOCK_SIZE, self.cp_rank, self.cp, CPU)
        attention = TreeAttention(PlainKernels(), self.kv, batch, self.reduction)
        share_SV = self.model.run(
            self.model.attention.forward(batch.token_ids_T, batch.positions_T, attention, batch.sample_rows_S)
        )
        return self.model.attention.lm_head.gather(share_SV)


def part(name: str, ids: list[int], start: int, stop: int, block_ids: tuple[int, ...], *, sample: bool) -> SequencePlan:
    return SequencePlan(
        request_id=name,
        epoch=0,
        token_ids=tuple(ids[start:stop]),
        start=start,
        block_ids=block_ids,
        sample=GREEDY if sample else None,
    )


@pytest.mark.parametrize(("tp", "cp"), [(1, 3), (2, 2)])
def test_every_family_equals_transformers(tp, cp, recipe, make_model, load, prompt, reference_tokens) -> None:
    """Two prompts that differ in length, the second with a prefix that the first left in the cache."""
    folder, reference = make_model(recipe)
    shared = BLOCK_SIZE * cp
    prompts = [prompt, [*prompt[:shared], 5, 80]]
    expected = [reference_tokens(reference, ids, NUM_OUTPUT) for ids in prompts]
    tables = [tuple(range(20)), (0, *range(30, 50))]  # the second one's first span is the first one's

    def rank_main(group) -> list[list[int]]:
        rank = MeshRank(group, Mesh(tp=tp, cp=cp), load, folder)
        ids = [list(p) for p in prompts]

        def take(row: torch.Tensor | None) -> int:
            token = 0 if row is None else int(row.argmax())
            return int(group.all_gather(torch.tensor([token]), 0)[0])

        first = shared + 1
        rank.prompt_step([part("a", ids[0], 0, first, tables[0], sample=False)])
        # One step with the rest of the first prompt and what the second one does not find in the cache.
        logits = rank.prompt_step(
            [
                part("a", ids[0], first, len(prompt), tables[0], sample=True),
                part("b", ids[1], shared, len(ids[1]), tables[1], sample=True),
            ]
        )
        assert logits.shape[0] == (2 if rank.cp_rank == 0 else 0)
        for b in range(2):
            ids[b].append(take(logits[b] if group.rank == 0 else None))
        for _ in range(NUM_OUTPUT - 1):
            rows = [part("ab"[b], ids[b], len(ids[b]) - 1, len(ids[b]), tables[b], sample=True) for b in range(2)]
            logits = rank.decode_step(rows)
            for b in range(2):
                ids[b].append(int(logits[b].argmax()))
        return [ids[b][len(prompts[b]) :] for b in range(2)]

    for generated in run_ranks(tp * cp, rank_main):
        assert generated == expected


def test_a_prompt_of_one_token_leaves_ranks_without_rows(make_model, load, reference_tokens) -> None:
    folder, reference = make_model("qwen2-moe-mixed")
    expected = reference_tokens(reference, [9], 1)

    def rank_main(group) -> list[int]:
        rank = MeshRank(group, Mesh(cp=3), load, folder)
        return [int(row.argmax()) for row in rank.prompt_step([part("a", [9], 0, 1, (4,), sample=True)])]

    assert run_ranks(3, rank_main) == [expected, [], []]
