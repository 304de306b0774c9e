"""Workers that come and go, what operators see and do, health and reflection, and noise on the control port."""

from __future__ import annotations

import asyncio
import os

import grpc
import msgspec
import pytest
import zmq
import zmq.asyncio
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from anabranch.protocol.workers import Beat, Drain, Generate, Register, Registered, Shutdown, ToWorker
from anabranch_client import InvalidRequest, Sampling
from transport.control import ControlClient

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("model_fingerprint", "f2", "model_fingerprint: 'f2': of odd .model bytes. differs from 'f1' of first"),
        ("num_layers", 2, "num_layers: 2: of odd .model bytes. differs from 1 of the orchestrator .model bytes."),
        ("num_heads", 4, "num_heads: 4: of odd .* differs from 1 of the orchestrator"),
        ("num_kv_heads", 4, "num_kv_heads: 4: of odd .* differs from 1 of the orchestrator"),
        ("kv_dtype", "bfloat16", "kv_dtype: 'bfloat16': of odd .* differs from 'float32' of first"),
        ("vocab_size", 300, "vocab_size: 300: of odd .* differs from 256 of the orchestrator"),
        ("name", "first", "name: 'first': is taken by a living worker .pid 7 on here."),
        ("max_context", 0, "max_context: 0: must be at least 1"),
    ],
)
def test_a_worker_that_does_not_fit_is_refused_with_both_sides_values(play, field, value, says):
    async def scenario(world):
        await world.worker("first", "prefill", pid=7)
        odd = world.stranger("odd", "decode", **{field: value})
        answer = await odd.register()
        assert answer.error.code == "config"
        assert msgspec.json.encode(answer.error.message)
        with pytest.raises(Exception, match=says):
            raise answer.error.to_error()
        assert [member.name for member in world.orchestrator.membership.members] == ["first"]
        # It goes on talking: it is told again.
        await odd.send(Beat())
        assert (await odd.expect(Registered)).error.code == "worker_died"
        # Put right, it is taken.
        right = await world.worker("second", "decode")
        assert right.received == []
        assert await world.client.health() == "serving"

    play(scenario)


def test_registering_twice_is_harmless_and_an_empty_cluster_takes_another_model(play, wait):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        assert (await worker.register()).error is None
        assert len(world.orchestrator.membership.members) == 1
        await worker.close()
        await wait(lambda: not world.orchestrator.membership.members)
        await world.worker("both-0", "colocated", model_fingerprint="f2", kv_dtype="bfloat16")
        assert (await world.client.model()).dtype == "bfloat16"

    play(scenario)


def test_a_second_process_under_the_same_connection_name_does_not_replace_a_living_worker(play):
    async def scenario(world):
        first = world.stranger("both-0", "colocated", identity=b"both-0")
        assert (await first.register()).error is None
        second = world.stranger("both-0", "colocated", identity=b"both-0", pid=4242)
        answer = await second.register()
        assert "is taken by a living worker" in answer.error.message

    play(scenario)


def test_health_follows_the_usable_paths(play, wait):
    async def scenario(world):
        async def health() -> str:
            return await world.client.health()

        assert await health() == "not_serving"
        prefill = await world.worker("prefill-0", "prefill")
        assert await health() == "not_serving"
        decode = await world.worker("decode-0", "decode")
        assert await health() == "serving"
        both = await world.worker("both-0", "colocated")
        await prefill.close()
        await wait(lambda: len(world.orchestrator.membership.members) == 2)
        assert await health() == "serving"
        with world.admin() as admin:
            await asyncio.to_thread(admin.drain, "both-0")
        await both.expect(Drain)
        assert await health() == "not_serving"
        assert decode.received == []

    play(scenario)


def test_reflection_lists_the_services(play):
    async def scenario(world):
        async with grpc.aio.insecure_channel(world.orchestrator.grpc_endpoint) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            requests = [
                reflection_pb2.ServerReflectionRequest(list_services=""),
                reflection_pb2.ServerReflectionRequest(file_containing_symbol="anabranch.v1.Inference"),
            ]
            listed, described = [response async for response in stub.ServerReflectionInfo(iter(requests))]
        names = {service.name for service in listed.list_services_response.service}
        assert {"anabranch.v1.Inference", "anabranch.v1.Admin", "grpc.health.v1.Health"} <= names
        assert b"GenerateRequest" in described.file_descriptor_response.file_descriptor_proto[0]

    play(scenario)


