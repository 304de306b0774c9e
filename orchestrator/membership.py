"""Who is in the cluster: workers that registered, when they were last heard, and what they hold.

A worker's life here: Register (refused, or ready) -> ready -> [draining] -> gone. Gone for good: after silence,
a lost connection or a parent's report, the first thing that its connection still says is answered with
Registered(error), the connection ends, and so does the process. A restarted worker may take the name again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Literal

import msgspec

from anabranch.errors import AnabranchError, ConfigError, NoWorkers, PeerLost, WorkerDied
from anabranch.protocol.wire_error import WireError
from anabranch.protocol.workers import (
    Beat,
    Drain,
    ModelIdentity,
    Registered,
    Role,
    Shutdown,
    ToWorker,
    WorkerInfo,
    WorkerStats,
)
from anabranch.system.clock import loop_clock
from orchestrator.context_limit import ContextLimit
from transport.control import ControlServer

logger = logging.getLogger(__name__)

MAX_DEPARTURES = 32
# The fingerprint comes last: where shapes differ, they say more.
_MODEL_FIELDS = tuple(field for field in ModelIdentity.__struct_fields__ if field not in ("model", "model_fingerprint"))
_MODEL_FIELDS += ("model_fingerprint",)


class Departure(msgspec.Struct, frozen=True, kw_only=True):
    """A worker that is gone; `expected` when it was drained or told to go."""

    name: str
    pid: int
    reason: str
    expected: bool


class Member:
    """A living worker.

    Attributes:
        heard_at: when its last message came, on `loop_clock`.
        end: how it went; None while it lives.
        num_requests: attempts that it was given and that have not ended.
        prefill_tokens: prompt tokens of those attempts that are not yet known to be computed.
        waits_for: what an attn worker cannot serve without, in words; empty: it can.
    """

    def __init__(self, info: WorkerInfo, peer: bytes, heard_at: float) -> None:
        self.info = info
        self.peer = peer
        self.heard_at = heard_at
        self.stats: WorkerStats | None = None
        self.draining = False
        self.end: WorkerDied | None = None
        self.num_requests = 0
        self.prefill_tokens = 0
        self.waits_for = "no ffn worker is known" if info.role == "attn" else ""

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def role(self) -> Role:
        return self.info.role

    @property
    def alive(self) -> bool:
        return self.end is None

    @property
    def state(self) -> Literal["ready", "draining", "gone"]:
        if not self.alive:
            return "gone"
        return "draining" if self.draining else "ready"

    @property
    def ready(self) -> bool:
        """Whether it may be given requests."""
        return self.alive and not self.draining and not self.waits_for


class Membership:
    """The living workers.

    Args:
        served: the orchestrator's own model, whose tokenizer makes the prompts.
        worker_timeout_s: silence after which a worker is gone.
        heartbeat_s: time between beats to each worker.
        on_change: called with each worker that came, began to drain or went; one that went has `end`.
    """

    def __init__(
        self,
        channel: ControlServer,
        served: ModelIdentity,
        *,
        worker_timeout_s: float,
        heartbeat_s: float,
        on_change: Callable[[Member], None],
    ) -> None:
        self._channel = channel
        self._served = served
        self._worker_timeout_s = worker_timeout_s
        self._heartbeat_s = heartbeat_s
        self._on_change = on_change
        self._by_name: dict[str, Member] = {}
        self._by_peer: dict[bytes, Member] = {}
        self.departures: deque[Departure] = deque(maxlen=MAX_DEPARTURES)

    # Views ------------------------------------------------------------------------------------------------

    @property
    def members(self) -> list[Member]:
        """The living, in the order in which they came."""
        return list(self._by_name.values())

    def by_name(self, name: str) -> Member | None:
        return self._by_name.get(name)

    def context_limit(self) -> ContextLimit | None:
        """How long a request may be on the widest usable path; None where there is none."""

        def widest(*roles: Role) -> WorkerInfo | None:
            ready = (m.info for m in self._by_name.values() if m.ready and m.role in roles)
            return max(ready, key=_context_of, default=None)

        prefill, decode, colocated = widest("prefill"), widest("decode", "attn"), widest("colocated")
        paths = [colocated] if colocated is not None else []
        if prefill is not None and decode is not None:
            paths.append(min(prefill, decode, key=_context_of))
        return ContextLimit.of_worker(max(paths, key=_context_of)) if paths else None

    def max_context(self) -> int:
        """Most tokens that one request may hold on some usable path; 0 where there is none."""
        limit = self.context_limit()
        return 0 if limit is None else limit.num_tokens

    @property
    def serving(self) -> bool:
        """Whether a prefill and a decode or attn worker, or a colocated one, are ready."""
        return self.max_context() > 0

    def missing(self) -> NoWorkers | None:
        """What no request can be served without; None while one can."""
        if self.serving:
            return None
        members = self._by_name.values()
        ready = {member.role for member in members if member.ready}
        wanted = [] if "prefill" in ready else ["prefill"]
        waiting = ""
        if not ready & {"decode", "attn"}:
            waiting = next((m.waits_for for m in members if m.waits_for and not m.draining), "")
            if not waiting:
                wanted.append("attn" if any(member.role == "ffn" for member in members) else "decode")
        absent = f"no {' and no '.join(wanted)} worker takes requests, nor does a colocated one" if wanted else ""
        draining = [member.name for member in members if member.draining]
        return NoWorkers(
            ", and ".join(filter(None, (waiting, absent)))
            + (f" ({', '.join(draining)} drain{'s' * (len(draining) == 1)})" if draining else "")
            + "; start one, and try again once health says SERVING"
        )

    # Coming -----------------------------------------------------------------------------------------------

    async def register(self, peer: bytes, info: WorkerInfo) -> None:
        """Take a worker in, or tell it why not."""
        known = self._by_peer.get(peer)
        if known is not None and known.info == info:
            await self._answer(peer, None)
            return
        try:
            self._check(info)
        except ConfigError as error:
            logger.warning("refused worker %s (pid %d): %s", info.name, info.pid, error)
            await self._answer(peer, error)
            return
        if known is not None:
            self.lose(known, f"its connection now speaks for {info.name} (pid {info.pid})")
        member = Member(info, peer, loop_clock().now())
        self._by_name[info.name] = member
        self._by_peer[peer] = member
        logger.info("worker %s came: %s, pid %d on %s", info.name, info.role, info.pid, info.host)
        await self._answer(peer, None)
        self._on_change(member)

    def _check(self, info: WorkerInfo) -> None:
        living = self._by_name.get(info.name)
        if living is not None:
            raise ConfigError(
                "name",
                info.name,
                f"is taken by a living worker (pid {living.info.pid} on {living.info.host}); choose another name",
            )
        # The orchestrator need not have the weights; a worker has them, and says which.
        for field in ("name", "model_fingerprint", "kv_dtype"):
            if not getattr(info, field):
                raise ConfigError(field, "", f"a worker must send its {field}; run the same release everywhere")
        # An ffn worker has no requests, and so no KV.
        needed = ("incarnation",) if info.role == "ffn" else ("max_context", "num_blocks", "block_size")
        for field in (*needed, "vocab_size"):
            if getattr(info, field) < 1:
                raise ConfigError(field, getattr(info, field), "must be at least 1")
        if info.role == "ffn" and not info.addresses:
            raise ConfigError("addresses", {}, "an ffn worker must send where attn workers reach it")
        _check_alike(info, self._served, "the orchestrator", _MODEL_FIELDS)
        for member in self._by_name.values():
            _check_alike(info, member.info, member.name, (*_MODEL_FIELDS, "kv_dtype"))

    async def _answer(self, peer: bytes, error: AnabranchError | None) -> None:
        try:
            await self._channel.send(peer, Registered(error=None if error is None else WireError.of(error)))
        except AnabranchError as failure:
            logger.info("could not answer a registration: %s", failure)

    # Staying ----------------------------------------------------------------------------------------------

    async def heard(self, peer: bytes, stats: WorkerStats | None = None) -> Member | None:
        """Note a sign of life; a connection that is not (or no longer) a member's is told so once, and ended."""
        member = self._by_peer.get(peer)
        if member is None:
            error = WorkerDied("this connection is not registered, or counts as dead; start anew")
            try:
                await self._channel.dismiss(peer, Registered(error=WireError.of(error)))
            except AnabranchError as failure:
                logger.debug("could not fence a connection: %s", failure)
            return None
        member.heard_at = loop_clock().now()
        if stats is not None:
            member.stats = stats
        return member

    async def send(self, member: Member, message: ToWorker) -> None:
        """Send to a worker. Raises WorkerDied when it is gone, also when that shows only now."""
        if member.end is None:
            try:
                await self._channel.send(member.peer, message)
                return
            except PeerLost:
                self.lose(member, "its control connection is gone")
        assert member.end is not None
        raise member.end

    async def watch(self) -> None:
        """Send beats and notice silence, until cancelled."""
        # It stands still while this loop is held up, and beats wait in the socket: our silence is not theirs.
        clock = loop_clock()
        while True:
            await asyncio.sleep(self._heartbeat_s)
            for member in self.members:
                silence_s = clock.now() - member.heard_at
                if silence_s > self._worker_timeout_s:
                    self.lose(member, f"it was silent for {silence_s:.1f} s")
                    continue
                try:
                    await self.send(member, Beat())
                except AnabranchError as error:
                    logger.debug("no beat to %s: %s", member.name, error)

    # Going ------------------------------------------------------------------------------------------------

    async def drain(self, member: Member) -> None:
        """Give a worker no new work, and tell it to end once its work is done.

        An ffn worker is told by the `FfnPool`, once others hold what it does.
        """
        self.mark_draining(member)
        if member.role != "ffn":
            await self.send(member, Drain())

    def mark_draining(self, member: Member) -> None:
        if member.alive and not member.draining:
            member.draining = True
            logger.info("worker %s drains", member.name)
            self._on_change(member)

    def lose(self, member: Member, reason: str) -> None:
        """A worker is gone; its requests are told at once. Idempotent."""
        if not member.alive:
            return
        expected = member.draining and member.num_requests == 0
        member.end = WorkerDied(f"worker {member.name} (pid {member.info.pid}) died: {reason}")
        del self._by_name[member.name]
        if self._by_peer.get(member.peer) is member:
            del self._by_peer[member.peer]
        self.departures.append(Departure(name=member.name, pid=member.info.pid, reason=reason, expected=expected))
        logger.log(
            logging.INFO if expected else logging.ERROR,
            "worker %s (pid %d) %s: %s",
            member.name,
            member.info.pid,
            "left" if expected else "died",
            reason,
        )
        self._on_change(member)

    async def shut_down(self) -> None:
        """Tell every worker to exit now."""
        for member in self.members:
            member.draining = True
            try:
                await self.send(member, Shutdown())
            except AnabranchError as error:
                logger.info("could not shut %s down: %s", member.name, error)


def _context_of(info: WorkerInfo) -> int:
    return info.max_context


def _check_alike(info: WorkerInfo, other: ModelIdentity, who: str, fields: tuple[str, ...]) -> None:
    """Raise ConfigError, with both sides' values, for the first field that differs.

    Only a fingerprint may be unknown (empty), and only on the other side: the orchestrator's, without the weights.
    """
    for field in fields:
        ours, theirs = getattr(info, field), getattr(other, field)
        if ours != theirs and not (field == "model_fingerprint" and theirs == ""):
            raise ConfigError(
                field,
                ours,
                f"of {info.name} (model {info.model}) differs from {theirs!r} of {who} (model {other.model}); "
                "start the orchestrator and all workers with the same model, and all workers with the same dtype",
            )
