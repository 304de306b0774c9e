"""An FFN worker over the real channel, with a test in the place of the orchestrator and of the attention ranks."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from anabranch.config.worker import WorkerConfig
from anabranch.errors import CheckpointError, ConfigError, WorkerDied
from anabranch.kernels.native import select_kernels
from anabranch.kernels.plain import PlainKernels
from anabranch.kernels.row_exact import RowExact
from anabranch.model.ffn_half import FfnInput
from anabranch.model.load import load_model
from anabranch.parallel.group import SingleRank
from anabranch.protocol.ffn import Holding
from anabranch.protocol.workers import Drain, ExpertRows, Failing, Generate, Leaving, Place, Placed
from anabranch.system import clock
from benchmarks.m2n_ends import make_call
from ffn_nodes import rank, ranked_experts
from ffn_nodes import worker as worker_module
from ffn_nodes.product import Product
from ffn_nodes.worker import FfnWorker
from runtime import worker as runtime_worker
from tests.support.resources import our_threads
from tests.support.scripted import ScriptedOrchestrator, play, request
from tests.support.waiting import WAIT_S, eventually_async
from transport.m2n import create_link_maker
from transport.m2n.base import ChannelShape, Link, LinkMaker
from transport.m2n.messages import Answer, Call, Status

pytestmark = pytest.mark.unit

ALL: Holding = (tuple(range(6)), (0,), tuple(range(6)))
Act = Callable[[ScriptedOrchestrator, FfnWorker], Awaitable[None]]


@pytest.fixture
def with_worker(tmp_path: Path, folder: Path) -> Callable[..., None]:
    """`with_worker(act, **options)`: a worker that has sent Register; afterwards nothing is left of it."""

    def run(act: Act, **options: object) -> None:
        async def scenario() -> None:
            async with ScriptedOrchestrator(tmp_path, folder, "ffn", FfnWorker, **options) as orchestrator:
                worker = orchestrator.worker
                assert isinstance(worker, FfnWorker)
                await orchestrator.accept()
                await act(orchestrator, worker)
            assert not our_threads()

        play(scenario)

    return run


class Peer:
    """An attention rank."""

    def __init__(self, maker: LinkMaker, link: Link) -> None:
        self._maker, self.link = maker, link

    def ask(self, call: Call) -> Answer:
        self.link.send(call)
        for _ in range(int(WAIT_S / 0.05)):
            if (answer := self.link.receive()) is not None:
                return answer
            self._maker.wait(0.05)
        raise AssertionError("no answer came")


@contextmanager
def linked(orchestrator: ScriptedOrchestrator, transport: str = "auto", **changes: object) -> Iterator[Peer]:
    fields: dict[str, object] = {
        "model": orchestrator.info.model_fingerprint,
        "dtype": torch.float32,
        "hidden_size": 48,
        "max_rows": 64,
        "max_choices": 3,
        "num_slots": 2,
    }
    maker = create_link_maker(ChannelShape(**{**fields, **changes}), transport)
    try:
        yield Peer(maker, maker.dial(orchestrator.info.addresses, "ffn-0").attach())
    finally:
        maker.close()


async def place(orchestrator: ScriptedOrchestrator, version: int, holding: Holding) -> Placed:
    await orchestrator.send(Place(version=version, holding=holding))
    placed = await orchestrator.expect(Placed)
    assert placed.version == version
    return placed


async def ended(orchestrator: ScriptedOrchestrator) -> None:
    async with asyncio.timeout(WAIT_S):
        await orchestrator.run


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("native", [False, True])
def test_rows_go_in_and_answers_come_out(transport: str, native: bool, with_worker, folder: Path) -> None:
    device = torch.device("cpu")
    rows_TC = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    experts_TS = torch.tensor([[0, 1, 2], [5, 4, 0], [2, 3, 1], [4, 1, 5], [3, 0, 2]])
    kernels = RowExact(select_kernels(device, torch.float32, native))
    _, whole = load_model(str(folder), dtype=torch.float32, device=device, kernels=PlainKernels(), group=SingleRank())

    async def act(orchestrator: ScriptedOrchestrator, worker: FfnWorker) -> None:
        info = orchestrator.info
        assert (info.role, info.num_blocks, info.max_context, info.planes) == ("ffn", 0, 0, ())
        assert info.kv_dtype == "float32"
        assert info.model_fingerprint == (await asyncio.to_thread(fingerprint, folder))
        assert info.incarnation > 0
        assert info.capacity_bytes == 1 << 30
        assert transport in info.addresses
        with linked(orchestrator, transport) as peer:
            dense = make_call(rows_TC, layer=1, ticket=1)
            sparse = make_call(rows_TC, layer=2, ticket=2, experts_TS=experts_TS)
            assert (await asyncio.to_thread(peer.ask, dense)).status is Status.NOT_HELD
            assert (await place(orchestrator, 1, ALL)).error is None
            answer = await asyncio.to_thread(peer.ask, make_call(rows_TC, layer=1, ticket=3))
            assert (answer.status, answer.ticket, answer.merged_rows) == (Status.OK, 3, 5)
            dense_ffn = whole.ffn.layers[1]
            gate_up_FC, down_CF = dense_ffn.gate_up.weight_FC, dense_ffn.down.weight_FC
            expected = kernels.linear(kernels.linear_silu_mul(rows_TC, gate_up_FC, None), down_CF, None)
            assert torch.equal(answer.rows_RC, expected)
            answer = await asyncio.to_thread(peer.ask, sparse)
            assert answer.status is Status.OK
            assert answer.rows_RC.shape == (15, 48)
            assert peer.link.num_free == 2
            await eventually_async(lambda: worker.stats().num_running == worker.stats().num_waiting == 0)
            assert not worker.is_idle()
        await eventually_async(worker.is_idle)
        await eventually_async(lambda: worker._serving.activity.num_done == 3)

    with_worker(act, native_kernels=native, ffn_transport=transport, capacity_bytes=1 << 30)


def fingerprint(folder: Path) -> str:
    config, _ = load_model(
        str(folder),
        dtype=torch.float32,
        device=torch.device("cpu"),
        kernels=PlainKernels(),
        group=SingleRank(),
    )
    return config.fingerprint()


def test_another_model_or_dtype_gets_no_link(with_worker) -> None:
    async def act(orchestrator: ScriptedOrchestrator, worker: FfnWorker) -> None:
        changes: list[dict[str, object]] = [{"model": "f" * 32}, {"dtype": torch.bfloat16}, {"hidden_size": 49}]
        for change in changes:
            with pytest.raises(ConfigError), linked(orchestrator, **change):
                pass
        with linked(orchestrator):
            await eventually_async(lambda: not worker.is_idle())

    with_worker(act)


def test_it_takes_no_requests_and_goes_on(with_worker, caplog) -> None:
    async def act(orchestrator: ScriptedOrchestrator, worker: FfnWorker) -> None:
        await orchestrator.send(Generate(request=request((1,), 2)))
        assert (await place(orchestrator, 1, ALL)).error is None
        assert "a ffn worker takes no Generate" in caplog.text
        refused = await place(orchestrator, 2, ((0,),))
        assert refused.error is not None and refused.error.code == "malformed_message"

    with_worker(act)


def test_drained_it_serves_until_nobody_is_linked(with_worker) -> None:
    async def act(orchestrator: ScriptedOrchestrator, worker: FfnWorker) -> None:
        assert (await place(orchestrator, 1, ALL)).error is None
        with linked(orchestrator) as peer:
            await eventually_async(lambda: not worker.is_idle())
            await orchestrator.send(Drain())
            await eventually_async(lambda: worker.draining)
            answer = await asyncio.to_thread(peer.ask, make_call(torch.zeros(1, 48), layer=1))
            assert answer.status is Status.OK
            assert not orchestrator.run.done()
        await ended(orchestrator)

    with_worker(act)


def test_a_signal_is_announced_and_it_serves_until_others_have_what_it_holds(with_worker) -> None:
    async def act(orchestrator: ScriptedOrchestrator, worker: FfnWorker) -> None:
        assert (await place(orchestrator, 1, ALL)).error is None
        with linked(orchestrator) as peer:
            await eventually_async(lambda: not worker.is_idle())
            # As `runtime.entry` does at SIGTERM.
            worker.drain()
            await orchestrator.expect(Leaving)
            answer = await asyncio.to_thread(peer.ask, make_call(torch.zeros(1, 48), layer=1))
            assert answer.status is Status.OK
            await orchestrator.send(Drain())
            answer = await asyncio.to_thread(peer.ask, make_call(torch.zeros(1, 48), layer=1, ticket=2))
            assert answer.status is Status.OK
            assert not orchestrator.run.done()
        await ended(orchestrator)

    with_worker(act)


def test_the_rows_of_each_expert_are_reported_once(with_worker, monkeypatch) -> None:
    monkeypatch.setattr(worker_module, "awake_s", lambda: clock.awake_s() + elapsed[0])
    elapsed = [0.0]

    async def act(orchestrator: ScriptedOrchestrator, worker: FfnWorker) -> None:
        assert (await place(orchestrator, 1, ((0, 1), (0,), (0, 1, 2)))).error is None
        experts_TS = torch.tensor([[0, 1], [2, 1], [0, 1]])
        with linked(orchestrator) as peer:
            refused = make_call(torch.ones(1, 48), layer=2, ticket=1, experts_TS=torch.tensor([[5]]))
            assert (await asyncio.to_thread(peer.ask, refused)).status is Status.NOT_HELD
            dense = make_call(torch.ones(3, 48), layer=1, ticket=2)
            assert (await asyncio.to_thread(peer.ask, dense)).status is Status.OK
            for ticket in (3, 4):
                call = make_call(torch.ones(3, 48), layer=2, ticket=ticket, experts_TS=experts_TS)
                assert (await asyncio.to_thread(peer.ask, call)).status is Status.OK
            elapsed[0] += worker_module.REPORT_S
            assert (await orchestrator.expect(ExpertRows)).rows == ((0,) * 6, (), (4, 6, 2, 0, 0, 0))
            call = make_call(torch.ones(3, 48), layer=0, ticket=5, experts_TS=torch.zeros(3, 1, dtype=torch.int64))
            assert (await asyncio.to_thread(peer.ask, call)).status is Status.OK
            elapsed[0] += worker_module.REPORT_S
            assert (await orchestrator.expect(ExpertRows)).rows == ((3, 0, 0, 0, 0, 0), (), (0,) * 6)

    with_worker(act)


def test_drained_it_ends_at_last_though_somebody_is_linked(with_worker, monkeypatch, caplog) -> None:
    monkeypatch.setattr(worker_module, "awake_s", lambda: clock.awake_s() + elapsed[0])
    elapsed = [0.0]

    async def act(orchestrator: ScriptedOrchestrator, worker: FfnWorker) -> None:
        with linked(orchestrator):
            await eventually_async(lambda: not worker.is_idle())
            await orchestrator.send(Drain())
            await eventually_async(lambda: worker.draining)
            assert not worker.is_idle()
            elapsed[0] = worker_module.DRAIN_TIMEOUT_S
            await ended(orchestrator)
        assert "ffn_drain_timeout_s: 1 attention ranks are still linked" in caplog.text

    with_worker(act)


def test_a_product_that_hangs_ends_the_worker_with_its_reason(with_worker, monkeypatch) -> None:
    monkeypatch.setattr(runtime_worker, "FAREWELL_TIMEOUT_S", WAIT_S)
    hold = threading.Event()
    compute = Product.compute

    def held_up(self: Product, calls: list[Call]) -> object:
        hold.wait(WAIT_S)
        return compute(self, calls)

    monkeypatch.setattr(Product, "compute", held_up)

    async def act(orchestrator: ScriptedOrchestrator, worker: FfnWorker) -> None:
        with linked(orchestrator) as peer:
            peer.link.send(make_call(torch.zeros(1, 48), layer=1))
            failing = await orchestrator.expect(Failing)
            assert failing.error.code == "worker_died"
            assert "step_stall_s: the compute thread has been at one thing for" in failing.error.message
            hold.set()
            with pytest.raises(WorkerDied, match="step_stall_s"):
                await ended(orchestrator)

    with_worker(act, step_stall_s=0.5)


@pytest.mark.parametrize("tp", [2, 3])
def test_ranks_answer_together(tp: int, with_worker, folder: Path, monkeypatch) -> None:
    # So that a call's rows reach the other ranks in several parts.
    monkeypatch.setattr(ranked_experts, "MAX_ROWS_BYTES", 4 * 4 * 48)
    device = torch.device("cpu")
    _, whole = load_model(str(folder), dtype=torch.float32, device=device, kernels=PlainKernels(), group=SingleRank())
    rows_TC = torch.randn(9, 48, generator=torch.Generator().manual_seed(0))
    experts_TS = torch.rand(9, 6, generator=torch.Generator().manual_seed(1)).argsort(dim=1)[:, :3]
    weights_TS = torch.rand(9, 3, generator=torch.Generator().manual_seed(2))
    layer = whole.ffn.layers[2]
    layer.shared = None

    async def act(orchestrator: ScriptedOrchestrator, worker: FfnWorker) -> None:
        assert orchestrator.info.tp == tp
        with linked(orchestrator) as peer:
            assert (await place(orchestrator, 1, ((), (0,), (0, 1, 2)))).error is None
            answer = await asyncio.to_thread(peer.ask, make_call(rows_TC, layer=1, ticket=1))
            expected = whole.ffn.layers[1].forward(FfnInput(rows_TC, None, None))
            torch.testing.assert_close(answer.rows_RC, expected, rtol=1e-5, atol=1e-4)
            row = await asyncio.to_thread(peer.ask, make_call(rows_TC[4:5], layer=1, ticket=2))
            assert torch.equal(row.rows_RC, answer.rows_RC[4:5])
            sums = make_call(rows_TC, layer=2, ticket=3, experts_TS=experts_TS, weights_TS=weights_TS)
            assert (await asyncio.to_thread(peer.ask, sums)).status is Status.NOT_HELD
            # The second time, what only the first placement named goes.
            for version in (2, 3):
                assert (await place(orchestrator, version, ((), (), tuple(range(6))))).error is None
            answer = await asyncio.to_thread(peer.ask, sums)
            expected = layer.forward(FfnInput(rows_TC, weights_TS, experts_TS))
            torch.testing.assert_close(answer.rows_RC, expected, rtol=1e-5, atol=1e-4)
            row = make_call(rows_TC[8:], layer=2, ticket=4, experts_TS=experts_TS[8:], weights_TS=weights_TS[8:])
            assert torch.equal((await asyncio.to_thread(peer.ask, row)).rows_RC, answer.rows_RC[8:])
            dense = make_call(rows_TC, layer=1, ticket=5)
            assert (await asyncio.to_thread(peer.ask, dense)).status is Status.NOT_HELD

    with_worker(act, tp=tp, rank_processes=False)


def test_what_a_rank_cannot_load_is_said_and_not_used(with_worker, monkeypatch) -> None:
    broken = [True]
    load = rank.load_experts

    def load_experts(*arguments: object) -> bool:
        if broken[0]:
            raise CheckpointError("the disk is gone")
        return load(*arguments)

    monkeypatch.setattr(rank, "load_experts", load_experts)

    async def act(orchestrator: ScriptedOrchestrator, worker: FfnWorker) -> None:
        with linked(orchestrator) as peer:
            refused = await place(orchestrator, 1, ((), (0,), ()))
            assert refused.error is not None
            assert (refused.error.code, refused.error.message) == ("checkpoint", "the disk is gone")
            dense = make_call(torch.ones(1, 48), layer=1, ticket=1)
            assert (await asyncio.to_thread(peer.ask, dense)).status is Status.NOT_HELD
            broken[0] = False
            assert (await place(orchestrator, 2, ((), (0,), ()))).error is None
            dense = make_call(torch.ones(1, 48), layer=1, ticket=2)
            assert (await asyncio.to_thread(peer.ask, dense)).status is Status.OK

    with_worker(act, tp=2, rank_processes=False)


def test_ranks_die_together(with_worker, monkeypatch) -> None:
    monkeypatch.setattr(runtime_worker, "FAREWELL_TIMEOUT_S", WAIT_S)

    async def act(orchestrator: ScriptedOrchestrator, worker: FfnWorker) -> None:
        assert (await place(orchestrator, 1, ALL)).error is None
        with linked(orchestrator) as peer:
            assert (await asyncio.to_thread(peer.ask, make_call(torch.ones(1, 48), layer=1))).status is Status.OK
            [pid] = worker._ranks.pids.values()
            os.kill(pid, signal.SIGKILL)
            failing = await orchestrator.expect(Failing)
            assert "rank 1 of ffn-0" in failing.error.message
            assert "was killed by SIGKILL" in failing.error.message
            with pytest.raises(WorkerDied, match="SIGKILL"):
                await ended(orchestrator)

    with_worker(act, tp=2)


def test_more_ranks_than_features_are_refused(tmp_path: Path, folder: Path) -> None:
    config = WorkerConfig(
        role="ffn", name="ffn-0", model=str(folder), orchestrator=f"ipc://{tmp_path}/x", dtype="float32", tp=15
    )
    with pytest.raises(ConfigError, match="tp: 15: must be at most the model's 14 FFN features"):
        FfnWorker(config).build()
