"""FFN workers are told what to hold, and attention workers who holds what, whatever comes and goes in which order."""

from __future__ import annotations

import asyncio
from itertools import permutations

import pytest

from anabranch.errors import AnabranchError
from anabranch.protocol.ffn import FfnPlacement, Holding
from anabranch.protocol.wire_error import WireError
from anabranch.protocol.workers import Drain, ExpertRows, FfnNodes, Leaving, Place, Placed, Registered, Reserve
from anabranch_client import NoWorkers, Sampling
from tests.distributed.orchestrator.conftest import ALL_EXPERTS, EXPERTS, ScriptedWorker, World
from tests.support.waiting import eventually_async

pytestmark = pytest.mark.distributed

FOREVER = {"ffn_gather_timeout_s": 3600.0, "ffn_place_timeout_s": 3600.0, "no_worker_grace_s": 3600.0}


async def holds(node: ScriptedWorker) -> Place:
    """Let an FFN worker do what it is told."""
    place = await node.expect(Place)
    await node.send(Placed(version=place.version))
    return place


async def told(attn: ScriptedWorker) -> FfnPlacement:
    return (await attn.expect(FfnNodes)).placement


def holdings(placement: FfnPlacement) -> dict[str, Holding]:
    return {node.name: node.holding for node in placement.nodes}


def owners(*given: Holding) -> list[int]:
    """How many of these hold each expert, layer by layer."""
    return [
        sum(expert in holding[layer] for holding in given)
        for layer, (count, _) in enumerate(EXPERTS)
        for expert in range(count)
    ]


async def serve(world: World, prefill: ScriptedWorker, attn: ScriptedWorker) -> None:
    """One request from prefill to attn."""
    answer = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=1)))
    request = (await attn.expect(Reserve)).request
    await attn.reserved(request)
    await attn.tokens(request, "k", 0)
    await attn.ended(request, "length")
    completion = await answer
    assert completion.text == "k"
    assert completion.route == (prefill.info.name, attn.info.name)
    prefill.received.clear()


async def apart(world: World, num_ffn: int, **changes: object) -> tuple[ScriptedWorker, list[ScriptedWorker]]:
    """A prefill worker (unused), an attention worker that was told of all, and the FFN workers."""
    await world.worker("prefill-0", "prefill")
    nodes = [await world.worker(f"ffn-{number}", "ffn", **changes) for number in range(num_ffn)]
    for node in nodes:
        await holds(node)
    attn = await world.worker("attn-0", "attn")
    placement = await told(attn)
    # It may be told before all have answered, where those that have hold everything.
    while len(placement.nodes) < num_ffn:
        placement = await told(attn)
    return attn, nodes


@pytest.mark.parametrize("order", list(permutations(("prefill-0", "attn-0", "ffn-0", "ffn-1"))))
def test_any_start_order_works(play, order):
    async def scenario(world):
        workers = {}
        for name in order:
            assert await world.client.health() == "not_serving"
            workers[name] = await world.worker(name, name.partition("-")[0])
        placed = {name: (await holds(workers[name])).holding for name in ("ffn-0", "ffn-1")}
        assert owners(*placed.values()) == [1] * 5
        placement = await told(workers["attn-0"])
        assert placement.version == 1
        assert holdings(placement) == placed
        for node in placement.nodes:
            info = workers[node.name].info
            assert (node.incarnation, node.addresses) == (info.incarnation, info.addresses)
        await serve(world, workers["prefill-0"], workers["attn-0"])
        assert await world.client.health() == "serving"

    play(scenario, ffn_workers=2, **FOREVER)


