"""Steps of several lanes on one thread: while the rows of one are at the FFN nodes, another computes attention.

    lane 0   attention 0 --rows--> . . . . . . . --answers--> attention 1 --rows--> . . . .
    lane 1                attention 0 --rows--> . . . . . . . . . . . . . --answers--> attention 1

A lane's next step begins when its last one has ended, whatever the other lanes do.
"""

from __future__ import annotations

import time
from collections import deque

import torch

from anabranch.engine.pending import PendingResult
from anabranch.engine.runner import Runner
from anabranch.errors import FfnUnavailable
from anabranch.model.ffn_half import FfnCall, FfnCalls
from anabranch.parallel.group import Group
from anabranch.protocol.ffn import FfnPlacement
from anabranch.request.ffn_times import FfnTimes
from anabranch.step.plan import StepPlan
from attn_nodes.lane_meter import LaneMeter
from attn_nodes.part import Ticket
from attn_nodes.remote_ffn import RemoteFfn
from attn_nodes.shares import Shares
from attn_nodes.turns import NOBODY, Turns
from runtime.rank import ADVANCE_S, Done


class _Lane:
    """Its steps, and where the first of them stands.

    Attributes:
        calls: the step that has begun; None: none has.
        ticket: rows of it that are out.
        num_rows: of all ranks, for this ticket.
        beside_TC: what is to be added to the answer, computed meanwhile.
        broken: why the last step failed; whatever follows it fails alike.
        turn: when it last went on.
        times: what the step that has begun has cost at FFN nodes.
        attention_s: what the step's attention halves took so far.
        ways_s: what each of its tickets took on its way; more where the answer came while another lane was computed.
    """

    def __init__(self) -> None:
        self.waiting: deque[tuple[StepPlan, Done]] = deque()
        self.plan = StepPlan(step=0, sequences=())
        self.done: Done | None = None
        self.calls: FfnCalls[PendingResult] | None = None
        self.ticket: Ticket | None = None
        self.num_rows = 0
        self.beside_TC: torch.Tensor | None = None
        self.broken: FfnUnavailable | None = None
        self.turn = 0
        self.times = FfnTimes()
        self.attention_s = 0.0
        self.ways_s: list[float] = []

    @property
    def ready(self) -> bool:
        """Whether it can go on now."""
        if self.calls is None:
            return bool(self.waiting)
        return self.ticket is not None and self.ticket.done

    def end(self, result: PendingResult | Exception) -> None:
        """The step that has begun is over."""
        if self.calls is not None:
            self.calls.close()
        done, self.done = self.done, None
        self.calls, self.ticket, self.beside_TC = None, None, None
        self.broken = result if isinstance(result, FfnUnavailable) else None
        assert done is not None
        done(result)


