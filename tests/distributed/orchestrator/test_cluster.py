"""Workers that come and go, what operators see and do, health and reflection, and noise on the control port."""

from __future__ import annotations

import asyncio
import os

import grpc
import msgspec
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from anabranch.errors import AccessDenied
from anabranch.protocol.workers import Beat, Drain, Generate, Register, Registered, Shutdown, ToWorker
from anabranch.system.private_files import write_secret
from anabranch_client import InvalidRequest, Sampling
from tests.distributed.orchestrator.conftest import ScriptedWorker, worker_info
from tests.support.control import proven
from tests.support.waiting import WAIT_S
from transport.control import ControlClient
from transport.control.frames import frame

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
        ("model_fingerprint", "", "model_fingerprint: '': a worker must send its model_fingerprint"),
        ("kv_dtype", "", "kv_dtype: '': a worker must send its kv_dtype"),
        ("name", "", "name: '': a worker must send its name"),
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


def test_a_second_process_under_a_living_workers_name_neither_replaces_nor_hears_it(play):
    async def scenario(world):
        first = await world.worker("both-0", "colocated")
        # Name and pid are what GetCluster shows.
        second = world.stranger("both-0", "colocated")
        answer = await second.register()
        assert "is taken by a living worker" in answer.error.message
        answer = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=1)))
        request = (await first.expect(Generate)).request
        await second.tokens(request, "!", 0)
        assert (await second.expect(Registered)).error.code == "worker_died"
        await first.tokens(request, "k", 0)
        await first.ended(request, "length")
        assert (await answer).text == "k"
        assert second.received == []

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
        assert decode_.last_heard_s >= 0.0
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
        client = ControlClient(world.orchestrator.control_endpoint, ToWorker)
        await client.send(Register(worker=worker.info))
        assert await client.recv() == Registered()
        async with asyncio.timeout(WAIT_S):
            for _ in range(3):
                assert await client.recv() == Beat()
                await client.send(Beat())
        await client.close()

    play(scenario)


def test_noise_on_the_control_port_changes_nothing(play):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated")
        answer = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=3)))
        request = (await worker.expect(Generate)).request
        await worker.tokens(request, "a", 0)
        encode = msgspec.msgpack.encode
        # A stranger that proves to know the secret, sends nonsense, and then speaks well about another's request.
        reader, writer = await proven(world.orchestrator.control_endpoint, secret=b"")
        noise = (
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
        )
        for data in noise:
            writer.write(frame(data))
        stray = {"request_id": request.request_id, "epoch": 0, "index": 1, "token_id": 33}
        for _ in range(100):
            writer.write(frame(encode({"type": "tokens", "tokens": [stray]})))
        # It is told off once, and not heard.
        async with asyncio.timeout(WAIT_S):
            said = await reader.read()
        assert msgspec.msgpack.decode(said[4:])["error"]["code"] == "worker_died"
        writer.transport.abort()
        await worker.tokens(request, "bc", 1)
        await worker.ended(request, "length")
        assert (await answer).text == "abc"
        assert world.orchestrator._control.num_malformed == len(noise)

    play(scenario)


def test_a_stranger_without_the_secret_is_not_heard_over_tcp(play, tmp_path):
    secret_file = write_secret(tmp_path / "control.secret")
    secret = secret_file.read_bytes().strip()

    async def scenario(world):
        endpoint = world.orchestrator.control_endpoint
        for guess in (b"a guess", b"\0", secret[:-1], secret + b"\n"):
            stranger = ScriptedWorker(endpoint, worker_info("both-0", "colocated"), guess)
            with pytest.raises(AccessDenied, match="secret_file"):
                await stranger.client.recv()
            await stranger.close()
        assert world.orchestrator.membership.members == []
        assert world.orchestrator._control.num_refused == 4
        worker = ScriptedWorker(endpoint, worker_info("both-0", "colocated"), secret)
        assert (await worker.register()).error is None
        assert await world.client.health() == "serving"
        await worker.close()

    play(scenario, control_bind="tcp://127.0.0.1:0", secret_file=str(secret_file))
