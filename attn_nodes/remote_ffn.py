"""FFN halves that other processes compute: rows out, answers back, and what is done about those that do not come.

    dispatch --> part for each node --> sent --> answered --> Ticket.result
                   ^                      |
                   +--- planned again <---+  node lost, refused, silent for ffn_timeout_s, an answer that is no number
                                          |
                                          +--> sent a second time to a replica: the first answer wins

The thread that computes calls everything. A row's answer is a function of the row alone, so it does not matter who
gives it, or how often it is asked for.

Shape suffixes: T rows of a ticket, A assignments (a row and one of its experts), C hidden.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from anabranch.errors import AnabranchError, DeadlineExceeded, FfnUnavailable, PeerLost
from anabranch.model.ffn_half import FfnInput
from anabranch.protocol.ffn import FfnPlacement
from anabranch.request.ffn_times import FfnTraffic
from anabranch.system.clock import awake_s
from attn_nodes.connector import Connected, Connector
from attn_nodes.dealing import Dealing
from attn_nodes.node import Node
from attn_nodes.part import Part, Ticket
from transport.m2n.base import LinkMaker
from transport.m2n.messages import Answer, Call, Combine, Status

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 8
# A call is late, and is sent to a second node, after so many times the usual answer time, at the earliest after this.
LATE_FACTOR = 8.0
LATE_S = 0.05

_NOTHING = torch.empty(0, dtype=torch.int32)
_NO_WEIGHTS = torch.empty(0, dtype=torch.float32)


@dataclass
class Traffic:
    """What went out and came back since the start.

    Attributes:
        num_calls, num_rows: sent, each sending counted.
        num_retries: parts that were planned again.
        num_second: calls that were late and were sent to a second node.
        num_answers: that counted.
        queue_us, compute_us, merged_rows: of these, as the nodes said.
        stepping_s, waited_s: see `FfnTraffic`.
    """

    num_calls: int = 0
    num_rows: int = 0
    num_retries: int = 0
    num_second: int = 0
    num_answers: int = 0
    queue_us: int = 0
    compute_us: int = 0
    merged_rows: int = 0
    stepping_s: float = 0.0
    waited_s: float = 0.0

    def report(self) -> FfnTraffic:
        """The same as it is now, for the orchestrator."""
        return FfnTraffic(
            num_calls=self.num_calls,
            num_rows=self.num_rows,
            num_retries=self.num_retries,
            num_second=self.num_second,
            num_answers=self.num_answers,
            queue_s=self.queue_us / 1e6,
            compute_s=self.compute_us / 1e6,
            merged_rows=self.merged_rows,
            stepping_s=self.stepping_s,
            waited_s=self.waited_s,
        )


class RemoteFfn:
    """One attention rank's FFN halves.

    Args:
        links: makes the links, and is closed with this.
        combine: SLOTS or SUMS, of sparse layers.
        ffn_timeout_s: silence after which a node is given up.
        ffn_unavailable_s: longest that rows wait for some node.
    """

    def __init__(self, links: LinkMaker, *, combine: Combine, ffn_timeout_s: float, ffn_unavailable_s: float) -> None:
        self.traffic = Traffic()
        self._links = links
        self._connector = Connector(links)
        self._combine = combine
        self._timeout_s = ffn_timeout_s
        self._unavailable_s = ffn_unavailable_s
        self._nodes: dict[str, Node] = {}
        self._dealing = Dealing(self._nodes)
        self._version = -1
        self._next_ticket = 1
        self._next_part = 1
        self._unsent: list[Part] = []

    # Nodes --------------------------------------------------------------------------------------------------

    def update(self, placement: FfnPlacement) -> None:
        """Rows go to these nodes from now on. An older version than the last one is ignored."""
        if placement.version < self._version:
            return
        self._version = placement.version
        there = {info.name: info for info in placement.nodes}
        for node in list(self._nodes.values()):
            info = there.get(node.name)
            if info is None or info.incarnation != node.info.incarnation:
                self._connector.forget(node.name)
                del self._nodes[node.name]
                self._plan_again(node.drop(), node.name, "it left")
        for info in placement.nodes:
            known = self._nodes.get(info.name)
            if known is not None:
                known.hold(info)
            else:
                self._nodes[info.name] = Node(info)
                self._connector.connect(info)
        for part in self._unsent:
            part.tried.clear()

    def _lose(self, node: Node, error: Exception) -> None:
        logger.warning("FFN node %s: %s; %d calls go elsewhere", node.name, error, len(node.calls))
        parts = node.drop()
        self._connector.connect(node.info)
        self._plan_again(parts, node.name, str(error))

    def _attach(self, made: Connected) -> None:
        node = self._nodes.get(made.node.name)
        if node is None or node.link is not None or node.info.incarnation != made.node.incarnation:
            made.dialled.close()
            return
        try:
            node.link = made.dialled.attach()
        except PeerLost:
            self._connector.connect(node.info)
            return
        for part in self._unsent:
            part.tried.discard(node.name)

    # Rows ---------------------------------------------------------------------------------------------------

    def dispatch(self, step: int, lane: int, layer: int, rows: FfnInput) -> Ticket:
        """Send rows to the nodes that hold their experts."""
        sparse = rows.experts_TS is not None
        ticket = Ticket(
            step=step,
            lane=lane,
            layer=layer,
            rows=rows,
            combine=self._combine if sparse else Combine.ROWS,
            began_s=(now_s := awake_s()),
            deadline_s=now_s + self._unavailable_s,
        )
        if ticket.num_rows:
            self._plan(ticket, None)
        return ticket

    def poll(self) -> None:
        """Take in what has come, and do what is due. Never waits."""
        while (made := self._connector.take()) is not None:
            self._attach(made)
        for node in list(self._nodes.values()):
            if node.link is not None:
                self._receive(node)
        if self._unsent:
            self._send_late()

    def wait(self, timeout_s: float) -> None:
        """Return as soon as an answer may have come."""
        began_s = time.monotonic()
        self._links.wait(timeout_s)
        self.traffic.waited_s += time.monotonic() - began_s

    def close(self) -> None:
        self._connector.close()
        for node in self._nodes.values():
            node.drop()
        self._links.close()

    # Out ----------------------------------------------------------------------------------------------------

    def _plan(self, ticket: Ticket, again: Part | None) -> None:
        """Deal assignments to nodes.

        Args:
            again: a part that was not answered; None: all of the ticket's.
        """
        for share in self._dealing.deal(ticket, again):
            number, self._next_part = self._next_part, self._next_part + 1
            part = Part(
                ticket=ticket,
                number=number,
                experts=share.experts,
                picked_A=share.picked_A,
                picked_R=share.picked_R,
                rows_A=share.rows_A,
                num_rows=share.num_rows,
            )
            if again is not None:
                part.attempt, part.tried = again.attempt + 1, set(again.tried)
                part.reason, part.refused = again.reason, again.refused
            ticket.num_open += 1
            if share.node is None or not self._send(part, share.node):
                self._unsent.append(part)

    def _send(self, part: Part, node: Node) -> bool:
        """False where the node has no room now, or is lost just now."""
        if node.link is None or not node.link.num_free:
            return False
        number, self._next_ticket = self._next_ticket, self._next_ticket + 1
        try:
            node.link.send(self._call(number, part))
        except PeerLost as error:
            self._lose(node, error)
            return False
        node.sent(number, part, awake_s())
        part.sent_to.add(node.name)
        self.traffic.num_calls += 1
        self.traffic.num_rows += part.num_rows
        return True

    def _call(self, number: int, part: Part) -> Call:
        ticket = part.ticket
        normed_TC, weights_TS, experts_TS, _ = ticket.rows
        experts_A, weights_A = _NOTHING, _NO_WEIGHTS
        rows_TC = normed_TC
        if part.picked_A is not None and part.picked_R is not None:
            assert experts_TS is not None
            assert weights_TS is not None
            experts_A = experts_TS.flatten().cpu().index_select(0, part.picked_A).to(torch.int32)
            if ticket.combine is Combine.SUMS:
                weights_A = weights_TS.flatten().cpu().index_select(0, part.picked_A)
            if part.num_rows < ticket.num_rows:
                rows_TC = normed_TC.index_select(0, part.picked_R.to(normed_TC.device))
        return Call(
            ticket=number,
            step=ticket.step,
            layer=ticket.layer,
            lane=ticket.lane,
            attempt=part.attempt,
            placement=max(self._version, 0),
            combine=ticket.combine,
            rows_TC=rows_TC.contiguous().cpu(),
            rows_A=part.rows_A,
            experts_A=experts_A,
            weights_A=weights_A,
        )

    def _send_late(self) -> None:
        """Try the parts that could not be sent."""
        parts, self._unsent = self._unsent, []
        now_s = awake_s()
        for part in parts:
            ticket = part.ticket
            if ticket.error is not None:
                continue
            if (error := self._hopeless(part, now_s)) is not None:
                ticket.error = error
            elif any(self._dealing.choose(ticket.layer, expert, part.tried) for expert in part.experts):
                self._plan_again([part], "", part.reason, count=False)
            else:
                self._unsent.append(part)

    def _hopeless(self, part: Part, now_s: float) -> FfnUnavailable | None:
        ticket = part.ticket
        what = f"layer {ticket.layer}, expert{'s' * (len(part.experts) > 1)} {_listed(part.experts)}"
        why = f" (the last one said: {part.reason})" if part.reason else ""
        if part.refused and any(self._dealing.all_tried(ticket.layer, expert, part.tried) for expert in part.experts):
            return FfnUnavailable(f"{what}: no FFN node that holds it could compute it{why}")
        if part.attempt >= MAX_ATTEMPTS:
            return FfnUnavailable(f"{what}: {part.attempt} FFN nodes in a row did not answer{why}")
        if now_s >= ticket.deadline_s:
            return FfnUnavailable(
                f"ffn_unavailable_s: {what}: no FFN node that holds it answered in {self._unavailable_s:g} s{why}"
            )
        return None

    # Back ---------------------------------------------------------------------------------------------------

    def _receive(self, node: Node) -> None:
        """Everything that a node has sent, and what is to be done about what it has not."""
        link = node.link
        assert link is not None
        try:
            while (answer := link.receive()) is not None:
                self._answered(node, answer)
        except AnabranchError as error:
            self._lose(node, error)
            return
        oldest = next(iter(node.calls.values()), None)
        if oldest is None:
            return
        now_s = awake_s()
        age_s = now_s - oldest.sent_s
        if age_s > self._timeout_s:
            self._lose(node, DeadlineExceeded(f"ffn_timeout_s: no answer in {self._timeout_s:g} s"))
        elif age_s > max(LATE_S, LATE_FACTOR * node.usual_s):
            self._send_twice(node, now_s)

    def _answered(self, node: Node, answer: Answer) -> None:
        now_s = awake_s()
        sent = node.answered(answer.ticket, now_s)
        if sent is None:
            return
        part = sent.part
        part.sent_to.discard(node.name)
        if not part.open or part.ticket.error is not None:
            return
        if answer.status is Status.NOT_HELD:
            self._refused(part, node, "does not hold it")
        elif answer.status is not Status.OK:
            part.refused = True
            self._refused(part, node, answer.status.name.lower())
        elif not math.isfinite(answer.rows_RC.sum(dtype=torch.float32)):
            part.refused = True
            self._refused(part, node, "answered values that are not finite")
        else:
            part.open = False
            part.ticket.take(part, answer, now_s)
            traffic = self.traffic
            traffic.num_answers += 1
            traffic.queue_us += answer.queue_us
            traffic.compute_us += answer.compute_us
            traffic.merged_rows += answer.merged_rows

    def _refused(self, part: Part, node: Node, reason: str) -> None:
        logger.info("FFN node %s, layer %d: %s", node.name, part.ticket.layer, reason)
        part.reason = f"{node.name}: {reason}"
        part.tried.add(node.name)
        if not part.sent_to:
            self._plan_again([part], node.name, part.reason)

    def _plan_again(self, parts: Sequence[Part], name: str, reason: str, *, count: bool = True) -> None:
        """Deal parts anew that a node was sent and will not answer."""
        for part in parts:
            part.sent_to.discard(name)
            if not part.open or part.sent_to or part.ticket.error is not None:
                continue
            part.open = False
            part.ticket.num_open -= 1
            if count:
                part.tried.add(name)
                part.reason = reason
                self.traffic.num_retries += 1
                # What nobody can answer any more is not sent to another node first, or each could wait once more.
                part.ticket.error = self._hopeless(part, awake_s())
            else:
                part.attempt -= 1
            if part.ticket.error is None:
                self._plan(part.ticket, part)

    def _send_twice(self, node: Node, now_s: float) -> None:
        """Send the late calls of a node to a replica too."""
        late_s = max(LATE_S, LATE_FACTOR * node.usual_s)
        for sent in list(node.calls.values()):
            if now_s - sent.sent_s <= late_s:
                return
            part = sent.part
            if part.open and len(part.sent_to) == 1:
                for other in self._nodes.values():
                    if other is not node and all(other.holds(part.ticket.layer, e) for e in part.experts):
                        self.traffic.num_second += self._send(part, other)
                        break


def _listed(experts: Sequence[int]) -> str:
    shown = ", ".join(map(str, experts[:8]))
    return shown + (f" and {len(experts) - 8} more" if len(experts) > 8 else "")