class Lanes:
    """One rank's. See `LanedRank`.

    Args:
        runner: of attention halves.
        world: all ranks of the node.
        meter: told what steps take; None: nobody wants to know.
    """

    def __init__(
        self, runner: Runner, ffn: RemoteFfn, world: Group, num_lanes: int, meter: LaneMeter | None = None
    ) -> None:
        self._runner = runner
        self._ffn = ffn
        self._shares = Shares(world)
        self._turns = Turns(world)
        self._lanes = [_Lane() for _ in range(num_lanes)]
        self._num_turns = 0
        self._meter = meter
        # On ranks that do not decide: the lane whose turn it is, where its step has not come yet.
        self._due: int | None = None

    @property
    def busy(self) -> bool:
        """See `LanedRank.busy`."""
        if self._due is not None:
            lane = self._lanes[self._due]
            return lane.calls is not None or bool(lane.waiting)
        return any(lane.calls is not None or lane.waiting for lane in self._lanes)

    @torch.inference_mode()
    def use(self, placement: FfnPlacement) -> None:
        """Send rows to these nodes from now on."""
        self._ffn.update(placement)

    def begin(self, plan: StepPlan, done: Done) -> None:
        """See `LanedRank.begin`."""
        self._lanes[plan.lane].waiting.append((plan, done))

    def advance(self) -> None:
        """See `LanedRank.advance`."""
        began_s = time.monotonic()
        try:
            with torch.inference_mode():
                self._advance()
        except Exception as error:
            # Not of one step: of the mesh, or of all nodes' links.
            self._fail(error)
        self._ffn.traffic.stepping_s += time.monotonic() - began_s

    def _advance(self) -> None:
        index, self._due = (self._next() if self._due is None else self._due), None
        if index == NOBODY:
            return
        lane = self._lanes[index]
        if lane.calls is None and not lane.waiting:
            self._due = index
            return
        while not lane.ready:  # another rank's answers have come, this one's are on their way, or their deadline
            self._ffn.wait(ADVANCE_S)
            self._ffn.poll()
        self._go_on(lane)

    def _fail(self, error: Exception) -> None:
        for lane in self._lanes:
            waiting, lane.waiting = lane.waiting, deque()
            if lane.calls is not None:
                lane.end(error)
            for _, done in waiting:
                done(error)

    def _next(self) -> int:
        """The lane whose turn it is: of those that can go on, the one that waited longest."""
        if not self._turns.decides:
            return self._turns.agree(NOBODY)
        self._ffn.poll()
        if (index := self._ready()) == NOBODY:
            self._ffn.wait(ADVANCE_S)
            self._ffn.poll()
            index = self._ready()
        return self._turns.agree(index)

    def _ready(self) -> int:
        ready = [index for index, lane in enumerate(self._lanes) if lane.ready]
        return min(ready, key=lambda index: self._lanes[index].turn, default=NOBODY)

    def _go_on(self, lane: _Lane) -> None:
        self._num_turns += 1
        lane.turn = self._num_turns
        start_s = time.perf_counter()
        try:
            if lane.calls is None:
                call = self._first(lane)
                if call is None:
                    return
            else:
                call = lane.calls.send(self._answer(lane))
            self._ask(lane, call)
            lane.attention_s += time.perf_counter() - start_s
        except StopIteration as end:
            end.value.ffn, end.value.ffn_traffic = lane.times, self._ffn.traffic.report()
            lane.attention_s += time.perf_counter() - start_s
            if self._meter is not None:
                self._meter.ended(
                    lane.plan.num_tokens,
                    attention_s=lane.attention_s,
                    ffn_s=lane.times.compute_s,
                    ways_s=lane.ways_s,
                )
            lane.end(end.value)
        except Exception as error:
            lane.end(error)

    def _first(self, lane: _Lane) -> FfnCall | None:
        """Begin the next step; None where it follows one that failed for lack of FFN nodes."""
        lane.plan, lane.done = lane.waiting.popleft()
        lane.attention_s = 0.0
        lane.ways_s.clear()
        if lane.broken is not None and any(sequence.follows is not None for sequence in lane.plan.sequences):
            lane.end(lane.broken)
            return None
        lane.times = FfnTimes()
        lane.calls = self._runner.steps(lane.plan)
        return next(lane.calls)

    def _ask(self, lane: _Lane, call: FfnCall) -> None:
        lane.num_rows = call.rows.normed_TC.shape[0]
        lane.ticket = self._ffn.dispatch(lane.plan.step, lane.plan.lane, call.layer, self._shares.cut(call.rows))
        shared = self._runner.stack.shared_experts[call.layer]
        lane.beside_TC = None if shared is None else shared.forward(call.rows.normed_TC)

    def _answer(self, lane: _Lane) -> torch.Tensor:
        assert lane.ticket is not None
        lane.times += lane.ticket.times
        answer_TC = self._shares.join(lane.ticket, lane.num_rows)
        lane.ways_s.append(lane.ticket.times.way_s)
        return answer_TC if lane.beside_TC is None else answer_TC + lane.beside_TC
