"""Sequences that are preempted with their KV kept: what ranks are told, that it is enough, and that all blocks return.

`Rank` obeys commands late, in their order, on a pool whose slots hold token ids; each step checks that all that
its sequences have computed is in their blocks.
"""

from __future__ import annotations

import random
from collections import deque

import msgspec
import pytest

from anabranch.cache.kv_manager import KvCacheManager
from anabranch.config.options import Preemption
from anabranch.request.request import Request
from anabranch.request.sampling_params import SamplingParams
from anabranch.sampling.stop import StopChecker
from anabranch.schedule.generation import GenerationScheduler
from anabranch.schedule.host_offload import HostOffload
from anabranch.schedule.preemption import PreemptionRule
from anabranch.schedule.sequence import Sequence
from anabranch.step.plan import SampledToken, StepPlan, StepResult
from runtime.generation.commands import GenerationCommand, Offload, Restore, Step

pytestmark = pytest.mark.unit

BLOCK = 4
NOTHING = -1


def next_token(tokens: list[int]) -> int:
    """The model: what follows depends on all that came before."""
    return (sum(tokens) * 31 + len(tokens) * 7) % 97


class Rank:
    """One rank: a pool and host blocks of token ids, and commands that wait until somebody needs a result."""

    def __init__(self, num_blocks: int, num_host: int) -> None:
        self.pool = [[NOTHING] * BLOCK for _ in range(num_blocks)]
        self.host = [[NOTHING] * BLOCK for _ in range(num_host)]
        self.texts: dict[str, list[int]] = {}
        self.told: list[GenerationCommand] = []
        self._queue: deque[GenerationCommand] = deque()
        self._decoder = msgspec.msgpack.Decoder(GenerationCommand)

    def send(self, command: GenerationCommand) -> None:
        self.told.append(command)
        self._queue.append(self._decoder.decode(msgspec.msgpack.encode(command)))

    def result(self) -> StepResult:
        """Obey up to the next step."""
        while True:
            match self._queue.popleft():
                case Offload(pairs=pairs):
                    for block_id, host_id in pairs:
                        self.host[host_id] = list(self.pool[block_id])
                case Restore(pairs=pairs):
                    for host_id, block_id in pairs:
                        self.pool[block_id] = list(self.host[host_id])
                case Step(plan=plan):
                    return self._compute(plan)

    def _compute(self, plan: StepPlan) -> StepResult:
        sampled = []
        for planned in plan.sequences:
            for place, token in enumerate(planned.token_ids, start=planned.start):
                self.pool[planned.block_ids[place // BLOCK]][place % BLOCK] = token
            held = [token for block_id in planned.block_ids for token in self.pool[block_id]][: planned.context_len]
            assert NOTHING not in held
            assert held == self.texts[planned.request_id][: planned.context_len], planned.request_id
            if planned.sample is not None:
                token_id = next_token(held)
                self.texts[planned.request_id].append(token_id)
                sampled.append(
                    SampledToken(
                        request_id=planned.request_id,
                        epoch=planned.epoch,
                        index=planned.sample.index,
                        token_id=token_id,
                    )
                )
        return StepResult(step=plan.step, tokens=tuple(sampled))


class World:
    """A scheduler with a rank."""

    def __init__(
        self,
        *,
        num_blocks: int = 6,
        num_host: int = 12,
        choice: Preemption = "offload",
        colocated: bool = False,
        prefix_cache: bool = False,
        max_running: int = 8,
    ) -> None:
        self.rank = Rank(num_blocks, max(1, num_host))
        rule = PreemptionRule(choice, block_bytes=100, copy_bytes_per_s=1e6)
        self.offload = HostOffload(
            num_blocks=num_host,
            rule=rule,
            copy_out=lambda pairs: self.rank.send(Offload(pairs=pairs)),
            copy_in=lambda pairs: self.rank.send(Restore(pairs=pairs)),
        )
        self.scheduler = GenerationScheduler(
            KvCacheManager(num_blocks=num_blocks, block_size=BLOCK, prefix_cache=prefix_cache),
            StopChecker(max_context=num_blocks * BLOCK),
            computes_prompts=colocated,
            max_running=max_running,
            max_step_tokens=16,
            offload=self.offload,
        )
        self.ended: dict[str, str] = {}
        self.sent_away: list[str] = []
        self.indexes: dict[str, list[int]] = {}

    def sequence(self, name: str, length: int, age_s: float, max_tokens: int) -> Sequence:
        prompt = tuple((len(name) + place * 5) % 90 for place in range(length))
        self.rank.texts[name] = list(prompt)
        self.indexes[name] = []
        request = Request(request_id=name, epoch=0, prompt_ids=prompt, sampling=SamplingParams(max_tokens=max_tokens))
        return Sequence(request, age_s)

    def join(self, name: str, length: int, age_s: float, max_tokens: int = 12) -> Sequence:
        """Import a sequence: its KV comes in a stream, after all that was ordered before."""
        item = self.sequence(name, length, age_s, max_tokens)
        cache = self.scheduler.cache
        item.hold(cache.admit(item.key, item.tokens, item.num_tokens + 1))
        assert item.table is not None
        while self.rank._queue:  # copies that were ordered before the stream was opened
            self._obey_copies()
        for place, token in enumerate(item.tokens):
            self.rank.pool[item.table.block_ids[place // BLOCK]][place % BLOCK] = token
        token_id = next_token(item.tokens)
        self.rank.texts[name].append(token_id)
        self._note(self.scheduler.join(item, SampledToken(request_id=name, epoch=0, index=0, token_id=token_id)))
        return item

    def step(self) -> StepPlan | None:
        plan, away = self.scheduler.schedule()
        for item in away:
            self.sent_away.append(item.request.request_id)
        if plan is not None:
            self.rank.send(Step(plan=plan))
            self._note(self.scheduler.update(plan, self.rank.result()))
        self.check()
        return plan

    def run(self) -> None:
        for _ in range(2000):
            if self.step() is None:
                break
        assert len(self.scheduler) == 0
        assert self.scheduler.cache.pool.num_free == self.scheduler.cache.pool.num_blocks
        assert self.offload.pool.num_free == self.offload.pool.num_blocks
        for name, indexes in self.indexes.items():
            assert indexes == list(range(len(indexes))), name

    def check(self) -> None:
        self.scheduler.cache.check_integrity()
        self.offload.check_integrity()

    def _obey_copies(self) -> None:
        self.rank._queue.append(Step(plan=StepPlan(step=0, sequences=())))
        self.rank.result()

    def _note(self, outcome) -> None:
        for token in outcome.tokens:
            self.indexes[token.request_id].append(token.index)
        for item, reason in outcome.ended:
            self.ended[item.request.request_id] = reason


def test_the_youngest_is_offloaded_and_goes_on_where_it_was() -> None:
    world = World(num_blocks=5)
    world.join("old", 6, 0.0, max_tokens=8)
    young = world.join("young", 6, 1.0, max_tokens=8)
    while not len(world.offload):
        world.step()
    assert world.offload.sequences == [young]
    assert young.table is None
    (offload,) = [c for c in world.rank.told if isinstance(c, Offload)]
    assert len(offload.pairs) == 2
    assert world.offload.pool.num_free == 10
    world.run()
    assert world.ended == {"old": "length", "young": "length"}
    assert [len(world.indexes[name]) for name in ("old", "young")] == [8, 8]
    assert world.sent_away == []
    assert (world.scheduler.num_offloaded, world.scheduler.num_preempted) == (1, 1)
    assert sum(isinstance(c, Restore) for c in world.rank.told) == 1


def test_without_room_in_host_memory_a_sequence_is_sent_back() -> None:
    world = World(num_blocks=4, num_host=1)
    world.join("old", 6, 0.0)
    world.join("young", 6, 1.0)
    while not world.sent_away:
        world.step()
    assert world.sent_away == ["young"]
    assert (world.scheduler.num_offloaded, world.scheduler.num_preempted) == (0, 1)
    world.run()


def test_the_rule_decides() -> None:
    world = World(num_blocks=5, choice="auto", colocated=True)
    cost = world.offload.rule.cost
    cost.measured(10_000, 1e-3)  # a token costs next to nothing
    for number in range(2):
        world.scheduler.add_prompt(world.sequence("ab"[number] * (number + 1), 6, number, 8))
    while world.scheduler.num_preempted == 0:
        world.step()
    assert world.scheduler.num_offloaded == 0
    world.run()
    assert {len(indexes) for indexes in world.indexes.values()} == {8}


def test_offloaded_sequences_come_back_oldest_first_and_before_anybody_new() -> None:
    world = World(num_blocks=9, colocated=True)
    for number in range(3):
        world.scheduler.add_prompt(world.sequence("x" * (number + 1), 9, number, 16))
    while len(world.offload) < 2:
        world.step()
    # A small one would fit at once.
    world.scheduler.add_prompt(world.sequence("new", 1, 9.0, 2))
    assert world.scheduler.num_places == 0
    order = []
    while "new" not in order:
        plan = world.step()
        assert plan is not None
        order += [s.request_id for s in plan.sequences if s.request_id not in order]
    assert len(world.offload) == 0
    assert order == ["x", "xx", "xxx", "new"]
    world.run()


def test_places_count_those_that_are_offloaded_too() -> None:
    world = World(num_blocks=5, max_running=3)
    world.join("old", 6, 0.0)
    assert world.scheduler.num_places == 2
    world.join("young", 6, 1.0)
    assert world.scheduler.num_places == 1
    while not len(world.offload):
        world.step()
    assert world.scheduler.num_places == 0
    world.run()
    assert world.scheduler.num_places == 3


def test_a_sequence_that_is_removed_while_offloaded_frees_its_host_blocks() -> None:
    world = World(num_blocks=5)
    world.join("old", 6, 0.0)
    young = world.join("young", 6, 1.0)
    while not len(world.offload):
        world.step()
    assert world.scheduler.remove(("young", 0)) is young
    assert world.offload.pool.num_free == 12
    assert len(world.scheduler) == 1
    world.run()
    assert "young" not in world.ended


@pytest.mark.parametrize("ends", [False, True])
def test_a_sequence_that_is_offloaded_while_its_step_is_computed_keeps_what_the_step_gave(ends: bool) -> None:
    world = World(num_blocks=8)
    old = world.join("old", 6, 0.0)
    young = world.join("young", 6, 1.0, max_tokens=2 if ends else 9)
    plan, _ = world.scheduler.schedule()
    assert plan is not None
    world.rank.send(Step(plan=plan))
    # Before the result is in, the next step is planned and somebody has to are preempted.
    world.scheduler._preempt(young, [])
    assert world.offload.sequences == [young]
    world._note(world.scheduler.update(plan, world.rank.result()))
    assert young.num_computed == (0 if ends else 7)
    assert young.tokens == world.rank.texts["young"]
    assert (len(world.offload) == 0) == ends
    world.check()
    world.run()
    assert len(world.indexes["young"]) == (2 if ends else 9)
    assert old.num_output == 12


def test_a_prompt_that_is_offloaded_half_way_is_computed_on() -> None:
    world = World(num_blocks=9, colocated=True)
    world.scheduler.add_prompt(world.sequence("prompt", 30, 1.0, 3))
    world.step()
    (item,) = world.scheduler.prompts.computing
    assert item.num_computed == 16
    world.scheduler._preempt(item, [])
    assert (world.scheduler.prompts.computing, len(world.offload)) == ([], 1)
    plan = world.step()
    assert plan is not None
    assert [(s.start, s.num_new_tokens) for s in plan.sequences] == [(16, 14)]
    world.run()
    assert world.ended == {"prompt": "length"}


def test_what_the_prefix_cache_still_has_is_not_copied_in() -> None:
    world = World(num_blocks=12, prefix_cache=True)
    item = world.join("one", 9, 0.0)
    world.step()
    world.scheduler._preempt(item, [])
    world.step()
    # Two full blocks of nine tokens are still in the pool; the third was not full.
    (restore,) = [c for c in world.rank.told if isinstance(c, Restore)]
    assert len(restore.pairs) == 1
    world.run()


def test_one_that_fills_the_whole_pool_comes_back_when_it_is_alone() -> None:
    world = World(num_blocks=5)
    item = world.join("whole", 12, 0.0, max_tokens=8)
    for _ in range(6):
        world.step()
    assert item.table is not None and len(item.table) == 5
    world.scheduler._preempt(item, [])
    world.run()
    assert world.ended == {"whole": "length"}


@pytest.mark.parametrize("seed", range(12))
def test_any_mix_gives_the_right_tokens_and_all_blocks_back(seed: int) -> None:
    rng = random.Random(seed)
    colocated, choices = bool(seed % 2), ("offload", "auto", "recompute")
    world = World(
        num_blocks=rng.randint(7, 14),
        num_host=rng.randint(2, 30),
        choice=choices[seed % 3],
        colocated=colocated,
        prefix_cache=rng.random() < 0.5,
        max_running=rng.randint(2, 8),
    )
    scheduler, limit = world.scheduler, world.scheduler.cache.pool.num_blocks * BLOCK
    num_made = 0
    for now in range(150):
        if num_made < 40 and rng.random() < 0.6:
            name, length = "n" * num_made + "!", rng.randint(1, limit // 3)
            max_tokens = rng.randint(1, min(24, limit - length))
            if colocated:
                scheduler.add_prompt(world.sequence(name, length, now, max_tokens))
                num_made += 1
            elif scheduler.num_places and scheduler.cache.can_admit((), length + 1):
                world.join(name, length, now, max_tokens)
                num_made += 1
        if rng.random() < 0.05 and scheduler.attempts():
            scheduler.remove(rng.choice(scheduler.attempts()))
        plan = world.step()
        if plan is not None:
            decoding = {s.request.request_id for s in scheduler.running}
            assert len(plan.sequences) <= scheduler.max_running
            assert len(decoding) + len(world.offload) + len(scheduler.prompts.computing) <= scheduler.max_running
    world.run()
    assert set(world.ended.values()) <= {"length"}
