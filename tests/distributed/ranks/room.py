"""A room for tests: its ranks say what they are, sum, fail, and wait.

`python -m tests.distributed.ranks.room` is the process of a rank other than the first.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from anabranch.config.worker import WorkerConfig
from anabranch.engine.build import Engine
from anabranch.engine.pending import PendingResult
from anabranch.errors import InvalidRequest
from anabranch.step.plan import StepPlan
from runtime.rank import RankRoom
from runtime.rank_process import run_rank


class Order(msgspec.Struct, frozen=True, kw_only=True, tag_field="c"):
    pass


class Step(Order, frozen=True, kw_only=True, tag="step"):
    plan: StepPlan


class Say(Order, frozen=True, kw_only=True, tag="say"):
    """Answered with Said."""

    text: str


class Sum(Order, frozen=True, kw_only=True, tag="sum"):
    """Sum the ranks' numbers over all of them; answered with Summed."""


class Fail(Order, frozen=True, kw_only=True, tag="fail"):
    """Raise, on one rank."""

    rank: int


class Said(msgspec.Struct, frozen=True, kw_only=True, tag_field="e", tag="said"):
    text: str
    pid: int
    process_name: str
    cores: tuple[int, ...]
    num_threads: int


class Summed(msgspec.Struct, frozen=True, kw_only=True, tag_field="e", tag="summed"):
    total: float


Command = Step | Say | Sum | Fail
Event = Said | Summed


class TalkingRank:
    def __init__(self, config: WorkerConfig, engine: Engine, emit: Callable[[Event], None]) -> None:
        if config.max_running == 13 and engine.context.rank == 1:
            raise InvalidRequest("rank 1 does not like thirteen", "max_running")
        self.engine = engine
        self._emit = emit

    def handle(self, command: Command) -> None:
        context = self.engine.context
        match command:
            case Step(plan=plan):
                self.step(plan)
            case Say(text=text):
                said = Said(
                    text=text,
                    pid=os.getpid(),
                    process_name=Path(f"/proc/self/task/{threading.get_native_id()}/comm").read_text().strip(),
                    cores=tuple(sorted(os.sched_getaffinity(0))),
                    num_threads=torch.get_num_threads(),
                )
                self._emit(said)
            case Sum():
                total = context.tp.all_reduce(torch.tensor([context.rank + 1.0]))
                self._emit(Summed(total=float(total)))
            case Fail(rank=rank):
                if context.rank == rank:
                    raise InvalidRequest("was told to fail", "order")

    def step(self, plan: StepPlan) -> PendingResult:
        return self.engine.runner.launch(plan)

    def close(self) -> None:
        pass


ROOM = RankRoom[Command, Event](
    module="tests.distributed.ranks.room",
    commands=msgspec.msgpack.Decoder(Command),
    events=msgspec.msgpack.Decoder(tuple[int, Event]),
    make_step=lambda plan: Step(plan=plan),
    make_rank=TalkingRank,
)

if __name__ == "__main__":
    run_rank(ROOM)
