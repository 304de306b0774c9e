"""What collectives compute, on every carrier: equal to torch's, the same bits on every rank."""

from __future__ import annotations

import hashlib
from typing import Protocol

import pytest
import torch

from anabranch.parallel.mesh import Mesh
from anabranch.parallel.threads import run_ranks
from transport.collectives import CollectiveGroup

pytestmark = pytest.mark.distributed

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32)
SIZES = (1, 2, 7, 63, 1024, 1025, 8191, 16385, 100_003, 700_001)


class Launch(Protocol):
    def __call__(self, size: int, body: object) -> list[object]: ...


@pytest.fixture(params=["shm", "gloo", "threads"])
def launch(request: pytest.FixtureRequest) -> Launch:
    """Runs a body on ranks that are processes (shared memory, Gloo) or threads."""
    if request.param == "threads":
        return lambda size, body: run_ranks(size, body)
    ranks = request.getfixturevalue("ranks")
    return lambda size, body: ranks.run(size, body, backend=request.param)


def part_of(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + sum(shape))
    if dtype.is_floating_point:
        return (torch.randn(shape, generator=generator) * 8).to(dtype)
    return torch.randint(-1000, 1000, shape, generator=generator, dtype=dtype)


def summed(parts: list[torch.Tensor]) -> torch.Tensor:
    """In rank order, in float32, rounded once."""
    wide = [part.float() if part.dtype in (torch.bfloat16, torch.float16) else part for part in parts]
    total = wide[0].clone()
    for part in wide[1:]:
        total += part
    return total.to(parts[0].dtype)


def digest(x: torch.Tensor) -> str:
    return hashlib.sha256(x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_sums_are_torchs_and_the_same_bits_on_every_rank(launch: Launch, size: int) -> None:
    def body(group: CollectiveGroup) -> object:
        digests = []
        for dtype in DTYPES:
            for length in SIZES:
                parts = [part_of(rank, (length,), dtype) for rank in range(size)]
                expected = summed(parts)
                found = group.all_reduce(parts[group.rank])
                exact = group.backend != "gloo" or size == 2 or not dtype.is_floating_point
                if exact:
                    assert torch.equal(found, expected), (dtype, length)
                else:  # Gloo rounds after each addition
                    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.3)
                digests.append(digest(found))
        return digests

    results = launch(size, body)
    assert all(result == results[0] for result in results)


def test_sums_keep_infinities_and_nan(launch: Launch) -> None:
    rows = {
        0: [float("inf"), float("inf"), float("nan"), 3.0e38, 65504.0],
        1: [1.0, float("-inf"), 1.0, 3.0e38, 65504.0],
    }

    def body(group: CollectiveGroup) -> object:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            expected = summed([torch.tensor(rows[rank]).to(dtype) for rank in range(2)])
            found = group.all_reduce(torch.tensor(rows[group.rank]).to(dtype))
            assert torch.equal(found.isnan(), expected.isnan()), dtype
            assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0)), dtype
        return None

    launch(2, body)


@pytest.mark.parametrize("size", [2, 3])
def test_gathers_and_scatters_along_every_dim(launch: Launch, size: int) -> None:
    def body(group: CollectiveGroup) -> object:
        for shape in ((6,), (1, 5), (3, 6, 4), (2, 90_000), (700, 300)):
            for dtype in (torch.float32, torch.bfloat16, torch.int64):
                for dim in (*range(len(shape)), -1):
                    parts = [part_of(rank, shape, dtype) for rank in range(size)]
                    gathered = group.all_gather(parts[group.rank], dim)
                    assert torch.equal(gathered, torch.cat(parts, dim)), (shape, dtype, dim)
        return None

    launch(size, body)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_blocks_go_round_a_ring(launch: Launch, size: int) -> None:
    def body(group: CollectiveGroup) -> object:
        to, source = (group.rank + 1) % size, (group.rank - 1) % size
        for in_place in (True, False):
            for length in (1, 100, 16_000, 40_001, 300_000, 1_200_001):
                own = part_of(group.rank, (length,), torch.float32)
                block = own
                for step in range(size):
                    make = group.buffer_like if in_place else torch.empty_like
                    following = make(block)
                    handle = group.post([block], to, [following], source)
                    assert torch.equal(block, part_of((group.rank - step) % size, (length,), torch.float32))
                    handle.wait()
                    block = following
                assert torch.equal(block, own), (in_place, length)
        return None

    launch(size, body)


def test_transfers_may_be_cut_differently_and_keep_their_order(launch: Launch) -> None:
    def body(group: CollectiveGroup) -> object:
        peer = 1 - group.rank
        for length in (5, 20_000, 300_000):
            handles, received = [], []
            for number in range(5):
                whole = torch.arange(3 * length, dtype=torch.float32) + 10 * number + group.rank
                pieces = [whole] if number % 2 else list(whole.split([length, 2 * length]))
                target = group.buffer_like(whole) if number % 3 == 0 else torch.empty_like(whole)
                buffers = list(target.split([2 * length, length])) if group.rank else [target]
                handles.append(group.post(pieces, peer, buffers, peer))
                received.append(target)
            for handle in reversed(handles):
                handle.wait()
            for number, target in enumerate(received):
                assert torch.equal(target, torch.arange(3 * length, dtype=torch.float32) + 10 * number + peer)
        one_way = torch.ones(3)
        if group.rank == 0:
            group.post([one_way * 4], 1, [], 0).wait()
        else:
            group.post([], 0, [one_way], 0).wait()
            assert one_way.tolist() == [4.0, 4.0, 4.0]
        group.post([], 0, [], 0).wait()
        with pytest.raises(ValueError, match="ranks 0 to 1"):
            group.post([one_way], 2, [], 0)
        with pytest.raises(ValueError, match="not contiguous"):
            group.post([], 0, [torch.ones(4, 4).T], peer)
        return None

    launch(2, body)


@pytest.mark.parametrize(("tp", "cp"), [(2, 2), (1, 3), (3, 1)])
def test_a_mesh_splits_into_rows_and_columns(launch: Launch, tp: int, cp: int) -> None:
    mesh = Mesh(tp=tp, cp=cp)

    def body(group: CollectiveGroup) -> object:
        tp_rank, cp_rank = mesh.tp_rank(group.rank), mesh.cp_rank(group.rank)
        rows, columns = group.split(cp_rank), group.split(tp_rank)
        me = torch.tensor([group.rank])
        assert rows.all_gather(me, 0).tolist() == list(range(cp_rank * tp, cp_rank * tp + tp))
        assert columns.all_gather(me, 0).tolist() == list(range(tp_rank, mesh.world_size, tp))
        # Rows run apart: each makes its own number of calls between two of a column.
        for turn in range(20):
            for _ in range(1 + cp_rank):
                assert rows.all_reduce(torch.ones(5)).tolist() == [float(tp)] * 5
            total = columns.all_reduce(torch.tensor([float(turn + cp_rank)]))
            assert total.item() == turn * cp + sum(range(cp))
        group.barrier()
        rows.close()
        columns.close()
        return None

    launch(mesh.world_size, body)


def test_many_small_sums(launch: Launch) -> None:
    def body(group: CollectiveGroup) -> object:
        num_rounds = 500 if group.backend == "gloo" else 5000
        x = torch.empty(288)
        for number in range(num_rounds):
            found = group.all_reduce(x.fill_(number + group.rank))
            assert found[number % 288].item() == 2 * number + 1, number
            if number % 97 == 0:
                assert group.all_gather(torch.tensor([number]), 0).tolist() == [number] * 2
        return None

    launch(2, body)
