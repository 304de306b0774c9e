"""Who is in the cluster: workers that registered, when they were last heard, and what they hold.

A worker's life here:

    Register (refused, or taken in) -> ready -> [draining] -> gone
                                       |   ^
                                       |   +-- suspect: it failed SUSPECT_AFTER requests in a row without dying. It gets
                                       |       one at a time, and is ready again after one that it served
                                       +------ cordoned: an operator lets it take none, until it is uncordoned

Gone for good: after silence, a step that takes longer than the worker's own `step_stall_s`, a lost connection or a
parent's report. Then it is fenced: the first thing that its connection still says is answered with Registered(error),
the connection ends, and so does the process. A restarted worker may take the name again, and is another one.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Literal

import msgspec

from anabranch.errors import AnabranchError, ConfigError, InvalidRequest, NoWorkers, PeerLost, WorkerDied
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
from orchestrator.member import SUSPECT_AFTER, Member
from orchestrator.registration import check_registration
from orchestrator.worker_log import WorkerLog
from transport.control import ControlServer

logger = logging.getLogger(__name__)

MAX_DEPARTURES = 32


class Departure(msgspec.Struct, frozen=True, kw_only=True):
    """A worker that is gone; `expected` when it was drained or told to go."""

    name: str
    pid: int
    reason: str
    expected: bool


class Membership:
    """The living workers.

    Args:
        served: the orchestrator's own model, whose tokenizer makes the prompts.
        worker_timeout_s: silence after which a worker is gone.
        heartbeat_s: time between beats to each worker.
        on_change: called with each worker that came, changed its state or went; one that went has `end`.

    Attributes:
        departures: the latest that went.
        log: of all that happened to workers.
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
        self.log = WorkerLog()
        # Those that went and have not been told so, the latest last.
        self._unfenced: dict[bytes, tuple[WorkerInfo, str]] = {}

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
        cordoned = [member.name for member in members if member.state == "cordoned"]
        return NoWorkers(
            ", and ".join(filter(None, (waiting, absent)))
            + (f" ({', '.join(draining)} drain{'s' * (len(draining) == 1)})" if draining else "")
            + (f" (cordoned: {', '.join(cordoned)}; uncordon what is well)" if cordoned else "")
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
            living = [member.info for member in self._by_name.values()]
            check_registration(info, living, self._served, self._worker_timeout_s)
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
        self.log.add(info, "came")
        await self._answer(peer, None)
        self._on_change(member)

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
            gone = self._unfenced.pop(peer, None)
            if gone is not None:
                info, end = gone
                error = WorkerDied(f"this connection counts as dead ({end}); start anew")
                self.log.add(info, "fenced", "it spoke, though it counts as gone")
            try:
                await self._channel.dismiss(peer, Registered(error=WireError.of(error)))
            except AnabranchError as failure:
                logger.debug("could not fence a connection: %s", failure)
            return None
        member.heard_at = loop_clock().now()
        if stats is not None:
            member.stats = stats
            limit_s = member.info.step_stall_s
            if 0.0 < limit_s < stats.work_age_s:
                self.lose(
                    member,
                    f"step_stall_s: it beats, but has been at one thing for {stats.work_age_s:.1f} s, longer than "
                    f"{limit_s:g} s; where steps take so long, raise step_stall_s or lower max_step_tokens",
                )
        return member

    async def send(self, member: Member, message: ToWorker) -> None:
        """Send to a worker. Raises WorkerDied when it is gone, also when that shows only now."""
        if member.end is None:
            try:
                await self._channel.send(member.peer, message)
                return
            except PeerLost:
                self.lose(member, "its control connection is gone")
        # A new one each time: an error that is raised keeps hold of whoever it passed.
        raise WorkerDied(str(member.end))

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

    # Doing well or not ------------------------------------------------------------------------------------

    def failed(self, member: Member, error: AnabranchError) -> None:
        """A worker failed a request, as its own fault as far as can be told, and did not die of it."""
        if not member.alive:
            return
        member.num_failed += 1
        if member.num_failed == SUSPECT_AFTER:
            reason = f"it failed {SUSPECT_AFTER} requests in a row, the last with: {error}"
            logger.warning("worker %s is suspect: %s", member.name, reason)
            self.log.add(member.info, "suspect", reason)
            self._on_change(member)

    def served(self, member: Member) -> None:
        """A worker has done its part of a request."""
        was_suspect = member.suspect and member.alive
        member.num_failed = 0
        if was_suspect:
            logger.info("worker %s is ready again", member.name)
            self.log.add(member.info, "ready", "it served a request")
            self._on_change(member)

    def cordon(self, member: Member) -> None:
        """Give a worker no new work; what it has goes on. Raises InvalidRequest for one that has no requests."""
        if member.role == "ffn":
            raise InvalidRequest(f"{member.name} is an ffn worker, which is given no requests; drain it", "worker")
        if member.draining:
            raise InvalidRequest(f"{member.name} drains, and takes no new work already", "worker")
        self._set_cordoned(member, True, "cordoned")

    def uncordon(self, member: Member) -> None:
        """Let a worker take new work again. Raises InvalidRequest for one that drains, which has no way back."""
        if member.draining:
            raise InvalidRequest(f"{member.name} drains and will end; start another worker", "worker")
        self._set_cordoned(member, False, "ready")

    def _set_cordoned(self, member: Member, cordoned: bool, change: Literal["cordoned", "ready"]) -> None:
        if member.cordoned != cordoned:
            member.cordoned = cordoned
            logger.info("worker %s is %s, as an operator says", member.name, member.state)
            self.log.add(member.info, change, "an operator said so")
            self._on_change(member)

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
            self.log.add(member.info, "draining")
            self._on_change(member)

    def lose(self, member: Member, reason: str, *, failed: bool = False) -> None:
        """A worker is gone; its requests are told at once. Idempotent.

        Args:
            failed: it said so itself. One that fails drains too, and that is no orderly end.
        """
        if not member.alive:
            return
        expected = member.draining and member.num_requests == 0 and not failed
        member.end = WorkerDied(f"worker {member.name} (pid {member.info.pid}) died: {reason}")
        del self._by_name[member.name]
        if self._by_peer.get(member.peer) is member:
            del self._by_peer[member.peer]
        self._unfenced[member.peer] = member.info, str(member.end)
        if len(self._unfenced) > MAX_DEPARTURES:
            del self._unfenced[next(iter(self._unfenced))]
        self.log.add(member.info, "gone", "it was drained" if expected else reason)
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
