"""A recorded decode step gives the bits of the step computed call by call, whatever changes between steps."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from anabranch.cache.paged_kv import PagedKv
from anabranch.config.worker import WorkerConfig
from anabranch.engine import kept_programs
from anabranch.engine.build import Engine, build_engine
from anabranch.engine.last_tokens import LastTokens
from anabranch.engine.step_programs import StepPrograms
from anabranch.errors import PeerLost
from anabranch.kernels.compiler import native_status
from anabranch.kernels.native import select_kernels
from anabranch.kernels.record import StepRecorder
from anabranch.parallel.context import RankContext
from anabranch.parallel.group import NativeReduce
from anabranch.parallel.mesh import Mesh
from anabranch.parallel.threads import run_ranks
from anabranch.request.sampling_params import SamplingParams
from anabranch.step.plan import SampleSpec, SequencePlan, StepPlan, StepResult
from tests.support.decode_steps import BLOCK_SIZE, NUM_BLOCKS, Steps
from tests.support.families import build

pytestmark = pytest.mark.unit
# Dense families, in shapes that the compiled kernels cover.
DENSE = {
    "llama-gqa-tied": {"head_dim": 16},
    "llama-mha-biases": {"head_dim": 16},
    "mistral-window": {"head_dim": 32},
    "qwen2-window-layers": {"num_attention_heads": 3, "num_key_value_heads": 1},
    "qwen3-odd": {"head_dim": 16},
}
SIZES = {"hidden_size": 48, "intermediate_size": 64}
MakeEngine = Callable[..., Engine]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    if not native_status().usable:
        pytest.skip(native_status().reason)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_engine(tmp_path: Path) -> MakeEngine:
    """`make_engine(recipe, dtype=..., context=..., **config) -> Engine`; engines of one recipe share weights."""

    def make(recipe: str, dtype: str = "float32", context: RankContext | None = None, **config: object) -> Engine:
        folder = tmp_path / recipe
        if not folder.exists():
            build(recipe, **{**SIZES, **DENSE.get(recipe, {})}).save_pretrained(folder)
        engine = build_engine(
            WorkerConfig(
                role="decode",
                name="decode-0",
                orchestrator="",
                model=str(folder),
                dtype=dtype,
                threads=1,
                block_size=BLOCK_SIZE,
                kv_cache_bytes=1 << 20,
                **config,
            ),
            context,
        )
        assert engine.kv.num_blocks >= NUM_BLOCKS
        torch.manual_seed(3)
        engine.kv.data.normal_()
        return engine

    return make


def logits_of(engine: Engine, plan: StepPlan) -> torch.Tensor:
    """This rank's logits, by whichever path the runner takes."""
    runner = engine.runner
    with torch.inference_mode():
        if runner.programs is not None:
            assert runner.programs.covers(plan)
            return runner.model.run(runner.programs.forward(plan, LastTokens()))
        batch, attention = runner._lay_out(plan, None)
        return runner.model.run(
            runner.stack.forward(batch.token_ids_T, batch.positions_T, attention, batch.sample_rows_S)
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", DENSE)
def test_both_paths_agree_bit_for_bit(recipe: str, dtype: str, make_engine: MakeEngine) -> None:
    recorded, plain = make_engine(recipe, dtype), make_engine(recipe, dtype, step_programs=False)
    for plan in Steps():
        assert torch.equal(logits_of(recorded, plan), logits_of(plain, plan)), plan.step
        assert torch.equal(recorded.kv.data, plain.kv.data), plan.step
    programs = recorded.runner.programs
    assert programs is not None
    assert sorted(count for count, _ in programs._programs._kept) == [1, 2, 3, 4]
    assert all(program is not None for program in programs._programs._kept.values())


@pytest.mark.parametrize("num_threads", [2, 3])
def test_several_threads_agree_too(num_threads: int, make_engine: MakeEngine) -> None:
    torch.set_num_threads(num_threads)
    recorded, plain = (make_engine("llama-gqa-tied", step_programs=on) for on in (True, False))
    for plan in Steps():
        assert torch.equal(logits_of(recorded, plan), logits_of(plain, plan)), plan.step


def test_ranks_that_share_layers_sum_inside_the_program(make_engine: MakeEngine) -> None:
    make_engine("llama-gqa-tied")  # writes the folder before two threads do

    def rank(group) -> tuple[list[StepResult], list[StepResult]]:
        results = []
        for on in (True, False):
            context = RankContext(mesh=Mesh(tp=2), rank=group.rank, tp=group)
            engine = make_engine("llama-gqa-tied", context=context, tp=2, step_programs=on)
            results.append([engine.runner.execute(plan) for plan in Steps()])
        return results[0], results[1]

    # Threads have no native sum: the steps go on without a program.
    for recorded, plain in run_ranks(2, rank):
        assert recorded == plain


class FailingGroup:
    """A rank of two whose native sum ends with a code."""

    rank, size = 0, 2

    def __init__(self) -> None:
        self._fails = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int)(
            lambda handle, data, count, dtype: dtype
        )

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.cat([x, x], dim)

    def native_all_reduce(self, x: torch.Tensor) -> NativeReduce:
        address = ctypes.cast(self._fails, ctypes.c_void_p).value
        assert address is not None
        return NativeReduce(function=address, handle=0, dtype=7, error=lambda code: PeerLost(f"code {code}"))


