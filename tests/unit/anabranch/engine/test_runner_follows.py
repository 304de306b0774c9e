"""A step goes on with tokens that the ranks sampled in the step before, which nobody else has seen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from anabranch.config.worker import WorkerConfig
from anabranch.engine.build import Engine, build_engine
from anabranch.errors import AnabranchError
from anabranch.parallel.context import RankContext
from anabranch.parallel.mesh import Mesh
from anabranch.parallel.threads import run_ranks
from anabranch.request.sampling_params import SamplingParams
from anabranch.step.plan import SampleSpec, SequencePlan, StepPlan
from tests.support.families import save

pytestmark = pytest.mark.unit

BLOCK = 4
PROMPTS = {"a": tuple(range(3, 14)), "b": tuple(range(40, 45)), "c": (60,)}
NUM_OUTPUT = 6
PARAMS = {"a": SamplingParams(), "b": SamplingParams(temperature=1.0, seed=3), "c": SamplingParams(logprobs=1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama-gqa-tied", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def engine(folder: Path, context: RankContext | None = None) -> Engine:
    mesh = context.mesh if context else Mesh()
    config = WorkerConfig(
        role="colocated",
        name="one",
        orchestrator="",
        model=str(folder),
        dtype="float32",
        threads=1,
        block_size=BLOCK,
        kv_cache_bytes=1 << 20,
        native_kernels=False,
        tp=mesh.tp,
        cp=mesh.cp,
    )
    return build_engine(config, context)


def part(name: str, tokens: tuple[int, ...], start: int, index: int | None, follows: int | None = None) -> SequencePlan:
    first = 8 * "abc".index(name)
    return SequencePlan(
        request_id=name,
        epoch=0,
        token_ids=tokens,
        start=start,
        block_ids=tuple(range(first, first + 8)),
        sample=None if index is None else SampleSpec(params=PARAMS[name], index=index),
        follows=follows,
    )


def step(number: int, *parts: SequencePlan) -> StepPlan:
    return StepPlan(step=number, sequences=parts)


def one_by_one(engine: Engine, name: str) -> list[int]:
    """Each token known before the next step."""
    prompt = PROMPTS[name]
    tokens: list[int] = []
    new, start = prompt, 0
    for index in range(NUM_OUTPUT):
        (sampled,) = engine.runner.execute(step(index, part(name, new, start, index))).tokens
        tokens.append(sampled.token_id)
        start += len(new)
        new = (sampled.token_id,)
    return tokens


def ahead(engine: Engine) -> dict[str, list[int]]:
    """Joined one after another, in an order that changes; nothing is read before all is launched."""
    a, b, c = (len(PROMPTS[name]) for name in "abc")
    plans = [
        # c's row comes before the prompts', though a ring computes prompts first.
        step(1, part("c", PROMPTS["c"], 0, 0), part("a", PROMPTS["a"][:7], 0, None), part("b", PROMPTS["b"], 0, 0)),
        step(2, part("a", PROMPTS["a"][7:], 7, 0), part("b", (0,), b, 1, follows=1), part("c", (0,), c, 1, follows=0)),
    ]
    order = ["a", "b", "c"]
    for number in range(3, 3 + NUM_OUTPUT - 2):
        turned = order[1:] + order[:1]
        done = {"a": number - 3, "b": number - 2, "c": number - 2}
        lengths = {"a": a, "b": b, "c": c}
        plans.append(
            step(
                number,
                *(
                    part(name, (0,), lengths[name] + done[name], done[name] + 1, follows=order.index(name))
                    for name in turned
                ),
            )
        )
        order = turned
    pending = [engine.runner.launch(plan) for plan in plans]
    tokens: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    for result in (item.result() for item in pending):
        for token in result.tokens:
            assert token.index == len(tokens[token.request_id])
            tokens[token.request_id].append(token.token_id)
    return tokens


@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_tokens_are_the_same_as_one_by_one(tp: int, cp: int, folder: Path) -> None:
    mesh = Mesh(tp=tp, cp=cp)
    alone = engine(folder)
    expected = {name: one_by_one(alone, name) for name in PROMPTS}

    def rank(world) -> dict[str, list[int]]:  # type: ignore[no-untyped-def]
        context = RankContext(
            mesh=mesh,
            rank=world.rank,
            tp=world.split(mesh.cp_rank(world.rank)),
            cp=world.split(mesh.tp_rank(world.rank)) if cp > 1 else None,
        )
        return ahead(engine(folder, context))

    found, *others = run_ranks(mesh.world_size, rank)
    for name, tokens in found.items():
        assert tokens == expected[name][: len(tokens)], name
        assert len(tokens) >= NUM_OUTPUT - 1
    # Only the rank that drives reports.
    assert all(not any(tokens.values()) for tokens in others)


@pytest.mark.parametrize("tp", [1, 2])
def test_penalties_know_the_token_in_flight(tp: int, folder: Path) -> None:
    params = SamplingParams(logit_bias={42: 50.0}, presence_penalty=100.0)  # 42 comes first, and no token twice
    prompt = PROMPTS["a"]

    def planned(number: int, known: list[int], follows: int | None) -> StepPlan:
        tokens, start = ((0,), len(prompt) + number - 1) if number else (prompt, 0)
        spec = SampleSpec(params=params, index=number, prompt_ids=prompt, output_ids=tuple(known))
        item = SequencePlan(
            request_id="a",
            epoch=0,
            token_ids=tokens,
            start=start,
            block_ids=tuple(range(8)),
            sample=spec,
            follows=follows,
        )
        return step(number, item)

    def rank(world) -> list[int]:  # type: ignore[no-untyped-def]
        mesh = Mesh(tp=tp)
        runner = engine(folder, RankContext(mesh=mesh, rank=world.rank, tp=world, cp=None)).runner
        known: list[int] = []
        flying = runner.launch(planned(0, known, None))
        for number in range(1, 2 * NUM_OUTPUT):
            following = runner.launch(planned(number, known, 0))  # before the result is looked at
            known += [token.token_id for token in flying.result().tokens]
            if world.rank:
                known.append(0)  # ranks that do not choose are not told
            flying = following
        return known

    tokens, *_ = run_ranks(tp, rank)
    assert len(set(tokens)) == len(tokens) == 2 * NUM_OUTPUT - 1
    assert tokens[0] == 42


def test_nothing_follows_a_step_that_failed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = engine(folder)
    runner = one.runner
    runner.launch(step(1, part("b", PROMPTS["b"], 0, 0)))

    def fail(*args: object) -> torch.Tensor:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(runner.stack, "forward", fail)
        with pytest.raises(ZeroDivisionError):
            runner.launch(step(2, part("b", (0,), 5, 1, follows=0)))
    with pytest.raises(AnabranchError, match="the step before failed"):
        runner.launch(step(3, part("b", (0,), 6, 2, follows=0)))
    # What is known can be computed again.
    (token,) = runner.execute(step(4, part("b", PROMPTS["b"], 0, 0))).tokens
    assert token.token_id == one_by_one(one, "b")[0]
