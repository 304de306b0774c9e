"""One FFN worker as the orchestrator sees it: what it holds, what it was told to hold, what it shall hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from anabranch.protocol.ffn import Holding
from anabranch.protocol.workers import Place
from orchestrator.awake_timer import AwakeTimer
from orchestrator.member import Member

Experts = frozenset[tuple[int, int]]
"""(layer, expert); a dense layer has one expert, 0."""


class FfnMember:
    """Belongs to one event loop.

    Attributes:
        held: what the worker has said that it holds.
        target: what it shall hold; less than what it holds is fine.
        problem: why it is told no more; empty: it has loaded whatever it was told to.
    """

    def __init__(self, member: Member) -> None:
        self.member = member
        self.held: Experts = frozenset()
        self.target: Experts = frozenset()
        self.problem = ""
        self.told_to_drain = False
        self._orders: dict[int, Experts] = {}
        self._unsent: list[Place] = []
        self._timer: AwakeTimer | None = None

    @property
    def asked(self) -> Experts:
        """What it was told to hold last, as far as it could."""
        return self._orders[max(self._orders)] if self._orders else self.held

    @property
    def loading(self) -> bool:
        """Whether it has been told to hold something and has not answered."""
        return bool(self._orders)

    def order(
        self, version: int, experts: Experts, num_layers: int, timeout_s: float, on_late: Callable[[], None]
    ) -> None:
        """Have it told to hold these.

        Args:
            version: greater than that of its earlier orders.
            on_late: called where it has not answered the last order in time.
        """
        self.close()
        self._orders[version] = experts
        self._unsent.append(Place(version=version, holding=holding_of(experts, num_layers)))
        self._timer = AwakeTimer(timeout_s, on_late)

    def take_order(self) -> Place | None:
        """What is to be sent next, once."""
        return self._unsent.pop(0) if self._unsent else None

    def settle(self, version: int, *, failed: bool) -> bool:
        """It has answered an order, and so all earlier ones; False where that changes nothing."""
        experts = self._orders.get(version)
        if experts is None:
            return False
        self._orders = {later: wanted for later, wanted in self._orders.items() if later > version}
        if not self._orders:
            self.close()
        if not failed:
            self.held = experts
        return True

    def close(self) -> None:
        """Take back the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def union(sets: Iterable[Experts]) -> Experts:
    """What is in any of the sets."""
    return frozenset().union(*sets)


def holding_of(experts: Experts, num_layers: int) -> Holding:
    """The same as it travels."""
    layers: list[list[int]] = [[] for _ in range(num_layers)]
    for layer, expert in sorted(experts):
        layers[layer].append(expert)
    return tuple(map(tuple, layers))


def experts_of(holding: Holding) -> Experts:
    """What has travelled as a set."""
    return frozenset((layer, expert) for layer, experts in enumerate(holding) for expert in experts)