def test_a_failed_sum_ends_the_program_with_the_groups_error(make_engine: MakeEngine) -> None:
    context = RankContext(mesh=Mesh(tp=2), rank=0, tp=FailingGroup())
    engine = make_engine("llama-gqa-tied", context=context, tp=2)
    plan = next(iter(Steps()))
    engine.runner.execute(plan)
    with pytest.raises(PeerLost, match="code 7"):
        engine.runner.execute(plan)


@pytest.mark.parametrize("recipe", ["mixtral-window", "llama-mqa-llama3"])
def test_what_is_not_all_native_calls_is_never_recorded_again(
    recipe: str, make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger=kept_programs.__name__)
    recorded, plain = make_engine(recipe), make_engine(recipe, step_programs=False)
    for plan in Steps():
        assert recorded.runner.execute(plan) == plain.runner.execute(plan)
    programs = recorded.runner.programs
    assert programs is not None
    assert set(programs._programs._kept.values()) == {None}
    assert len([line for line in caplog.messages if "are not recorded" in line]) == 1


def test_programs_take_turns_beyond_their_number(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_programs, "MAX_KEPT", 2)
    recorded, plain = make_engine("llama-gqa-tied"), make_engine("llama-gqa-tied", step_programs=False)
    for plan in Steps():
        assert torch.equal(logits_of(recorded, plan), logits_of(plain, plan))
        assert isinstance(recorded.runner.programs, StepPrograms)
        assert len(recorded.runner.programs._programs) <= 2


def test_programs_of_many_sizes_share_their_memory(make_engine: MakeEngine) -> None:
    engine = make_engine("llama-gqa-tied")
    plans = list(Steps())
    for plan in plans:
        engine.runner.execute(plan)
    held = engine.runner.programs._memory.num_bytes
    for plan in plans:
        engine.runner.execute(plan)
    assert engine.runner.programs._memory.num_bytes == held < 2 << 20


def test_steps_that_are_not_covered(make_engine: MakeEngine) -> None:
    engine = make_engine("llama-gqa-tied", max_running=2, max_context=16)
    programs = engine.runner.programs
    assert programs is not None
    spec = SampleSpec(params=SamplingParams(), index=0)

    def plan(*, num_new: int = 1, blocks: int = 2, count: int = 1, sample: SampleSpec | None = spec) -> StepPlan:
        sequence = SequencePlan(
            request_id="r", epoch=0, token_ids=(1,) * num_new, start=0, block_ids=tuple(range(blocks)), sample=sample
        )
        return StepPlan(step=0, sequences=(sequence,) * count)

    assert programs.covers(plan())
    assert not programs.covers(plan(num_new=2))
    assert not programs.covers(plan(blocks=5))
    assert not programs.covers(plan(count=3))
    assert not programs.covers(plan(sample=None))
    assert make_engine("llama-gqa-tied", native_kernels=False).runner.programs is None


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

    program = kernels.record(step, kernels.program_memory()).program
    assert program is not None
    assert torch.equal(kv.layer(0).k[0, 3], torch.ones(1, 16))
    kv.data.zero_()
    program.run()
    assert not kv.data.any()
    assert torch.equal(program.output, kernels.rms_norm(x_TC, weight_C, 1e-6))
