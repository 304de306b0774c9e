"""A step's tokens on their way to the scheduler: on a GPU they are computed after the step has been launched."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from anabranch.request.ffn_times import FfnTimes, FfnTraffic
from anabranch.sampling.logprobs import Logprobs
from anabranch.step.plan import SampledToken, SequencePlan, StepResult


class PendingResult:
    """What one step will have sampled; made on the thread that launched the step, read on any.

    Args:
        sequences: those that sample.
        tokens_S: int64, their tokens, on the device; None: this rank reports nothing.

    Attributes:
        ffn, ffn_traffic: see `StepResult`.
    """

    ffn: FfnTimes | None = None
    ffn_traffic: FfnTraffic | None = None

    def __init__(
        self,
        step: int,
        sequences: Sequence[SequencePlan] = (),
        tokens_S: torch.Tensor | None = None,
        logprobs: Sequence[Logprobs] = (),
    ) -> None:
        self._step = step
        self._sequences = sequences
        self._tokens_S = tokens_S
        self._logprobs = logprobs
        self._copied: torch.cuda.Event | None = None
        if tokens_S is not None and tokens_S.is_cuda:
            self._tokens_S = tokens_S.to("cpu", non_blocking=True)
            self._logprobs = [part.to_host() for part in logprobs]
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def result(self) -> StepResult:
        """Wait for the device and read what was sampled, in the order of `sequences`."""
        if self._copied is not None:
            self._copied.synchronize()
        if self._tokens_S is None:
            return StepResult(step=self._step, tokens=())
        token_ids: list[int] = self._tokens_S.tolist()
        reported = [entry for part in self._logprobs for entry in part.read()]
        tokens = []
        for sequence, token_id, logprob in zip(self._sequences, token_ids, reported, strict=True):
            assert sequence.sample is not None
            tokens.append(
                SampledToken(
                    request_id=sequence.request_id,
                    epoch=sequence.epoch,
                    index=sequence.sample.index,
                    token_id=token_id,
                    logprob=logprob,
                )
            )
        return StepResult(step=self._step, tokens=tuple(tokens), ffn=self.ffn, ffn_traffic=self.ffn_traffic)
