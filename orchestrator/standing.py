"""What decides when a request's turn comes."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.client_deadline import ClientDeadline
from orchestrator.tenants import Account


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Who asks, how urgently, and until when.

    Attributes:
        priority: lower goes first.
    """

    account: Account
    priority: int
    deadline: ClientDeadline
