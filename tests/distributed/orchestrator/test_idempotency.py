"""One idempotency key, one generation: while it runs, for a while after its end, and after a client that left."""

from __future__ import annotations

import asyncio

import pytest

from anabranch.protocol.wire_error import WireError
from anabranch.protocol.workers import Cancel, Generate
from anabranch_client import AsyncClient, InvalidRequest, Overloaded, Sampling, Tokens

pytestmark = pytest.mark.distributed

THREE = Sampling(max_tokens=3)


async def answer(worker, text="klm"):
    request = (await worker.expect(Generate)).request
    await worker.tokens(request, text, 0)
    await worker.ended(request, "length")
    return request


def test_a_second_call_gets_the_first_ones_answer_from_its_beginning(play, wait):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        ask = {"idempotency_key": "k1", "tenant": "t"}
        async with world.client.generate("abc", THREE, **ask, request_id="mine") as first:
            accepted = await anext(first)
            request = (await worker.expect(Generate)).request
            await worker.tokens(request, "k", 0)
            assert (await anext(first)).text == "k"
            # While it runs, over another connection, and with another call's name.
            async with AsyncClient(world.orchestrator.grpc_endpoint) as other:
                second = asyncio.create_task(other.complete("abc", THREE, **ask, request_id="again"))
                stream = other.generate("abc", THREE, **ask)
                assert await anext(stream) == accepted
                assert await anext(stream) == Tokens(first_index=0, token_ids=(107,), text="k")
                await worker.tokens(request, "lm", 1)
                await worker.ended(request, "length")
                rest = [event async for event in first]
                assert (await second).text == "klm"
                assert (await second).request_id == "mine"
                assert "".join(event.text for event in rest[:-1]) == "lm"
                assert [event async for event in stream][-1] == rest[-1]
        # After its end, whoever may serve: nothing is computed.
        await worker.close()
        await wait(lambda: not world.orchestrator.membership.serving)
        again = await world.client.complete("abc", THREE, **ask)
        assert (again.text, again.token_ids) == ("klm", tuple(b"klm"))
        assert not worker.received

    play(scenario)


def test_another_body_another_tenant_and_no_key(play):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        first = asyncio.create_task(world.client.complete("abc", THREE, idempotency_key="k"))
        await answer(worker)
        assert (await first).text == "klm"
        for prompt, sampling, more in (
            ("abd", THREE, {}),
            ([97, 98, 99], THREE, {}),
            ("abc", Sampling(max_tokens=4), {}),
            ("abc", THREE, {"cache_salt": "s"}),
        ):
            with pytest.raises(
                InvalidRequest, match=r"^idempotency_key: was given before with another prompt"
            ) as caught:
                await world.client.complete(prompt, sampling, idempotency_key="k", **more)
            assert caught.value.code == "invalid_request"
        # Nothing is lost by it, and nobody else's key is this one.
        assert (await world.client.complete("abc", THREE, idempotency_key="k", priority=3)).text == "klm"
        other = asyncio.create_task(world.client.complete("abc", THREE, idempotency_key="k", tenant="other"))
        await answer(worker, "xyz")
        assert (await other).text == "xyz"
        for _ in range(2):
            own = asyncio.create_task(world.client.complete("abc", THREE))
            await answer(worker)
            await own

    play(scenario)


def test_calls_that_come_while_the_prompt_is_encoded_share_it(play, wait):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        world.model.gate.clear()
        first = asyncio.create_task(world.client.complete("abc", THREE, idempotency_key="k"))
        await wait(lambda: world.orchestrator._intake.num_encoding == 1)
        others = [asyncio.create_task(world.client.complete("abc", THREE, idempotency_key="k")) for _ in range(5)]
        await wait(lambda: world.orchestrator._gateway.num_calls == 6)
        # The one that began it goes; the others need not notice.
        first.cancel()
        await wait(lambda: world.orchestrator._gateway.num_calls == 5)
        world.model.gate.set()
        await answer(worker)
        assert [(await other).text for other in others] == ["klm"] * 5
        assert not worker.received

    play(scenario)


