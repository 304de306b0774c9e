"""Turns a step plan into tensors, runs the model, samples: one forward pass, no policy."""

from __future__ import annotations

import torch

from anabranch.cache.paged_kv import PagedKv
from anabranch.engine.attention import LayerSink, PagedAttention
from anabranch.engine.batch import ForwardBatch
from anabranch.engine.plan import SampledToken, StepPlan, StepResult
from anabranch.kernels.base import Kernels
from anabranch.model.transformer import Transformer
from anabranch.sampling.sampler import Sampler


class Runner:
    """Executes step plans on one rank.

    Args:
        model: weights of this rank.
        kv: this rank's share of the KV pool.
        kernels: what the model computes with.
    """

    def __init__(self, model: Transformer, kv: PagedKv, kernels: Kernels, device: torch.device) -> None:
        self.model = model
        self.kv = kv
        self.kernels = kernels
        self.device = device
        self.sampler = Sampler()

    @torch.inference_mode()
    def execute(self, plan: StepPlan, sink: LayerSink | None = None) -> StepResult:
        """Run one forward pass.

        Args:
            sink: hears of each layer as soon as its KV is stored.

        Returns:
            The sampled tokens, in the plan's order of sequences that sample.
        """
        batch = ForwardBatch.from_plan(plan, self.kv.block_size, self.device)
        attention = PagedAttention(self.kernels, self.kv, batch, sink)
        logits_SV = self.model.forward(batch.token_ids_T, batch.positions_T, attention, batch.sample_rows_S)
        sampling = [sequence for sequence in plan.sequences if sequence.sample is not None]
        if not sampling:
            return StepResult(step=plan.step, tokens=())
        chosen = self.sampler.sample(logits_SV, [s.sample for s in sampling if s.sample is not None])
        return StepResult(
            step=plan.step,
            tokens=tuple(
                SampledToken(
                    request_id=sequence.request_id,
                    epoch=sequence.epoch,
                    index=sequence.sample.index,
                    token_id=token_id,
                    logprob=logprob,
                )
                for sequence, (token_id, logprob) in zip(sampling, chosen, strict=True)
                if sequence.sample is not None
            ),
        )
