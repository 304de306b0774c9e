"""The thread that makes an FFN worker hold what it is told to, while the compute thread serves.

    told -> what is not needed any more is dropped as soon as no call needs it -> what is missing is loaded, expert by
    expert -> placed; told something else meanwhile: the rest is not loaded, and only the newest is answered

What the last but one placement named stays for `ffn_timeout_s`, for calls that were sent by it; where it takes the room
of what is to be loaded, it goes before.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable

import torch

from anabranch.engine.fit import available_bytes
from anabranch.errors import AnabranchError, ConfigError, MalformedMessage
from anabranch.model.shared_layers import with_shared
from anabranch.model.size import expert_bytes
from anabranch.protocol.ffn import Holding
from anabranch.protocol.wire_error import WireError
from anabranch.protocol.workers import Place, Placed
from ffn_nodes.experts import Experts, NodeExperts, experts_of
from ffn_nodes.rank import be_nice
from ffn_nodes.serving import Serving
from ffn_nodes.throttle import Throttle

logger = logging.getLogger(__name__)


class Placing:
    """Obeys `Place`, the newest one, on a thread of its own.

    Args:
        capacity_bytes: most weights; 0: no limit.
        num_threads: threads that read while nobody is served.
        stall_s: longest time that the compute thread may take to listen.
        keep_s: after which no call counts any more that was sent by an older placement than the one that is obeyed.
        post: takes the answers, on any thread.
    """

    def __init__(
        self,
        experts: NodeExperts,
        serving: Serving,
        *,
        capacity_bytes: int,
        num_threads: int,
        stall_s: float,
        keep_s: float,
        post: Callable[[Placed], None],
    ) -> None:
        self._experts = experts
        self._serving = serving
        self._capacity_bytes = capacity_bytes
        self._num_threads = num_threads
        self._stall_s = stall_s
        self._keep_s = keep_s
        self._post = post
        self._throttle = Throttle(lambda: serving.num_products)
        self._told: queue.SimpleQueue[Place | None] = queue.SimpleQueue()
        self._before: Experts = frozenset()
        # Whether something is held for older calls alone.
        self._keeps = False
        self._thread = threading.Thread(target=self._run, name="placing", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def place(self, message: Place) -> None:
        """Hold this as soon as can be; never blocks."""
        self._told.put(message)

    def stop(self, timeout_s: float) -> bool:
        """End after the expert in hand; False if that took longer than `timeout_s`. Idempotent."""
        self._told.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # On its own thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        be_nice()
        while (message := self._next()) is not None:
            if not self._told.empty():
                continue
            try:
                placed = self._place(self._wanted(message.holding))
            except AnabranchError as error:
                logger.error("placement %d: %s", message.version, error)
                self._post(Placed(version=message.version, error=WireError.of(error)))
            except Exception as error:
                logger.exception("placement %d", message.version)
                self._post(Placed(version=message.version, error=WireError.of(error)))
            else:
                if placed:
                    self._post(Placed(version=message.version))

    def _next(self) -> Place | None:
        """What it is told next; what is held for older calls goes meanwhile."""
        if self._keeps:
            try:
                return self._told.get(timeout=self._keep_s)
            except queue.Empty:
                self._let_go()
        return self._told.get()

    def _let_go(self) -> None:
        self._keeps = False
        try:
            self._serving.set_excess(self._experts.present() - self._before, self._stall_s)
        except AnabranchError as error:
            # Whoever watches the compute thread ends the worker, or the next placement says it again.
            logger.warning("experts that nobody needs any more stay: %s", error)

    def _wanted(self, holding: Holding) -> Experts:
        layers = self._experts.layers
        if len(holding) != len(layers):
            raise MalformedMessage(f"a placement of {len(holding)} layers for a model of {len(layers)}")
        for layer, (experts, (count, _)) in enumerate(zip(holding, layers, strict=True)):
            if experts and max(experts) >= count:
                raise MalformedMessage(f"a placement of expert {max(experts)} of layer {layer}, which has {count}")
        return experts_of(with_shared(self._experts.config, holding))

    def _place(self, wanted: Experts) -> bool:
        """Whether all is here now; False where something else is to be placed instead."""
        held = self._experts.present()
        if self._capacity_bytes and self._bytes(wanted) > self._capacity_bytes:
            raise ConfigError(
                "capacity",
                self._capacity_bytes,
                f"is less than the {self._bytes(wanted)} bytes of the {len(wanted)} experts to be held here; "
                "raise it, or lower replicas, or add ffn workers",
            )
        kept = wanted | (held & self._before)
        if self._capacity_bytes and self._bytes(kept | held) > self._capacity_bytes:
            kept = wanted
        self._serving.set_excess(held - kept, self._stall_s)
        self._before = wanted
        self._keeps = bool((held & kept) - wanted)
        missing = wanted - self._experts.usable()
        self._check_memory(missing, held - kept)
        torch.set_num_threads(1 if self._serving.num_links else self._num_threads)
        self._throttle.begin()
        return self._experts.load(missing, self._interrupted)

    def _interrupted(self) -> bool:
        """Between two experts: whether something else is to be placed instead."""
        self._throttle.rest()
        return not self._told.empty()

    def _check_memory(self, missing: Experts, excess: Experts) -> None:
        needed, free = self._bytes(missing), available_bytes(str(self._experts.device))
        if needed > free + self._bytes(excess):
            raise ConfigError(
                "memory", needed, f"bytes of experts are to be loaded, and {free} are free; lower replicas or capacity"
            )

    def _bytes(self, experts: Iterable[tuple[int, int]]) -> int:
        dtype = str(self._experts.dtype).removeprefix("torch.")
        return sum(expert_bytes(self._experts.config, dtype, layer, expert) for layer, expert in experts)
