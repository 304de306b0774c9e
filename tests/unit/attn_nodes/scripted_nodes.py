"""FFN nodes that answer when, and as badly as, a test says; an answer is a function of row, layer and expert."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from anabranch.errors import PeerLost
from anabranch.protocol.ffn import FfnNode, FfnPlacement
from transport.m2n.messages import Answer, Call, Combine, Status


def expert_row(row_C: torch.Tensor, layer: int, expert: int) -> torch.Tensor:
    """What an expert answers to a row."""
    return row_C * (expert + 1) + layer


class ScriptedLink:
    """A link whose answers the test gives."""

    def __init__(self, node: ScriptedNode, num_slots: int) -> None:
        self.peer = node.name
        self.node = node
        self.calls: list[Call] = []
        self.answers: list[Answer] = []
        self.num_out = 0
        self.num_slots = num_slots
        self.lost = False
        self.closed = False

    @property
    def num_free(self) -> int:
        return self.num_slots - self.num_out

    def send(self, call: Call) -> None:
        assert not self.closed and self.num_free > 0
        if self.lost:
            raise PeerLost(f"{self.peer} is gone")
        self.num_out += 1
        self.calls.append(call)

    def receive(self) -> Answer | None:
        assert not self.closed
        if self.answers:
            self.num_out -= 1
            return self.answers.pop(0)
        if self.lost:
            raise PeerLost(f"{self.peer} is gone")
        return None

    def close(self) -> None:
        self.closed = True
        self.calls.clear()


class ScriptedNode:
    """A node; each connection is a link of its own."""

    def __init__(self, name: str, holding: Sequence[Sequence[int]], incarnation: int = 1, num_slots: int = 4) -> None:
        self.name = name
        self.holding = tuple(tuple(experts) for experts in holding)
        self.incarnation = incarnation
        self.num_slots = num_slots
        self.links: list[ScriptedLink] = []
        self.reachable = True

    @property
    def info(self) -> FfnNode:
        return FfnNode(
            name=self.name, incarnation=self.incarnation, addresses={"scripted": self.name}, holding=self.holding
        )

    @property
    def calls(self) -> list[tuple[ScriptedLink, Call]]:
        """Those that wait for an answer."""
        return [(link, call) for link in self.links if not link.closed for call in link.calls]

    def answer(
        self, link: ScriptedLink, call: Call, status: Status = Status.OK, *, twice: bool = False, spoil: bool = False
    ) -> None:
        """Answer a call; `spoil`: with a value that is no number."""
        link.calls.remove(call)
        held = self.holding[call.layer]
        wanted = call.experts_A.tolist() if call.combine is not Combine.ROWS else [0]
        if status is Status.OK and not set(wanted) <= set(held):
            status = Status.NOT_HELD
        rows_RC = self._compute(call) if status is Status.OK else call.rows_TC[:0]
        if spoil and rows_RC.numel():
            rows_RC[0, 0] = torch.nan
        link.answers.append(Answer(ticket=call.ticket, attempt=call.attempt, status=status, rows_RC=rows_RC))
        if twice:
            link.num_out += 1
            link.answers.append(link.answers[-1])

    def lose(self) -> None:
        """Every link is gone."""
        for link in self.links:
            link.lost = True
            link.calls.clear()

    def _compute(self, call: Call) -> torch.Tensor:
        if call.combine is Combine.ROWS:
            return expert_row(call.rows_TC, call.layer, 0)
        pairs = zip(call.rows_A.tolist(), call.experts_A.tolist(), strict=True)
        answers = [expert_row(call.rows_TC[row], call.layer, expert) for row, expert in pairs]
        if call.combine is Combine.SLOTS:
            return torch.stack(answers)
        total = torch.zeros(call.rows_TC.shape, dtype=torch.float32)
        for row, answer, weight in zip(call.rows_A.tolist(), answers, call.weights_A.tolist(), strict=True):
            total[row] += answer.float() * weight
        return total


class ScriptedDialled:
    """A node that was reached."""

    def __init__(self, node: ScriptedNode) -> None:
        self._node = node

    def attach(self) -> ScriptedLink:
        link = ScriptedLink(self._node, self._node.num_slots)
        self._node.links.append(link)
        return link

    def close(self) -> None: ...


class ScriptedLinks:
    """A `LinkMaker` over scripted nodes."""

    def __init__(self, nodes: Sequence[ScriptedNode]) -> None:
        self.nodes = {node.name: node for node in nodes}
        self.num_waits = 0

    def dial(self, addresses: dict[str, str], peer: str) -> ScriptedDialled:
        node = self.nodes[peer]
        if not node.reachable:
            raise PeerLost(f"{peer}: nobody there")
        return ScriptedDialled(node)

    def wait(self, timeout_s: float) -> None:
        self.num_waits += 1

    def close(self) -> None: ...


def placement(version: int, *nodes: ScriptedNode) -> FfnPlacement:
    return FfnPlacement(version=version, nodes=tuple(node.info for node in nodes))
