"""The Admin service answers those alone who show the token, and says to others where it is."""

from __future__ import annotations

import asyncio
import os
import stat
from itertools import islice
from pathlib import Path

import grpc
import pytest

from anabranch.errors import ConfigError
from anabranch.protocol.workers import Drain, Generate
from anabranch.system.private_files import read_secret, write_secret
from anabranch_client import AccessDenied, Admin, InvalidRequest, Sampling
from anabranch_client.v1 import anabranch_pb2 as pb
from tests.support.waiting import WAIT_S

pytestmark = pytest.mark.distributed

CALLS = {
    "GetCluster": (pb.GetClusterRequest(), pb.Cluster),
    "ReportExit": (pb.ReportExitRequest(worker="both-0", pid=11, how="gone"), pb.ReportExitResponse),
    "Cordon": (pb.CordonRequest(worker="both-0"), pb.CordonResponse),
    "Uncordon": (pb.UncordonRequest(worker="both-0"), pb.UncordonResponse),
    "Events": (pb.EventsRequest(first=-1), pb.WorkerEvent),
    "Drain": (pb.DrainRequest(worker="both-0"), pb.DrainResponse),
    "ScaleFfn": (pb.ScaleFfnRequest(workers=1), pb.ScaleFfnResponse),
    "FollowFfnScale": (pb.FollowFfnScaleRequest(max_workers=0), pb.FfnScale),
}


async def status(endpoint: str, method: str, metadata: list[tuple[str, str]]) -> grpc.StatusCode:
    """How a bare gRPC call ends, whatever the SDK would have sent."""
    request, response = CALLS[method]
    async with grpc.aio.insecure_channel(endpoint) as channel:
        call = channel.unary_unary(
            f"/anabranch.v1.Admin/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=response.FromString,
        )
        answer = call(request, metadata=metadata, timeout=WAIT_S)
        code = await answer.code()
        told = await answer.details()
        assert code is grpc.StatusCode.OK or "token_file" in told or "workers: " in told or "first: " in told
        return code


@pytest.mark.parametrize("method", CALLS)
def test_no_call_is_answered_without_the_token(play, method):
    async def scenario(world):
        worker = await world.worker("both-0", "colocated", pid=11)
        token = read_secret("", world.orchestrator.admin_token_file).decode()
        endpoint = world.orchestrator.grpc_endpoint
        wrong = {
            "none": [],
            "empty": [("authorization", "")],
            "bare": [("authorization", token)],
            "shorter": [("authorization", f"Bearer {token[:-1]}")],
            "longer": [("authorization", f"Bearer {token}0")],
            "guess": [("authorization", "Bearer " + "0" * 64)],
            "another key": [("x-authorization", f"Bearer {token}")],
            "twice": [("authorization", "Bearer guess"), ("authorization", f"Bearer {token}")],
        }
        for name, metadata in wrong.items():
            assert await status(endpoint, method, metadata) is grpc.StatusCode.PERMISSION_DENIED, name
        # Nothing was done.
        assert [member.state for member in world.orchestrator.membership.members] == ["ready"]
        assert worker.received == []
        # Here are no ffn workers that could be scaled, nor may nobody be followed for, nor is there a number below 0.
        wrong_here = "Ffn" in method or method == "Events"
        good = grpc.StatusCode.INVALID_ARGUMENT if wrong_here else grpc.StatusCode.OK
        assert await status(endpoint, method, [("authorization", f"Bearer {token}")]) is good

    play(scenario)


def test_the_sdk_reads_the_token_from_a_file(play, tmp_path, monkeypatch):
    monkeypatch.delenv("ANABRANCH_ADMIN_TOKEN_FILE", raising=False)
    other = write_secret(tmp_path / "other")

    async def scenario(world):
        def with_none() -> None:
            with Admin(world.orchestrator.grpc_endpoint) as admin:
                admin.cluster()

        def with_other() -> None:
            with world.admin(token_file=other) as admin:
                admin.cluster()

        for call in (with_none, with_other):
            with pytest.raises(AccessDenied, match="ANABRANCH_ADMIN_TOKEN_FILE") as caught:
                await asyncio.to_thread(call)
            assert caught.value.code == "access_denied"
            assert other.read_text().strip() not in str(caught.value)
        with pytest.raises(InvalidRequest, match=r"token_file: .*absent.*No such file"):
            world.admin(token_file=tmp_path / "absent")
        os.mkfifo(tmp_path / "pipe")  # without a writer: opened as usual, it would never be
        with pytest.raises(InvalidRequest, match=r"token_file: .*pipe': it holds no token"):
            world.admin(token_file=tmp_path / "pipe")
        monkeypatch.setenv("ANABRANCH_ADMIN_TOKEN_FILE", world.orchestrator.admin_token_file)
        await asyncio.to_thread(with_none)

    play(scenario)


