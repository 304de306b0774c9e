"""Turns a step plan into tensors, runs the model, samples: one forward pass, no policy.

With one CP rank, a plan is one pass over its ragged batch. With several, its parts with many new tokens go
round the ring (each rank computes its share of the tokens), and its decode rows are joined by a tree (each
rank computes them all over its share of the KV): two passes where a plan has both.
"""

from __future__ import annotations

from typing import Protocol

import torch

from anabranch.cache.paged_kv import PagedKv
from anabranch.engine.attention import LayerSink, PagedAttention
from anabranch.engine.batch import ForwardBatch
from anabranch.engine.plan import SampledToken, SampleSpec, StepPlan, StepResult
from anabranch.engine.step_programs import StepPrograms
from anabranch.kernels.base import Kernels
from anabranch.model.attention import Attention
from anabranch.model.transformer import Transformer
from anabranch.parallel.context import RankContext
from anabranch.parallel.cp_batch import RingBatch, TreeBatch
from anabranch.parallel.pass_rule import PassRule
from anabranch.parallel.ring_attention import RingAttention
from anabranch.parallel.tree_attention import TreeAttention
from anabranch.parallel.tree_reduce import Reduction
from anabranch.protocol.requests import TokenLogprob
from anabranch.sampling.sampler import Sampler


class Batch(Protocol):
    """What the three kinds of batches have in common."""

    @property
    def token_ids_T(self) -> torch.Tensor: ...

    @property
    def positions_T(self) -> torch.Tensor: ...

    @property
    def sample_rows_S(self) -> torch.Tensor: ...


class StoredSink:
    """Attention that tells a sink once a layer's KV is stored, by whichever rank owns it."""

    def __init__(self, attention: Attention, sink: LayerSink) -> None:
        self.attention = attention
        self.sink = sink

    def attend(
        self,
        layer: int,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Attention.attend`."""
        result = self.attention.attend(layer, q_THD, k_TKD, v_TKD, scale, window)
        self.sink.layer_stored(layer)
        return result


class Runner:
    """Executes step plans on one rank.

    Args:
        model: weights of this rank.
        kv: this rank's share of the KV pool.
        kernels: what the model computes with.
        context: the rank's place in its mesh.
        pass_rule, reduction: of ring and tree attention; needed where there are several CP ranks.
        programs: recorded decode steps; None: every step is computed call by call.
    """

    def __init__(
        self,
        model: Transformer,
        kv: PagedKv,
        kernels: Kernels,
        device: torch.device,
        context: RankContext,
        pass_rule: PassRule | None = None,
        reduction: Reduction | None = None,
        programs: StepPrograms | None = None,
    ) -> None:
        self.model = model
        self.kv = kv
        self.kernels = kernels
        self.device = device
        self.context = context
        self.pass_rule = pass_rule
        self.reduction = reduction
        self.programs = programs
        self.sampler = Sampler()

    @torch.inference_mode()
    def execute(self, plan: StepPlan, sink: LayerSink | None = None) -> StepResult:
        """Run one step.

        Args:
            sink: hears of each layer as soon as its KV is stored on this rank.

        Returns:
            The sampled tokens, in the plan's order of sequences that sample; none on ranks that do not drive.
        """
        if self.context.cp is None:
            return self._forward(plan, sink)
        prompts = tuple(s for s in plan.sequences if s.num_new_tokens > 1)
        decodes = tuple(s for s in plan.sequences if s.num_new_tokens == 1)
        if not prompts or not decodes:
            return self._forward(plan, sink)
        parts = [self._forward(StepPlan(step=plan.step, sequences=part), sink) for part in (prompts, decodes)]
        return StepResult(step=plan.step, tokens=tuple(token for part in parts for token in part.tokens))

    def _forward(self, plan: StepPlan, sink: LayerSink | None) -> StepResult:
        if sink is not None:
            sink.begin_pass(plan)
        if sink is None and self.programs is not None and self.programs.covers(plan):
            share_SV = self.programs.forward(plan)
        else:
            batch, attention = self._lay_out(plan, sink)
            share_SV = self.model.forward_share(batch.token_ids_T, batch.positions_T, attention, batch.sample_rows_S)
        sampling = [(sequence, sequence.sample) for sequence in plan.sequences if sequence.sample is not None]
        if not sampling:
            return StepResult(step=plan.step, tokens=())
        chosen = self._choose(share_SV, [spec for _, spec in sampling])
        if not self.context.drives:
            return StepResult(step=plan.step, tokens=())
        return StepResult(
            step=plan.step,
            tokens=tuple(
                SampledToken(
                    request_id=sequence.request_id,
                    epoch=sequence.epoch,
                    index=spec.index,
                    token_id=token_id,
                    logprob=logprob,
                )
                for (sequence, spec), (token_id, logprob) in zip(sampling, chosen, strict=True)
            ),
        )

    def _choose(self, share_SV: torch.Tensor, specs: list[SampleSpec]) -> list[tuple[int, TokenLogprob | None]]:
        """Tokens from the ranks' shares of the logits; every rank calls it, and the one that drives is answered."""
        head = self.model.lm_head
        if not any(spec.params.needs_all_logits for spec in specs):
            return [(token_id, None) for token_id in head.argmax(share_SV).tolist()]
        logits_SV = head.gather(share_SV)
        return self.sampler.sample(logits_SV, specs) if self.context.drives else []

    def _lay_out(self, plan: StepPlan, sink: LayerSink | None) -> tuple[Batch, Attention]:
        size, cp = self.kv.block_size, self.context.cp
        if cp is None:
            paged = ForwardBatch.from_plan(plan, size, self.device)
            return paged, PagedAttention(self.kernels, self.kv, paged, sink)
        if any(sequence.num_new_tokens > 1 for sequence in plan.sequences):
            assert self.pass_rule is not None
            ring = RingBatch.from_plan(plan, size, cp.rank, cp.size, self.device)
            attention = RingAttention(self.kernels, self.kv, ring, cp, self.pass_rule.choose(plan))
            return ring, attention if sink is None else StoredSink(attention, sink)
        assert self.reduction is not None
        tree = TreeBatch.from_plan(plan, size, cp.rank, cp.size, self.device)
        joined = TreeAttention(self.kernels, self.kv, tree, self.reduction)
        return tree, joined if sink is None else StoredSink(joined, sink)
