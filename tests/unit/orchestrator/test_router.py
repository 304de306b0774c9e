"""Which workers a request is given."""

from __future__ import annotations

import msgspec
import pytest

from anabranch.protocol.workers import WorkerInfo, WorkerStats
from anabranch.request.request import Request
from anabranch.request.sampling_params import SamplingParams
from orchestrator.attempt import Attempt
from orchestrator.member import Member
from orchestrator.router import LeastWork, Route

pytestmark = pytest.mark.unit

INFO = WorkerInfo(
    name="",
    role="decode",
    pid=1,
    host="here",
    model="m",
    model_fingerprint="f",
    vocab_size=10,
    hidden_size=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    kv_dtype="float32",
    max_context=1000,
    num_blocks=10,
    block_size=16,
    planes=(),
    device="cpu",
    num_threads=1,
)


def member(name: str, role: str, *, num_free_blocks: int = 10, **changes: object) -> Member:
    made = Member(msgspec.structs.replace(INFO, name=name, role=role, **changes), name.encode(), 0.0)
    stats = WorkerStats(
        num_free_blocks=10, num_total_blocks=10, num_running=0, num_waiting=0, num_leases=0, queued_tokens=0
    )
    made.stats = msgspec.structs.replace(stats, num_free_blocks=num_free_blocks)
    return made


def request(num_prompt: int = 10, max_tokens: int = 10, request_id: str = "r") -> Request:
    return Request(
        request_id=request_id,
        epoch=0,
        prompt_ids=tuple([1] * num_prompt),
        sampling=SamplingParams(max_tokens=max_tokens),
    )


def names(route: Route | None) -> tuple[str, ...] | None:
    return None if route is None else route.names


def test_no_route_without_a_usable_path():
    router = LeastWork(100)
    assert router.choose(request(), []) is None
    assert router.choose(request(), [member("p", "prefill")]) is None
    assert router.choose(request(), [member("d", "decode")]) is None
    assert names(router.choose(request(), [member("c", "colocated")])) == ("c",)


def test_an_attention_worker_counts_as_decode_once_every_expert_has_an_owner():
    attn = member("a", "attn")
    members = [member("p", "prefill"), attn, member("f", "ffn")]
    router = LeastWork(100)
    assert attn.state == "ready"
    assert router.choose(request(), members) is None
    attn.waits_for = ""
    assert names(router.choose(request(), members)) == ("p", "a")
    Attempt(request(), Route(attn, members[0]))
    assert names(router.choose(request(), [*members, member("d", "decode")])) == ("p", "d")


def test_draining_dead_and_small_workers_are_passed_over():
    draining, small = member("d0", "decode"), member("d1", "decode", max_context=19)
    draining.draining = True
    prefill, decode = member("p0", "prefill"), member("d2", "decode")
    members = [prefill, draining, small, decode]
    assert names(LeastWork(100).choose(request(10, 10), members)) == ("p0", "d2")
    assert names(LeastWork(100).choose(request(9, 10), [prefill, small])) == ("p0", "d1")
    decode.end = Exception("dead")  # type: ignore[assignment]
    assert LeastWork(100).choose(request(10, 10), members) is None


def test_work_is_spread_by_what_waits_and_what_runs():
    prefills = [member(f"p{n}", "prefill") for n in range(2)]
    decodes = [member(f"d{n}", "decode") for n in range(3)]
    router = LeastWork(1000)
    members = prefills + decodes
    attempts = []
    for number, num_prompt in enumerate((100, 10, 10, 10)):
        route = router.choose(request(num_prompt), members)
        attempts.append(Attempt(request(num_prompt, request_id=f"{number}"), route))
    assert [attempt.route.prefill.name for attempt in attempts] == ["p0", "p1", "p1", "p1"]
    assert [attempt.route.decode.name for attempt in attempts] == ["d0", "d1", "d2", "d0"]
    assert (prefills[0].prefill_tokens, prefills[1].prefill_tokens) == (100, 30)
    attempts[0].prompt_computed()
    attempts[0].prompt_computed()
    assert (prefills[0].prefill_tokens, prefills[0].num_requests) == (0, 1)
    for attempt in attempts:
        attempt.close()
        attempt.close()
    assert all(m.num_requests == 0 and m.prefill_tokens == 0 for m in members)


