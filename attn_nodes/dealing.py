"""Which FFN node is sent which rows: of those that hold an expert, the one with the fewest rows outstanding.

Shape suffixes: T rows of a ticket, S chosen experts of a row, A assignments (a row and one of its experts), R rows of
a share.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch

from attn_nodes.node import Node
from attn_nodes.part import Part, Ticket

_NOTHING = torch.empty(0, dtype=torch.int32)
_NOBODY: dict[str, int] = {}


class Share(NamedTuple):
    """What one node is to be sent; the fields of `Part` of the same names.

    Attributes:
        node: None: nobody holds these experts and can be sent something now.
    """

    node: Node | None
    experts: tuple[int, ...]
    picked_A: torch.Tensor | None
    picked_R: torch.Tensor | None
    rows_A: torch.Tensor
    num_rows: int


class Dealing:
    """Deals a ticket's assignments to nodes.

    Args:
        nodes: by name, as they are at each moment.
    """

    def __init__(self, nodes: Mapping[str, Node]) -> None:
        self._nodes = nodes

    def deal(self, ticket: Ticket, again: Part | None) -> list[Share]:
        """Every assignment once.

        Args:
            again: a part that was not answered; None: all of the ticket's.
        """
        tried: Collection[str] = () if again is None else again.tried
        experts_TS = ticket.rows.experts_TS
        if experts_TS is None:
            return [Share(self.choose(ticket.layer, 0, tried), (0,), None, None, _NOTHING, ticket.num_rows)]
        chosen_A = experts_TS.flatten().cpu()
        picked_A = torch.arange(chosen_A.shape[0]) if again is None else again.picked_A
        assert picked_A is not None
        if again is not None:
            chosen_A = chosen_A.index_select(0, picked_A)
        counts = chosen_A.bincount().tolist()
        by_node = self._by_node(ticket.layer, counts, tried)
        place_of_E = torch.zeros(len(counts), dtype=torch.int64)
        for place, experts in enumerate(by_node.values()):
            place_of_E[experts] = place
        place_of_A = place_of_E.index_select(0, chosen_A)
        shares: list[Share] = []
        for place, (name, experts) in enumerate(by_node.items()):
            mine_A = picked_A if len(by_node) == 1 else picked_A[place_of_A == place]
            picked_R, rows_A = torch.unique_consecutive(mine_A // experts_TS.shape[1], return_inverse=True)
            node = self._nodes.get(name)
            shares.append(Share(node, tuple(experts), mine_A, picked_R, rows_A.to(torch.int32), picked_R.shape[0]))
        return shares

    def choose(
        self, layer: int, expert: int, tried: Collection[str], booked: Mapping[str, int] = _NOBODY
    ) -> Node | None:
        """The node with the fewest rows that holds an expert and can take a call now; None where there is none.

        Args:
            booked: rows that nodes are about to be sent.
        """
        best: Node | None = None
        least = 0
        for node in self._nodes.values():
            link = node.link
            if link is not None and link.num_free and node.name not in tried and node.holds(layer, expert):
                rows = node.num_rows + booked.get(node.name, 0)
                if best is None or rows < least:
                    best, least = node, rows
        return best

    def all_tried(self, layer: int, expert: int, tried: Collection[str]) -> bool:
        """Whether there are nodes that hold an expert and can be reached, and all of them were tried."""
        there = [node.name for node in self._nodes.values() if node.link is not None and node.holds(layer, expert)]
        return bool(there) and set(there) <= set(tried)

    def _by_node(self, layer: int, counts: list[int], tried: Collection[str]) -> dict[str, list[int]]:
        """The experts that some assignment chose, by the name of the node for them; "" where there is none."""
        booked: dict[str, int] = {}
        by_node: dict[str, list[int]] = {}
        for expert, count in enumerate(counts):
            if count:
                node = self.choose(layer, expert, tried, booked)
                name = "" if node is None else node.name
                booked[name] = booked.get(name, 0) + count
                by_node.setdefault(name, []).append(expert)
        return by_node
