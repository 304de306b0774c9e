"""What one request's time went into, over all its attempts."""

from __future__ import annotations

from anabranch.protocol.workers import Ended, PrefillEnded
from anabranch.request.ffn_times import FfnTimes
from orchestrator.answer import Finished, FinishReason, KvTransfer, Timings
from orchestrator.attempt import Attempt
from orchestrator.history import History


class RequestTimings:
    """Gathers timings; times are of `time.monotonic`.

    `queue_s` and the cached tokens are the first attempt's; prefill's and the KV streams' costs add up.
    """

    def __init__(self, accepted_at: float) -> None:
        self._accepted_at = accepted_at
        self._queue_s: float | None = None
        self._num_cached_tokens = 0
        self._prefill_s = 0.0
        self._first_token_at: float | None = None
        self._last_token_at = accepted_at
        self._kv_bytes = 0
        self._kv_stream_s = 0.0
        self._kv_exposed_s = 0.0
        self._kv_transport = ""
        self._ffn: FfnTimes | None = None
        self._failed_at: float | None = None
        self._recovery_s = 0.0

    def failed(self, now: float) -> None:
        """A worker failed the request."""
        if self._failed_at is None:
            self._failed_at = now

    def _recovered(self, now: float) -> None:
        if self._failed_at is not None:
            self._recovery_s += now - self._failed_at
            self._failed_at = None

    def tokens_came(self, now: float) -> None:
        self._recovered(now)
        if self._first_token_at is None:
            self._first_token_at = now
        self._last_token_at = now

    def prefilled(self, attempt: Attempt, report: PrefillEnded | Ended) -> None:
        """A prompt was computed, by a prefill or a colocated worker."""
        assert attempt.ordered_at is not None
        if self._queue_s is None:
            self._queue_s = attempt.ordered_at - self._accepted_at + report.queue_s
            self._num_cached_tokens = report.num_cached_tokens
        self._prefill_s += report.prefill_s
        if isinstance(report, PrefillEnded) and report.kv is not None:
            self._kv_bytes += report.kv.payload_bytes
            self._kv_stream_s += report.kv.stream_s
            self._kv_exposed_s += (1.0 - report.kv.overlap) * report.kv.stream_s
            self._kv_transport = report.kv.transport

    def generated(self, report: Ended) -> None:
        """A worker has ended an attempt."""
        if report.ffn is not None:
            self._ffn = report.ffn if self._ffn is None else self._ffn + report.ffn

    def finished(
        self,
        reason: FinishReason,
        *,
        num_prompt_tokens: int,
        num_output_tokens: int,
        history: History,
        now: float,
    ) -> Finished:
        """The end of an answer that is complete."""
        self._recovered(now)
        first = self._first_token_at if self._first_token_at is not None else now
        overlap = 1.0 - self._kv_exposed_s / self._kv_stream_s if self._kv_stream_s > 0.0 else 1.0
        return Finished(
            finish_reason=reason,
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=num_output_tokens,
            num_cached_tokens=self._num_cached_tokens,
            timings=Timings(
                queue_s=self._queue_s or 0.0,
                prefill_s=self._prefill_s,
                kv_stream_s=self._kv_stream_s,
                ttft_s=first - self._accepted_at,
                tpot_s=(self._last_token_at - first) / (num_output_tokens - 1) if num_output_tokens > 1 else 0.0,
                e2e_s=now - self._accepted_at,
                recovery_s=self._recovery_s,
            ),
            route=history.routes[-1].workers,
            kv=KvTransfer(num_bytes=self._kv_bytes, transport=self._kv_transport, overlap=overlap)
            if self._kv_transport
            else None,
            ffn=self._ffn,
            num_recoveries=history.num_recoveries,
            routes=history.routes,
        )