def test_nothing_is_told_before_all_have_come_and_every_expert_has_an_owner(play):
    async def scenario(world):
        await world.worker("prefill-0", "prefill")
        attn = await world.worker("attn-0", "attn")
        says = "no ffn worker is there; start one"
        with pytest.raises(NoWorkers, match=says):
            await world.client.complete("abc")
        first = await world.worker("ffn-0", "ffn")
        with pytest.raises(NoWorkers, match=r"no ffn worker holds experts before 2 have come \(there: ffn-0\)"):
            await world.client.complete("abc")
        assert first.received == []
        second = await world.worker("ffn-1", "ffn")
        await holds(first)
        place = await second.expect(Place)
        with pytest.raises(NoWorkers, match=r"no ffn worker holds experts of layer \d: .*\(ffn-1 loads\)"):
            await world.client.complete("abc")
        # Of another version, or from another worker: nothing comes of it.
        await second.send(Placed(version=place.version + 7))
        await attn.send(Placed(version=place.version))
        await asyncio.sleep(0.05)
        assert attn.received == []
        assert await world.client.health() == "not_serving"
        await second.send(Placed(version=place.version))
        assert (await told(attn)).version == 1
        assert await world.client.health() == "serving"

    play(scenario, ffn_workers=2, **FOREVER)


def test_whoever_comes_in_time_holds_everything(play):
    async def scenario(world):
        await world.worker("prefill-0", "prefill")
        attn = await world.worker("attn-0", "attn")
        node = await world.worker("ffn-0", "ffn")
        assert (await holds(node)).holding == ALL_EXPERTS
        assert holdings(await told(attn)) == {"ffn-0": ALL_EXPERTS}

    play(scenario, ffn_workers=3, ffn_gather_timeout_s=0.2)


def test_an_attention_worker_that_comes_late_is_told_and_then_given_requests(play, wait):
    async def scenario(world):
        attn, _ = await apart(world, 1)
        late = await world.worker("attn-1", "attn")
        assert holdings(await told(late)) == {"ffn-0": ALL_EXPERTS}
        await wait(lambda: all(member.ready for member in world.orchestrator.membership.members))
        assert attn.received == []

    play(scenario, **FOREVER)


def test_a_lost_node_is_left_out_at_once_and_its_experts_go_to_survivors(play):
    async def scenario(world):
        attn, (first, second) = await apart(world, 2)
        with world.admin() as admin:
            assert await asyncio.to_thread(admin.report_exit, "ffn-1", second.info.pid, "killed")
        without = await told(attn)
        assert list(holdings(without)) == ["ffn-0"]
        assert without.version == 2
        with pytest.raises(NoWorkers, match=r"no ffn worker holds experts of layer .*ffn-0 loads"):
            await world.client.complete("abc")
        assert (await holds(first)).holding == ALL_EXPERTS
        assert holdings(await told(attn)) == {"ffn-0": ALL_EXPERTS}
        assert await world.client.health() == "serving"
        # It comes again, as another process: placed, then published.
        again = await world.worker("ffn-1", "ffn", incarnation=999, pid=77)
        place = await holds(again)
        back = await told(attn)
        assert back.version == 4
        assert holdings(back)["ffn-1"] == place.holding
        assert owners(*holdings(back).values()) == [1] * 5
        assert {node.name: node.incarnation for node in back.nodes}["ffn-1"] == 999

    play(scenario, ffn_workers=2, **FOREVER)


def test_with_replicas_nothing_stops(play):
    async def scenario(world):
        attn, (first, second) = await apart(world, 2)
        await second.close()
        placement = await told(attn)
        assert holdings(placement) == {"ffn-0": ALL_EXPERTS}
        assert first.received == []
        assert await world.client.health() == "serving"

    play(scenario, ffn_workers=2, ffn_replicas=0, **FOREVER)


def test_without_any_node_requests_that_wait_are_told_why(play):
    async def scenario(world):
        attn, (node,) = await apart(world, 1)
        running = asyncio.create_task(world.client.complete("abc", Sampling(max_tokens=2)))
        request = (await attn.expect(Reserve)).request
        await node.close()
        assert (await told(attn)).nodes == ()
        with pytest.raises(NoWorkers, match="no ffn worker is there; start one"):
            await world.client.complete("abc")
        error = WireError(code="ffn_unavailable", message="ffn_unavailable_s: nobody holds layer 0: 1")
        await attn.ended(request, "failed", error)
        # It waits for one to come, and then goes on.
        await holds(await world.worker("ffn-1", "ffn"))
        await eventually_async(lambda: any(isinstance(message, Reserve) for message in attn.received))
        again = next(message for message in attn.received if isinstance(message, Reserve)).request
        assert again.epoch == 1
        await attn.tokens(again, "ab", 0)
        await attn.ended(again, "length")
        done = await running
        assert [(route.workers[1], route.left) for route in done.routes] == [
            ("attn-0", "ffn_unavailable"),
            ("attn-0", ""),
        ]
        # That is no fault of the attention worker.
        assert world.orchestrator.membership.by_name("attn-0").num_failed == 0

    play(scenario, **FOREVER)


