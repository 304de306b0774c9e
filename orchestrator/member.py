"""A worker as the orchestrator sees it: who it is, what it was given, and in which state it is."""

from __future__ import annotations

from typing import Literal

from anabranch.errors import WorkerDied
from anabranch.protocol.workers import Role, WorkerInfo, WorkerStats

# Requests in a row that a worker fails before it is suspect.
SUSPECT_AFTER = 3

State = Literal["ready", "suspect", "cordoned", "draining", "gone"]


class Member:
    """A living worker.

    Attributes:
        heard_at: when its last message came, on `loop_clock`.
        end: how it went; None while it lives.
        num_requests: attempts that it was given and that have not ended.
        prefill_tokens: prompt tokens of those attempts that are not yet known to be computed.
        num_unproven: those attempts that have not brought many tokens yet.
        held_alone: of these, the ones that want the worker for themselves: none or one.
        num_failed: requests that it has failed since it last served one.
        waits_for: what an attn worker cannot serve without, in words; empty: it can.
    """

    def __init__(self, info: WorkerInfo, peer: bytes, heard_at: float) -> None:
        self.info = info
        self.peer = peer
        self.heard_at = heard_at
        self.stats: WorkerStats | None = None
        self.draining = False
        self.cordoned = False
        self.end: WorkerDied | None = None
        self.num_requests = 0
        self.prefill_tokens = 0
        self.num_unproven = 0
        self.held_alone = 0
        self.num_failed = 0
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
    def state(self) -> State:
        if not self.alive:
            return "gone"
        if self.draining:
            return "draining"
        if self.cordoned:
            return "cordoned"
        return "suspect" if self.suspect else "ready"

    @property
    def suspect(self) -> bool:
        return self.num_failed >= SUSPECT_AFTER

    @property
    def ready(self) -> bool:
        """Whether it may be given requests, if not just now."""
        return self.alive and not self.draining and not self.cordoned and not self.waits_for

    @property
    def full(self) -> bool:
        """Whether it may not be given another request just now, however small."""
        return bool(self.held_alone or (self.suspect and self.num_requests))
