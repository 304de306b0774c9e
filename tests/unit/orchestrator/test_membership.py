"""What becomes of a worker's state, and what the log says of it."""

from __future__ import annotations

import asyncio

import pytest

from anabranch.errors import AnabranchError, InvalidRequest
from anabranch.protocol.workers import ModelIdentity, Registered, ToWorker, WorkerInfo
from orchestrator.member import SUSPECT_AFTER, Member
from orchestrator.membership import Membership
from tests.unit.orchestrator.test_router import member

pytestmark = pytest.mark.unit


class Channel:
    """The control channel's sending side."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, ToWorker]] = []
        self.dismissed: list[tuple[bytes, Registered]] = []

    async def send(self, peer: bytes, message: ToWorker) -> None:
        self.sent.append((peer, message))

    async def dismiss(self, peer: bytes, message: Registered) -> None:
        self.dismissed.append((peer, message))


class Cluster:
    def __init__(self) -> None:
        self.channel = Channel()
        self.changed: list[tuple[str, str]] = []
        served = ModelIdentity(
            **{field: getattr(member("x", "decode").info, field) for field in ModelIdentity.__struct_fields__}
        )
        self.membership = Membership(
            self.channel,  # type: ignore[arg-type]
            served,
            worker_timeout_s=3.0,
            heartbeat_s=0.5,
            on_change=lambda changed: self.changed.append((changed.name, changed.state)),
        )

    async def come(self, name: str, role: str, **changes: object) -> Member:
        info: WorkerInfo = member(name, role, **changes).info
        await self.membership.register(name.encode(), info)
        found = self.membership.by_name(name)
        assert found is not None, self.channel.sent
        return found

    @property
    def log(self) -> list[tuple[str, str]]:
        return [(event.worker, event.change) for event in self.membership.log._events]


def test_a_worker_that_fails_some_in_a_row_is_suspect_until_it_serves_one():
    async def scenario():
        cluster = Cluster()
        bad = await cluster.come("a", "decode")
        error = AnabranchError("the step failed")
        for _ in range(SUSPECT_AFTER - 1):
            cluster.membership.failed(bad, error)
        cluster.membership.served(bad)
        for _ in range(SUSPECT_AFTER + 2):
            assert bad.state == ("suspect" if bad.num_failed >= SUSPECT_AFTER else "ready")
            cluster.membership.failed(bad, error)
        assert bad.ready
        assert not bad.full
        bad.num_requests = 1
        assert bad.full
        cluster.membership.served(bad)
        assert (bad.state, bad.full) == ("ready", False)
        assert cluster.log == [("a", "came"), ("a", "suspect"), ("a", "ready")]
        assert cluster.changed == [("a", "ready"), ("a", "suspect"), ("a", "ready")]
        assert "3 requests in a row, the last with: the step failed" in cluster.membership.log._events[1].reason
        cluster.membership.lose(bad, "killed")
        for _ in range(SUSPECT_AFTER):
            cluster.membership.failed(bad, error)
        cluster.membership.served(bad)
        assert cluster.log[3:] == [("a", "gone")]

    asyncio.run(scenario())


def test_a_cordoned_worker_takes_nothing_until_it_is_uncordoned():
    async def scenario():
        cluster = Cluster()
        worker = await cluster.come("c", "colocated")
        membership = cluster.membership
        membership.cordon(worker)
        membership.cordon(worker)
        assert (worker.state, worker.ready, membership.serving) == ("cordoned", False, False)
        missing = membership.missing()
        assert missing is not None
        assert "(cordoned: c; uncordon what is well)" in str(missing)
        membership.uncordon(worker)
        membership.uncordon(worker)
        assert (worker.state, membership.serving) == ("ready", True)
        assert cluster.log == [("c", "came"), ("c", "cordoned"), ("c", "ready")]
        membership.cordon(worker)
        await membership.drain(worker)
        assert worker.state == "draining"
        for refused in (membership.cordon, membership.uncordon):
            with pytest.raises(InvalidRequest, match=r"worker: c drains"):
                refused(worker)
        node = await cluster.come("f", "ffn", incarnation=1, addresses={"shm": "/f"})
        with pytest.raises(InvalidRequest, match="f is an ffn worker, which is given no requests; drain it"):
            membership.cordon(node)
        membership.lose(worker, "exit status 0")
        assert membership.log._events[-1].reason == "it was drained"
        # One that fails refuses requests as one that drains does.
        failing = await cluster.come("c", "colocated")
        membership.mark_draining(failing)
        membership.lose(failing, "every step fails", failed=True)
        assert membership.log._events[-1].reason == "every step fails"
        assert [gone.expected for gone in membership.departures] == [True, False]

    asyncio.run(scenario())


def test_one_that_is_gone_is_fenced_once_and_told_why():
    async def scenario():
        cluster = Cluster()
        worker = await cluster.come("c", "colocated")
        cluster.membership.lose(worker, "it was silent for 3.1 s")
        for _ in range(2):
            assert await cluster.membership.heard(b"c") is None
        assert await cluster.membership.heard(b"stranger") is None
        says = [registered.error.message for _, registered in cluster.channel.dismissed]
        assert "counts as dead (worker c (pid 1) died: it was silent for 3.1 s); start anew" in says[0]
        assert cluster.log == [("c", "came"), ("c", "gone"), ("c", "fenced")]

    asyncio.run(scenario())
