"""Recorded decode steps on ranks that are processes: the sums over shared memory are a part of the program."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from anabranch.config.worker import WorkerConfig
from anabranch.engine.build import Engine, build_engine
from anabranch.kernels.compiler import native_status
from anabranch.parallel.context import RankContext
from anabranch.parallel.mesh import Mesh
from anabranch.request.sampling_params import SamplingParams
from anabranch.step.plan import SampleSpec, SequencePlan, StepPlan
from tests.support.families import build

pytestmark = pytest.mark.distributed
SIZES = {"hidden_size": 48, "intermediate_size": 64, "head_dim": 16}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    if not native_status().usable:
        pytest.skip(native_status().reason)
    folder = tmp_path / "model"
    build("llama-gqa-tied", **SIZES).save_pretrained(folder)
    return folder


def make_engine(folder: Path, group, dtype: str, *, step_programs: bool) -> Engine:
    config = WorkerConfig(
        role="decode",
        name="decode-0",
        orchestrator="",
        model=str(folder),
        dtype=dtype,
        threads=1,
        tp=group.size,
        kv_cache_bytes=1 << 20,
        step_programs=step_programs,
    )
    engine = build_engine(config, RankContext(mesh=Mesh(tp=group.size), rank=group.rank, tp=group))
    torch.manual_seed(5)
    engine.kv.data.normal_()
    return engine


def make_plan(step: int, count: int) -> StepPlan:
    rows = range(count)
    return StepPlan(
        step=step,
        sequences=tuple(
            SequencePlan(
                request_id=str(row),
                epoch=0,
                token_ids=((11 * step + row) % 101,),
                start=20 * row + step,
                block_ids=tuple(range(8 * row, 8 * row + 8)),
                sample=SampleSpec(params=SamplingParams(), index=step),
            )
            for row in rows
        ),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_agree_with_the_plain_path_bit_for_bit(ranks, folder: Path, size: int, dtype: str) -> None:
    def body(group) -> str:
        recorded, plain = (make_engine(folder, group, dtype, step_programs=on) for on in (True, False))
        programs = recorded.runner.programs
        assert programs is not None
        for step, count in enumerate([1, 3, 3, 2, 1, 3, 4, 4]):
            plan = make_plan(step, count)
            assert recorded.runner.execute(plan) == plain.runner.execute(plan)
            assert torch.equal(recorded.kv.data, plain.kv.data), step
        assert all(program is not None for program in programs._programs._kept.values())
        return "agreed"

    assert ranks.run(size, body) == ["agreed"] * size


def test_a_rank_that_leaves_ends_the_others_program(ranks, folder: Path) -> None:
    def body(group) -> None:
        engine = make_engine(folder, group, "float32", step_programs=True)
        for step in range(3):
            engine.runner.execute(make_plan(step, 2))
        if group.rank == 0:
            engine.runner.execute(make_plan(3, 2))

    ranks.start(2, body, timeout_s=60.0)
    first, second = ranks.wait()
    assert first.error == "PeerLost"
    assert not second.error
