"""How the ranks of an attention node share its rows out: each sends some of them, and all get every answer.

Every rank computes all rows of a step up to the FFN (heads and tokens are what it shares), so nothing has to be sent
between ranks before; after it, one all-gather brings the answers together, and with them whether some rank has none.

Shape suffixes: T rows of a step, C hidden.
"""

from __future__ import annotations

import torch

from anabranch.errors import FfnUnavailable
from anabranch.model.ffn_half import FfnInput
from anabranch.parallel.group import Group
from attn_nodes.part import Ticket


class Shares:
    """One rank's view.

    Args:
        world: all ranks of the mesh.
    """

    def __init__(self, world: Group) -> None:
        self._world = world

    def cut(self, rows: FfnInput) -> FfnInput:
        """This rank's share of the rows, which may be none."""
        if self._world.size == 1:
            return rows
        count = self._share(rows.normed_TC.shape[0])
        held = slice(self._world.rank * count, (self._world.rank + 1) * count)
        weights_TS, experts_TS = rows.weights_TS, rows.experts_TS
        return FfnInput(
            rows.normed_TC[held],
            None if weights_TS is None else weights_TS[held],
            None if experts_TS is None else experts_TS[held],
            rows.shared,
        )

    def join(self, ticket: Ticket, num_rows: int) -> torch.Tensor:
        """`[T, C]`, the answers to all rows, the same on every rank.

        Raises:
            FfnUnavailable: on every rank where one has no answer.
        """
        if self._world.size == 1:
            return ticket.result()
        count = self._share(num_rows)
        normed_TC = ticket.rows.normed_TC
        # The last row says whether this rank has failed.
        mine_TC = normed_TC.new_zeros((count + 1, normed_TC.shape[1]))
        own: FfnUnavailable | None = None
        try:
            mine_TC[: ticket.num_rows] = ticket.result()
        except FfnUnavailable as error:
            own = error
            mine_TC[count] = 1
        every_NTC = self._world.all_gather(mine_TC, 0).view(self._world.size, count + 1, -1)
        failed = every_NTC[:, count, 0].nonzero().flatten().tolist()
        if own is not None:
            raise own
        if failed:
            raise FfnUnavailable(f"layer {ticket.layer}: no FFN node answered rank {failed[0]}")
        return every_NTC[:, :count].flatten(0, 1)[:num_rows]

    def _share(self, num_rows: int) -> int:
        return -(-num_rows // self._world.size)