def test_a_node_that_cannot_load_is_told_no_more_and_others_take_its_part(play):
    async def scenario(world):
        await world.worker("prefill-0", "prefill")
        attn = await world.worker("attn-0", "attn")
        first, second = [await world.worker(f"ffn-{number}", "ffn") for number in range(2)]
        place = await second.expect(Place)
        await second.send(Placed(version=place.version, error=WireError(code="checkpoint", message="torn file")))
        await holds(first)
        # Whether it was told its share first, or everything at once.
        placement = await asyncio.wait_for(_whole(first, attn), 10.0)
        assert holdings(placement) == {"ffn-0": ALL_EXPERTS}
        assert second.received == []
        await first.close()
        await told(attn)
        with pytest.raises(NoWorkers, match=r"no ffn worker holds experts of .*ffn-1: torn file"):
            await world.client.complete("abc")

    async def _whole(node: ScriptedWorker, attn: ScriptedWorker) -> FfnPlacement:
        while not attn.received:
            if node.received:
                await holds(node)
            await asyncio.sleep(0.01)
        return await told(attn)

    play(scenario, ffn_workers=2, **FOREVER)


def test_a_node_that_never_answers_counts_as_dead(play):
    async def scenario(world):
        await world.worker("prefill-0", "prefill")
        attn = await world.worker("attn-0", "attn")
        first, second = [await world.worker(f"ffn-{number}", "ffn") for number in range(2)]
        await second.expect(Place)
        await holds(first)
        assert (await second.expect(Registered)).error.code == "worker_died"
        assert (await holds(first)).holding == ALL_EXPERTS
        assert holdings(await told(attn)) == {"ffn-0": ALL_EXPERTS}
        (gone,) = world.orchestrator.membership.departures
        assert (gone.name, gone.reason) == ("ffn-1", "ffn_place_timeout_s: it has not loaded its experts in 0.3 s")

    play(scenario, ffn_workers=2, ffn_place_timeout_s=0.3)


def test_experts_that_do_not_fit_are_said(play):
    async def scenario(world):
        async def is_said() -> bool:
            # Experts are shared out beside the event loop; until that has been done, something else is missing.
            with pytest.raises(NoWorkers, match="no ffn worker") as error:
                await world.client.complete("abc")
            return "capacity" in str(error.value)

        await world.worker("prefill-0", "prefill")
        attn = await world.worker("attn-0", "attn")
        first = await world.worker("ffn-0", "ffn", capacity_bytes=40)
        await eventually_async(is_said)
        assert first.received == []
        second = await world.worker("ffn-1", "ffn", capacity_bytes=20)
        placed = [(await holds(node)).holding for node in (first, second)]
        assert owners(*placed) == [1] * 5
        await told(attn)
        await second.close()
        # What is left is published; nobody has room for the rest.
        assert list(holdings(await told(attn))) == ["ffn-0"]
        await eventually_async(is_said)

    play(scenario, **FOREVER)


def test_a_node_drains_once_others_hold_its_experts(play, wait):
    async def scenario(world):
        attn, (first, second) = await apart(world, 2)
        with world.admin() as admin:
            await asyncio.to_thread(admin.drain, "ffn-1")
            place = await first.expect(Place)
            assert place.holding == ALL_EXPERTS
            assert await world.client.health() == "serving"
            assert second.received == []
            await first.send(Placed(version=place.version))
            assert holdings(await told(attn)) == {"ffn-0": ALL_EXPERTS}
            await second.expect(Drain)
            await second.close()
            await wait(lambda: world.orchestrator.membership.by_name("ffn-1") is None)
            assert [gone.expected for gone in world.orchestrator.membership.departures] == [True]
            # The last one goes on: there is nobody to hold what it does.
            await asyncio.to_thread(admin.drain, "ffn-0")
            cluster = await asyncio.to_thread(admin.cluster)
            roles = {worker.name: (worker.role, worker.state) for worker in cluster.workers}
            assert roles["ffn-0"] == ("ffn", "draining")
            assert roles["attn-0"] == ("attn", "ready")
        assert await world.client.health() == "serving"
        assert first.received == []

    play(scenario, ffn_workers=2, **FOREVER)


