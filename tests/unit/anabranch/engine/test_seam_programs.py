"""Recorded attention halves give the bits of the same halves computed call by call, whatever lanes do in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from anabranch.config.worker import WorkerConfig
from anabranch.engine import kept_programs
from anabranch.engine.build import Engine, build_engine
from anabranch.engine.last_tokens import LastTokens
from anabranch.engine.seam_programs import SeamPrograms
from anabranch.kernels.compiler import native_status
from anabranch.model.ffn_half import FfnCalls
from anabranch.model.transformer import Transformer
from anabranch.step.plan import StepPlan
from tests.support.decode_steps import BLOCK_SIZE, NUM_BLOCKS, Steps
from tests.support.families import build

pytestmark = pytest.mark.unit
SIZES = {"hidden_size": 48, "intermediate_size": 64}
RECIPES = {
    "llama-gqa-tied": {"head_dim": 16},
    "qwen3-odd": {"head_dim": 16},
    "mixtral": {"head_dim": 16},
    "qwen2-moe-mixed": {"num_attention_heads": 3, "num_key_value_heads": 1},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    if not native_status().usable:
        pytest.skip(native_status().reason)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Halves:
    """An attention worker's engine, and FFN halves of the same model that answer whenever the test asks them."""

    def __init__(self, folder: Path, recipe: str, *, step_programs: bool, dtype: str = "float32") -> None:
        if not folder.exists():
            build(recipe, **{**SIZES, **RECIPES[recipe]}).save_pretrained(folder)

        def engine(role: str) -> Engine:
            return build_engine(
                WorkerConfig(
                    role=role,
                    name="one",
                    orchestrator="",
                    model=str(folder),
                    dtype=dtype,
                    threads=1,
                    block_size=BLOCK_SIZE,
                    kv_cache_bytes=4 << 20,
                    step_programs=step_programs,
                )
            )

        self.engine = engine("attn")
        assert self.engine.kv.num_blocks >= 3 * NUM_BLOCKS
        whole = engine("decode").runner.model
        assert isinstance(whole, Transformer)
        self._ffn = whole.ffn
        torch.manual_seed(3)
        self.engine.kv.data.normal_()

    @property
    def programs(self) -> SeamPrograms:
        assert isinstance(self.engine.runner.programs, SeamPrograms)
        return self.engine.runner.programs

    def logits(self, plan: StepPlan) -> FfnCalls[torch.Tensor]:
        """By whichever path the runner takes."""
        runner = self.engine.runner
        if runner.programs is not None and runner.programs.covers(plan):
            return (yield from runner.programs.forward(plan, LastTokens()))
        batch, attention = runner._lay_out(plan, None)
        return (yield from runner.stack.forward(batch.token_ids_T, batch.positions_T, attention, batch.sample_rows_S))

    @torch.inference_mode()
    def run(self, *plans: StepPlan) -> list[torch.Tensor]:
        """The logits of steps that go on in turn, a layer of each at a time."""
        out: dict[int, torch.Tensor] = {}
        begun = {place: self.logits(plan) for place, plan in enumerate(plans)}
        calls = {place: next(step) for place, step in begun.items()}
        while calls:
            for place, call in list(calls.items()):
                try:
                    # As late as can be: the rows have to be where they were, whatever the others did.
                    calls[place] = begun[place].send(self._ffn.layers[call.layer].forward(call.rows))
                except StopIteration as end:
                    out[place] = end.value.clone()
                    del calls[place]
        return [out[place] for place in range(len(plans))]


MakeHalves = Callable[..., Halves]


@pytest.fixture
def halves(tmp_path: Path) -> MakeHalves:
    def make(recipe: str, *, step_programs: bool = True, dtype: str = "float32") -> Halves:
        return Halves(tmp_path / recipe, recipe, step_programs=step_programs, dtype=dtype)

    return make


def lanes_of(num_lanes: int) -> Iterator[tuple[StepPlan, ...]]:
    """Steps of several lanes, each on blocks of its own."""
    blocks = [range(lane * NUM_BLOCKS, (lane + 1) * NUM_BLOCKS) for lane in range(num_lanes)]
    return zip(*(Steps(seed=lane, lane=lane, blocks=held) for lane, held in enumerate(blocks)), strict=True)


@pytest.mark.parametrize(
    ("recipe", "dtype"), [(recipe, "float32") for recipe in RECIPES] + [("llama-gqa-tied", "bfloat16")]
)
def test_both_paths_agree_bit_for_bit_in_two_lanes(recipe: str, dtype: str, halves: MakeHalves) -> None:
    recorded, plain = halves(recipe, dtype=dtype), halves(recipe, dtype=dtype, step_programs=False)
    assert plain.engine.runner.programs is None
    for plans in lanes_of(2):
        both = recorded.run(*plans)
        for plan, logits in zip(plans, both, strict=True):
            assert torch.equal(logits, plain.run(plan)[0]), (plan.step, plan.lane)
        assert torch.equal(recorded.engine.kv.data, plain.engine.kv.data), plans[0].step
    kept = recorded.programs._programs._kept
    assert sorted((lane, count) for lane, count, _ in kept) == [(lane, n) for lane in (0, 1) for n in (1, 2, 3, 4)]
    layers = len(recorded.engine.runner.stack.layers)
    assert all(programs is not None and len(programs) == layers + 1 for programs in kept.values())


def test_a_step_that_is_given_up_while_it_is_recorded_leaves_nothing(halves: MakeHalves) -> None:
    recorded, plain = halves("llama-gqa-tied"), halves("llama-gqa-tied", step_programs=False)
    first, *others = Steps()
    with torch.inference_mode():
        given_up = recorded.logits(first)
        next(given_up)
        given_up.close()
    assert not len(recorded.programs._programs)
    for plan in (first, *others):
        assert torch.equal(recorded.run(plan)[0], plain.run(plan)[0])


def test_sizes_that_libraries_multiply_are_not_recorded(
    halves: MakeHalves, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger=kept_programs.__name__)
    recorded, plain = halves("llama-gqa-tied"), halves("llama-gqa-tied", step_programs=False)
    for each in (recorded, plain):
        monkeypatch.setattr(each.engine.runner.kernels, "_max_rows_of", lambda channels: 2)
    for plan in Steps():
        assert torch.equal(recorded.run(plan)[0], plain.run(plan)[0])
    kept = recorded.programs._programs._kept
    assert {count for (_, count, _), programs in kept.items() if programs is not None} == {1, 2}
    assert {count for (_, count, _), programs in kept.items() if programs is None} == {3, 4}
    assert len([line for line in caplog.messages if "are not recorded" in line]) == 1


def test_programs_are_bounded_and_share_their_lanes_memory(halves: MakeHalves, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_programs, "MAX_KEPT", 3)
    recorded, plain = halves("llama-gqa-tied"), halves("llama-gqa-tied", step_programs=False)
    for plans in lanes_of(3):
        assert all(map(torch.equal, recorded.run(*plans), plain.run(*plans)))
        assert len(recorded.programs._programs) <= 3
    assert all(lane.memory.num_bytes < 2 << 20 for lane in recorded.programs._lanes.values())