def test_among_equals_the_decode_worker_with_more_free_blocks_is_taken():
    members = [member("p", "prefill"), member("d0", "decode", num_free_blocks=3), member("d1", "decode")]
    assert names(LeastWork(100).choose(request(), members)) == ("p", "d1")


def test_no_more_than_some_prompt_tokens_wait_at_a_worker_but_one_request_always_may():
    members = [member("p", "prefill"), member("d", "decode")]
    router = LeastWork(50)
    first = Attempt(request(500), router.choose(request(500), members))
    assert router.choose(request(1), members) is None
    first.prompt_computed()
    Attempt(request(30), router.choose(request(30), members))
    assert router.choose(request(21), members) is None
    assert names(router.choose(request(20), members)) == ("p", "d")


def test_a_colocated_worker_takes_over_when_the_pair_has_more_to_do():
    pair = [member("p", "prefill"), member("d", "decode")]
    members = [*pair, member("c", "colocated")]
    router = LeastWork(1000)
    assert names(router.choose(request(), members)) == ("p", "d")
    Attempt(request(), Route(pair[1], pair[0]))
    assert names(router.choose(request(), members)) == ("c",)


def test_those_that_failed_a_request_are_taken_only_where_there_are_no_others():
    prefills = [member(f"p{n}", "prefill") for n in range(2)]
    decodes = [member(f"d{n}", "decode") for n in range(2)]
    members = prefills + decodes
    router = LeastWork(100)
    assert names(router.choose(request(), members, {decodes[0]})) == ("p0", "d1")
    assert names(router.choose(request(), members, {prefills[0], decodes[0]})) == ("p1", "d1")
    # Others that are busy are waited for; those that are no path are not.
    Attempt(request(90), Route(decodes[1], prefills[1]))
    assert router.choose(request(20), members, {prefills[0]}) is None
    assert names(router.choose(request(), members, set(prefills))) == ("p0", "d0")
    assert names(router.choose(request(), [*prefills, decodes[0]], {prefills[0], decodes[0]})) == ("p1", "d0")
    assert names(router.choose(request(), members, set(members))) == ("p0", "d0")


def test_a_colocated_worker_and_a_pair_are_others_of_each_other():
    pair = [member("p", "prefill"), member("d", "decode")]
    both = member("c", "colocated")
    router = LeastWork(100)
    assert names(router.choose(request(), [*pair, both], {pair[1]})) == ("c",)
    assert names(router.choose(request(), [*pair, both], {both})) == ("p", "d")
    small = member("c", "colocated", max_context=5)
    assert names(router.choose(request(), [*pair, small], {pair[1]})) == ("p", "d")


def test_one_that_came_again_is_another_one():
    old, new = member("c", "colocated"), member("c", "colocated")
    other = member("e", "colocated")
    Attempt(request(), Route(other))
    assert names(LeastWork(100).choose(request(), [new, other], {old})) == ("c",)


def test_a_suspect_worker_gets_one_request_at_a_time_and_one_held_alone_gets_none():
    worker, prefill = member("d", "decode"), member("p", "prefill")
    members = [prefill, worker]
    router = LeastWork(100)
    worker.num_failed = 3
    running = Attempt(request(), router.choose(request(), members))
    running.prompt_computed()
    assert router.choose(request(), members) is None
    running.close()
    assert names(router.choose(request(), members)) == ("p", "d")
    worker.num_failed = 0
    lonely = Attempt(request(), router.choose(request(), members), alone=True)
    lonely.prompt_computed()
    assert router.choose(request(), members) is None
    assert not lonely.brought(15)
    assert router.choose(request(), members) is None
    assert lonely.brought(1)
    assert not lonely.brought(1)
    assert names(router.choose(request(), members)) == ("p", "d")
    lonely.close()
    assert [(m.num_requests, m.num_unproven, m.held_alone, m.prefill_tokens) for m in members] == [(0, 0, 0, 0)] * 2
