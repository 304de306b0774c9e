"""How many FFN workers there shall be: asked by operators, heard by whoever starts workers, and refused by name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from anabranch.protocol.workers import Drain, FfnNodes, Place, Placed
from anabranch_client import Admin, ClientError, InvalidRequest
from tests.distributed.orchestrator.conftest import World
from tests.support.waiting import WAIT_S, eventually_async

pytestmark = pytest.mark.distributed


class Follower:
    """A launcher that only listens."""

    def __init__(self, admin: Admin, max_workers: int) -> None:
        self.heard: list[int] = []
        self._admin = admin
        self._max_workers = max_workers

    def run(self) -> None:
        try:
            for workers in self._admin.follow_ffn_scale(self._max_workers):
                self.heard.append(workers)
        except ClientError:
            pass


@asynccontextmanager
async def following(world: World, max_workers: int) -> AsyncIterator[Follower]:
    admin = world.admin()
    follower = Follower(admin, max_workers)
    task = asyncio.create_task(asyncio.to_thread(follower.run))
    await eventually_async(lambda: bool(follower.heard) or task.done())
    try:
        yield follower
    finally:
        admin.close()
        await task


async def refused(world: World, workers: int) -> str:
    with world.admin() as admin, pytest.raises(InvalidRequest) as caught:
        await asyncio.to_thread(admin.scale_ffn, workers)
    assert caught.value.code == "invalid_request"
    return str(caught.value)


async def scale(world: World, workers: int) -> None:
    with world.admin() as admin:
        await asyncio.to_thread(admin.scale_ffn, workers)


def test_who_follows_hears_the_newest_number_and_so_does_who_follows_later(play: Callable[..., None]) -> None:
    async def scenario(world: World) -> None:
        async with following(world, 8) as first:
            assert first.heard == [0]
            for workers in (3, 1, 8):
                await scale(world, workers)
                await eventually_async(lambda: first.heard[-1] == workers)  # noqa: B023
            async with following(world, 2) as second:
                assert second.heard == [8]
                await scale(world, 2)
                await eventually_async(lambda: first.heard[-1] == second.heard[-1] == 2)
        # Nobody is left.
        await eventually_async(lambda: not world.orchestrator._ffn_scale._followers)
        assert (await refused(world, 2)).startswith("workers: nobody who starts workers follows; start `python")

    play(scenario, ffn_workers=1)


def test_what_cannot_be_is_refused(play: Callable[..., None]) -> None:
    async def scenario(world: World) -> None:
        async with following(world, 4):
            for workers in (0, -3, 257):
                assert await refused(world, workers) == f"workers: {workers}: give 1 to 256"
            assert await refused(world, 5) == "workers: 5: the machine has memory for 4 ffn workers"
            assert "ScaleFfnRequest" not in await refused(world, 2**70)
        with world.admin() as admin:
            for max_workers in (0, 257):
                with pytest.raises(InvalidRequest, match=f"max_workers: {max_workers}: give 1 to 256"):
                    await asyncio.to_thread(next, admin.follow_ffn_scale(max_workers))

    play(scenario, ffn_workers=1)


def test_without_ffn_workers_there_is_nothing_to_scale(play: Callable[..., None]) -> None:
    async def scenario(world: World) -> None:
        await world.pair()
        async with following(world, 4):
            assert (await refused(world, 2)).startswith("workers: this cluster has no ffn workers; start one whose")

    play(scenario)


def test_fewer_than_hold_all_experts_are_refused_and_the_youngest_leaves_once_others_hold_its_share(
    play: Callable[..., None],
) -> None:
    async def scenario(world: World) -> None:
        await world.worker("prefill-0", "prefill")
        attn = await world.worker("attn-0", "attn")
        # Each holds half of all, and a little more.
        total = sum(count * size for count, size in world.model.expert_bytes("float32", shared=False))
        nodes = [
            await world.worker(f"ffn-{number}", "ffn", capacity_bytes=total * 3 // 5 if number < 2 else 0)
            for number in range(3)
        ]
        for node in nodes:
            place = await node.expect(Place)
            await node.send(Placed(version=place.version))
        while len((await attn.expect(FfnNodes)).placement.nodes) < 3:
            pass
        async with following(world, 4) as follower:
            assert "capacity" in await refused(world, 1)
            await scale(world, 2)
            await eventually_async(lambda: follower.heard[-1] == 2)
        with world.admin() as admin:
            await asyncio.to_thread(admin.drain, "ffn-2")
        async with asyncio.timeout(WAIT_S):
            while not any(isinstance(message, Drain) for message in nodes[2].received):
                # Whichever of the others takes its share over.
                for node in nodes[:2]:
                    for place in [message for message in node.received if isinstance(message, Place)]:
                        node.received.remove(place)
                        await node.send(Placed(version=place.version))
                await asyncio.sleep(0.01)
        left = (await attn.expect(FfnNodes)).placement
        while len(left.nodes) > 2:
            left = (await attn.expect(FfnNodes)).placement
        assert {node.name for node in left.nodes} == {"ffn-0", "ffn-1"}

    play(scenario, ffn_workers=3)
