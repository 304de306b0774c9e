"""Clients that cancel, vanish, run out of time or never read, at every stage: blocks return, others go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import grpc
import pytest

from anabranch_client import CallCancelled, Client, DeadlineExceeded, Sampling, Stream, Tokens
from anabranch_client.v1 import anabranch_pb2 as pb
from tests.support.in_process import InProcessCluster, wait_until
from tests.support.waiting import WAIT_S
from transport.planes import usable_planes

pytestmark = pytest.mark.distributed

COLOCATED = ("colocated",)
SPLIT = ("prefill", "decode")
PROMPT = tuple(range(3, 93))
CHUNK = 32
LONG = Sampling(max_tokens=1500, ignore_eos=True)

# What a stage holds up, until the request that `start` makes is in it.
Start = Callable[[], Stream]


@contextmanager
def at_stage(cluster: InProcessCluster, stage: str, start: Start) -> Iterator[Stream]:
    """Bring a request to `stage` and keep it there."""
    names = [worker.config.name for worker in cluster.workers]
    computes, decodes = names[0], names[-1]
    split = len(names) == 2
    with ExitStack() as stack:
        lifecycles = cluster.orchestrator._dispatcher._requests

        def state() -> str:
            return next((lifecycle.state for lifecycle in lifecycles.values()), "none")

        if stage == "queued":  # there is no route for now
            router = cluster.orchestrator._dispatcher.queue._router
            stack.callback(setattr, router, "choose", router.choose)
            router.choose = lambda *_: None
            stream = start()
            wait_until(lambda: len(cluster.orchestrator._dispatcher.queue) == 1, "a queued request")
        elif stage == "reserving":
            stack.enter_context(cluster.held(decodes))
            stream = start()
            wait_until(lambda: state() == "reserving", "reserving")
        elif stage == "connecting":  # prefill has the order and has done nothing yet
            stack.enter_context(cluster.held(computes))
            stream = start()
            wait_until(lambda: state() == "prefilling", "prefilling")
        elif stage == "prefilling":  # two chunks of three are computed, their KV has left
            throttle = stack.enter_context(cluster.throttled(computes))
            stream = start()
            throttle.allow(2)
            assert [plan.num_tokens for plan in throttle.plans] == [CHUNK, CHUNK]
        elif stage == "committed":  # all KV is there, the decode engine has not looked yet
            throttle = stack.enter_context(cluster.throttled(computes))
            stream = start()
            throttle.allow(2)
            stack.enter_context(cluster.held(decodes))
            throttle.open()
            minutes = cluster.minutes[computes]
            wait_until(lambda: any(kind == "prefill" for kind, _, _ in minutes.ended), "the commit")
        else:
            assert stage == "decoding"
            throttle = stack.enter_context(cluster.throttled(decodes))
            stream = start()
            # Three chunks and three tokens, or three tokens beside prefill's.
            throttle.allow(3 if split else 6)
            assert sum(len(event.token_ids) for event in (next(stream), next(stream)) if isinstance(event, Tokens)) > 0
        yield stream


STAGES = [("colocated", stage) for stage in ("queued", "connecting", "prefilling", "decoding")]
STAGES += [("split", stage) for stage in ("queued", "reserving", "connecting", "prefilling", "committed", "decoding")]


@pytest.mark.parametrize("how", ["cancel", "disconnect", "deadline"])
@pytest.mark.parametrize(("kind", "stage"), STAGES)
def test_a_client_leaves(serve, still_serves, kind: str, stage: str, how: str) -> None:
    roles = COLOCATED if kind == "colocated" else SPLIT
    cluster, client = serve(*roles, max_step_tokens=CHUNK)
    still_serves(cluster, client)
    leaver = Client(cluster.endpoint)
    timeout_s = 0.4 if how == "deadline" else 30.0
    with at_stage(cluster, stage, lambda: leaver.generate(PROMPT, LONG, timeout_s=timeout_s)) as stream:
        if how == "cancel":
            stream.close()
        elif how == "disconnect":
            leaver.close()
        with pytest.raises((CallCancelled, DeadlineExceeded)) as caught:
            list(stream)
        assert isinstance(caught.value, DeadlineExceeded) == (how == "deadline")
        wait_until(lambda: cluster.orchestrator.num_requests == 0, "the request to end")
    leaver.close()
    still_serves(cluster, client)


@pytest.mark.parametrize("roles", [COLOCATED, SPLIT], ids=["colocated", "split"])
def test_a_request_id_comes_again(serve, still_serves, good, roles) -> None:
    """Left after two tokens and asked for again at once, three times over: each life has its own answer."""
    cluster, client = serve(*roles, max_step_tokens=CHUNK)
    ((prompt, answer), *_) = good.items()
    whole = Sampling(max_tokens=len(answer), ignore_eos=True)
    for _ in range(3):
        with client.generate(PROMPT, LONG, request_id="x") as stream:
            seen = 0
            while seen < 2:
                event = next(stream)
                seen += len(event.token_ids) if isinstance(event, Tokens) else 0
        done = client.complete(prompt, whole, request_id="x")
        assert (done.token_ids, done.request_id) == (answer, "x")
    with ThreadPoolExecutor(4) as pool:
        together = [pool.submit(client.complete, prompt, whole, request_id="x") for _ in range(4)]
        assert [one.result(WAIT_S).token_ids for one in together] == [answer] * 4
    still_serves(cluster, client)


def test_a_client_leaves_while_it_waits_for_blocks(serve, still_serves, known) -> None:
    """The pool holds one request: the second one waits at the decode worker."""
    small = {"kv_cache_bytes": 10 * known.block_bytes(16), "block_size": 16}
    cluster, client = serve(*SPLIT, by_role={"decode": small})
    decode = cluster.worker("decode-1")
    with cluster.throttled("decode-1") as throttle:
        first = client.generate(PROMPT, Sampling(max_tokens=70, ignore_eos=True))
        throttle.allow(2)
        second = client.generate(tuple(reversed(PROMPT)), Sampling(max_tokens=70, ignore_eos=True))
        wait_until(lambda: decode.stats().num_waiting == 1, "a request that waits for blocks")
        second.close()
        wait_until(lambda: cluster.orchestrator.num_requests == 1, "the second one to end")
    tokens = [token for event in first if isinstance(event, Tokens) for token in event.token_ids]
    assert len(tokens) == 70
    still_serves(cluster, client)


@pytest.mark.parametrize("roles", [COLOCATED, SPLIT], ids=["colocated", "split"])
def test_a_client_that_never_reads(serve, still_serves, good, roles) -> None:
    cluster, client = serve(*roles, orchestrator={"client_stall_s": 0.5}, max_step_tokens=CHUNK)
    # A window that does not grow, so that little fits between server and client.
    options = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024), ("grpc.enable_http_proxy", 0))
    sampling = pb.SamplingParams(max_tokens=1900, ignore_eos=True, logprobs=20)
    with grpc.insecure_channel(cluster.endpoint, options=options) as channel:
        call = channel.unary_stream(
            "/anabranch.v1.Inference/Generate",
            request_serializer=pb.GenerateRequest.SerializeToString,
            response_deserializer=pb.GenerateEvent.FromString,
        )(pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT), sampling=sampling), timeout=60)
        wait_until(lambda: cluster.orchestrator.num_requests == 1, "the request")
        served = 0
        while cluster.orchestrator.num_requests:  # others are served meanwhile
            for prompt, answer in good.items():
                found = client.complete(prompt, Sampling(max_tokens=12, temperature=0.0, ignore_eos=True))
                assert found.token_ids == answer
                served += 1
        assert served >= len(good)
        indexes: list[int] = []

        def read() -> None:
            for event in call:
                if event.WhichOneof("event") == "tokens":
                    indexes.extend(
                        range(event.tokens.first_index, event.tokens.first_index + len(event.tokens.token_ids))
                    )

        with pytest.raises(grpc.RpcError) as caught:
            read()
        assert caught.value.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
        assert indexes == list(range(len(indexes)))
        assert len(indexes) < 1900
    still_serves(cluster, client)


@pytest.mark.parametrize("plane", ["inproc", "tcp", "ucx"])
def test_many_clients_leave_at_once(serve, still_serves, plane) -> None:
    """Twelve streams are dropped at whatever stage they happen to be in."""
    if plane not in usable_planes():
        pytest.skip(f"the {plane} plane cannot be used here")
    cluster, client = serve(*SPLIT, kv_transport=plane, max_step_tokens=CHUNK)

    def leave(number: int) -> None:
        prompt = (number + 3,) * (20 + 17 * number)
        with client.generate(prompt, LONG) as stream:
            for _ in range(number % 4):
                next(stream)

    for _ in range(3):
        with ThreadPoolExecutor(12) as pool:
            list(pool.map(leave, range(12)))
        cluster.wait_idle()
    still_serves(cluster, client)
