"""Recorded decode steps give what the plain path gives, bit for bit."""

from __future__ import annotations

import threading

import pytest
import torch

from anabranch.cache.paged_kv import PagedKv
from anabranch.config.worker import WorkerConfig
from anabranch.engine.build import build_engine
from anabranch.engine.last_tokens import LastTokens
from anabranch.engine.plan import SampleSpec, SequencePlan, StepPlan
from anabranch.kernels.native import select_kernels
from anabranch.kernels.record import StepRecorder
from anabranch.sampling.params import SamplingParams
from tests.support.families import VOCAB, build

pytestmark = pytest.mark.unit
BLOCK_SIZE = 4
MAX_BLOCKS = 16
# Which of four sequences take part in each decode step: sizes come again with other members.
MEMBERS = [(0, 1, 2), (0, 1, 2), (1, 2, 3), (3,), (0,), (3, 0), (2, 1), (0, 1, 2, 3), (3, 2, 1, 0), (2, 3, 0)]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _plan(step: int, parts: list[tuple[int, int, tuple[int, ...]]]) -> StepPlan:
    """Parts: (sequence, start, token ids); each sequence has blocks of its own, in an odd order."""
    return StepPlan(
        step=step,
        sequences=tuple(
            SequencePlan(
                request_id=str(row),
                epoch=0,
                token_ids=ids,
                start=start,
                block_ids=tuple((row + 4 * ((5 * n + 3) % MAX_BLOCKS)) for n in range(-(-(start + len(ids)) // 4))),
                sample=SampleSpec(params=SamplingParams(max_tokens=9), index=0),
            )
            for row, start, ids in parts
        ),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", ["llama-gqa-tied", "mistral-window", "qwen2-window-layers"])
def test_programs_equal_the_plain_path_as_members_change(recipe, dtype, tmp_path) -> None:
    build(recipe, head_dim=16).save_pretrained(tmp_path)
    config = WorkerConfig(
        role="decode",
        name="d",
        orchestrator="inproc://none",
        model=str(tmp_path),
        dtype=dtype,
        kv_cache_bytes=1 << 20,
        block_size=BLOCK_SIZE,
        max_running=8,
    )
    recorded, plain = (build_engine(config) for _ in range(2))
    runner, programs = recorded.runner, recorded.runner.programs
    if runner.kernels.name != "native":
        pytest.skip("no native kernels here")
    assert programs is not None
    lens = [3, 9, 14, 6]
    prompts = _plan(0, [(row, 0, tuple((7 * row + i) % VOCAB for i in range(n))) for row, n in enumerate(lens)])
    assert not programs.covers(prompts)
    for engine in (recorded, plain):
        engine.runner.execute(prompts)
    for step, members in enumerate(MEMBERS, 1):
        plan = _plan(step, [(row, lens[row], ((11 * step + row) % VOCAB,)) for row in members])
        for row in members:
            lens[row] += 1
        assert programs.covers(plan)
        with torch.inference_mode():
            got = programs.forward(plan, LastTokens()).clone()
            batch, attention = plain.runner._lay_out(plan, None)
            expected = plain.runner.model.forward_share(
                batch.token_ids_T, batch.positions_T, attention, batch.sample_rows_S
            )
        assert torch.equal(got, expected)
        assert torch.equal(recorded.kv.data, plain.kv.data)
    assert sorted(count for count, _ in programs._programs) == [1, 2, 3, 4]
    assert all(programs._programs.values())


def test_what_other_threads_do_meanwhile_is_not_recorded(tmp_path) -> None:
    """KV that arrives is stored by the transport's thread, with the same kernels."""
    kernels = select_kernels(torch.device("cpu"), torch.float32)
    if not isinstance(kernels, StepRecorder):
        pytest.skip("no native kernels here")
    kv = PagedKv(
        num_layers=1,
        num_blocks=2,
        block_size=4,
        num_kv_heads=1,
        head_dim=16,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    x_TC, weight_C = torch.randn(2, 16), torch.randn(16)

    def arrive() -> None:
        kernels.store_kv(torch.ones(1, 1, 16), torch.ones(1, 1, 16), kv.layer(0), torch.tensor([3]))

    def step() -> torch.Tensor:
        other = threading.Thread(target=arrive)
        other.start()
        other.join()
        return kernels.rms_norm(x_TC, weight_C, 1e-6)

    program = kernels.record(step).program
    assert program is not None
    assert torch.equal(kv.layer(0).k[0, 3], torch.ones(1, 16))
    kv.data.zero_()
    program.run()
    assert not kv.data.any()
    assert torch.equal(program.output, kernels.rms_norm(x_TC, weight_C, 1e-6))
