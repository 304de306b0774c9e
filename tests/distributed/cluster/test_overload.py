"""A real pair of workers that are asked for more than they can do: who is refused, who waits, and what is left."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from anabranch_client import DeadlineExceeded, Overloaded, Sampling
from tests.support.in_process import wait_until
from tests.support.waiting import WAIT_S

pytestmark = pytest.mark.distributed


def test_overload_refuses_by_name_and_loses_nothing(serve, still_serves, good) -> None:
    cluster, client = serve(
        "prefill", "decode", orchestrator={"max_queued": 3, "prefill_ahead_tokens": 1, "tenant_weights": ("gold=3",)}
    )
    (prompt, answer), *_ = good.items()
    sampling = Sampling(max_tokens=len(answer), temperature=0.0, ignore_eos=True)
    dispatcher = cluster.orchestrator._dispatcher
    with ThreadPoolExecutor(5) as executor:
        with cluster.held("prefill-0"):
            # The first is at its workers; of those with a key one waits for both calls.
            terms = ({}, {"idempotency_key": "k"}, {"idempotency_key": "k"}, {"tenant": "gold", "priority": -1})
            waiting = [executor.submit(client.complete, prompt, sampling, **more) for more in terms]
            wait_until(lambda: dispatcher.room.num_places == 3, "three to wait")
            wait_until(lambda: cluster.orchestrator._gateway.num_calls == 4, "all to be taken in")
            for tenant in (None, "gold", "another"):
                with pytest.raises(Overloaded, match="3 requests wait for their first token") as caught:
                    client.complete(prompt, sampling, tenant=tenant)
                assert caught.value.retry_after_s is not None
            # One that gives up leaves its place, wherever it was.
            waiting.append(executor.submit(client.complete, prompt, sampling, idempotency_key="k", timeout_s=0.2))
            with pytest.raises(DeadlineExceeded):
                waiting.pop().result(WAIT_S)
        assert [call.result(WAIT_S).token_ids for call in waiting] == [answer] * 4
        assert client.complete(prompt, sampling, idempotency_key="k").token_ids == answer
    still_serves(cluster, client)