def test_get_cluster_and_get_model(play, wait):
    async def scenario(world):
        await world.worker("prefill-0", "prefill", tp=2, pid=11)
        decode = await world.worker("decode-0", "decode", pid=12, max_context=512)
        await wait(lambda: all(member.stats for member in world.orchestrator.membership.members))
        answer = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=1)))
        await wait(lambda: decode.received)
        with world.admin() as admin:
            cluster = await asyncio.to_thread(admin.cluster)
        by_name = {worker.name: worker for worker in cluster.workers}
        prefill, decode_ = by_name["prefill-0"], by_name["decode-0"]
        assert (prefill.role, prefill.pid, prefill.tp, prefill.state) == ("prefill", 11, 2, "ready")
        assert (decode_.num_requests, decode_.num_free_blocks, decode_.num_total_blocks) == (1, 60, 64)
        assert (decode_.max_context, decode_.block_size, decode_.planes) == (512, 16, ("tcp",))
        assert 0.0 <= decode_.last_heard_s < 1.0
        assert (cluster.num_requests, cluster.num_queued) == (1, 0)
        assert (cluster.serving, cluster.draining) == (True, False)
        model = await world.client.model()
        assert (model.name, model.vocab_size, model.eos_token_ids, model.dtype) == ("bytes", 256, (0,), "float32")
        assert (model.max_context, model.has_chat_template) == (512, True)
        assert {(pool.role, pool.num_workers, pool.tp, pool.cp) for pool in model.pools} == {
            ("prefill", 1, 2, 1),
            ("decode", 1, 1, 1),
        }
        answer.cancel()

    play(scenario)


def test_a_drained_worker_finishes_what_it_has_and_its_leaving_is_expected(play, wait):
    async def scenario(world):
        leaving = await world.worker("leaving", "colocated")
        answer = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=2)))
        request = (await leaving.expect(Generate)).request
        staying = await world.worker("staying", "colocated")
        with world.admin() as admin:
            await asyncio.to_thread(admin.drain, "leaving")
            await leaving.expect(Drain)
            other = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=1)))
            second = (await staying.expect(Generate)).request
            await staying.tokens(second, "k", 0)
            await staying.ended(second, "length")
            assert (await other).route == ("staying",)
            await leaving.tokens(request, "ok", 0)
            await leaving.ended(request, "length")
            assert (await answer).text == "ok"
            await leaving.close()
            await wait(lambda: len(world.orchestrator.membership.members) == 1)
            cluster = await asyncio.to_thread(admin.cluster)
            assert [(gone.name, gone.expected) for gone in cluster.departures] == [("leaving", True)]
            with pytest.raises(InvalidRequest, match=r"worker: 'leaving' is no living worker \(staying\)"):
                await asyncio.to_thread(admin.drain, "leaving")

    play(scenario)


def test_an_exit_of_a_pid_that_is_not_the_workers_changes_nothing(play):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        with world.admin() as admin:
            assert not await asyncio.to_thread(admin.report_exit, "both-0", worker.info.pid + 1, "gone")
            assert not await asyncio.to_thread(admin.report_exit, "nobody", 1, "gone")
        assert await world.client.health() == "serving"

    play(scenario)


def test_workers_are_told_to_exit_at_the_end(play):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        await world.orchestrator.membership.shut_down()
        await worker.expect(Shutdown)

    play(scenario)


def test_workers_hear_beats(play):
    async def scenario(world):
        worker = world.stranger("both-0", "colocated")
        await worker.close()
        client = ControlClient(world.orchestrator.control_endpoint, ToWorker, identity=None)
        await client.send(Register(worker=worker.info))
        assert await client.recv() == Registered()
        async with asyncio.timeout(5):
            for _ in range(3):
                assert await client.recv() == Beat()
                await client.send(Beat())
        client.close()

    play(scenario)


def test_noise_on_the_control_port_changes_nothing(play):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        answer = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=3)))
        request = (await worker.expect(Generate)).request
        await worker.tokens(request, "a", 0)
        context = zmq.asyncio.Context()
        with context.socket(zmq.DEALER) as socket:
            socket.linger = 0
            socket.connect(world.orchestrator.control_endpoint)
            encode = msgspec.msgpack.encode
            for noise in (
                b"",
                b"\xc1",
                os.urandom(1000),
                encode({"type": "tokens"}),
                encode({"type": "tokens", "tokens": "all"}),
                encode({"type": "shutdown"}),
                encode({"type": "register", "worker": {"name": 5}}),
                encode({"type": "beat", "stats": None, "more": 1}),
                encode([1, 2, 3]),
                b"\x81" * 100_000,
                b"\x93" * 5_000,
            ):
                await socket.send(noise)
            await socket.send_multipart([b"a", b"b", b"c"])
            # A stranger that speaks well, about a request that is not its own, is told off and not heard.
            stray = {"request_id": request.request_id, "epoch": 0, "index": 1, "token_id": 33}
            await socket.send(encode({"type": "tokens", "tokens": [stray]}))
            fenced = msgspec.msgpack.decode(await asyncio.wait_for(socket.recv(), 5))
            assert fenced["error"]["code"] == "worker_died"
        context.term()
        await worker.tokens(request, "bc", 1)
        await worker.ended(request, "length")
        assert (await answer).text == "abc"
        assert world.orchestrator._control.num_malformed == 12

    play(scenario)
