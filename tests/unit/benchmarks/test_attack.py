"""The attack benchmark sees a fault where there is one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from anabranch_client.v1 import anabranch_pb2 as pb
from anabranch_client.v1 import anabranch_pb2_grpc as pb_grpc
from benchmarks.attack import calls
from benchmarks.attack.calls import Calls
from benchmarks.attack.census import Census, Holdings
from benchmarks.attack.figures import Outcome, figures_of
from benchmarks.attack.probe import Probe
from benchmarks.attack.tally import Tally

pytestmark = pytest.mark.unit

HELD = Holdings(num_descriptors=10, num_threads=4, rss_bytes=100 << 20)
BEFORE = Census(
    holdings={"orchestrator": HELD, "decode-0": HELD},
    free_blocks={"decode-0": 64},
    num_leases=0,
    num_requests=0,
    workers=("decode-0",),
)


def census(**changes: object) -> Census:
    return Census(**{**{field: getattr(BEFORE, field) for field in BEFORE.__dataclass_fields__}, **changes})


def missed(tally: Tally, after: Census = BEFORE, num_wrong: int = 0, sockets: tuple[str, ...] = ()) -> set[str]:
    """Keys of the figures that miss their targets."""
    probe = Probe(None, tally, 1)  # type: ignore[arg-type]
    probe.num_right, probe.num_wrong = 9, num_wrong
    outcome = Outcome(
        tally=tally,
        probe=probe,
        before=BEFORE,
        after_attacks=after,
        after_kills=BEFORE,
        unlisted_sockets=sockets,
        phase_s={},
    )
    return {figure.key for figure in figures_of(outcome) if figure.met is False}


def test_a_clean_run_misses_nothing() -> None:
    tally = Tally()
    for phase, end in (
        ("calls", "OK"),
        ("calls", "INVALID_ARGUMENT.invalid_request"),
        ("cancels", "accepted"),
        ("kills", "probe.worker_died"),
        ("connections", "stalled.reset"),
    ):
        tally.count(phase, end)
    assert not missed(tally)


@pytest.mark.parametrize(
    ("phase", "end", "key"),
    [
        ("calls", "INTERNAL.internal", "status.INTERNAL"),
        ("calls", "UNKNOWN.grpc", "status.UNKNOWN"),
        ("cancels", "error.internal", "errors.unnamed"),
        ("victims", "unknown", "errors.unnamed"),
        ("calls", "hung", "hung"),
        ("connections", "silent.open", "hung"),
        ("control", "register.ACCEPTED", "let_in"),
        ("slices", "ack.ACCEPTED", "let_in"),
        ("freezes", "probe.worker_died", "answers.missing"),
    ],
)
def test_what_should_not_happen_misses_its_target(phase: str, end: str, key: str) -> None:
    tally = Tally()
    tally.count(phase, end)
    assert key in missed(tally)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"free_blocks": {"decode-0": 63}}, "after_attacks.decode-0.free_blocks"),
        ({"num_leases": 1}, "after_attacks.leases"),
        ({"num_requests": 1}, "after_attacks.requests"),
        (
            {"holdings": {"decode-0": Holdings(num_descriptors=11, num_threads=4, rss_bytes=100 << 20)}},
            "after_attacks.decode-0.descriptors",
        ),
        (
            {"holdings": {"decode-0": Holdings(num_descriptors=10, num_threads=14, rss_bytes=100 << 20)}},
            "after_attacks.decode-0.more_threads",
        ),
        (
            {"holdings": {"decode-0": Holdings(num_descriptors=10, num_threads=4, rss_bytes=140 << 20)}},
            "after_attacks.decode-0.rss",
        ),
    ],
)
def test_what_is_kept_misses_its_target(changes: dict[str, object], key: str) -> None:
    assert missed(Tally(), census(**changes)) == {key}


def test_wrong_answers_and_new_sockets_miss_their_targets() -> None:
    assert missed(Tally(), num_wrong=1, sockets=("decode worker: udp 0.0.0.0:PORT",)) == {
        "answers.wrong",
        "sockets.unlisted",
    }


def test_the_same_seed_makes_the_same_calls() -> None:
    one, two, other = (Calls(seed, "token") for seed in (1, 1, 2))
    made = [one.make() for _ in range(300)]
    assert made == [two.make() for _ in range(300)]
    assert made != [other.make() for _ in range(300)]
    assert {call.path.rpartition("/")[2] for call in made} >= {"Generate", "Tokenize", "Drain", "Watch"}


class Broken(pb_grpc.InferenceServicer):
    """Tokenize raises; Generate says so itself."""

    def Tokenize(self, request: pb.TokenizeRequest, context: grpc.ServicerContext) -> pb.TokenizeResponse:
        raise RuntimeError("a fault")

    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateEvent]:
        context.abort(grpc.StatusCode.INTERNAL, "a fault that is noticed")
        yield pb.GenerateEvent()


def test_a_handler_that_raises_is_counted() -> None:
    server = grpc.server(ThreadPoolExecutor(4))
    pb_grpc.add_InferenceServicer_to_server(Broken(), server)  # type: ignore[no-untyped-call]
    endpoint = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    tally = Tally()
    try:
        asyncio.run(calls.attack(endpoint, 3, "token", 120, tally))
    finally:
        server.stop(0).wait()
    assert tally.total("calls") == 120
    assert tally.num_faults("UNKNOWN") > 3
    assert tally.num_faults("INTERNAL") > 3
    assert {"status.INTERNAL", "status.UNKNOWN"} <= missed(tally)
    assert any("a fault" in details for details in tally.details.values())