def test_a_node_that_leaves_by_itself_is_drained_and_one_that_dies_meanwhile_is_lost(play, wait):
    async def scenario(world):
        attn, (first, second) = await apart(world, 2)
        await second.send(Leaving())
        place = await first.expect(Place)
        assert place.holding == ALL_EXPERTS
        # It dies before others have what it held: published without it at once, and nobody is told twice.
        await second.close()
        assert list(holdings(await told(attn))) == ["ffn-0"]
        await first.send(Placed(version=place.version))
        assert holdings(await told(attn)) == {"ffn-0": ALL_EXPERTS}
        assert await world.client.health() == "serving"
        third = await world.worker("ffn-1", "ffn", incarnation=999, pid=77)
        await holds(third)
        await told(attn)
        await holds(first)
        # Now the other way: it serves until it gets Drain.
        await first.send(Leaving())
        await holds(third)
        placement = await told(attn)
        while len(placement.nodes) > 1:
            placement = await told(attn)
        assert holdings(placement) == {"ffn-1": ALL_EXPERTS}
        await first.expect(Drain)

    play(scenario, ffn_workers=2, **FOREVER)


def test_experts_move_for_the_load_that_workers_report(play, wait):
    async def scenario(world):
        attn, nodes = await apart(world, 2)
        by_name = {node.info.name: node for node in nodes}
        before = {node.info.name: held for node, held in zip(nodes, await _held(world), strict=True)}
        hot = before["ffn-0"][0]
        rows = tuple(1000 if expert in hot else 10 for expert in range(4))

        async def report():
            await nodes[0].send(ExpertRows(rows=(rows, ())))
            await asyncio.sleep(0.05)

        while not any(node.received for node in nodes):
            await report()
        # What both shall hold is loaded first, then published, then what is too much goes.
        placement = None
        while placement is None or set(holdings(placement)["ffn-0"][0]) == set(hot):
            for node in by_name.values():
                while node.received:
                    await holds(node)
            await asyncio.sleep(0.01)
            if attn.received:
                placement = await told(attn)
                assert min(owners(*holdings(placement).values())) >= 1
        assert len(set(holdings(placement)["ffn-1"][0]) & set(hot)) >= 1

    async def _held(world):
        return [node.holding for node in world.orchestrator._ffn_pool._placement.nodes]

    play(scenario, ffn_workers=2, ffn_rebalance_s=1, **FOREVER)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"addresses": {}}, "addresses: {}: an ffn worker must send where attn workers reach it"),
        ({"incarnation": 0}, "incarnation: 0: must be at least 1"),
        ({"kv_dtype": "bfloat16"}, "kv_dtype: 'bfloat16': of odd .* differs from 'float32' of first"),
        ({"model_fingerprint": "f2"}, "model_fingerprint: 'f2': of odd .* differs from 'f1' of first"),
        ({"hidden_size": 9}, "hidden_size: 9: of odd .* differs from 8 of the orchestrator"),
    ],
)
def test_a_node_that_does_not_fit_is_refused(play, changes, says):
    async def scenario(world):
        await world.worker("first", "attn")
        answer = await world.stranger("odd", "ffn", **changes).register()
        with pytest.raises(AnabranchError, match=says):
            raise answer.error.to_error()

    play(scenario)


def test_ffn_workers_without_attention_workers_serve_nobody(play):
    async def scenario(world):
        await world.worker("prefill-0", "prefill")
        node = await world.worker("ffn-0", "ffn")
        await holds(node)
        with pytest.raises(NoWorkers, match="no attn worker takes requests, nor does a colocated one"):
            await world.client.complete("abc")
        # Beside them, others serve.
        await world.worker("decode-0", "decode")
        assert await world.client.health() == "serving"
        model = await world.client.model()
        assert {(pool.role, pool.num_workers) for pool in model.pools} == {("prefill", 1), ("ffn", 1), ("decode", 1)}

    play(scenario)
