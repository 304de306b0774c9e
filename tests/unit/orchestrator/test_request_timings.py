"""What a request's time went into."""

from __future__ import annotations

import pytest

from anabranch.protocol.kv import KvStreamStats
from anabranch.protocol.workers import Ended, PrefillEnded
from anabranch.request.ffn_times import FfnTimes
from orchestrator.attempt import Attempt
from orchestrator.history import History
from orchestrator.request_timings import RequestTimings
from orchestrator.router import Route
from tests.unit.orchestrator.test_router import member, request

pytestmark = pytest.mark.unit


class Ordered:
    """The part of an attempt that the timings read."""

    def __init__(self, ordered_at: float) -> None:
        self.ordered_at = ordered_at


def report(**more: object) -> PrefillEnded:
    return PrefillEnded(request_id="r", epoch=0, **more)


def finish(timings: RequestTimings, num_output_tokens: int, now: float):
    history = History(max_recoveries=3, max_given_back=8)
    history.ended(Attempt(request(), Route(member("d", "decode"), member("p", "prefill"))))
    return timings.finished("stop", num_prompt_tokens=3, num_output_tokens=num_output_tokens, history=history, now=now)


def test_one_attempt():
    timings = RequestTimings(100.0)
    kv = KvStreamStats(payload_bytes=1000, transport="ucx", stream_s=0.5, exposed_s=0.05)
    timings.prefilled(Ordered(101.0), report(queue_s=0.5, prefill_s=2.0, num_cached_tokens=7, kv=kv))
    timings.tokens_came(104.0)
    timings.tokens_came(105.0)
    timings.tokens_came(107.0)
    done = finish(timings, 4, 108.0)
    assert done.timings.queue_s == 1.5
    assert done.timings.prefill_s == 2.0
    assert done.timings.kv_stream_s == 0.5
    assert done.timings.ttft_s == 4.0
    assert done.timings.tpot_s == 1.0
    assert done.timings.e2e_s == 8.0
    assert done.num_cached_tokens == 7
    assert (done.kv.num_bytes, done.kv.transport) == (1000, "ucx")
    assert done.kv.overlap == pytest.approx(0.9)


def test_attempts_add_up_but_the_queue_is_the_firsts():
    timings = RequestTimings(100.0)
    for ordered_at, stream_s, exposed_s in ((101.0, 1.0, 1.0), (150.0, 3.0, 0.0)):
        kv = KvStreamStats(payload_bytes=10, transport="tcp", stream_s=stream_s, exposed_s=exposed_s)
        timings.prefilled(Ordered(ordered_at), report(queue_s=0.5, prefill_s=2.0, kv=kv))
    timings.tokens_came(104.0)
    done = finish(timings, 1, 160.0)
    assert (done.timings.queue_s, done.timings.prefill_s, done.timings.kv_stream_s) == (1.5, 4.0, 4.0)
    assert done.kv.num_bytes == 20
    assert done.kv.overlap == pytest.approx(0.75)
    assert done.timings.tpot_s == 0.0


def test_a_colocated_worker_streams_nothing():
    timings = RequestTimings(0.0)
    ended = Ended(request_id="r", epoch=0, reason="stop", queue_s=0.25, prefill_s=0.5, num_cached_tokens=1)
    timings.prefilled(Ordered(1.0), ended)
    timings.tokens_came(2.0)
    done = finish(timings, 2, 3.0)
    assert done.kv is None
    assert (done.timings.queue_s, done.timings.prefill_s, done.num_cached_tokens) == (1.25, 0.5, 1)


def test_what_ffns_cost_adds_up_over_attempts():
    timings = RequestTimings(0.0)
    timings.generated(Ended(request_id="r", epoch=0, reason="preempted"))
    assert finish(timings, 2, 3.0).ffn is None
    cost = FfnTimes(queue_s=0.5, compute_s=1.0, way_s=0.25, num_answers=10, merged_rows=35)
    for epoch, reason in ((1, "preempted"), (2, "stop")):
        timings.generated(Ended(request_id="r", epoch=epoch, reason=reason, ffn=cost))
    assert finish(timings, 2, 3.0).ffn == FfnTimes(
        queue_s=1.0, compute_s=2.0, way_s=0.5, num_answers=20, merged_rows=70
    )


def test_what_recoveries_take_lasts_until_the_next_token() -> None:
    timings = RequestTimings(0.0)
    timings.failed(1.0)
    timings.failed(2.0)
    timings.tokens_came(4.0)
    timings.tokens_came(5.0)
    timings.failed(6.0)
    assert finish(timings, 2, 6.5).timings.recovery_s == 3.5
