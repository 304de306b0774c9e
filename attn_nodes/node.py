"""One FFN node as an attention rank sees it: what it holds, what it has been sent and has not answered."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from anabranch.protocol.ffn import FfnNode
from attn_nodes.part import Part
from transport.m2n.base import Link

# Of a new answer in the average of answer times.
_WEIGHT = 0.1


@dataclass(frozen=True, slots=True)
class Sent:
    """A part that is out.

    Attributes:
        sent_s: `awake_s()`.
    """

    part: Part
    sent_s: float


class Node:
    """A node, with or without a link.

    Attributes:
        info: as the orchestrator published it last.
        calls: those that it has not answered, by ticket, the oldest first.
        num_rows: rows of these.
        usual_s: average of its answer times; 0: it has not answered yet.
    """

    def __init__(self, info: FfnNode) -> None:
        self.link: Link | None = None
        self.calls: OrderedDict[int, Sent] = OrderedDict()
        self.num_rows = 0
        self.usual_s = 0.0
        self.hold(info)

    @property
    def name(self) -> str:
        return self.info.name

    def hold(self, info: FfnNode) -> None:
        """The node holds other experts from now on."""
        self.info = info
        self._held = [frozenset(experts) for experts in info.holding]

    def holds(self, layer: int, expert: int) -> bool:
        return layer < len(self._held) and expert in self._held[layer]

    def sent(self, ticket: int, part: Part, sent_s: float) -> None:
        self.calls[ticket] = Sent(part, sent_s)
        self.num_rows += part.num_rows

    def answered(self, ticket: int, now_s: float) -> Sent | None:
        """Forget a call; None where it is unknown (an answer that came twice)."""
        sent = self.calls.pop(ticket, None)
        if sent is not None:
            self.num_rows -= sent.part.num_rows
            taken_s = now_s - sent.sent_s
            self.usual_s = taken_s if not self.usual_s else self.usual_s + _WEIGHT * (taken_s - self.usual_s)
        return sent

    def drop(self) -> list[Part]:
        """Close the link; the parts that were out."""
        if self.link is not None:
            self.link.close()
            self.link = None
        parts = [sent.part for sent in self.calls.values()]
        self.calls.clear()
        self.num_rows = 0
        return parts
