"""Which workers serve a request."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from anabranch.protocol.workers import Role
from anabranch.request.request import Request
from orchestrator.member import Member


@dataclass(frozen=True)
class Route:
    """A pair of workers, or one colocated worker (`prefill` is None, `decode` does both).

    Attributes:
        decode: who generates: a decode, attn or colocated worker.
    """

    decode: Member
    prefill: Member | None = None

    @property
    def computes_prompt(self) -> Member:
        return self.prefill or self.decode

    @property
    def members(self) -> tuple[Member, ...]:
        return (self.decode,) if self.prefill is None else (self.prefill, self.decode)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(member.name for member in self.members)


def total_tokens(request: Request) -> int:
    """Most tokens that the request will hold: prompt and whole answer."""
    assert request.sampling.max_tokens is not None
    return len(request.prompt_ids) + request.sampling.max_tokens


class Router(Protocol):
    def choose(
        self, request: Request, members: Sequence[Member], avoid: Collection[Member] = frozenset()
    ) -> Route | None:
        """A route for the request now, or None: it waits in the queue and is asked about again.

        Args:
            avoid: workers that have failed the request; they are taken only where there are no others.

        Pure: neither members nor router change.
        """
        ...


class LeastWork:
    """Prompts go where the fewest prompt tokens wait, answers where the fewest requests run.

    A worker that computes prompts is given `ahead_tokens` of them at a time; what exceeds that waits in the
    orchestrator's queue, so that KV blocks are reserved shortly before they are needed.
    """

    def __init__(self, ahead_tokens: int) -> None:
        self._ahead_tokens = ahead_tokens

    def choose(
        self, request: Request, members: Sequence[Member], avoid: Collection[Member] = frozenset()
    ) -> Route | None:
        """The least loaded pair or colocated worker that may take the request now."""
        total = total_tokens(request)
        prompt = len(request.token_ids)
        able = [m for m in members if m.ready and m.info.max_context >= total]
        others = [m for m in able if m not in avoid]
        # Where others make up no whole path, each role has its own best.
        whole = _make_a_path(others)

        def fitting(*roles: Role) -> list[Member]:
            theirs = [m for m in others if m.role in roles]
            if not theirs and not whole:
                theirs = [m for m in able if m.role in roles]
            return [m for m in theirs if not m.full]

        def may_take(member: Member) -> bool:
            return member.prefill_tokens == 0 or member.prefill_tokens + prompt <= self._ahead_tokens

        def waiting(member: Member) -> tuple[int, int]:
            return member.prefill_tokens, member.num_requests

        def running(member: Member) -> tuple[int, int]:
            return member.num_requests, -(member.stats.num_free_blocks if member.stats else 0)

        prefill = min(filter(may_take, fitting("prefill")), key=waiting, default=None)
        decode = min(fitting("decode", "attn"), key=running, default=None)
        colocated = min(filter(may_take, fitting("colocated")), key=waiting, default=None)
        pair = Route(decode, prefill) if prefill is not None and decode is not None else None
        if colocated is None:
            return pair
        if pair is None or waiting(colocated) < waiting(pair.computes_prompt):
            return Route(colocated)
        return pair


def _make_a_path(members: Sequence[Member]) -> bool:
    roles = {member.role for member in members}
    return "colocated" in roles or ("prefill" in roles and bool(roles & {"decode", "attn"}))
