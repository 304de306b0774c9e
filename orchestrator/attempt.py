"""One epoch of a request on its route: what the workers hold of it."""

from __future__ import annotations

from anabranch.request.request import Request
from orchestrator.member import Member
from orchestrator.router import Route

# An epoch that has brought so many is no failure of the first steps that a bad prompt or context would cause.
PROVEN_TOKENS = 16


class Attempt:
    """Counts itself in its workers' loads from the start until `close`.

    Args:
        alone: until it has brought PROVEN_TOKENS tokens its workers take no other request.

    Attributes:
        decode_open: the decode (or colocated) worker was given the request and has not said Ended.
        prefill_open: the prefill worker was given the prompt and has not said PrefillEnded.
        report_due: the worker that computes the prompt was given it and has not yet said what that cost.
        committed: a token of this epoch has come, so the KV cache is whole at the decode worker.
        ordered_at: when the order to compute the prompt was sent; None before.
        num_tokens: new tokens of this epoch.
        proven: PROVEN_TOKENS of them have come.
    """

    def __init__(self, request: Request, route: Route, *, alone: bool = False) -> None:
        self.request = request
        self.route = route
        self.decode_open = False
        self.prefill_open = False
        self.report_due = False
        self.committed = False
        self.ordered_at: float | None = None
        self.num_tokens = 0
        self.proven = False
        self._alone = alone
        self._counted_tokens = len(request.token_ids)
        self._closed = False
        route.computes_prompt.prefill_tokens += self._counted_tokens
        for member in route.members:
            member.num_requests += 1
            member.num_unproven += 1
            member.held_alone += alone

    def prompt_computed(self) -> None:
        """The prompt no longer waits at its worker. Idempotent."""
        self.route.computes_prompt.prefill_tokens -= self._counted_tokens
        self._counted_tokens = 0

    def brought(self, num_tokens: int) -> bool:
        """Count new tokens; whether the attempt is proven by these."""
        self.num_tokens += num_tokens
        if self.proven or self.num_tokens < PROVEN_TOKENS:
            return False
        self.proven = True
        self._prove()
        return True

    def _prove(self) -> None:
        for member in self.route.members:
            member.num_unproven -= 1
            member.held_alone -= self._alone

    def depends_on(self, member: Member) -> bool:
        """Whether the attempt cannot go on without this worker."""
        if member is self.route.decode:
            return True
        return member is self.route.prefill and not self.committed

    def close(self) -> None:
        """Leave the loads. Idempotent."""
        if not self._closed:
            self._closed = True
            self.prompt_computed()
            if not self.proven:
                self._prove()
            for member in self.route.members:
                member.num_requests -= 1