def test_a_client_that_lost_its_connection_comes_back(play, wait):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        async with AsyncClient(world.orchestrator.grpc_endpoint) as gone:
            stream = gone.generate("abc", THREE, idempotency_key="k")
            await anext(stream)
            request = (await worker.expect(Generate)).request
            await worker.tokens(request, "k", 0)
            await anext(stream)
        await wait(lambda: world.orchestrator._gateway.num_calls == 0)
        again = asyncio.create_task(world.client.complete("abc", THREE, idempotency_key="k"))
        await wait(lambda: world.orchestrator._gateway.num_calls == 1)
        await worker.tokens(request, "lm", 1)
        await worker.ended(request, "length")
        assert (await again).text == "klm"

    play(scenario, idempotency_grace_s=60.0)


def test_a_request_that_nobody_comes_back_for_ends(play):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        async with world.client.generate("abc", THREE, idempotency_key="k") as stream:
            await anext(stream)
            request = (await worker.expect(Generate)).request
        assert (await worker.expect(Cancel)).request_id == request.request_id
        # The key is free again.
        anew = asyncio.create_task(world.client.complete("abd", THREE, idempotency_key="k"))
        await answer(worker, "xyz")
        assert (await anew).text == "xyz"

    play(scenario, idempotency_grace_s=0.05)


def test_what_failed_is_not_remembered(play, wait):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        calls = [asyncio.create_task(world.client.complete("abc", THREE, idempotency_key="k")) for _ in range(2)]
        await wait(lambda: world.orchestrator._gateway.num_calls == 2)
        request = (await worker.expect(Generate)).request
        await worker.ended(request, "failed", WireError(code="invalid_request", message="it broke"))
        for call in calls:
            with pytest.raises(InvalidRequest, match="it broke"):
                await call
        again = asyncio.create_task(world.client.complete("abc", THREE, idempotency_key="k"))
        await answer(worker)
        assert (await again).text == "klm"

    play(scenario)


def test_what_is_kept_is_bounded_in_number_bytes_and_time(play, wait, monkeypatch):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        keyed = world.orchestrator._intake._keyed

        async def ask(key: str, text: str = "klm") -> None:
            call = asyncio.create_task(world.client.complete("abc", THREE, idempotency_key=key))
            await answer(worker, text)
            assert (await call).text == text

        for key in ("a", "b", "c"):
            await ask(key)
        assert [key for _, key in keyed._answers] == ["b", "c"]
        assert keyed.num_bytes == sum(shared.num_counted for shared in keyed._answers.values()) > 0
        await ask("a", "new")
        running = []
        for key in ("x", "y"):
            running.append(asyncio.create_task(world.client.complete("abc", THREE, idempotency_key=key)))
            await wait(lambda: keyed.num_running == len(running))
        with pytest.raises(Overloaded, match="max_idempotent_answers: 2 requests with a key are under way") as caught:
            await world.client.complete("abc", THREE, idempotency_key="z")
        assert caught.value.retry_after_s is not None
        for _ in running:
            await answer(worker)
        await asyncio.gather(*running)
        keyed._max_bytes = 1
        flooded = asyncio.create_task(world.client.complete("abc", THREE, idempotency_key="q"))
        request = (await worker.expect(Generate)).request
        await worker.tokens(request, "k", 0)
        with pytest.raises(Overloaded, match="max_idempotent_bytes: answers with an idempotency key take"):
            await flooded
        assert (await worker.expect(Cancel)).request_id == request.request_id
        await wait(lambda: not keyed.num_running)
        assert (keyed.num_bytes, keyed._answers) == (0, {})
        keyed._max_bytes = 1 << 20
        keyed._remember_s = -1.0
        for text in ("klm", "xyz"):
            await ask("t", text)

    play(scenario, max_idempotent_answers=2)