def test_the_token_is_private_its_file_goes_with_the_orchestrator_and_a_given_one_stays(play, tmp_path, caplog):
    caplog.set_level("DEBUG")
    given = write_secret(tmp_path / "token")
    made: list[Path] = []

    async def scenario(world):
        made.append(Path(world.orchestrator.admin_token_file))
        with world.admin() as admin:
            await asyncio.to_thread(admin.cluster)
        assert stat.S_IMODE(os.stat(made[-1]).st_mode) == 0o600
        assert stat.S_IMODE(os.stat(made[-1].parent).st_mode) & 0o077 == 0 or made[-1] == given
        assert made[-1].read_text().strip() not in caplog.text

    play(scenario)
    assert not made[0].parent.exists()
    play(scenario, admin_token_file=str(given))
    assert made[1] == given
    assert given.exists()


@pytest.mark.parametrize("key", ["admin_token_file", "secret_file"])
def test_a_file_that_others_can_read_is_refused(play, tmp_path, key):
    given = write_secret(tmp_path / "token")
    given.chmod(0o644)

    async def scenario(world):
        pytest.fail("it started")

    with pytest.raises(ConfigError, match=rf"{key}: .* chmod 600 it"):
        play(scenario, **{key: str(given)})
    with pytest.raises(ConfigError, match=rf"{key}: .*absent.*cannot be read \(No such file or directory\)"):
        play(scenario, **{key: str(tmp_path / "absent")})


def test_an_operator_cordons_a_worker_and_follows_what_happens(play):
    async def scenario(world):
        first, second = [await world.worker(f"both-{number}", "colocated") for number in range(2)]
        with world.admin() as admin:
            events = admin.events()

            def read(number: int) -> list[tuple[str, str, str]]:
                return [(event.worker, event.change, event.reason) for event in islice(events, number)]

            assert await asyncio.to_thread(read, 2) == [("both-0", "came", ""), ("both-1", "came", "")]
            await asyncio.to_thread(admin.cordon, "both-0")
            assert [worker.state for worker in (await asyncio.to_thread(admin.cluster)).workers] == [
                "cordoned",
                "ready",
            ]
            for _ in range(2):
                answer = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=1)))
                request = (await second.expect(Generate)).request
                await second.tokens(request, "a", 0)
                await second.ended(request, "length")
                assert (await answer).route == ("both-1",)
            await asyncio.to_thread(admin.uncordon, "both-0")
            await asyncio.to_thread(admin.drain, "both-1")
            assert (await second.expect(Drain)) == Drain()
            with pytest.raises(InvalidRequest, match="worker: both-1 drains and will end"):
                await asyncio.to_thread(admin.uncordon, "both-1")
            for call in (admin.cordon, admin.uncordon):
                with pytest.raises(InvalidRequest, match=r"worker: 'nobody' is no living worker \(both-0, both-1\)"):
                    await asyncio.to_thread(call, "nobody")
            await first.close()
            said = "an operator said so"
            assert await asyncio.to_thread(read, 4) == [
                ("both-0", "cordoned", said),
                ("both-0", "ready", said),
                ("both-1", "draining", ""),
                ("both-0", "gone", "its control connection is gone"),
            ]
            # From a number on, and not from one that has not been.
            again = await asyncio.to_thread(next, admin.events(5))
            assert (again.sequence, again.change, again.num_missed, again.pid) == (5, "draining", 0, second.info.pid)
            with pytest.raises(InvalidRequest, match="first: 99: give 0 to 7; an orchestrator that started again"):
                await asyncio.to_thread(next, admin.events(99))

    play(scenario)
