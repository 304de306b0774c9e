"""FFN workers: which experts each is told to hold, and what attention workers are told of it.

An FFN worker's life here: came -> (all that are expected have come) -> told to hold experts (Place) -> holds them
(Placed) -> published to every attention worker (FfnNodes) -> gone: published without it at once, and its experts go to
those that are left. An expert is published of the workers that shall hold it as soon as all of them do; until then of
whoever has it. An attention worker takes requests once it has been told of an owner of every expert, and while there
is one.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Collection
from functools import partial

from anabranch.config.orchestrator import OrchestratorConfig
from anabranch.errors import AnabranchError, ConfigError, InvalidRequest
from anabranch.parallel.expert_placement import place
from anabranch.protocol.ffn import FfnNode, FfnPlacement
from anabranch.protocol.workers import Drain, ExpertRows, FfnNodes, Place, Placed
from anabranch.system.clock import loop_clock
from orchestrator.awake_timer import AwakeTimer
from orchestrator.ffn_balance import FfnBalance
from orchestrator.ffn_member import Experts, FfnMember, experts_of, holding_of, union
from orchestrator.ffn_plan import FfnPlan, FfnTargets
from orchestrator.member import Member
from orchestrator.membership import Membership
from orchestrator.served_model import ServedModel

logger = logging.getLogger(__name__)

# Layers named in an error.
MAX_NAMED_LAYERS = 3


class FfnPool:
    """Belongs to one event loop; `run` sends what the other methods decide.

    Args:
        on_change: called when attention workers have become able to serve, or unable.
    """

    def __init__(
        self, config: OrchestratorConfig, model: ServedModel, membership: Membership, on_change: Callable[[], None]
    ) -> None:
        self._config = config
        self._model = model
        self._membership = membership
        self._on_change = on_change
        self._nodes: dict[Member, FfnMember] = {}
        # Attention workers, with the version of the placement that each was told last.
        self._told: dict[Member, int] = {}
        self._all: Experts = frozenset()
        # For each layer how many experts it has, and bytes of one.
        self._layers: tuple[tuple[int, int], ...] = ()
        self._gathering: AwakeTimer | None = None
        self._gathered = False
        self._num_orders = 0
        self._placement = FfnPlacement(version=0, nodes=())
        # What it says, and the experts that it gives no owner.
        self._serving: dict[Member, Experts] = {}
        self._missing: Experts = frozenset()
        self._problem = ""
        self._balance = FfnBalance(config.ffn_rebalance_s)
        # Whether loads decided what workers shall hold.
        self._measured = False
        # Whether to plan for the load alone.
        self._for_load = False
        self._due = asyncio.Event()
        self._news = asyncio.Event()

    # What happens -----------------------------------------------------------------------------------------

    def changed(self, member: Member) -> None:
        """A worker of any role came, began to drain, or went."""
        if member.role == "attn":
            if member.alive:
                self._told.setdefault(member, 0)
            else:
                self._told.pop(member, None)
        elif member.role == "ffn":
            if not member.alive:
                node = self._nodes.pop(member, None)
                if node is not None:
                    node.close()
            elif member not in self._nodes:
                self._nodes[member] = FfnMember(member)
            self._plan()
        else:
            return
        self._renew()

    def placed(self, member: Member, message: Placed) -> None:
        """An FFN worker holds what it was told to, or says why not."""
        node = self._nodes.get(member)
        if node is None or not node.settle(message.version, failed=message.error is not None):
            return
        if message.error is not None:
            logger.warning("worker %s does not hold what it was told to: %s", member.name, message.error.message)
            if self._measured and node.held:
                # It goes on with what it holds.
                logger.warning("experts do not move for the load's sake any more")
                self._balance.give_up()
                node.target = node.held
            else:
                node.problem = message.error.message
            self._plan()
        self._renew()

    def measured(self, member: Member, message: ExpertRows) -> None:
        """An FFN worker has computed rows; where the load is uneven, experts move."""
        if member not in self._nodes or not self._layers:
            return
        now_s = loop_clock().now()
        try:
            self._balance.add(message.rows, self._layers, now_s)
        except AnabranchError as error:
            logger.warning("worker %s: %s", member.name, error)
            return
        holdings = [node.holding for node in self._placement.nodes]
        if self._balance.is_due(holdings, self._layers, now_s) and self._is_settled() and not self._due.is_set():
            self._for_load = True
            self._due.set()

    @property
    def exists(self) -> bool:
        """Whether there are FFN workers, or shall be."""
        return bool(self._nodes) or self._config.ffn_workers > 0

    def check_size(self, workers: int) -> None:
        """Raise InvalidRequest where the oldest so many FFN workers would not hold all experts."""
        left = [node.member for node in self._nodes.values() if not node.member.draining][:workers]
        if not self._layers or len(left) < workers:
            return
        capacities = {member.name: member.info.capacity_bytes for member in left}
        try:
            place(self._layers, capacities, replicas=1, current=dict.fromkeys(capacities, ()))
        except ConfigError as error:
            raise InvalidRequest(f"{workers}: {error}", "workers") from None

    async def run(self) -> None:
        """Plan and send what is due, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._plan_what_is_due(), name="ffn plan")
            tasks.create_task(self._send_what_is_due(), name="ffn news")

    async def _plan_what_is_due(self) -> None:
        while True:
            await self._due.wait()
            self._due.clear()
            plan, self._for_load = self._plan_of_now(), False
            # On a thread: with many experts it takes a while.
            targets = await asyncio.to_thread(plan.make)
            # Where somebody came or went meanwhile, it is of no use.
            if targets is not None and not self._due.is_set():
                self._adopt(targets)
                self._renew()

    async def _send_what_is_due(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            failed: set[Member] = set()
            # One at a time: what has become due meanwhile may have to go first.
            while (due := self._next_message(failed)) is not None:
                member, message = due
                if not await self._send(member, message):
                    failed.add(member)
                elif isinstance(message, FfnNodes) and member in self._told:
                    self._told[member] = message.placement.version
            self._say_who_serves()

    def _next_message(self, failed: Collection[Member]) -> tuple[Member, FfnNodes | Place | Drain] | None:
        """What is to be sent next, to whom; attention workers know where rows go before anybody drops an expert."""
        placement = self._placement
        for member, version in self._told.items():
            if version < placement.version and member not in failed:
                return member, FfnNodes(placement=placement)
        for node in self._nodes.values():
            if (order := node.take_order()) is not None:
                return node.member, order
        for node in self._nodes.values():
            # One that serves goes on until others hold what it does.
            if node.member.draining and not node.told_to_drain and node.member not in self._serving:
                node.told_to_drain = True
                return node.member, Drain()
        return None

    def close(self) -> None:
        """Take back all timers."""
        if self._gathering is not None:
            self._gathering.cancel()
        for node in self._nodes.values():
            node.close()

    async def _send(self, member: Member, message: FfnNodes | Place | Drain) -> bool:
        try:
            await self._membership.send(member, message)
        except AnabranchError as error:
            logger.info("%s not sent to %s: %s", type(message).__name__, member.name, error)
            return False
        return True

    def _renew(self) -> None:
        """Do what follows from who shall hold what, and who does."""
        unready = self._unready()
        self._publish(unready)
        self._order(unready)
        self._say_who_serves()
        self._news.set()

    # Who shall hold what ----------------------------------------------------------------------------------

    def _plan(self) -> None:
        """Have the experts shared out among the workers that are there."""
        usable = [node for node in self._nodes.values() if not node.member.draining]
        if not usable or not self._may_begin(usable):
            return
        if not self._layers:
            info = usable[0].member.info
            self._layers = self._model.expert_bytes(info.kv_dtype, shared=info.shared_experts)
            counts = [count for count, _ in self._layers]
            self._all = frozenset((layer, expert) for layer, count in enumerate(counts) for expert in range(count))
        self._for_load = False
        self._due.set()

    def _plan_of_now(self) -> FfnPlan:
        nodes = [node for node in self._nodes.values() if not node.member.draining and not node.problem]
        return FfnPlan(
            layers=self._layers,
            capacities={node.member.name: node.member.info.capacity_bytes for node in nodes},
            replicas=self._config.ffn_replicas,
            held={node.member.name: node.asked for node in nodes},
            loads=self._balance.loads(self._layers),
            for_load=self._for_load,
        )

    def _adopt(self, targets: FfnTargets) -> None:
        self._problem = targets.problem
        self._measured = targets.measured
        self._balance.moved(loop_clock().now())
        for node in self._nodes.values():
            node.target = experts_of(targets.holdings.get(node.member.name, ()))

    def _is_settled(self) -> bool:
        """Whether everybody holds what it shall, and nothing is on its way."""
        return not self._unready() and not any(node.loading for node in self._nodes.values())

    def _may_begin(self, usable: list[FfnMember]) -> bool:
        if not self._gathered:
            self._gathered = len(usable) >= self._config.ffn_workers
            if not self._gathered and self._gathering is None:
                self._gathering = AwakeTimer(self._config.ffn_gather_timeout_s, self._gather_no_longer)
        return self._gathered

    def _gather_no_longer(self) -> None:
        if not self._gathered and self._nodes:
            logger.warning(
                "ffn_gather_timeout_s: %d of %d ffn workers have come in %g s; they hold everything",
                len(self._nodes),
                self._config.ffn_workers,
                self._config.ffn_gather_timeout_s,
            )
            self._gathered = True
            self._plan()
            self._renew()
        self._gathering = None

    def _order(self, unready: Experts) -> None:
        """Tell workers that shall hold something else than they were told."""
        timeout_s = self._config.ffn_place_timeout_s
        for node in self._nodes.values():
            # What others do not hold yet stays where it is.
            wanted = node.target | (node.held & unready)
            if self._num_bytes(wanted) > (node.member.info.capacity_bytes or math.inf):
                wanted = node.target
            if wanted != node.asked and not node.problem and not node.member.draining:
                self._num_orders += 1
                node.order(
                    self._num_orders,
                    wanted,
                    len(self._layers),
                    timeout_s=timeout_s,
                    on_late=partial(self._lose, node.member, timeout_s),
                )

    def _num_bytes(self, experts: Experts) -> int:
        return sum(self._layers[layer][1] for layer, _ in experts)

    def _lose(self, member: Member, timeout_s: float) -> None:
        self._membership.lose(member, f"ffn_place_timeout_s: it has not loaded its experts in {timeout_s:g} s")

    def _unready(self) -> Experts:
        """What not all do hold yet that shall, or none shall: whoever has it is asked."""
        nodes = self._nodes.values()
        return union(node.target - node.held for node in nodes) | (self._all - union(node.target for node in nodes))

    # What is published ------------------------------------------------------------------------------------

    def _publish(self, unready: Experts) -> None:
        """Make a new version where who serves what has changed; the first one once every expert has an owner."""
        serving = {
            node.member: experts for node in self._nodes.values() if (experts := node.held & (node.target | unready))
        }
        missing = self._all - union(serving.values())
        if not self._placement.version:
            self._missing = missing
        if serving == self._serving or (missing and not self._placement.version):
            return
        self._serving, self._missing = serving, missing
        nodes = tuple(
            FfnNode(
                name=member.name,
                incarnation=member.info.incarnation,
                addresses=member.info.addresses,
                holding=holding_of(experts, len(self._layers)),
            )
            for member, experts in serving.items()
        )
        self._placement = FfnPlacement(version=self._placement.version + 1, nodes=nodes)
        shown = ", ".join(f"{member.name} {len(experts)}" for member, experts in serving.items()) or "nobody"
        logger.info("FFN placement %d, of %d experts: %s", self._placement.version, len(self._all), shown)

    def _say_who_serves(self) -> None:
        """Let attention workers take requests, or no more."""
        lack = self._lack()
        changed = False
        for member, version in self._told.items():
            waits_for = lack or ("" if version else f"no ffn worker is known to {member.name} yet")
            changed = changed or bool(waits_for) != bool(member.waits_for)
            member.waits_for = waits_for
        if changed:
            self._on_change()

    def _lack(self) -> str:
        """What attention workers cannot serve without; empty: every expert has an owner."""
        if not self._nodes:
            return "no ffn worker is there"
        if not self._gathered:
            expected = self._config.ffn_workers
            return f"no ffn worker holds experts before {expected} have come (there: {self._names()})"
        if not self._missing:
            return ""
        layers = sorted({layer for layer, _ in self._missing})
        named = [
            f"layer {layer}: {_few(sorted(expert for of, expert in self._missing if of == layer))}"
            for layer in layers[:MAX_NAMED_LAYERS]
        ]
        more = f"; and of {len(layers) - len(named)} more layers" if len(layers) > len(named) else ""
        why = [self._problem] if self._problem else []
        why += [f"{node.member.name}: {node.problem}" for node in self._nodes.values() if node.problem]
        why += [f"{node.member.name} loads" for node in self._nodes.values() if node.loading]
        return f"no ffn worker holds experts of {'; '.join(named)}{more} ({'; '.join(why) or self._names()})"

    def _names(self) -> str:
        return ", ".join(node.member.name for node in self._nodes.values())


def _few(experts: list[int]) -> str:
    shown = ", ".join(map(str, experts[:4]))
    return shown if len(experts) <= 4 else f"{shown}, ... ({len(experts)})"
