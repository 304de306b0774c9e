"""Turns a step plan into tensors, runs the model, samples: one forward pass, no policy.

With one CP rank, a plan is one pass over its ragged batch. With several, its parts with many new tokens go
round the ring (each rank computes its share of the tokens), and its decode rows are joined by a tree (each
rank computes them all over its share of the KV): two passes where a plan has both.

A rank that holds whole layers `launch`es a step. One that holds attention halves alone takes `steps`, which stop at
each FFN half until somebody brings its answer.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Protocol

import torch

from anabranch.attention.cp_batch import RingBatch, TreeBatch
from anabranch.attention.paged import LayerSink, PagedAttention
from anabranch.attention.pass_rule import PassRule
from anabranch.attention.ring import RingAttention
from anabranch.attention.tree import TreeAttention
from anabranch.attention.tree_reduce import Reduction
from anabranch.cache.paged_kv import PagedKv
from anabranch.engine.last_tokens import LastTokens
from anabranch.engine.pending import PendingResult
from anabranch.engine.sampling import RankSampler
from anabranch.engine.seam_programs import SeamPrograms
from anabranch.engine.step_programs import StepPrograms
from anabranch.kernels.base import Kernels
from anabranch.model.attention import Attention
from anabranch.model.attention_stack import AttentionStack
from anabranch.model.ffn_half import FfnCalls
from anabranch.model.transformer import Transformer
from anabranch.parallel.context import RankContext
from anabranch.sampling.logprobs import Logprobs
from anabranch.step.batch import ForwardBatch
from anabranch.step.plan import StepPlan, StepResult


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
        model: weights of this rank: whole layers, or attention halves alone.
        kv: this rank's share of the KV pool.
        kernels: what the model computes with.
        context: the rank's place in its mesh.
        pass_rule, reduction: of ring and tree attention; needed where there are several CP ranks.
        programs: recorded decode steps; None: every step is computed call by call.
    """

    def __init__(
        self,
        model: Transformer | AttentionStack,
        kv: PagedKv,
        kernels: Kernels,
        device: torch.device,
        context: RankContext,
        pass_rule: PassRule | None = None,
        reduction: Reduction | None = None,
        programs: StepPrograms | SeamPrograms | None = None,
    ) -> None:
        self.model = model
        self.kv = kv
        self.kernels = kernels
        self.device = device
        self.context = context
        self.pass_rule = pass_rule
        self.reduction = reduction
        self.programs = programs
        self.stack = model.attention if isinstance(model, Transformer) else model
        self.sampler = RankSampler(self.stack.lm_head, context, device)
        # By lane.
        self._last_tokens: defaultdict[int, LastTokens] = defaultdict(LastTokens)

    @torch.inference_mode()
    def launch(self, plan: StepPlan, sink: LayerSink | None = None) -> PendingResult:
        """Start one step of whole layers. On a GPU it returns as soon as the step is queued there.

        Args:
            sink: called for each layer as soon as its KV is stored on this rank.

        Returns:
            What will be sampled; nothing on ranks that do not drive.

        Raises:
            AnabranchError: a sequence follows a step that failed.
        """
        assert isinstance(self.model, Transformer)
        return self.model.run(self.steps(plan, sink))

    def steps(self, plan: StepPlan, sink: LayerSink | None = None) -> FfnCalls[PendingResult]:
        """One step that stops at each FFN half; to be begun and gone on with in inference mode.

        Steps of different lanes may go on in turn; a lane's next one begins when the last one has ended. See `launch`.
        """
        last_tokens = self._last_tokens[plan.lane]
        last_tokens.begin()
        passes = self._passes(plan)
        sampled = []
        for part in passes:
            sampled.append((yield from self._forward(part, sink, last_tokens)))
        tokens_S = sampled[0][0] if len(passes) == 1 else torch.cat([tokens for tokens, _ in sampled])
        sequences = [sequence for part in passes for sequence in part.sequences if sequence.sample is not None]
        if len(passes) == 1:
            last_tokens.keep(tokens_S)
        else:
            places = {id(sequence): place for place, sequence in enumerate(sequences)}
            order = [places[id(sequence)] for sequence in plan.sequences if sequence.sample is not None]
            last_tokens.keep(tokens_S[torch.tensor(order, dtype=torch.int64).to(self.device)])
        if not self.context.drives:
            return PendingResult(plan.step)
        return PendingResult(plan.step, sequences, tokens_S, [logprobs for _, logprobs in sampled])

    def execute(self, plan: StepPlan, sink: LayerSink | None = None) -> StepResult:
        """Compute one step of whole layers to its end; see `launch`."""
        return self.launch(plan, sink).result()

    def _passes(self, plan: StepPlan) -> list[StepPlan]:
        if self.context.cp is None:
            return [plan]
        prompts = tuple(s for s in plan.sequences if s.num_new_tokens > 1)
        decodes = tuple(s for s in plan.sequences if s.num_new_tokens == 1)
        if not prompts or not decodes:
            return [plan]
        return [StepPlan(step=plan.step, sequences=part, lane=plan.lane) for part in (prompts, decodes)]

    def _forward(
        self, plan: StepPlan, sink: LayerSink | None, last_tokens: LastTokens
    ) -> FfnCalls[tuple[torch.Tensor, Logprobs]]:
        if sink is not None:
            sink.begin_pass(plan)
        if sink is None and self.programs is not None and self.programs.covers(plan):
            share_SV = yield from self.programs.forward(plan, last_tokens)
            return self.sampler.sample(share_SV, last_tokens.specs(plan))
        batch, attention = self._lay_out(plan, sink)
        last_tokens.fill_in(plan, batch.token_ids_T)
        rows_S = batch.sample_rows_S if self.sampler.needs_logits else batch.sample_rows_S[:0]
        share_SV = yield from self.stack.forward(batch.token_ids_T, batch.positions_T, attention, rows_S)
        return self.sampler.sample(share_SV, last_tokens.specs(plan))

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
